"""How sections of buckets get from rank to rank.

Two verbs. *Gather*: every rank has a section, and all of them get all sections. *Reduce*: every rank has a section for
every other, and each gets the sum of those that are for it. Both are started and then waited for; ranks start them in
one order.

``Collectives`` asks ``torch.distributed``, whatever the device. Where all ranks are processes of one machine and
compute on its CPU, ``SharedMemory`` lets them read each other's memory: a byte is copied once, where a message through
the loopback device is copied several times by the cores that compute.
"""

from __future__ import annotations

import logging
import mmap
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from drivetrain.errors import ConfigError

_log = logging.getLogger("drivetrain")

Fill = Callable[[torch.Tensor], None]
"""Writes a section."""

FillFor = Callable[[int, torch.Tensor], None]
"""Writes the section for one rank."""

Rows = Sequence[torch.Tensor]
"""A section of each rank."""

_OUTSTANDING = 2
"""Reductions of one rank that may be under way: so far a rank may run ahead of the slowest."""

_SLOTS = 2 * _OUTSTANDING
"""A rank that starts exchange k has read those up to k - OUTSTANDING, and its own last wait has told that the others
had started k - OUTSTANDING, and so read those up to k - 2 OUTSTANDING: that slot can be written again."""


class Transport(ABC):
    """Moves sections among the ranks of one group. ``size`` of 1: there is nothing to move."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @abstractmethod
    def new_section(self, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Zeros that stay, for this rank's values of a bucket, which the others gather. Called by all ranks alike."""

    @abstractmethod
    def start_gather(self, section_S: torch.Tensor) -> Callable[[], Rows]:
        """Gather from what :meth:`new_section` made. Calling the result waits, and gives the rows, to be read at once
        and not written to."""

    @abstractmethod
    def start_passing(self, fill: Fill, size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Rows]:
        """Gather what ``fill`` writes."""

    @abstractmethod
    def start_reduce(
        self, fill: FillFor, size: int, dtype: torch.dtype, device: torch.device
    ) -> Callable[[torch.Tensor], None]:
        """Reduce. Calling the result with a tensor waits, and adds this rank's sum to it. Results are called in the
        order in which they came, before the third next reduction is started."""

    @abstractmethod
    def settle(self) -> None:
        """Have what is in sections be for all: what the others gather from now on is that. Every rank calls it."""


