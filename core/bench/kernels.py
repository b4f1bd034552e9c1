"""Measures kernel providers on this machine: every use of every operation, beside the machine's own ceilings."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.contracts.kernels import OPERATIONS, KernelProvider, KernelSpec
from drivetrain.contracts.source import Progress, silent
from drivetrain.errors import ConfigError, DrivetrainError, NoCandidateError, nearest
from drivetrain.hardware import read_cache_bytes, read_memory
from drivetrain.kernel_record import ROW_CLASSES, Ceilings, Measurement, use_of, version_of
from drivetrain.packed.gguf import block_type
from drivetrain.registry.discovery import PluginRef, load
from drivetrain.registry.selection import means, probe_safely
from drivetrain.testing.kernel_oracle import Case

if TYPE_CHECKING:
    from drivetrain.assembly import Parts
    from drivetrain.contracts.platform import Platform

_LEAST_SAMPLES, _MOST_SAMPLES = 5, 21
_SAMPLE_SECONDS = 0.002
"""One sample repeats the call until it takes this long: the clock and a busy moment then weigh little."""
_USE_SECONDS = 0.5
"""Time for one provider at one number of rows, once it has its least samples."""

_LEAST_COLD_BYTES, _MOST_COLD_BYTES, _MOST_COPIES = 256 << 20, 1 << 30, 1024
"""A call finds weights in memory, not in a cache: calls go round copies of the inputs that no cache holds together.
What is so small that this many copies stay in a cache stays there in a model too."""

_CEILING_SIZE = {"cpu": 1024}
_CEILING_SIZE_ELSEWHERE = 8192

_PRODUCTS: Mapping[str, tuple[int, str, str]] = {
    "linear": (2, "I", "O"),
    "gated_linear": (4, "I", "O"),
    "linear_cross_entropy": (2, "E", "V"),
    "linear_int8": (2, "I", "O"),
    "linear_int4": (2, "I", "O"),
    "linear_int4_a8": (2, "I", "O"),
    "linear_fp8": (2, "I", "O"),
    "linear_int3": (2, "I", "O"),
    "linear_w8a8": (2, "I", "O"),
    "linear_fp8a8": (2, "I", "O"),
    "linear_gguf": (2, "I", "O"),
    "linear_gguf_a8": (2, "I", "O"),
}
"""Operations that multiply matrices -> additions and multiplications for each row and pair of these two dims."""

_ROW_DIMS = ("...", "T", "S")
_BLOCK_SIZE = 16

_LAYER = ((576, 576), (576, 192), (576, 1536), (1536, 576))
_LAYER_AND_HEAD = (*_LAYER, (576, 49152))
USUAL: Mapping[str, tuple[tuple[Mapping[str, int], Mapping[str, float]], ...]] = {
    "rms_norm": (({"E": 576}, {"eps": 1e-5}),),
    "add_rms_norm": (({"E": 576}, {"eps": 1e-5}),),
    "rope": (({"H": 9, "G": 3, "D": 64, "R": 64}, {}),),
    "rope_write": (({"H": 9, "G": 3, "D": 64, "R": 64, "N": _BLOCK_SIZE}, {}),),
    "silu_mul": (({"E": 1536}, {}),),
    "gelu_tanh_mul": (({"E": 1536}, {}),),
    "linear": tuple(({"I": inner, "O": outer}, {}) for inner, outer in _LAYER_AND_HEAD),
    "gated_linear": (({"I": 576, "O": 1536}, {"activation": 0.0}),),
    "linear_cross_entropy": (({"E": 576, "V": 49152}, {}),),
    "sample": (({"V": 49152}, {}),),
    "linear_int8": tuple(({"I": inner, "O": outer}, {}) for inner, outer in _LAYER_AND_HEAD),
    "linear_int4": tuple(({"I": inner, "O": outer}, {"group": 32.0}) for inner, outer in _LAYER_AND_HEAD),
    "linear_int4_a8": tuple(({"I": inner, "O": outer}, {"group": 32.0}) for inner, outer in _LAYER_AND_HEAD),
    "linear_fp8": tuple(({"I": inner, "O": outer}, {}) for inner, outer in _LAYER_AND_HEAD),
    "linear_int3": tuple(({"I": inner, "O": outer}, {"group": 32.0}) for inner, outer in _LAYER_AND_HEAD),
    "linear_w8a8": tuple(({"I": inner, "O": outer}, {}) for inner, outer in _LAYER_AND_HEAD),
    "linear_fp8a8": tuple(({"I": inner, "O": outer}, {}) for inner, outer in _LAYER_AND_HEAD),
    "linear_gguf": tuple(
        ({"I": inner, "O": outer}, {"type": number}) for inner, outer in _LAYER_AND_HEAD for number in (3.0, 8.0)
    ),
    "linear_gguf_a8": tuple(
        ({"I": inner, "O": outer}, {"type": number}) for inner, outer in _LAYER_AND_HEAD for number in (3.0, 8.0)
    ),
}
"""Operation -> its uses (sizes, params) in smollm2-135m; those that its decoder does not bind, in sizes that it has."""


@dataclass(frozen=True)
class Refused:
    """A use that a provider was not measured in, and why."""

    operation: str
    sizes: Mapping[str, int]
    provider: str
    reason: str


@dataclass(frozen=True)
class Offer:
    """A provider that can work here."""

    name: str
    version: str
    provider: KernelProvider


# --- what is measured ----------------------------------------------------------------------------------------------


def usual_specs(device_type: str, dtype: str, operations: Iterable[str] = ()) -> list[KernelSpec]:
    """The uses that smollm2-135m has."""
    chosen = check_operations(operations) or [name for name in OPERATIONS if not OPERATIONS[name].takes_modules]
    return [
        KernelSpec(operation, device_type, dtype, sizes, params)
        for operation in chosen
        for sizes, params in USUAL.get(operation, ())
    ]


def sized_specs(device_type: str, dtype: str, operations: Iterable[str], sizes: Mapping[str, int]) -> list[KernelSpec]:
    """One use of each operation, with the given sizes. Raises ConfigError when an operation needs another one."""
    chosen = check_operations(operations)
    if not chosen:
        raise ConfigError("sizes belong to an operation", where="--sizes", hint="Name it with --operation.")
    specs = []
    for operation in chosen:
        (usual, params), *_ = USUAL[operation]
        missing = [dim for dim in usual if dim not in sizes and dim != "N"]
        if missing:
            raise ConfigError(
                f"{operation} needs the size {missing[0]}",
                where="--sizes",
                found=", ".join(f"{dim}={size}" for dim, size in sizes.items()),
                allowed=", ".join(f"{dim}={size}" for dim, size in usual.items()),
            )
        own = {dim: sizes.get(dim, _BLOCK_SIZE) for dim in usual}
        specs.append(KernelSpec(operation, device_type, dtype, own, params))
    return specs


def model_specs(parts: Parts, operations: Iterable[str] = (), progress: Progress = silent) -> list[KernelSpec]:
    """The uses that the named model binds. Builds it, and lets it go again."""
    from drivetrain.assembly import build_model

    chosen = check_operations(operations)
    _, binder = build_model(parts, parts.kernels, parts.quantizer, progress)
    specs = {use_of(binding.spec): binding.spec for binding in binder.bindings}
    return [
        spec
        for spec in specs.values()
        if (not chosen or spec.operation in chosen) and not OPERATIONS[spec.operation].takes_modules
    ]


def parse_sizes(text: str) -> dict[str, int]:
    """``E=576,I=1536`` as a table. Raises ConfigError."""
    sizes = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*([A-Z])\s*=\s*([1-9]\d*)\s*", part)
        if match is None:
            raise ConfigError("not a size", where="--sizes", found=part, allowed="DIM=NUMBER, such as E=576")
        sizes[match[1]] = int(match[2])
    return sizes


def check_operations(names: Iterable[str]) -> list[str]:
    """The names, each of which must be a logical operation. Raises ConfigError."""
    chosen = list(names)
    for name in chosen:
        if name not in OPERATIONS:
            close = nearest(name, OPERATIONS)
            raise ConfigError(
                "no such logical operation",
                where="--operation",
                found=name,
                allowed=sorted(OPERATIONS),
                hint=f"Did you mean {close!r}?" if close else None,
            )
        if OPERATIONS[name].takes_modules:
            raise ConfigError(
                f"{name} works on a whole model's layers, which are not measured alone",
                where="--operation",
                hint="Run: drivetrain bench latency --model NAME",
            )
    return chosen


def check_dtype(name: str) -> str:
    """The name, which must be of a floating torch dtype that operations have tolerances in. Raises ConfigError."""
    allowed = sorted({dtype for operation in OPERATIONS.values() for dtype in operation.tolerance})
    if name not in allowed:
        raise ConfigError("not a dtype of activations", where="--dtype", found=name, allowed=allowed)
    return name


def offers(parts: Parts, names: Sequence[str] = ()) -> tuple[list[Offer], list[Refused]]:
    """The providers to measure, the chosen one with its options, and those that refuse as a whole.

    names: only these; by default every one that can work here. Raises UnknownPluginError for a name that nobody has,
    and NoCandidateError when none of them can work.
    """
    refs = [parts.registry.find("kernels", name) for name in names] or parts.registry.candidates("kernels")
    found, refused = [], []
    for ref in refs:
        reason = _refusal(ref, parts)
        if reason is None:
            found.append(Offer(ref.name, version_of(ref), _create(ref, parts)))
        else:
            refused.append(Refused("", {}, ref.name, reason))
    if not found:
        raise NoCandidateError(
            "no provider can be measured here: " + "; ".join(f"{entry.provider}: {entry.reason}" for entry in refused)
        )
    return found, refused


def _refusal(ref: PluginRef, parts: Parts) -> str | None:
    try:
        probe = probe_safely(load(ref), parts.context)
    except DrivetrainError as error:
        return str(error)
    return None if probe.ok else probe.reason


def _create(ref: PluginRef, parts: Parts) -> KernelProvider:
    if means(parts.report["kernels"].chosen.qualified, ref):
        return parts.kernels
    plugin: Any = load(ref)
    provider: KernelProvider = plugin(plugin.Config())
    return provider


# --- measuring -----------------------------------------------------------------------------------------------------


def measure_ceilings(platform: Platform, dtypes: Iterable[str], offers: Sequence[Offer] = ()) -> Ceilings:
    """What the device can do at best: reading or copying memory, and a large product, each in its best of several.

    offers: on a processor, whose products count too. Torch's library may be made for another maker's.
    """
    device = platform.device()
    memory = torch.ones(cold_bytes() // 4, device=device)
    target = torch.empty_like(memory)
    reading = memory.nbytes / _best_seconds(platform, lambda: memory.sum())
    copying = 2 * memory.nbytes / _best_seconds(platform, lambda: target.copy_(memory))
    size = _CEILING_SIZE.get(device.type, _CEILING_SIZE_ELSEWHERE)
    rates = {}
    for name in dict.fromkeys(("float32", *dtypes)):
        one, other = (torch.randn(size, size, device=device).to(getattr(torch, name)) for _ in range(2))
        spec = KernelSpec("linear", device.type, name, {"I": size, "O": size})
        made = [_make(offer, spec) for offer in offers] if device.type == "cpu" else []
        kernels = [partial(_without_bias, kernel) for kernel in made if not isinstance(kernel, str)]
        products: list[Callable[..., object]] = [torch.matmul, *kernels]
        rates[name] = max(2 * size**3 / _best_seconds(platform, partial(product, one, other)) for product in products)
    return Ceilings(max(reading, copying), rates)


def _without_bias(linear: Callable[..., object], x: torch.Tensor, weight: torch.Tensor) -> object:
    return linear(x, weight, None)


def cold_bytes() -> int:
    """So many bytes that a cache does not hold them; never more than an eighth of the memory that is free."""
    least = min(max(2 * read_cache_bytes(), _LEAST_COLD_BYTES), _MOST_COLD_BYTES)
    return min(least, read_memory().available_bytes // 8)


def _best_seconds(platform: Platform, call: Callable[[], object], times: int = 7) -> float:
    with torch.inference_mode():
        return min(_time(platform, itertools.repeat(call), 1) for _ in range(times))


def _time(platform: Platform, calls: Iterator[Callable[[], object]], repeats: int) -> float:
    """Seconds of one call, over the next ``repeats`` of ``calls``."""
    platform.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        next(calls)()
    platform.synchronize()
    return (time.perf_counter() - started) / repeats


def measure(
    specs: Sequence[KernelSpec],
    found: Sequence[Offer],
    platform: Platform,
    ceilings: Ceilings,
    progress: Progress = silent,
) -> tuple[list[Measurement], list[Refused]]:
    """Every provider in every use, at each class of rows; the providers of one use take turns, sample by sample."""
    measurements: list[Measurement] = []
    refused: list[Refused] = []
    for number, spec in enumerate(specs):
        progress(f"measuring {spec.operation}", number, len(specs), "uses")
        made: list[tuple[Offer, Callable[..., Any]]] = []
        for offer in found:
            kernel = _make(offer, spec)
            if isinstance(kernel, str):
                refused.append(Refused(spec.operation, spec.sizes, offer.name, kernel))
            else:
                made.append((offer, kernel))
        for rows in ROW_CLASSES if made else ():
            measurements += _measure_rows(spec, rows, made, platform, ceilings)
    progress("measuring", len(specs), len(specs), "uses")
    return measurements, refused


def _make(offer: Offer, spec: KernelSpec) -> Callable[..., Any] | str:
    """The callable, or why there is none."""
    if spec.operation not in offer.provider.operations():
        return f"has no {spec.operation}"
    probe = offer.provider.supports(spec)
    if not probe.ok:
        return probe.reason
    try:
        return offer.provider.make(spec)
    except DrivetrainError as error:
        return str(error)


def shapes_of(spec: KernelSpec, rows: int) -> tuple[tuple[int, ...] | None, ...]:
    """The shape of each argument at a number of rows, read off the operation's signature; a bias is left out."""
    signature = OPERATIONS[spec.operation].signature.partition("->")[0]
    optional = re.findall(r"(\w+): (?:\w+ )?\[[^\]]*\] \| None", signature)
    return tuple(
        None if name in optional else tuple(_dim(part.strip(), spec, rows) for part in shape.split(",") if shape)
        for name, shape in OPERATIONS[spec.operation].arguments.items()
    )


