"""What a checkpoint policy saves and costs, measured on the run's own model and data."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

if TYPE_CHECKING:
    from drivetrain.contracts.checkpoint import CheckpointPolicy


@dataclass(frozen=True)
class PassCost:
    """One forward and backward.

    peak_bytes: most bytes of tensors of the device that were alive at one time and were not there before; gradients of
                parameters are among them.
    kept_bytes: those that were alive between forward and backward.
    seconds:    of a second pass, without what measuring costs.
    """

    peak_bytes: int
    kept_bytes: int
    seconds: float


class _Bytes(TorchDispatchMode):
    """Follows the storages that operations make on one kind of device, and when they go."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type
        self.alive = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {
            tensor.untyped_storage()._cdata
            for tensor in tree_iter((args, kwargs))
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        }
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage._cdata not in inputs and storage.device.type == self._device_type:
                    self._follow(storage)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.alive -= size


def measure_pass(
    model: torch.nn.Module, forward: Callable[[], torch.Tensor], synchronize: Callable[[], None]
) -> PassCost:
    """Measure one forward and backward. Gradients and random states are afterwards as they were.

    forward: computes the loss.
    """
    random_state = torch.get_rng_state()
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        _clear(model)
        with _Bytes(next(model.parameters()).device.type) as bytes_of:
            loss = forward()
            kept = bytes_of.alive
            loss.backward()
        _clear(model)
        synchronize()
        started = time.perf_counter()
        forward().backward()
        synchronize()
        seconds = time.perf_counter() - started
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        torch.set_rng_state(random_state)
    return PassCost(bytes_of.peak, kept, seconds)


def measure_policy(
    policy: CheckpointPolicy,
    model: torch.nn.Module,
    forward: Callable[[], torch.Tensor],
    synchronize: Callable[[], None],
    units: tuple[str, ...],
) -> tuple[PassCost, PassCost | None]:
    """A pass with the policy, and one without it, or None where that does not fit into the memory. The model is as it
    was afterwards: a policy changes how modules are called."""
    try:
        without = measure_pass(model, forward, synchronize)
    except torch.OutOfMemoryError:
        without = None
    calls = {module: module.__dict__.get("forward") for module in model.modules()}
    policy.apply(model, units)
    try:
        return measure_pass(model, forward, synchronize), without
    finally:
        for module, call in calls.items():
            if call is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = call


def _clear(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def compared(policy: str, with_policy: PassCost, without: PassCost | None) -> str:
    """In a sentence."""
    kept, peak = (f"{value / 2**20:.1f} MiB" for value in (with_policy.kept_bytes, with_policy.peak_bytes))
    if without is None:
        return f"checkpoint {policy} keeps {kept} of activations; without it a micro-batch does not fit into the memory"
    return (
        f"checkpoint {policy} keeps {kept} of activations in place of {without.kept_bytes / 2**20:.1f} MiB "
        f"(peak {peak} in place of {without.peak_bytes / 2**20:.1f} MiB), and a forward and backward take "
        f"{with_policy.seconds / without.seconds:.2f} times as long"
    )
