"""What the optimizer keeps, and parameters, outside the device's memory: in the host's, or in files.

Files are mapped into memory. A step goes through the optimizer's state bucket by bucket: while one is computed the next
is being read, and the one before is let go, so that two buckets are in memory at a time. The files are scratch: they lose
their names as soon as they are open, and are gone when the process ends, however it ends. Runs are saved by the store.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain.plugins.partitioner.transport import Transport
from drivetrain.training.state import make_state


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
        self._files: list[ScratchFile] = []

    @property
    def moves_parameters(self) -> bool:
        return self._to != "none" and "parameters" in self._what

    @property
    def moves_optimizer(self) -> bool:
        return self._to != "none" and "optimizer" in self._what

    def section(
        self, transport: Transport, size: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Zeros for this rank's values of a bucket."""
        return transport.new_section(size, dtype, device)

    def home(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def take_over(self, optimizer: torch.optim.Optimizer, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        return