def _dim(text: str, spec: KernelSpec, rows: int) -> int:
    if text in _ROW_DIMS:
        return rows
    if text == "B":  # blocks of a cache that is four times as long as what is written
        return 4 * -(-rows // spec.sizes.get("N", _BLOCK_SIZE))
    if text == "bytes":
        return block_type(spec.params).row_bytes(spec.sizes["I"])
    name, _, divisor = text.partition(" / ")
    size = spec.sizes.get(name, _BLOCK_SIZE) if name == "N" else spec.sizes[name]
    return size if not divisor else size // int(spec.params[divisor] if divisor.isalpha() else divisor)


def work_of(spec: KernelSpec, rows: int, inputs: Sequence[torch.Tensor | None], results: Any) -> tuple[int, int]:
    """(bytes, floating-point operations) that any implementation has to move and to compute.

    Every input is read once and every result written once; of what is written to in place, only the rows. Operations
    are counted of matrix products alone: elsewhere memory is what a machine waits for.
    """
    operation = OPERATIONS[spec.operation]
    outputs = results if isinstance(results, tuple | list) else (results,)
    moved = sum(tensor.nbytes for tensor in outputs)
    for name, tensor in zip(operation.arguments, inputs, strict=True):
        if tensor is not None:
            in_place = name in operation.writes
            moved += rows * tensor[0, 0].nbytes if in_place else tensor.nbytes
    if spec.operation not in _PRODUCTS:
        return moved, 0
    factor, one, other = _PRODUCTS[spec.operation]
    return moved, factor * rows * spec.sizes[one] * spec.sizes[other]


def _measure_rows(
    spec: KernelSpec,
    rows: int,
    made: Sequence[tuple[Offer, Callable[..., Any]]],
    platform: Platform,
    ceilings: Ceilings,
) -> Iterator[Measurement]:
    case = Case(spec.operation, shapes_of(spec, rows), spec.sizes, spec.params)
    inputs = case.inputs(getattr(torch, spec.dtype), str(platform.device()))
    size = sum(tensor.nbytes for tensor in inputs if tensor is not None)
    num_copies = min(_MOST_COPIES, -(-cold_bytes() // max(size, 1)))
    copies = [inputs, *(_copy(inputs) for _ in range(num_copies - 1))]
    with torch.inference_mode():
        results = made[0][1](*_copy(inputs))
        samples = _take_turns([[_bound(kernel, copy) for copy in copies] for _, kernel in made], platform)
    moved, flops = work_of(spec, rows, inputs, results)
    for (offer, _), times in zip(made, samples, strict=True):
        deciles = statistics.quantiles(times, n=10, method="inclusive")
        median = statistics.median(times)
        yield Measurement(
            operation=spec.operation,
            device_type=spec.device_type,
            dtype=spec.dtype,
            sizes=dict(spec.sizes),
            params=dict(spec.params),
            rows=rows,
            provider=offer.name,
            version=offer.version,
            median_seconds=median,
            low_seconds=deciles[0],
            high_seconds=deciles[-1],
            num_samples=len(times),
            moved_bytes=moved,
            flops=flops,
            share=ceilings.floor_seconds(moved, flops, spec.dtype) / median,
            date=datetime.date.today().isoformat(),
        )


def _copy(inputs: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.clone() for tensor in inputs)


def _bound(kernel: Callable[..., Any], inputs: Sequence[torch.Tensor | None]) -> Callable[[], object]:
    return lambda: kernel(*inputs)


def _take_turns(calls: Sequence[Sequence[Callable[[], object]]], platform: Platform) -> list[list[float]]:
    """Samples of each provider, one of each in turn, so that a busy moment of the machine strikes all alike."""
    rounds = [itertools.cycle(own) for own in calls]
    repeats = []
    for own in rounds:
        _time(platform, own, 1)  # compiles, tunes, allocates
        once = _time(platform, own, 1)
        few = max(1, min(10, round(_SAMPLE_SECONDS / max(once, 1e-9))))
        repeats.append(max(1, round(_SAMPLE_SECONDS / max(_time(platform, own, few), 1e-9))) if few > 1 else 1)
    samples: list[list[float]] = [[] for _ in calls]
    started = time.perf_counter()
    while len(samples[0]) < _MOST_SAMPLES:
        if len(samples[0]) >= _LEAST_SAMPLES and time.perf_counter() - started > _USE_SECONDS * len(calls):
            break
        for own, number, times in zip(rounds, repeats, samples, strict=True):
            times.append(_time(platform, own, number))
    return samples


def busy_note(usable_cores: int) -> str | None:
    """What to say when other work runs on the machine: a figure taken beside it says little."""
    load = os.getloadavg()[0]
    if load < 0.5 * usable_cores:
        return None
    return f"other work runs on this machine (load {load:.1f} on {usable_cores} cores): compare ratios, not times"


def summarize(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Measurements in JSON-able form with their rates: bytes and operations per second, and the spread."""
    return [
        {
            **dataclasses.asdict(m),
            "bytes_per_second": m.moved_bytes / m.median_seconds,
            "flops_per_second": m.flops / m.median_seconds,
        }
        for m in measurements
    ]