class Collectives(Transport):
    """Through ``torch.distributed``."""

    def new_section(self, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    def start_gather(self, section_S: torch.Tensor) -> Callable[[], Rows]:
        if self.size == 1:
            return lambda: [section_S]
        gathered = section_S.new_empty(self.size * section_S.numel())
        work = _all_gather(gathered, section_S, self.group)

        def wait() -> Rows:
            work.wait()
            return gathered.view(self.size, section_S.numel()).unbind()

        return wait

    def start_passing(self, fill: Fill, size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Rows]:
        section_S = torch.zeros(size, dtype=dtype, device=device)
        fill(section_S)
        return self.start_gather(section_S)

    def start_reduce(
        self, fill: FillFor, size: int, dtype: torch.dtype, device: torch.device
    ) -> Callable[[torch.Tensor], None]:
        sections_WS = torch.zeros(self.size, size, dtype=dtype, device=device)
        for rank in range(self.size):
            fill(rank, sections_WS[rank])
        if self.size == 1:
            return lambda into_S: _add(into_S, sections_WS)
        # Each rank sends to each what is for it: the bytes of a reduce-scatter, which Gloo makes of a whole all-reduce.
        received_WS = torch.empty_like(sections_WS)
        work = dist.all_to_all_single(received_WS.view(-1), sections_WS.view(-1), group=self.group, async_op=True)

        def wait(into_S: torch.Tensor) -> None:
            work.wait()
            _add(into_S, received_WS)

        return wait

    def settle(self) -> None:
        """Nothing to do: a collective takes the values that are there when a rank joins it."""


def _add(into_S: torch.Tensor, sections_WS: torch.Tensor) -> None:
    for section_S in sections_WS:
        into_S.add_(section_S)


def _all_gather(output: torch.Tensor, section: torch.Tensor, group: dist.ProcessGroup | None) -> Any:
    """By the name that this version of torch has for it."""
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return call(output, section, group=group, async_op=True)


class SharedMemory(Transport):
    """Processes of one machine that read each other's memory; only signals go through ``torch.distributed``.

    The memory has no name in any file system: it is gone when the last process that has it is, however that ends.
    """

    def __init__(self, group: dist.ProcessGroup, slot_bytes: int) -> None:
        """slot_bytes: of the largest exchange. Raises OSError where memory can't be shared."""
        super().__init__(group)
        slot_bytes = -(-slot_bytes // 64) * 64
        self._slots = [region.view(_SLOTS, slot_bytes) for region in self._share(_SLOTS * slot_bytes)]
        self._sections: dict[int, list[torch.Tensor]] = {}
        self._started = 0
        self._signals: deque[tuple[int, Any]] = deque()

    def _share(self, num_bytes: int) -> list[torch.Tensor]:
        """Memory of each rank, open to all. Every rank calls it, and all of them fail when one does."""
        descriptor = os.memfd_create("drivetrain")
        opened: list[int] = []
        told: list[tuple[int, int]] = [(0, 0)] * self.size
        try:
            os.ftruncate(descriptor, num_bytes)
            dist.all_gather_object(told, (os.getpid(), descriptor), group=self.group)
            regions: list[torch.Tensor] = []
            failure: OSError | None = None
            try:
                for rank, (process, number) in enumerate(told):
                    mine = rank == self.rank
                    opened.append(os.dup(descriptor) if mine else os.open(f"/proc/{process}/fd/{number}", os.O_RDWR))
                    mapped = mmap.mmap(opened[-1], num_bytes)
                    regions.append(torch.frombuffer(mapped, dtype=torch.uint8))
            except OSError as error:
                failure = error
            failures: list[str | None] = [None] * self.size
            dist.all_gather_object(failures, str(failure) if failure else None, group=self.group)
            first = next((text for text in failures if text), None)
            if first is not None:
                raise OSError(first) from failure
            return regions
        finally:
            for number in (descriptor, *opened):
                os.close(number)

    def new_section(self, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        rows = [region.view(dtype)[:size] for region in self._share(max(64, size * dtype.itemsize))]
        self._sections[rows[self.rank].data_ptr()] = rows
        return rows[self.rank]

    def start_gather(self, section_S: torch.Tensor) -> Callable[[], Rows]:
        rows = self._sections[section_S.data_ptr()]
        return lambda: rows

    def start_passing(self, fill: Fill, size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Rows]:
        exchange = self._begin()
        fill(self._slot(exchange, self.rank, size, dtype))
        self._signal(exchange)

        def wait() -> Rows:
            self._wait(exchange)
            return [self._slot(exchange, rank, size, dtype) for rank in range(self.size)]

        return wait

    def start_reduce(
        self, fill: FillFor, size: int, dtype: torch.dtype, device: torch.device
    ) -> Callable[[torch.Tensor], None]:
        exchange = self._begin()
        sections_WS = self._slot(exchange, self.rank, self.size * size, dtype).view(self.size, size)
        for rank in range(self.size):
            fill(rank, sections_WS[rank])
        self._signal(exchange)

        def wait(into_S: torch.Tensor) -> None:
            self._wait(exchange)
            for rank in range(self.size):
                theirs_WS = self._slot(exchange, rank, self.size * size, dtype).view(self.size, size)
                into_S.add_(theirs_WS[self.rank])

        return wait

    def settle(self) -> None:
        self._signal_all().wait()

    def _begin(self) -> int:
        exchange = self._started
        self._started += 1
        return exchange

    def _slot(self, exchange: int, rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        return self._slots[rank][exchange % _SLOTS].view(dtype)[:size]

    def _signal(self, exchange: int) -> None:
        self._signals.append((exchange, self._signal_all()))

    def _signal_all(self) -> Any:
        return dist.all_reduce(torch.zeros(1), group=self.group, async_op=True)

    def _wait(self, exchange: int) -> None:
        """Until every rank has written its part of an exchange."""
        while self._signals and self._signals[0][0] <= exchange:
            self._signals.popleft()[1].wait()


def make_transport(
    group: dist.ProcessGroup | None, device: torch.device, slot_bytes: int, wanted: str
) -> tuple[Transport, str]:
    """The transport and why it is this one. Every rank calls it.

    wanted: ``auto``, ``shared`` or ``collective``. Raises ConfigError where ``shared`` is wanted and can't be.
    """
    if group is None or wanted == "collective":
        return Collectives(group), "asked for" if group is not None else "one process"
    reason = _why_not_shared(group, device)
    if reason is None:
        try:
            return SharedMemory(group, slot_bytes), "all ranks are processes of this machine"
        except OSError as error:
            reason = f"memory can't be shared between processes: {error}"
    if wanted == "shared":
        raise ConfigError(reason, where="partitioner.transport", found=wanted, allowed="auto, collective")
    _log.info("sections go through torch.distributed: %s", reason)
    return Collectives(group), reason


def _why_not_shared(group: dist.ProcessGroup, device: torch.device) -> str | None:
    place: tuple[str, ...] | None = None
    with suppress(OSError):  # a system that has no such files has no such memory either
        place = (Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"), os.readlink("/proc/self/ns/pid"))
    if not hasattr(os, "memfd_create") or device.type != "cpu":
        place = None
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, place, group=group)
    if None in told:
        return "a rank does not compute on the CPU of a Linux machine"
    return None if len(set(told)) == 1 else "ranks are on several machines"
