"""A running engine with a tiny model, in which a part is exchanged and put back as in a live server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from drivetrain.assembly import build_engine, resolve_parts
from drivetrain.config import load_settings
from drivetrain.registry import PluginRef, Registry, discover
from drivetrain.serving.llm import LLM
from drivetrain.serving.swap import SwapOutcome
from drivetrain.serving.types import SamplingParams
from drivetrain.testing.places import Place
from drivetrain.testing.suites.loader import write_safetensors

Answers = list[tuple[int, ...]]

_PROMPTS = tuple([3 + number, 40, 7 * number + 5, 90 - number][: 2 + number % 3] for number in range(4))
_GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
_LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)


@contextmanager
def live_engine(folder: Path, place: Place, ref: PluginRef, width: int | None = None) -> Iterator[LLM]:
    """A tiny Qwen2 in float32 on the platform of ``place``; ``ref`` can be chosen there, installed or not.

    width: what has to divide the inputs of every layer.
    """
    model = write_safetensors(folder / "model", context=512, width=width)
    platform: dict[str, Any] = {"name": place.facts.name}
    if place.facts.name == "cpu":
        platform["threads"] = torch.get_num_threads()
    # No prefixes: a prompt is computed alike each time, so that answers may be compared to the last token.
    engine = {"max_model_len": 448, "prefix_cache": False}
    options = {"model": str(model), "platform": platform, "precision": "fp32", "engine": engine}
    found = discover()
    registry = Registry(found if ref in found else (*found, ref))
    parts = resolve_parts(load_settings(None, options), registry=registry, leave_out=("frontend",))
    with LLM.from_stack(build_engine(parts)) as llm:
        yield llm


def answers(llm: LLM) -> Answers:
    """Greedy answers to fixed prompts, one after the other."""
    return [llm.generate(list(prompt), _GREEDY)[0].token_ids for prompt in _PROMPTS]


def there_and_back(llm: LLM, kind: str, there: Mapping[str, Any], back: str) -> tuple[Answers, Answers]:
    """Exchange a part and put the old one back, with a request in flight; answers in between and afterwards.

    Fails unless both swaps stay, the request in flight is answered in full, and nothing is left in the cache.
    """
    stream = llm.stream([9, 8, 7], _LONG)
    tokens = list(next(stream).token_ids)
    _swap(llm, kind, there)
    between = answers(llm)
    _swap(llm, kind, back)
    tokens += [token for chunk in stream for token in chunk.token_ids]
    assert len(tokens) == _LONG.max_tokens, f"a request in flight has {len(tokens)} of {_LONG.max_tokens} tokens"
    afterwards = answers(llm)
    for pool in llm._stack.engine.kv.pools:
        assert pool.num_used == 0, f"{pool.num_used} blocks of the cache are lost"
    return between, afterwards


def _swap(llm: LLM, kind: str, part: str | Mapping[str, Any]) -> None:
    changes: dict[str, Any] = {kind: part}
    report = llm.swap(probation_steps=2, **changes)
    assert report.outcome is SwapOutcome.FINALIZED, f"the swap to {part} was {report.outcome}: {report.reason}"
