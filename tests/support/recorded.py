"""A stand-in for a device graph, on a CPU with Triton's interpreter: what a function does to tensors is written down
once, operation by operation and kernel by kernel, and done again without a line of the function being run.

So a step that decides anything on the host is found out: its replay goes on as it was decided when it was recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from drivetrain import LLM, SamplingParams, assembly

ASKS_THE_DEVICE = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.is_nonzero.default"}
"""What waits for a value; a graph can't hold it."""

Action = Callable[[], None]


class Recorder:
    """A platform's ``capture``. num_replayed: how often anything it recorded was done again."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        self.num_captured += 1
        actions: list[Action] = []
        with _kernels_into(actions), _Operations(actions):
            function()

        def replay() -> None:
            self.num_replayed += 1
            for action in actions:
                action()

        return replay


class _Operations(TorchDispatchMode):
    """Notes operations of torch. Results stay where they first were."""

    def __init__(self, actions: list[Action]) -> None:
        super().__init__()
        self._actions = actions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if str(func) in ASKS_THE_DEVICE:
            raise RuntimeError(f"{func} is not permitted when a stream is capturing")
        kwargs = dict(kwargs or {})
        found = func(*args, **kwargs)
        given = {_place(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        changes_inputs = func._schema.is_mutable
        if changes_inputs or not all(_place(leaf) in given for leaf in made):  # otherwise it is a view
            self._actions.append(functools.partial(_again, func, args, kwargs, [] if changes_inputs else made))
        return found


def _place(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _again(func: Any, args: Any, kwargs: Any, made: list[torch.Tensor]) -> None:
    found = func(*args, **kwargs)
    for old, new in zip(made, tree_leaves(found), strict=False):
        old.copy_(new)


@contextmanager
def _kernels_into(actions: list[Action]) -> Iterator[None]:
    """Notes launches of kernels, with the very tensors that they were given."""
    run = InterpretedFunction.run

    def noting(self: Any, *arguments: Any, **options: Any) -> Any:
        actions.append(functools.partial(run, self, *arguments, **options))
        with _disable_current_modes():
            return run(self, *arguments, **options)

    InterpretedFunction.run = noting
    try:
        yield
    finally:
        InterpretedFunction.run = run


def expect_the_same_tokens(
    model: Path,
    prompts: list[Any],
    max_tokens: int,
    max_batched_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
    **parts: Any,
) -> Recorder:
    """A model served with paged-triton, three requests at a time, gives the same whether its steps are recorded and
    replayed or not; returns what recorded them."""
    parts |= {"platform": {"name": "cpu", "threads": 1}, "attention": {"name": "paged-triton", "block_size": 16}}
    parts["scheduler"] = {"name": "fcfs", "max_running": 3, "max_batched_tokens": max_batched_tokens}
    engine: dict[str, Any] = {"max_model_len": 64, "kv_memory": "1MiB"}
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    with LLM(model, **parts, engine={**engine, "graphs": "off"}) as llm:
        wanted = [result.token_ids for result in llm.generate(prompts, params)]
    recorder = Recorder()
    monkeypatch.setattr(assembly, "_capture", lambda parts: recorder)
    with LLM(model, **parts, engine={**engine, "graphs": "on"}) as llm:
        assert [result.token_ids for result in llm.generate(prompts, params)] == wanted
        assert [result.token_ids for result in llm.generate(prompts[:1], params)] == wanted[:1]
        assert llm.stats()["fallbacks"] == 0
    return recorder
