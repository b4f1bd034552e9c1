"""Moves kept tensors to the host's memory and back, beside the device's own work.

Backward asks for tensors in about the reverse of the order in which forward kept them, so that when one is asked for,
the ones before it are sent on their way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary


class Lane(Protocol):
    """How tensors of one device travel."""

    def out(self, tensor: torch.Tensor) -> torch.Tensor:
        """Begin to copy to the host's memory; the copy is there for :meth:`back`. The tensor may be freed meanwhile."""

    def back(self, host: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Begin to copy back; what to wait for is given beside the tensor to be."""

    def wait(self, tensor: torch.Tensor, arrival: Any) -> None:
        """Have the work that is queued from now on find the tensor there."""


class StreamLane:
    """Copies on a stream of their own, between the device's memory and pinned memory of the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream(device)

    def out(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
        # The allocator may hand the tensor's memory on only when the copy has read it.
        tensor.record_stream(self._stream)
        return host

    def back(self, host: torch.Tensor) -> tuple[torch.Tensor, Any]:
        with self._module.stream(self._stream):
            tensor = torch.empty_like(host, device=self._device, pin_memory=False)
            tensor.copy_(host, non_blocking=True)
            arrival = self._module.Event()
            arrival.record(self._stream)
        return tensor, arrival

    def wait(self, tensor: torch.Tensor, arrival: Any) -> None:
        current = self._module.current_stream(self._device)
        current.wait_event(arrival)
        tensor.record_stream(current)


class _Kept:
    """A tensor that went out. What backward still needs holds it, nothing else.

    earlier: the one that forward kept before it.
    """

    def __init__(self, tensor: torch.Tensor, lane: Lane, earlier: weakref.ref[_Kept] | None) -> None:
        self.earlier = earlier
        self._lane = lane
        self._host = lane.out(tensor)
        self._back: tuple[torch.Tensor, Any] | None = None

    def send_back(self) -> tuple[torch.Tensor, Any]:
        """Begin the way back, once."""
        if self._back is None:
            self._back = self._lane.back(self._host)
        return self._back

    def value(self) -> torch.Tensor:
        tensor, arrival = self.send_back()
        self._lane.wait(tensor, arrival)
        return tensor


class Mover:
    """Keeps what the units of a model keep.

    smallest:  bytes below which a tensor stays where it is.
    ahead:     tensors that are sent back before they are asked for.
    make_lane: of a device; None for one whose tensors stay.
    """

    def __init__(
        self,
        model: nn.Module,
        smallest: int,
        ahead: int,
        make_lane: Callable[[torch.device], Lane | None] | None = None,
    ) -> None:
        self._smallest = smallest
        self._ahead = ahead
        self._model = model
        self._make_lane = make_lane or (lambda device: None if device.type == "cpu" else StreamLane(device))
        self._lanes: dict[torch.device, Lane | None] = {}
        self._last: weakref.ref[_Kept] | None = None
        self._known = WeakTensorKeyDictionary()

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        own = {parameter.data_ptr() for parameter in self._model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(partial(self._pack, own), self._unpack):
            return forward(*args, **kwargs)

    def _pack(self, own: set[int], tensor: torch.Tensor) -> torch.Tensor | _Kept:
        lane = self._lane_of(tensor.device)
        if lane is None or tensor.nbytes < self._smallest or tensor.data_ptr() in own:
            return tensor
        # One tensor may be kept by several operations; it travels once.
        known = self._known.get(tensor)
        kept: _Kept | None = None if known is None else known()
        if kept is None:
            kept = _Kept(tensor, lane, self._last)
            self._known[tensor] = self._last = weakref.ref(kept)
        return kept

    def _unpack(self, kept: torch.Tensor | _Kept) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        value = kept.value()
        earlier = kept
        for _ in range(self._ahead):
            before = None if earlier.earlier is None else earlier.earlier()
            if before is None:
                break
            before.send_back()
            earlier = before
        return value

    def _lane_of(self, device: torch.device) -> Lane | None:
        if device not in self._lanes:
            self._lanes[device] = self._make_lane(device)
        return self._lanes[device]
