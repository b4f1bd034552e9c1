"""Choosing costs nothing while a step runs: no registry and no binder is asked after the model is built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import LLM, SamplingParams
from drivetrain.binding import KernelBinder
from drivetrain.registry import discovery, selection
from support.tiny_models import save_tiny


def test_no_lookup_during_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    save_tiny("llama", tmp_path / "model")
    calls: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return count

    for owner, name in (
        (KernelBinder, "bind"),
        (selection.Registry, "find"),
        (selection.Registry, "candidates"),
        (selection.Selector, "choose"),
        (selection, "load"),
        (discovery, "entry_points"),
    ):
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    with LLM(tmp_path / "model") as llm:
        assert {"bind", "find", "choose", "load"} <= set(calls), "the counters see nothing"
        calls.clear()
        results = llm.generate([[5, 6, 7], [8, 9]], SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    assert [len(result.token_ids) for result in results] == [16, 16]
    assert calls == []
