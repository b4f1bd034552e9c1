"""A device with a small memory of its own, played by the processor."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drivetrain.backends.cpu import CpuPlatform
from drivetrain.contracts.platform import MemoryInfo
from drivetrain.registry import Registry, discover
from support.fake_plugins import ref


class Card(TorchDispatchMode):
    """Within this context, what torch operations of this thread make is on the card for as long as it lives. What has
    no room there raises as torch does on a GPU."""

    def __init__(self, total_bytes: int) -> None:
        super().__init__()
        self.total_bytes = total_bytes
        self.held_bytes = self.peak_bytes = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self._take(leaf.untyped_storage())
        return result

    def _take(self, storage: torch.UntypedStorage) -> None:
        address, num_bytes = storage.data_ptr(), storage.nbytes()
        if address in self._known or num_bytes == 0:
            return
        self._known[address] = num_bytes
        self.held_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        weakref.finalize(storage, self._release, address)
        if self.held_bytes > self.total_bytes:
            raise torch.OutOfMemoryError(f"the card has no room for {num_bytes} bytes")

    def _release(self, address: int) -> None:
        self.held_bytes -= self._known.pop(address)


class CardPlatform(CpuPlatform):
    """A card; which one, the test says."""

    card: ClassVar[Card]

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"peaks"})

    def memory(self) -> MemoryInfo:
        return MemoryInfo(self.card.total_bytes, max(0, self.card.total_bytes - self.card.held_bytes))

    def peak_of(self, work: Callable[[], object]) -> int:
        card = self.card
        before, highest, card.peak_bytes = card.held_bytes, card.peak_bytes, card.held_bytes
        try:
            work()
            return card.peak_bytes - before
        finally:
            card.peak_bytes = max(card.peak_bytes, highest)


def registry_with_card() -> Registry:
    """Everything that is installed, and the card."""
    return Registry((*discover(), ref("platform", "card", CardPlatform)))
