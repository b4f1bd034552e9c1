"""Parts to swap to: another cache layout, an exact quantizer, and parts that fail at a moment of one's choice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from drivetrain.contracts.attention import (
    PAGED_BNGD,
    AttentionBatch,
    AttentionSpec,
    AttentionStep,
    KVCache,
    KVContract,
    PagedCache,
)
from drivetrain.contracts.plugin import PluginConfig
from drivetrain.contracts.quantizer import Quantizer
from drivetrain.contracts.scheduler import OrderKey, RequestFacts, StepPlan, View
from drivetrain.pages import PagedConfig
from drivetrain.plugins.attention.sdpa import SdpaAttention
from drivetrain.plugins.quantizer.none import NoQuantizer
from drivetrain.plugins.scheduler.fcfs import FcfsScheduler
from drivetrain.registry import PluginRef, discover


class InjectedError(Exception):
    """A fault that a test asked for."""


GATE = threading.Event()
"""What hangs, in the phases ``hang`` and ``stall``, does so until this is set."""


def hang() -> None:
    assert GATE.wait(60), "nobody opened the gate"


class OtherLayoutAttention(SdpaAttention):
    """The same attention under a KV contract of its own, so that a cache can't be taken over."""

    def kv_contract(self, spec: AttentionSpec) -> KVContract:
        return KVContract("other-BNGD/1", self.config.block_size, spec.dtype)


class ConvertingAttention(OtherLayoutAttention):
    """The other layout, in a backend that takes over a cache of the plain one."""

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return super().abilities() | {"converts"}

    def converts_from(self, theirs: KVContract) -> bool:
        return theirs.layout == PAGED_BNGD

    def convert(
        self,
        spec: AttentionSpec,
        theirs: KVContract,
        cache: PagedCache,
        num_blocks: Sequence[int],
        live_blocks: Sequence[Sequence[int]],
        device: torch.device,
    ) -> PagedCache:
        made: PagedCache = self.allocate(spec, num_blocks, device)
        for group, blocks in zip(spec.groups, live_blocks, strict=True):
            for layer in group.layers:
                for old, new in ((cache.keys, made.keys), (cache.values, made.values)):
                    new[layer][list(blocks)] = old[layer][list(blocks)]
        return made


class FaultyConverter(ConvertingAttention):
    """Fails when it converts."""

    def convert(self, *_: object) -> PagedCache:
        raise InjectedError("attention was told to fail in commit")


class PlainOnlyAttention(SdpaAttention):
    """The same attention, but for keys and values with scales."""

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return super().abilities() - {"kv_int8", "kv_fp8"}


class SameLayoutAttention(SdpaAttention):
    """Another backend with the same KV contract."""


class ExactLinear(nn.Module):
    """A linear layer in another module, with the same numbers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        return out


class ExactQuantizer(Quantizer):
    """Replaces every linear layer by one that computes the same numbers."""

    def bits_per_weight(self) -> float | None:
        return None

    def convert(self, name: str, linear: nn.Linear) -> nn.Module:
        return ExactLinear(linear)


class FaultConfig(PluginConfig):
    """phase: prepare, hang (while it is prepared), commit, raise, nan or stall; after: steps of the live engine before
    the last three strike."""

    phase: str = "raise"
    after: int = 1


class FaultyAttention(SameLayoutAttention):
    """Fails in the phase that it is told to."""

    class Config(FaultConfig, PagedConfig):
        pass

    def __init__(self, config: Any) -> None:
        if config.phase == "prepare":
            raise InjectedError("attention was told to fail in prepare")
        if config.phase == "hang":
            hang()
        super().__init__(config)
        self._begun = 0

    def begin(self, spec: AttentionSpec, batch: AttentionBatch, cache: KVCache | None) -> AttentionStep:
        step = super().begin(spec, batch, cache)
        # The warming up runs one request; live batches of the tests have more.
        if batch.num_sequences > 1:
            self._begun += 1
        if batch.num_sequences > 1 and self._begun > self.config.after:  # type: ignore[attr-defined]
            return _FaultyStep(step, self.config.phase)  # type: ignore[attr-defined]
        return step


class _FaultyStep:
    def __init__(self, step: AttentionStep, phase: str) -> None:
        self._step, self._phase = step, phase

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self._phase == "raise" and layer == 1:
            raise InjectedError("attention was told to fail in a step")
        if self._phase == "stall" and layer == 1:
            hang()
        # Not only the answer is spoilt but the cache too: nothing of it may be used afterwards.
        spoilt = v * float("nan") if self._phase == "nan" else v
        return self._step.attend(layer, q, k, spoilt)


class FaultyScheduler(FcfsScheduler):
    """Fails in the phase that it is told to."""

    class Config(FaultConfig):
        max_batched_tokens: int = 512
        max_running: int = 64

    def __init__(self, config: Any) -> None:
        if config.phase == "prepare":
            raise InjectedError("the scheduler was told to fail in prepare")
        if config.phase == "hang":
            hang()
        super().__init__(config)
        self._keys = 0
        self._plans = 0

    def key(self, request: RequestFacts) -> OrderKey:
        self._keys += request.request_id != "warm[0]"
        if self.config.phase == "commit" and self._keys > self.config.after:  # type: ignore[attr-defined]
            raise InjectedError("the scheduler was told to fail in commit")
        return super().key(request)

    def plan(self, view: View) -> StepPlan:
        self._plans += len(view.running) > 1
        if self.config.phase == "raise" and self._plans > self.config.after:  # type: ignore[attr-defined]
            raise InjectedError("the scheduler was told to fail in a step")
        return super().plan(view)


class FaultyQuantizer(NoQuantizer):
    """Fails in the phase that it is told to."""

    Config = FaultConfig

    def convert(self, name: str, linear: nn.Linear) -> nn.Module:
        if self.config.phase == "prepare":  # type: ignore[attr-defined]
            raise InjectedError("the quantizer was told to fail in prepare")
        if self.config.phase == "hang":  # type: ignore[attr-defined]
            hang()
        if self.config.phase == "nan" and name.endswith("down_proj"):  # type: ignore[attr-defined]
            return _SpoiltLinear(linear, self.config.after)  # type: ignore[attr-defined]
        return linear


class _SpoiltLinear(nn.Module):
    def __init__(self, linear: nn.Linear, after: int) -> None:
        super().__init__()
        self.linear, self._calls, self._after = linear, 0, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        self._calls += x.shape[0] > 4
        return out * float("nan") if self._calls > self._after else out


PARTS: dict[str, Sequence[tuple[str, Callable[..., Any]]]] = {
    "attention": (
        ("other-layout", OtherLayoutAttention),
        ("same-layout", SameLayoutAttention),
        ("plain-only", PlainOnlyAttention),
        ("converting", ConvertingAttention),
        ("faulty-converter", FaultyConverter),
        ("faulty", FaultyAttention),
    ),
    "quantizer": (("exact", ExactQuantizer), ("faulty", FaultyQuantizer)),
    "scheduler": (("faulty", FaultyScheduler),),
}


def refs_with_swap_parts() -> tuple[PluginRef, ...]:
    """The installed plugins, and the parts above."""
    own = [
        PluginRef(kind, name, "swap-parts", "1.0", f"{part.__module__}:{part.__name__}")
        for kind, parts in PARTS.items()
        for name, part in parts
    ]
    return (*discover(), *own)
