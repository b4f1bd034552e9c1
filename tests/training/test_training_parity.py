"""A run's losses are those of a plain torch loop; however a step is cut up, and through a save, they stay the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from drivetrain import LLM, SamplingParams, Trainer
from drivetrain.config import load_settings
from support.training import plain_losses, read_figures, run_settings, train_in_processes

STEPS = 6
RELATIVE = 2e-4
"""How far a loss may be from the plain loop's, in float32: sums are made in another order, over several steps."""


@pytest.fixture(scope="session")
def wanted(model: Path, chats: Path) -> list[float]:
    """Losses of the plain loop with four samples a step."""
    return plain_losses(model, chats, steps=STEPS, batch=4, lr=3e-3, decay=0.1, warmup=2, clip=1.0)


def train(settings: dict[str, Any], **parts: Any) -> tuple[float, ...]:
    return Trainer(**{**settings, **parts}).run().losses


@pytest.mark.parametrize(("micro_batch", "accumulate"), [(4, 1), (2, 2), (1, 4)])
def test_losses_are_those_of_a_plain_loop(
    model: Path, chats: Path, tmp_path: Path, wanted: list[float], micro_batch: int, accumulate: int
) -> None:
    """k micro-batches of b samples make the step of one batch of k b, and both make the plain step."""
    settings = run_settings(model, chats, tmp_path, steps=STEPS, micro_batch=micro_batch, accumulate=accumulate)
    assert train(settings) == pytest.approx(wanted, rel=RELATIVE)


@pytest.mark.parametrize("attention", ["sdpa", "paged-cpu"])
@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_any_attention_and_kernels_train_alike(
    model: Path, chats: Path, tmp_path: Path, wanted: list[float], attention: str, kernels: str
) -> None:
    """What serves trains too, and to the same losses."""
    settings = run_settings(model, chats, tmp_path, steps=STEPS, micro_batch=4)
    assert train(settings, attention=attention, kernels=kernels) == pytest.approx(wanted, rel=RELATIVE)


def test_bf16_stays_near_float32(model: Path, chats: Path, tmp_path: Path, wanted: list[float]) -> None:
    """bfloat16 products with float32 master weights: within two percent over the run."""
    settings = run_settings(model, chats, tmp_path, steps=STEPS, micro_batch=2, accumulate=2)
    assert train(settings, precision="bf16") == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("policy", ["full", "selective", {"name": "selective", "modules": ["attention", "mlp"]}])
def test_a_checkpoint_policy_changes_no_bit(model: Path, chats: Path, tmp_path: Path, policy: Any) -> None:
    """Losses of every step, and so all gradients before them, are those without the policy."""
    losses = [
        train(run_settings(model, chats, tmp_path / str(i), steps=4), checkpoint=checkpoint)
        for i, checkpoint in enumerate(("none", policy))
    ]
    assert losses[0] == losses[1]


