"""What the GPU platforms share: torch's device modules ``torch.cuda`` and ``torch.xpu`` have the same functions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from drivetrain.contracts.platform import (
    CapturesPieces,
    MeasuresPeaks,
    MemoryInfo,
    Platform,
    PlatformFacts,
    SharesMachine,
    SupportsGraphs,
    SupportsStreams,
)
from drivetrain.contracts.plugin import PluginConfig, Tier
from drivetrain.errors import ConfigError, PlatformError

if TYPE_CHECKING:
    import torch


_FORGOTTEN_PEAKS: dict[tuple[str, int], int] = {}
"""Peaks since the start of the process, by device, which torch has forgotten: a measurement resets its one figure."""


class AcceleratorConfig(PluginConfig):
    """Options of every GPU platform."""

    device: int = Field(0, ge=0, description="index of the device among those that this process may see")


class AcceleratorPlatform(Platform):
    """A family of GPUs behind one of torch's device modules. Not a plugin itself."""

    device_type: ClassVar[str]

    contract_version = "1.1"
    Config = AcceleratorConfig
    config: AcceleratorConfig
    tier = Tier.VENDOR
    preferences = {"precision": ("bf16", "fp32"), "attention": ("sdpa",)}

    @classmethod
    def abilities(cls) -> frozenset[str]:
        claimed = {
            "streams": SupportsStreams,
            "graphs": SupportsGraphs,
            "graph_pieces": CapturesPieces,
            "peaks": MeasuresPeaks,
            "shares": SharesMachine,
        }
        return frozenset(name for name, protocol in claimed.items() if issubclass(cls, protocol))

    @abstractmethod
    def _module(self) -> Any:
        """``torch.cuda`` or ``torch.xpu``, imported on the first call."""

    def take_device(self, local_rank: int) -> None:
        self.config = self.config.model_copy(update={"device": self.config.device + local_rank})

    def activate(self) -> None:
        """Open the device. Raises ConfigError for an index that does not exist, PlatformError when opening fails."""
        facts = self.facts()
        try:
            self._module().set_device(self.config.device)
            self._module().mem_get_info(self.config.device)
        except RuntimeError as error:
            raise PlatformError(
                f"{facts.device_name} could not be opened: {error}",
                where=f"platform.device={self.config.device}",
                hint="Run: drivetrain doctor",
            ) from error

    def device(self) -> torch.device:
        import torch

        return torch.device(self.device_type, self.config.device)

    def memory(self) -> MemoryInfo:
        """What torch's allocator holds for tensors to come is free too: it is handed out, or given back, as needed."""
        module, device = self._module(), self.config.device
        free, total = module.mem_get_info(device)
        kept = module.memory_reserved(device) - module.memory_allocated(device)
        return MemoryInfo(total_bytes=total, free_bytes=free + kept)

    def peak_memory_bytes(self) -> int:
        """The most bytes torch's allocator held in tensors; what the driver itself takes is not in it."""
        highest = int(self._module().max_memory_allocated(self.config.device))
        return max(highest, _FORGOTTEN_PEAKS.get((self.device_type, self.config.device), 0))

    def peak_of(self, work: Callable[[], object]) -> int:
        """Counted in what torch's allocator takes from the driver, so that what lies idle between tensors, before and
        meanwhile, is in it."""
        module, device = self._module(), self.config.device
        self.synchronize()
        module.empty_cache()
        _FORGOTTEN_PEAKS[self.device_type, device] = self.peak_memory_bytes()
        module.reset_peak_memory_stats(device)
        before = module.memory_allocated(device)
        try:
            work()
            self.synchronize()
            return int(module.max_memory_reserved(device) - before)
        finally:
            module.empty_cache()

    def synchronize(self) -> None:
        self._module().synchronize(self.config.device)

    def stream(self) -> AbstractContextManager[object]:
        """A context in which launched work runs on a new stream, after what the current stream has queued so far."""
        module = self._module()
        side = module.Stream(self.config.device)
        side.wait_stream(module.current_stream(self.config.device))
        context: AbstractContextManager[object] = module.stream(side)
        return context

    def pick_device(self, devices: Sequence[PlatformFacts]) -> PlatformFacts:
        """The device that the configuration names. Raises ConfigError for an index out of range."""
        if self.config.device >= len(devices):
            raise ConfigError(
                "there is no device of this index",
                where="platform.device",
                found=self.config.device,
                allowed=f"0 to {len(devices) - 1}" if devices else "none: no device is visible",
                hint="Run: drivetrain doctor",
            )
        return devices[self.config.device]


def visible_indices(setting: str | None, identifiers: Sequence[str]) -> tuple[int, ...]:
    """Devices that a driver's visibility variable leaves, in its order.

    setting:     the variable's text: indices or beginnings of identifiers, separated by commas; None leaves all.
    identifiers: each device's unique name.

    As in CUDA, the first entry that names no device ends the list; an empty text hides every device.
    """
    if setting is None:
        return tuple(range(len(identifiers)))
    chosen: list[int] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdigit():
            matches = [int(entry)] if int(entry) < len(identifiers) else []
        else:
            matches = [i for i, name in enumerate(identifiers) if entry and name.startswith(entry)]
        if len(matches) != 1 or matches[0] in chosen:
            break
        chosen.append(matches[0])
    return tuple(chosen)


def record_graph(
    graph: Any, capturing: AbstractContextManager[object], function: Callable[[], None]
) -> Callable[[], None]:
    """Record what ``function`` launches inside ``capturing``; return the replay, which keeps ``graph`` alive."""
    with capturing:
        function()
    replay: Callable[[], None] = graph.replay
    return replay


def record_pieces(
    begin: Callable[[], Any], function: Callable[[Callable[[Callable[[], None]], None]], None]
) -> Callable[[], None]:
    """Record what ``function`` launches in pieces; return their replay, with the work between them.

    begin: begins to record, and returns the graph; it has ``capture_end`` and ``replay``.
    """
    parts: list[Callable[[], None]] = []
    graph = begin()

    def between(work: Callable[[], None]) -> None:
        nonlocal graph
        graph.capture_end()
        parts.extend((graph.replay, work))
        graph = begin()

    try:
        function(between)
    except BaseException:
        with suppress(RuntimeError):  # torch's, that nothing good was recorded: what was wrong is told already
            graph.capture_end()
        raise
    graph.capture_end()
    parts.append(graph.replay)

    def replay() -> None:
        for part in parts:
            part()

    return replay
