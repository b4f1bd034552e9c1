"""Which block sizes are fastest here: measured once for each shape class of a kernel, and kept in a file.

The record is one JSON file for each device and version of Triton, in a folder of the user's cache. Processes that
measure at the same time add to it one after another; a file that can't be read is set aside, never trusted.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import re
import statistics
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

RECORD_VERSION = 1
FUSED = {"enable_fp_fusion": True}
"""Option of every launch: products and sums are fused, as Triton did by default up to 3.9."""

DEFAULT_FOLDER = Path.home() / ".cache" / "drivetrain" / "triton"

_WARM_UPS = 2
_OTHER_BYTES, _TIMES_READ = 256 << 20, 2
_REPEATS = 7

_MOST_APART = 0.02
"""How far the output of a candidate may be from that of another, as a share of the largest number: products of half
precision that are summed in another order differ by a fifth of that at most."""


@dataclass(frozen=True)
class Blocks:
    """One way to launch a kernel.

    sizes:      values of the kernel's block parameters, such as ``(("ROWS", 4),)``.
    num_warps:  groups of 32 (on AMD 64) threads in a program.
    num_stages: depth of the software pipeline of loads.
    """

    sizes: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def of(cls, num_warps: int = 4, num_stages: int = 2, **sizes: int) -> Blocks:
        return cls(tuple(sizes.items()), num_warps, num_stages)

    def __getitem__(self, name: str) -> int:
        return dict(self.sizes)[name]

    @property
    def launch(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {**dict(self.sizes), "num_warps": self.num_warps, "num_stages": self.num_stages, **FUSED}


class TuningRecord:
    """Key of a kernel and shape class -> the blocks that were fastest, in memory and in a file.

    Raises nothing for a file that is corrupt: it is set aside with a warning, and what it held is measured again.
    """

    def __init__(self, folder: Path, device: str, compiler: str) -> None:
        slug = re.sub(r"[^a-z0-9.]+", "-", f"{device} triton {compiler}".lower()).strip("-")
        self.path = folder / f"{slug}.json"
        self.name = f"record_{hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:8]}"
        self._head = {"version": RECORD_VERSION, "device": device, "compiler": compiler}
        self._entries: dict[str, dict[str, Any]] | None = None
        self._lock = threading.Lock()

    def find(self, key: str, candidates: Sequence[Blocks]) -> Blocks | None:
        """The fastest of ``candidates`` as measured before; None where it is none of them, or nothing is known."""
        with self._lock:
            if self._entries is None:
                self._entries = self._read()
            entry = self._entries.get(key)
        for candidate in candidates:
            if entry is not None and entry.get("blocks") == _as_json(candidate):
                return candidate
        return None

    def add(self, key: str, blocks: Blocks, milliseconds: float) -> None:
        """Keep a measurement, beside those that other processes have added meanwhile."""
        with self._lock, self._exclusive():
            self._entries = {**self._read(), key: {"blocks": _as_json(blocks), "ms": round(milliseconds, 6)}}
            self._write(self._entries)

    @contextmanager
    def _exclusive(self) -> Any:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            entries = content.pop("entries")
            if content == self._head and all(isinstance(entry, dict) for entry in entries.values()):
                return dict(entries)
            reason = f"it is of {content}, not of {self._head}"
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        aside = self.path.with_suffix(".unreadable")
        warnings.warn(f"the tuning record {self.path} is set aside as {aside.name}: {reason}", stacklevel=2)
        if self.path.exists():
            os.replace(self.path, aside)
        return {}

    def _write(self, entries: dict[str, dict[str, Any]]) -> None:
        """Whole or not at all."""
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem)
        with open(handle, "w", encoding="utf-8") as file:
            json.dump({**self._head, "entries": entries}, file, indent=1, sort_keys=True)
        os.replace(name, self.path)


def _as_json(blocks: Blocks) -> dict[str, Any]:
    return {**asdict(blocks), "sizes": dict(blocks.sizes)}


class Tuner:
    """Chooses blocks. Without a record it takes the first candidate, which is where a kernel's author would start.

    time: runs a launch and gives its milliseconds; None where nothing can be measured (Triton's interpreter).
    """

    def __init__(
        self, record: TuningRecord | None = None, time: Callable[[Callable[[], object]], float] | None = None
    ) -> None:
        self.record = record
        self.time = time
        self._chosen: dict[str, Blocks] = {}

    @property
    def name(self) -> str:
        """Tells it from others in names of operators: two of one name choose alike."""
        return "untuned" if self.record is None else self.record.name

    def is_final(self, key: str) -> bool:
        """Whether the blocks for this shape class will stay what they are."""
        return key in self._chosen

    def known(self, key: str, candidates: Sequence[Blocks]) -> Blocks:
        """The blocks for one shape class as far as they are known: chosen, recorded, or the first candidate."""
        recorded = self.record.find(key, candidates) if self.record is not None and key not in self._chosen else None
        return self._chosen.get(key) or recorded or candidates[0]

    def choose(
        self,
        key: str,
        candidates: Sequence[Blocks],
        launch: Callable[[Blocks], object],
        worth_it: bool = True,
        output: torch.Tensor | None = None,
    ) -> Blocks:
        """The blocks for one shape class; ``launch`` may be called many times and has to give the same every time.

        worth_it: whether this use is large enough to tell anything; otherwise nothing is measured now.
        output:   what a launch writes. A candidate that writes other numbers than the first of them is told of in a
                  warning, and not taken.
        """
        if key in self._chosen:
            return self._chosen[key]
        if not worth_it or self._is_recording_a_graph():
            return self.known(key, candidates)
        self._chosen[key] = self._measured(key, candidates, launch, output)
        return self._chosen[key]

    def _is_recording_a_graph(self) -> bool:
        """Whether launches are only noted for later, so that nothing can be timed."""
        if self.time is None:
            return False
        import torch

        return bool(torch.cuda.is_current_stream_capturing())

    def _measured(
        self,
        key: str,
        candidates: Sequence[Blocks],
        launch: Callable[[Blocks], object],
        output: torch.Tensor | None,
    ) -> Blocks:
        if self.time is None or self.record is None or len(candidates) == 1:
            return candidates[0]
        known = self.record.find(key, candidates)
        if known is not None:
            return known
        times, wanted = {}, None
        for candidate in candidates:
            if output is not None:
                output.fill_(float("nan"))
            times[candidate] = self.time(functools.partial(launch, candidate))
            if output is None or times[candidate] == float("inf"):
                continue
            if wanted is None:
                wanted = output.clone()
            elif not _agree(output, wanted):
                times[candidate] = float("inf")
                _warn_of(key, candidate, candidates[0])
        best = min(candidates, key=lambda candidate: times[candidate])
        if times[best] == float("inf"):
            return candidates[0]  # let the launch itself raise what is wrong
        self.record.add(key, best, times[best])
        return best


def _agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    import torch

    largest = float(torch.nan_to_num(wanted.float(), 0.0, 0.0, 0.0).abs().max())
    return torch.allclose(found.float(), wanted.float(), rtol=0.0, atol=_MOST_APART * largest, equal_nan=True)


def _warn_of(key: str, candidate: Blocks, first: Blocks) -> None:
    warnings.warn(
        f"{key}: the kernel with {candidate.launch} gives other numbers on this device than the one with "
        f"{first.launch}, and is not used; please report it, with the device and the version of Triton",
        stacklevel=2,
    )


class Choice:
    """The blocks of one use, by shape. Once chosen they are found by a tuple of a few integers: nothing else of the
    choice is on a step's path."""

    def __init__(self, tuner: Tuner, name: str) -> None:
        self._tuner, self._name = tuner, name
        self._final: dict[tuple[int, ...], Blocks] = {}

    def __call__(
        self,
        shape: tuple[int, ...],
        candidates: Callable[[], Sequence[Blocks]],
        launch: Callable[[Blocks], object],
        worth_it: bool = True,
        output: torch.Tensor | None = None,
    ) -> Blocks:
        """As :meth:`Tuner.choose`, for a shape class of this use."""
        blocks = self._final.get(shape)
        if blocks is None:
            key = self._key(shape)
            blocks = self._tuner.choose(key, candidates(), launch, worth_it, output)
            if self._tuner.is_final(key):
                self._final[shape] = blocks
        return blocks

    def known(self, shape: tuple[int, ...], candidates: Callable[[], Sequence[Blocks]]) -> Blocks:
        """As :meth:`Tuner.known`: what would be taken for a use too small to be measured."""
        return self._final.get(shape) or self._tuner.known(self._key(shape), candidates())

    def _key(self, shape: tuple[int, ...]) -> str:
        return "/".join((self._name, *map(str, shape)))


def time_on_gpu(launch: Callable[[], object]) -> float:
    """Median milliseconds of a launch; infinite for blocks that need more of the device than it has.

    Each time the device's cache is filled with other numbers first: inputs come from memory, as they do in a step, and
    while that lasts the host gets ahead, so that a kernel is timed and not how long Python takes to launch it. They are
    read, not written: a kernel would be timed with their way back to memory, 6 us on an H100.
    """
    import torch
    from triton.runtime.errors import OutOfResources

    try:
        for _ in range(_WARM_UPS):
            launch()
    except OutOfResources:
        return float("inf")
    room = min(_OTHER_BYTES, torch.cuda.mem_get_info()[0] // 4)
    others = torch.zeros(max(1, room // 4), dtype=torch.float32, device="cuda")
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_TIMES_READ):
            others.sum()
        start.record()
        launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def rows_class(rows: int) -> int:
    """Shape class of a number of rows: the power of four that is not less."""
    return 1 << (max(0, rows - 1).bit_length() + 1) // 2 * 2
