"""What is done with saved states beside training: looking at them, checking them, taking them out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from drivetrain.contracts.store import Store, StoredTensor
from drivetrain.errors import StateNotFoundError, StoreError

if TYPE_CHECKING:
    import torch

_READ_BYTES = 2**30
"""About how much of a state is in memory at once, while it is checked."""


def chosen_step(store: Store, step: int | None) -> int:
    """``step``, or that of the newest complete state. Raises StateNotFoundError."""
    steps = store.steps()
    if step is None and steps:
        return steps[-1]
    if step is None or step not in steps:
        wanted = "" if step is None else f" of step {step}"
        raise StateNotFoundError(
            f"there is no complete state{wanted}", where=str(store.folder), allowed=list(steps) or "none"
        )
    return step


def check_state(store: Store, step: int) -> int:
    """Read every byte of a state and compare it with what was saved; the number of bytes. Raises DamagedStateError."""
    num_bytes = 0
    for part in _parts(store.tensors(step)):
        into = _empty(part)
        store.load(step, into)
        num_bytes += sum(tensor.nbytes for tensor in into.values())
    return num_bytes


def export_state(store: Store, step: int, path: Path, keep: Callable[[str], bool] = lambda name: True) -> int:
    """Write the tensors of a state whose names ``keep`` accepts to one safetensors file; the number of tensors.

    The metadata of the state is in the file's, as JSON under ``state``. The file is whole or not there. Raises
    StoreError, DamagedStateError.
    """
    from drivetrain.training.export import write_tensors

    wanted = {name: stored for name, stored in store.tensors(step).items() if keep(name)}
    if not wanted:
        raise StoreError("the state has no tensor of such a name", where=str(store.folder))
    into = _empty(wanted)
    store.load(step, into)
    unfinished = path.with_name(f".{path.name}-unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(into, unfinished, {"format": "pt", "state": json.dumps(store.metadata(step))})
        os.replace(unfinished, path)
    except Exception as error:  # safetensors has an error of its own for what the file system refuses
        if unfinished.exists():
            unfinished.unlink()
        raise StoreError(f"the file can't be written: {error}", where=str(path)) from error
    return len(wanted)


def _parts(tensors: Mapping[str, StoredTensor]) -> Iterator[dict[str, StoredTensor]]:
    part: dict[str, StoredTensor] = {}
    held = 0
    for name, stored in tensors.items():
        part[name] = stored
        held += next(iter(_empty({name: stored}, "meta").values())).nbytes
        if held > _READ_BYTES:
            yield part
            part, held = {}, 0
    if part:
        yield part


def _empty(tensors: Mapping[str, StoredTensor], device: str = "cpu") -> dict[str, torch.Tensor]:
    import torch

    return {
        name: torch.empty(stored.shape, dtype=getattr(torch, stored.dtype), device=device)
        for name, stored in tensors.items()
    }
