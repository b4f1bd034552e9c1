"""Small arrays on their way between the host and a device that queues its work, without waiting for either."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def on_device(values: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """``values`` as a tensor on ``device``. On a CPU they share memory.

    Through pinned memory: from any other, the host would wait until all that is queued on the device has run.
    """
    host = torch.from_numpy(values)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A small tensor on its way to the host, so that reading it waits for nothing that was queued later."""

    def __init__(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "cpu":
            self._host, self._arrived = tensor, None
        else:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.Event(tensor.device)
            self._arrived.record()

    def read(self) -> list[Any]:
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[Any] = self._host.tolist()
        return values
