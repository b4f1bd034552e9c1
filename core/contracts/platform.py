"""Contract of a platform: one family of devices, what they can do, and how their memory is counted.

Optional abilities are the protocols at the end of this module; a platform claims one by having its methods.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from drivetrain.contracts.plugin import Plugin

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch


@dataclass(frozen=True)
class PlatformFacts:
    """What is known of a platform's device before anything is opened on it.

    name:               plugin name: ``"cpu"``.
    device_type:        torch device type: ``"cpu"``, ``"cuda"`` (ROCm too), ``"xpu"``.
    device_name:        the product's name.
    device_count:       devices of this family on this machine.
    total_memory_bytes: memory of one device; None when it can't be told without opening it.
    dtypes:             parameter dtypes that compute at a useful speed, by torch name.
    architecture:       instruction set or compute capability: ``"avx2"``, ``"sm_90"``, ``"gfx942"``.
    collective:         torch.distributed backend: ``"gloo"``, ``"nccl"``, ``"xccl"``.
    details:            anything else worth printing (driver, compiler, cores).
    """

    name: str
    device_type: str
    device_name: str
    device_count: int
    dtypes: frozenset[str]
    architecture: str
    collective: str
    total_memory_bytes: int | None = None
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryInfo:
    """Bytes of one device: all of it, and what a new allocation could still take."""

    total_bytes: int
    free_bytes: int


class Platform(Plugin):
    """One family of devices.

    ``facts`` must work without a device context. ``activate`` opens the device; every method after it may assume so.
    """

    kind = "platform"

    preferences: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """kind -> plugin names in order of preference on this platform; ``auto`` ranks by it first."""

    pci_vendors: ClassVar[frozenset[int]] = frozenset()
    """PCI vendor ids of the devices that this platform drives; ``doctor`` tells by it which hardware nothing drives."""

    @abstractmethod
    def facts(self) -> PlatformFacts:
        """Describe the device that ``config`` names, without opening it."""

    @abstractmethod
    def activate(self) -> None:
        """Open the device and set thread counts. Called once, before any tensor is made."""

    @abstractmethod
    def device(self) -> torch.device:
        """The torch device that parameters and caches are placed on."""

    @abstractmethod
    def memory(self) -> MemoryInfo:
        """Bytes of the device now. For a CPU, free is what the system can give without swapping."""

    @abstractmethod
    def peak_memory_bytes(self) -> int:
        """The most bytes this process held on the device since it started (resident set for a CPU)."""

    def synchronize(self) -> None:
        """Wait until all work queued on the device is done. Nothing to do where work is not queued."""


@runtime_checkable
class SharesMachine(Protocol):
    """Ability ``shares``: several processes of one machine each take a device of their own."""

    def take_device(self, local_rank: int) -> None:
        """Use the device that is ``local_rank`` behind the configured one. Called before ``activate``."""


@runtime_checkable
class MeasuresPeaks(Protocol):
    """Ability ``peaks``: what a piece of work takes of the device's memory for a while is measured."""

    def peak_of(self, work: Callable[[], object]) -> int:
        """Run ``work`` to its end; return the most bytes of the device that were taken for it at once, beyond what
        tensors held before. Memory that is handed out in larger pieces than were asked for counts whole.

        Nothing else may use the device meanwhile. What no tensor holds any more is given back to the device, before and
        afterwards. ``peak_memory_bytes`` goes on counting from the start. What ``work`` raises comes out as it is.
        """


@runtime_checkable
class SupportsStreams(Protocol):
    """Ability ``streams``: work on a second queue beside the current one."""

    def stream(self) -> AbstractContextManager[object]:
        """A context in which launched work runs on a stream of its own."""


@runtime_checkable
class PlacesWeights(Protocol):
    """Keeps weights where its processor reads them fastest."""

    def place_weights(self, tensors: Iterable[torch.Tensor]) -> str:
        """Move what the tensors refer to, in place: they keep values, shapes, and what they share. Called once a model
        is built; returns what was done, in a sentence."""


@runtime_checkable
class SupportsGraphs(Protocol):
    """Ability ``graphs``: a fixed sequence of launches is recorded once and replayed."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Run ``function`` once under capture; return a callable that replays it on the same buffers. Captures share
        memory, but for tensors that are still held: one of them is replayed at a time.
        """


@runtime_checkable
class CapturesPieces(Protocol):
    """Ability ``graph_pieces``: launches are recorded in pieces, between which other work is done at each replay."""

    def capture_pieces(self, function: Callable[[Callable[[Callable[[], None]], None]], None]) -> Callable[[], None]:
        """Run ``function(between)`` once under capture; return a callable that replays it on the same buffers. Captures
        share memory, but for tensors that are still held: one of them is replayed at a time.

        ``between(work)`` ends a piece and begins the next: each replay calls ``work`` there, the capture does not. What
        ``work`` launches is not recorded; it finds what the pieces before it left in memory, and they what it left.
        """
