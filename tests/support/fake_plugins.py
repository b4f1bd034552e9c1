"""Small plugins of every kind that serving needs, and schedulers that misbehave in one way each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from drivetrain.contracts.attention import (
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    AttentionStep,
    KVCache,
    KVContract,
    KVGroup,
    LayerAttention,
)
from drivetrain.contracts.frontend import Frontend
from drivetrain.contracts.kernels import KernelProvider, KernelSpec
from drivetrain.contracts.loader import Checkpoint, Loader, TokenizerData
from drivetrain.contracts.model import BuildContext, CausalLM, Model, ModelSpec
from drivetrain.contracts.platform import MemoryInfo, Platform, PlatformFacts
from drivetrain.contracts.plugin import PluginConfig, Probe, ProbeContext, Tier
from drivetrain.contracts.precision import Dtypes, Precision
from drivetrain.contracts.quantizer import Quantizer
from drivetrain.contracts.scheduler import Limits, OrderKey, RequestFacts, Scheduler, StepPlan, View
from drivetrain.contracts.source import Progress, Source
from drivetrain.registry import PluginRef, Registry


def ref(kind: str, name: str, target: type | str, distribution: str = "fakes", version: str = "1.0") -> PluginRef:
    """A reference to a plugin of this module, or to any target given as text."""
    where = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
    return PluginRef(kind, name, distribution, version, where)


# --- schedulers, the kind that selection is tested with ------------------------------------------------------------


class PlainScheduler(Scheduler):
    """Does what the contract asks for, and nothing more."""

    def limits(self) -> Limits:
        return Limits(8, 2)

    def key(self, request: RequestFacts) -> OrderKey:
        return (request.sequence_number,)

    def plan(self, view: View) -> StepPlan:
        return StepPlan(())


class TunedScheduler(PlainScheduler):
    tier = Tier.TUNED


class VendorScheduler(PlainScheduler):
    tier = Tier.VENDOR


class OptionsScheduler(PlainScheduler):
    class Nested(PluginConfig):
        depth: int = 1

    class Config(PluginConfig):
        max_running: int = Field(default=4, ge=1, description="most requests at once")
        label: str = "none"
        nested: OptionsScheduler.Nested | None = None
        anything: Any = None


OptionsScheduler.Config.model_rebuild()


class RefusingScheduler(PlainScheduler):
    tier = Tier.VENDOR

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return Probe.no("no_device", "there is no such device here", wanted="a device", offered="nothing")


class RaisingProbeScheduler(PlainScheduler):
    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        raise ZeroDivisionError("oh no")


class ExitingProbeScheduler(PlainScheduler):
    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        raise SystemExit(3)


class RubbishProbeScheduler(PlainScheduler):
    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return True  # type: ignore[return-value]


class RaisingScheduler(PlainScheduler):
    def __init__(self, config: PluginConfig) -> None:
        raise OSError("the disk is full")


class WitnessScheduler(PlainScheduler):
    """Keeps the context its probe was given."""

    seen: ClassVar[list[ProbeContext]] = []

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        cls.seen.append(context)
        return Probe.yes()


# --- a whole serving set -------------------------------------------------------------------------------------------


class FakePlatform(Platform):
    class Config(PluginConfig):
        free_bytes: int = 2**20

    config: Config
    preferences: ClassVar[Mapping[str, tuple[str, ...]]] = {"attention": ("wide", "narrow")}

    def facts(self) -> PlatformFacts:
        return PlatformFacts("fake", "cpu", "a fake", 1, frozenset({"float32"}), "none", "gloo")

    def activate(self) -> None:
        raise AssertionError("nothing in these tests may open a device")

    def device(self) -> Any:
        @dataclass(frozen=True)
        class Device:
            type: str = "accelerator"

        return Device()

    def memory(self) -> MemoryInfo:
        return MemoryInfo(2 * self.config.free_bytes, self.config.free_bytes)

    def peak_memory_bytes(self) -> int:
        return 0


class FakePrecision(Precision):
    def dtypes(self) -> Dtypes:
        return Dtypes("float32", "float32")

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return cls.probe_dtype(context, "float32")


class HalfPrecision(Precision):
    def dtypes(self) -> Dtypes:
        return Dtypes("float16", "float32")

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return cls.probe_dtype(context, "float16")


class FakeSource(Source):
    """Knows ``tiny-model``, which lies beside this file, and ``far-model``, which is nowhere until fetched."""

    here = Path(__file__).parent

    @classmethod
    def known_names(cls) -> tuple[str, ...]:
        return ("far-model", "odd-model", "tiny-model")

    @classmethod
    def claims(cls, name: str) -> bool:
        return name in cls.known_names()

    def locate(self, name: str) -> Path | None:
        return None if name == "far-model" else self.here / name

    def fetch(self, name: str, progress: Progress) -> Path:
        progress(name, 1, 1)
        return self.here / name


class FakeCheckpoint(Checkpoint):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = {"architectures": ["OddForCausalLM" if path.name == "odd-model" else "TinyForCausalLM"]}
        self.generation_config = {}

    def names(self) -> Sequence[str]:
        return ()

    def shape(self, name: str) -> tuple[int, ...]:
        return ()

    def stored_bytes(self) -> int:
        return 0

    def tensor(self, name: str, dtype: Any) -> Any:
        raise NotImplementedError

    def tokenizer(self) -> TokenizerData:
        raise NotImplementedError


class FakeLoader(Loader):
    @classmethod
    def recognizes(cls, path: Path) -> bool:
        return True

    def open(self, path: Path) -> Checkpoint:
        return FakeCheckpoint(path)


class FakeModel(Model):
    architectures = frozenset({"TinyForCausalLM"})

    def describe(self, config: Mapping[str, Any], dtype: str) -> ModelSpec:
        layers = (LayerAttention(1, 1, 8, 1.0), LayerAttention(1, 1, 8, 1.0, window=16))
        return ModelSpec("TinyForCausalLM", 32, 8, 2, 256, 100, AttentionSpec(layers, dtype))

    def build(self, checkpoint: Checkpoint, context: BuildContext) -> CausalLM:
        raise NotImplementedError


class FakeQuantizer(Quantizer):
    def bits_per_weight(self) -> float | None:
        return None

    def convert(self, name: str, linear: Any) -> Any:
        return linear


class NarrowAttention(AttentionBackend):
    """16 bytes a block of 4 tokens, in each group."""

    def kv_contract(self, spec: AttentionSpec) -> KVContract:
        return KVContract("fake/1", 4, spec.dtype)

    def bytes_per_block(self, spec: AttentionSpec, group: KVGroup) -> int:
        return 16

    def allocate(self, spec: AttentionSpec, num_blocks: Sequence[int], device: Any) -> KVCache:
        return None

    def begin(self, spec: AttentionSpec, batch: AttentionBatch, cache: KVCache | None) -> AttentionStep:
        raise NotImplementedError

    def copy_blocks(self, cache: KVCache, group: KVGroup, pairs: Sequence[tuple[int, int]]) -> None:
        raise NotImplementedError

    def clear_blocks(self, cache: KVCache, group: KVGroup, blocks: Sequence[int]) -> None:
        raise NotImplementedError


class WideAttention(NarrowAttention):
    """Preferred by the fake platform, and able to work only once a model is known."""

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        if context.model is None:
            return Probe.no("no_model", "it must know the model")
        return Probe.yes("it knows the model")


class FakeKernels(KernelProvider):
    """Has the operations it is told of; refuses those for other devices than its own."""

    class Config(PluginConfig):
        names: tuple[str, ...] = ("silu_mul",)
        device_type: str = "cpu"

    config: Config

    def operations(self) -> frozenset[str]:
        return frozenset(self.config.names)

    def supports(self, spec: KernelSpec) -> Probe:
        if spec.device_type == self.config.device_type:
            return Probe.yes()
        return Probe.no("other_device", f"works on {self.config.device_type} only")

    def make(self, spec: KernelSpec) -> Callable[..., Any]:
        return lambda *arguments: (self.config.device_type, spec.operation, arguments)


class FakeFrontend(Frontend):
    def serve(self, engine: Any) -> None:
        raise NotImplementedError


def serving_refs() -> list[PluginRef]:
    """One plugin of each kind that serving needs; two of attention."""
    return [
        ref("platform", "fake", FakePlatform),
        ref("precision", "fp32", FakePrecision),
        ref("source", "fake", FakeSource),
        ref("loader", "fake", FakeLoader),
        ref("model", "tiny", FakeModel),
        ref("quantizer", "none", FakeQuantizer),
        ref("attention", "narrow", NarrowAttention),
        ref("attention", "wide", WideAttention),
        ref("kernels", "reference", FakeKernels),
        ref("scheduler", "fcfs", OptionsScheduler),
        ref("frontend", "openai", FakeFrontend),
    ]


def serving_registry(*more: PluginRef) -> Registry:
    return Registry([*serving_refs(), *more])
