"""Garbage is looked for seldom while a command starts, and as usual from where it has work."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import drivetrain.cli
from drivetrain import LLM, SamplingParams, Trainer
from drivetrain.calibration.quantizing import QuantizeOptions, quantize_model
from drivetrain.collecting import collect_as_usual, collect_seldom
from drivetrain.config import load_settings
from drivetrain.contracts.source import silent
from drivetrain.evaluation.scoring import Scorer, open_stack
from support.tiny_models import save_tiny
from support.training import run_settings, write_chats


@pytest.fixture(autouse=True)
def usual() -> Iterator[tuple[int, int, int]]:
    before = gc.get_threshold()
    yield before
    gc.set_threshold(*before)


def generate(folder: Path) -> None:
    save_tiny("llama", folder / "model")
    with LLM(folder / "model") as llm:
        llm.generate(["a fox"], SamplingParams(max_tokens=1))


def train(folder: Path) -> None:
    save_tiny("llama", folder / "model")
    Trainer(**run_settings(folder / "model", write_chats(folder / "chats.jsonl"), folder)).run()


def quantize(folder: Path) -> None:
    save_tiny("llama", folder / "model")
    quantizer = {"name": "int8", "allow_lossy": True}
    settings = load_settings(options={"model": str(folder / "model"), "quantizer": quantizer})
    quantize_model(settings, QuantizeOptions(folder / "out", None, 0, 0))


def evaluate(folder: Path) -> None:
    save_tiny("llama", folder / "model")
    stack = open_stack(load_settings(options={"model": str(folder / "model")}), None, silent)
    Scorer(stack).hidden([1, 2, 3])


@pytest.mark.parametrize("work", [generate, train, quantize, evaluate])
def test_work_begins_with_what_was_usual(
    work: Callable[[Path], None], tmp_path: Path, usual: tuple[int, int, int]
) -> None:
    collect_seldom()
    assert gc.get_threshold()[0] >= 50 * usual[0]
    work(tmp_path)
    assert gc.get_threshold() == usual


def test_thresholds_of_ones_own_stay() -> None:
    gc.set_threshold(1234, 5, 6)
    collect_as_usual()
    assert gc.get_threshold() == (1234, 5, 6)


def test_a_command_starts_so(monkeypatch: pytest.MonkeyPatch, usual: tuple[int, int, int]) -> None:
    seen = []
    monkeypatch.setattr(drivetrain.cli, "main", lambda: seen.append(gc.get_threshold()) or 0)
    monkeypatch.setattr("drivetrain.ending.end_process", lambda status: None)
    assert drivetrain.cli.program() == 0
    assert seen[0][0] > usual[0]
