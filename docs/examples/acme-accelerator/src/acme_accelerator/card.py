"""The card: a memory with a limit, and who holds how much of it.

A real device would have a driver here. What a process holds of it is state of the process, as with every driver; it
begins when the platform is activated and not when something is imported.
"""

from __future__ import annotations

import math
import threading
import weakref

import torch
from drivetrain.errors import MemoryBudgetError


class Card:
    """One opened card. Tensors made by :meth:`zeros` are charged to it until nothing refers to them any more."""

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.held_bytes = 0
        self.peak_bytes = 0
        self._lock = threading.Lock()

    @property
    def free_bytes(self) -> int:
        return self.memory_bytes - self.held_bytes

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeros on the card. Raises MemoryBudgetError when it has not enough left, and then holds what it held."""
        num_bytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            if num_bytes > self.free_bytes:
                raise MemoryBudgetError(
                    f"the card has no room for a tensor of shape {list(shape)} in {str(dtype).removeprefix('torch.')}",
                    where="platform/acme",
                    found=f"{num_bytes} bytes",
                    allowed=f"{self.free_bytes} of {self.memory_bytes} bytes are free",
                    hint="Raise platform.memory_mib, or lower engine.kv_memory.",
                )
            self.held_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        tensor = torch.zeros(shape, dtype=dtype)
        # The storage and not the tensor: views keep the memory when the tensor itself is gone.
        weakref.finalize(tensor.untyped_storage(), self._release, num_bytes)
        return tensor

    def _release(self, num_bytes: int) -> None:
        with self._lock:
            self.held_bytes -= num_bytes


_opened: Card | None = None


def open_card(memory_bytes: int) -> Card:
    """The process's card. Opening it again changes the limit and keeps the accounts."""
    global _opened
    if _opened is None:
        _opened = Card(memory_bytes)
    _opened.memory_bytes = memory_bytes
    return _opened


def opened_card() -> Card | None:
    """The card that this process has opened; None before the platform is activated."""
    return _opened


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros on the card where one is opened, else in plain memory: the parts work on other platforms too."""
    card = opened_card()
    return torch.zeros(shape, dtype=dtype, device=device) if card is None else card.zeros(shape, dtype)
