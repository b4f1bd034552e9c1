"""What is said of a run's memory beforehand is what it takes."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from drivetrain import Trainer
from drivetrain.contracts.partitioner import ParameterFacts, Partitioner, StateFormats
from drivetrain.plugins.partitioner.none import NoPartitioner
from drivetrain.plugins.partitioner.zero import Zero1Partitioner, Zero2Partitioner, Zero3Partitioner
from drivetrain.training import ledger
from support.training import run_settings

PAPER = [(NoPartitioner, 120.0), (Zero1Partitioner, 31.4), (Zero2Partitioner, 16.6), (Zero3Partitioner, 1.9)]
"""Gigabytes of model state for 7.5 billion parameters on 64 ranks (Rajbhandari et al. 2020, figure 1)."""


@pytest.mark.parametrize(("plugin", "gigabytes"), PAPER, ids=lambda value: getattr(value, "__name__", str(value)))
def test_the_table_of_the_paper(plugin: type[Partitioner], gigabytes: float) -> None:
    """Parameters and gradients in 16 bits, and 12 bytes of optimizer state an element: masters and two moments."""
    formats = StateFormats(param=2, gradient=2, master=4, state=lambda name, shape: 8 * shape[0] * shape[1])
    footprint = plugin(plugin.Config()).footprint([ParameterFacts("all", (7_500_000, 1000))], formats, 64)
    assert round(footprint.state / 1e9, 1) == gigabytes


def peak_of_step(run) -> int:
    """Bytes by which a step rises at most over what was there before it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run.make_step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_the_peak_of_a_step(model: Path, tmp_path: Path, policy: str, precision: str) -> None:
    """All that is allocated in a step of two micro-batches, on top of parameters and optimizer state: within 15%."""
    data = tmp_path / "texts.jsonl"
    texts = (f"the number is {number} and so on it goes " * 4 for number in range(40))
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    settings = run_settings(model, data, tmp_path, steps=4, micro_batch=2, accumulate=2, export=False)
    settings["recipe"] = {"name": "sft", "data": str(data), "length": 256, "train_on": "all"}
    with Trainer(**settings, checkpoint=policy, precision=precision).assembled() as work:
        run, parts = work.run, work.parts
        run.make_step()
        tokens = max(len(batch.ids_T) for batch in run._read_batches())
        rise = peak_of_step(run)
        config = parts.checkpoint.config
        formats = ledger.formats_of(parts.precision.dtypes(), parts.plugins["optimizer"])
        unit = ledger.decoder_activations(config, parts.precision.dtypes().param)
        activations = ledger.activation_bytes(parts.plugins["checkpoint"], unit, parts.spec.num_layers, tokens)
        facts = ledger.parameters_of(parts.checkpoint)
        found = ledger.plan_ranks(
            {"none": parts.plugins["partitioner"]}, facts, formats, 1, activations + ledger.loss_bytes(config, tokens)
        )["none"]
    held = found.footprint.parameters + found.footprint.optimizer
    assert found.peak == pytest.approx(held + rise, rel=0.15)


def test_parameters_are_those_of_the_model(model: Path, tmp_path: Path, chats: Path) -> None:
    with Trainer(**run_settings(model, chats, tmp_path, steps=4)).assembled() as work:
        facts = ledger.parameters_of(work.parts.checkpoint)
        named = dict(work.run.prepared.model.named_parameters())
    assert sum(fact.numel for fact in facts) == sum(parameter.numel() for parameter in named.values())
    assert {fact.unit for fact in facts} == {None, 0, 1, 2}
    assert all(isinstance(p, torch.Tensor) for p in named.values())


def test_the_command_shows_every_partitioner(cli, model: Path, chats: Path, tmp_path: Path) -> None:
    """Side by side, the chosen one marked; more ranks take less each."""
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({**run_settings(model, chats, tmp_path), "partitioner": "zero2"}), encoding="utf-8")
    table = cli("plan", str(file), "--ranks", "4").out
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["none", "zero1", "zero2", "zero3"]
    assert "zero2 *" in table
    figures = json.loads(cli("plan", str(file), "--ranks", "4", "--json").out)
    states = [figures[name]["state"] for name in ("none", "zero1", "zero2", "zero3")]
    assert states == sorted(states, reverse=True)
