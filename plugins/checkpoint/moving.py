"""Moves kept tensors to the host's memory and back, beside the device's own work.

Copies run on a stream of their own. Backward asks for tensors in about the reverse of the order in which forward kept
them, so that when one is asked for, the ones before it are sent on their way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary


class _Kept:
    """A tensor in the host's memory, or on its way there or back. What backward still needs holds it, nothing else.

    earlier: the one that forward kept before it.
    """

    def __init__(self, tensor: torch.Tensor, stream: Any, earlier: weakref.ref[_Kept] | None) -> None:
        module = torch.get_device_module(tensor.device)
        self.earlier = earlier
        self._device, self._stream = tensor.device, stream
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        stream.wait_stream(module.current_stream(tensor.device))
        with module.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
        # The allocator may hand the tensor's memory on only when the copy has read it.
        tensor.record_stream(stream)
        self._back: torch.Tensor | None = None
        self._arrived: Any = None

    def send_back(self) -> None:
        """Begin the way back, once."""
        if self._back is None:
            module = torch.get_device_module(self._device)
            with module.stream(self._stream):
                self._back = torch.empty_like(self._host, device=self._device, pin_memory=False)
                self._back.copy_(self._host, non_blocking=True)
                self._arrived = module.Event()
                self._arrived.record(self._stream)

    def value(self) -> torch.Tensor:
        """The tensor on the device; the work queued from now on waits for it."""
        self.send_back()
        assert self._back is not None
        current = torch.get_device_module(self._device).current_stream(self._device)
        current.wait_event(self._arrived)
        self._back.record_stream(current)
        return self._back


class Mover:
    """Keeps what the units of a model keep."""

    def __init__(self, model: nn.Module, smallest: int, ahead: int) -> None:
        self._smallest = smallest
        self._ahead = ahead
        self._model = model
        self._streams: dict[torch.device, Any] = {}
        self._last: weakref.ref[_Kept] | None = None
        self._known = WeakTensorKeyDictionary()

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        own = {parameter.data_ptr() for parameter in self._model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(partial(self._pack, own), self._unpack):
            return forward(*args, **kwargs)

    def _pack(self, own: set[int], tensor: torch.Tensor) -> torch.Tensor | _Kept:
        if tensor.device.type == "cpu" or tensor.nbytes < self._smallest or tensor.data_ptr() in own:
            return tensor
        # One tensor may be kept by several operations; it travels once.
        known = self._known.get(tensor)
        kept: _Kept | None = None if known is None else known()
        if kept is None:
            stream = self._streams.get(tensor.device)
            if stream is None:
                stream = self._streams[tensor.device] = torch.get_device_module(tensor.device).Stream(tensor.device)
            kept = _Kept(tensor, stream, self._last)
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
