"""What the optimizer keeps, and parameters, outside the device's memory: in the host's, or in files.

Files are mapped into memory. A step goes through the optimizer's state bucket by bucket: while one is computed the next
is being read, and the one before is let go, so that two buckets are in memory at a time. The files are scratch: they
lose their names as soon as they are open, and are gone when the process ends, however it ends. Runs are saved by the
store.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain.plugins.partitioner.transport import Transport
from drivetrain.training.state import optimizer_state

_ALIGNMENT = 64


class ScratchFile:
    """A nameless file that is mapped as one tensor of bytes."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, path = tempfile.mkstemp(prefix=".drivetrain-offload-", dir=folder)
            try:
                os.unlink(path)
                # Blocks are taken now: a disk that fills up later would end the process at a write to memory.
                os.posix_fallocate(descriptor, 0, num_bytes)
                self._map = mmap.mmap(descriptor, num_bytes)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ConfigError(
                f"the file for what is offloaded can't be made: {error.strerror or error}",
                where="partitioner.offload_folder",
                found=str(folder),
                hint=f"It takes {num_bytes} bytes.",
            ) from error
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def fetch(self) -> None:
        """Have the system read it now, while something else is computed."""
        self._map.madvise(mmap.MADV_WILLNEED)

    def let_go(self) -> None:
        """Its pages need not stay in this process's memory; what was written reaches the file."""
        self._map.flush()
        self._map.madvise(mmap.MADV_DONTNEED)


class Offload:
    """Where things live. The plain one leaves everything on the device.

    to:   ``none``, ``cpu`` or ``disk``.
    what: of ``optimizer`` and ``parameters``.
    """

    def __init__(self, to: str, what: Sequence[str], folder: Path) -> None:
        self._to, self._what, self._folder = to, frozenset(what), folder
        self._sections: dict[int, ScratchFile] = {}

    def on(self, device: torch.device) -> Offload:
        """What this comes to for a model on ``device``."""
        return Offload("none", (), self._folder) if self.note(device) else self

    @property
    def is_on_disk(self) -> bool:
        return self._to == "disk"

    @property
    def moves_parameters(self) -> bool:
        return self._to != "none" and "parameters" in self._what

    @property
    def moves_optimizer(self) -> bool:
        return self._to != "none" and "optimizer" in self._what

    def section(self, transport: Transport, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Zeros for this rank's values of a bucket."""
        if not self.moves_parameters:
            return transport.new_section(size, dtype, device)
        if not self.is_on_disk:
            return torch.zeros(size, dtype=dtype, pin_memory=True)
        file = self._file(size * dtype.itemsize)
        section_S = file.bytes.view(dtype)[:size]
        self._sections[section_S.data_ptr()] = file
        return section_S

    def file_of(self, section_S: torch.Tensor) -> ScratchFile | None:
        """The file that a section lies in."""
        return self._sections.get(section_S.data_ptr())

    def note(self, device: torch.device) -> str | None:
        """What a user should know."""
        if self._to == "cpu" and device.type == "cpu":
            return "partitioner.offload: cpu changes nothing here: everything is in the host's memory already"
        return None

    def home(self, values: torch.Tensor) -> torch.Tensor:
        """Values as they are to be copied for the optimizer: in the host's memory where it works there."""
        return values.cpu() if self.moves_optimizer else values

    def _file(self, num_bytes: int) -> ScratchFile:
        return ScratchFile(self._folder, max(num_bytes, mmap.PAGESIZE))

    def take_over(
        self,
        optimizer: torch.optim.Optimizer,
        groups: Sequence[Sequence[nn.Parameter]],
        before: Callable[[], None],
        after: Callable[[], None],
    ) -> None:
        """Move what an optimizer keeps to files, one for each group of its parameters, and have its steps go through
        them group by group, with ``before`` and ``after`` around the whole step."""
        optimizer_state(optimizer, ())  # which makes it
        moved = [(list(group), self._moved(optimizer, group)) for group in groups]
        OffloadedSteps(optimizer, moved, before, after)

    @torch.no_grad()
    def _moved(self, optimizer: torch.optim.Optimizer, group: Sequence[nn.Parameter]) -> ScratchFile | None:
        """The file that has the values of a group's state now, in place of the tensors that had them; all are zero, as
        before the first step."""
        places: list[tuple[dict[str, Any], str, int]] = []
        end = 0
        for parameter in group:
            for key, value in optimizer.state[parameter].items():
                if not isinstance(value, torch.Tensor):
                    continue
                if value.numel() > 1:
                    places.append((optimizer.state[parameter], key, end))
                    end += -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT
                else:
                    value.zero_()
        if not places:
            return None
        file = self._file(end)
        for state, key, start in places:
            value = state[key]
            state[key] = file.bytes[start : start + value.nbytes].view(value.dtype).view(value.shape)
        return file


class OffloadedSteps:
    """Splits each step of an optimizer into one for each group of its parameters."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        groups: Sequence[tuple[list[nn.Parameter], ScratchFile | None]],
        before: Callable[[], None],
        after: Callable[[], None],
    ) -> None:
        self._groups = groups
        self._before, self._after = before, after
        self._whole_step = optimizer.step
        optimizer.step = self.step  # type: ignore[method-assign, assignment]
        for _, file in groups:
            if file is not None:
                file.let_go()

    def step(self, *args: Any, **kwargs: Any) -> None:
        self._before()
        gradients = {parameter: parameter.grad for group, _ in self._groups for parameter in group}
        self._fetch(0)
        for parameter in gradients:
            parameter.grad = None
        for number, (group, file) in enumerate(self._groups):
            self._fetch(number + 1)
            for parameter in group:
                parameter.grad = gradients[parameter]
            self._whole_step(*args, **kwargs)
            for parameter in group:
                parameter.grad = None
            if file is not None:
                file.let_go()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        self._after()

    def _fetch(self, number: int) -> None:
        if number < len(self._groups) and (file := self._groups[number][1]) is not None:
            file.fetch()