def test_two_ranks_make_the_steps_of_one(model: Path, chats: Path, tmp_path: Path, wanted: list[float]) -> None:
    """Two processes with half of each step's samples: the plain loop's losses, and a model that is served."""
    settings = run_settings(model, chats, tmp_path, steps=STEPS, micro_batch=1, batch=4)
    done = train_in_processes(settings, tmp_path, 2)
    assert done.returncode == 0, done.stderr
    assert [figures["loss"] for figures in read_figures(tmp_path)] == pytest.approx(wanted, rel=RELATIVE)
    assert done.stdout.strip() == str(tmp_path / "run" / "model")
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def test_an_interrupted_run_goes_on_bit_for_bit(model: Path, chats: Path, tmp_path: Path) -> None:
    """Six steps at once, and three and then three more in another process: the same losses and the same weights."""
    settings = run_settings(model, chats, tmp_path / "whole", steps=STEPS)
    settings["optimizer"]["schedule"] = {"name": "constant", "warmup": 2}
    whole = train(settings)
    parts = run_settings(model, chats, tmp_path / "parts", steps=3)
    parts["optimizer"] = settings["optimizer"]
    first = train(parts)
    parts["trainer"]["steps"] = STEPS
    second = train(parts)
    assert first + second == whole
    weights = [load_file(tmp_path / name / "run" / "model" / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    steps = [figures["step"] for figures in read_figures(tmp_path / "parts")]
    assert steps == list(range(1, STEPS + 1))


def test_log_probabilities_of_trainer_and_server_are_equal(model: Path, chats: Path, tmp_path: Path) -> None:
    """Law 8: the same weights, precision and kernels score a text alike, packed with others or served from pages."""
    trained = Trainer(**run_settings(model, chats, tmp_path, steps=3)).run().folder
    settings = run_settings(trained, chats, tmp_path / "again", export=False, resume="never")
    with Trainer(**settings).assembled() as work:
        run = work.run
        batch = run.recipe.collate([run.samples[0]], torch.device("cpu"))
        assert len(batch.lengths) > 1
        with torch.no_grad():
            hidden_TE = run.forward.hidden(batch)
            next_T = torch.roll(batch.ids_T, -1)
            scored_T = -run.forward.token_losses(hidden_TE, next_T)
    texts = [ids.tolist() for ids in batch.ids_T.split(batch.lengths)]
    ours = [scores[:-1].tolist() for scores in scored_T.split(batch.lengths)]
    with LLM(model=str(trained), platform={"name": "cpu", "threads": 1}) as llm:
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        results = llm.generate(texts, params)
    for ids, mine, result in zip(texts, ours, results, strict=True):
        theirs = [place.logprob for place in result.prompt.logprobs[1:]]
        assert len(theirs) == len(ids) - 1
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-5, atol=2e-5)


def test_the_result_is_a_model_for_transformers_too(model: Path, chats: Path, tmp_path: Path) -> None:
    """The folder loads without a word, with the tokenizer and its chat template."""
    import transformers

    folder = Trainer(**run_settings(model, chats, tmp_path, steps=3)).run().folder
    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Say 3"}], tokenize=False)
    assert text == "<s>user: Say 3</s>"
    assert network.dtype == torch.float32
    ours = json.loads((folder / "config.json").read_text())
    assert ours["architectures"] == ["LlamaForCausalLM"]


def test_settings_are_the_files_of_a_run(model: Path, chats: Path, tmp_path: Path) -> None:
    """The plan is beside the figures, so that a run can be told from its folder."""
    settings = run_settings(model, chats, tmp_path, steps=3, export=False)
    Trainer(**settings).run()
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["purpose"] == "train"
    assert plan["parts"]["optimizer"]["options"]["lr"] == 3e-3
    assert load_settings(None, settings).trainer.steps == 3


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["none", "zero1", "zero3"])
def test_a_stage_trains_saves_goes_on_and_exports(
    model: Path, chats: Path, tmp_path: Path, wanted: list[float], stage: str
) -> None:
    """Two processes under a stage: the plain loop's losses, interrupted and gone on with by one, and a whole model.

    Samples are counted in samples, so that another number of ranks goes on with the next one.
    """
    settings = run_settings(model, chats, tmp_path, steps=3, micro_batch=1, batch=4)
    settings["optimizer"]["schedule"] = {"name": "constant", "warmup": 2}
    settings["partitioner"] = stage
    done = train_in_processes(settings, tmp_path, 2)
    assert done.returncode == 0, done.stderr
    first = [figures["loss"] for figures in read_figures(tmp_path)]
    settings["trainer"]["steps"] = STEPS
    second = train({**settings, "partitioner": "none"})
    plain = run_settings(model, chats, tmp_path / "plain", steps=STEPS, batch=4)
    plain["optimizer"] = settings["optimizer"]
    assert first + list(second) == pytest.approx(list(train(plain)), rel=RELATIVE)
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def test_a_deepspeed_configuration_is_taken(model: Path, chats: Path, tmp_path: Path) -> None:
    """``--deepspeed`` wins over the file, and what has no counterpart is an error before anything is started."""
    deepspeed = tmp_path / "ds.json"
    deepspeed.write_text(json.dumps({"train_batch_size": 4, "zero_optimization": {"stage": 2}}))
    settings = run_settings(model, chats, tmp_path, steps=3, export=False)
    done = train_in_processes(settings, tmp_path, 2, "--deepspeed", str(deepspeed))
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["parts"]["partitioner"]["name"] == "zero2"
    deepspeed.write_text(json.dumps({"curriculum_learning": {"enabled": True}}))
    done = train_in_processes(settings, tmp_path / "refused", 1, "--deepspeed", str(deepspeed))
    assert done.returncode != 0
    assert "curriculum_learning.enabled" in done.stderr
