"""The Triton kernels against the ceilings of this GPU, and serving beside them; writes docs/benchmarks/gpu.md.

    python tests/benchmarks/gpu/run.py [--quick] [--only decode serving] [--output docs/benchmarks/gpu.md]

Pointwise kernels and decode attention are bound by memory: their bytes a second are shown as a share of what a plain
copy of 1 GiB reaches here. Prefill attention is compared with the fastest of torch's own backends, forward and back. A
figure is the median of eleven launches, each after the cache of the device was filled with other numbers, which takes
longer than Python takes to launch: what is timed is the device.

Decodes are timed as a server runs them, in a graph that is replayed: the layers one after another, each with keys and
values of its own, and the figure is for one of them. Where little is read, no kernel comes near the bandwidth:
beside each figure is that of a copy of as many bytes, in a graph of as many nodes. Products of few rows by packed
weights are timed in such a graph too; their bytes are those of the weights.

Whole models are served by ``serving.py`` beside this file, which has options of its own.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import serving
from drivetrain.contracts.attention import AttentionBatch, AttentionSpec, LayerAttention, TakesWritten
from drivetrain.contracts.kernels import KernelSpec
from drivetrain.kernels.triton import TritonKernels
from drivetrain.packed.gguf import BLOCK_TYPES
from drivetrain.plugins.attention.paged_triton import PagedTritonAttention
from drivetrain.testing.attention_oracle import whole_batch

PAGE = Path(__file__).resolve().parents[3] / "docs" / "benchmarks" / "gpu.md"
DTYPE = torch.bfloat16
TOKENS, FEATURES, INNER, HEADS, KV_HEADS, SIZE, BLOCK = 8192, 4096, 14_336, 32, 8, 128, 16
"""The shape of an 8B Llama."""

REPEATS = 11
LAYERS, LAYERS_BYTES = 32, 16 << 30
"""Decodes are timed over as many layers as that model has, or fewer where their keys and values took more than that."""

POINTWISE_TARGET, DECODE_TARGET, PREFILL_TARGET, PACKED_TARGET = 0.85, 0.80, 0.9, 0.6


@dataclass(frozen=True)
class Line:
    """One row of a table: what ran, its milliseconds, and what that is a share of what."""

    name: str
    milliseconds: float
    rate: float
    share: float
    target: float

    def cells(self, unit: str) -> str:
        verdict = "yes" if self.share >= self.target else "no"
        return f"| {self.name} | {self.milliseconds:.3f} | {self.rate:,.0f} {unit} | {self.share:.0%} | {verdict} |"


class Clock:
    """Times launches with a cold cache."""

    def __init__(self) -> None:
        self._others = torch.zeros(64 << 20, dtype=torch.float32, device="cuda")

    def milliseconds(self, launch: Callable[[], object]) -> float:
        for _ in range(3):
            launch()
        times = []
        for _ in range(REPEATS):
            for _ in range(4):
                self._others.sum()  # read, not written: what a kernel has to write back is then its own
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            launch()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)

    def replayed(self, launch: Callable[[], object]) -> float:
        """The same of a graph that ``launch`` is recorded into."""
        launch()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        return self.milliseconds(graph.replay)


def randn(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=DTYPE).requires_grad_(grad)


def copy_bandwidth(clock: Clock) -> float:
    """Bytes a second of a plain copy, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock.milliseconds(lambda: target.copy_(source)) * 1e3


def pointwise(clock: Clock, bandwidth: float, quick: bool) -> Iterator[Line]:
    kernels = TritonKernels(TritonKernels.Config())

    def make(operation: str) -> Callable[..., object]:
        return kernels.make(KernelSpec(operation, "cuda", "bfloat16", {}, {"eps": 1e-5}))

    x, residual, weight = randn(TOKENS, FEATURES), randn(TOKENS, FEATURES), randn(FEATURES)
    gate, up = randn(TOKENS, INNER), randn(TOKENS, INNER)
    q, k, v = randn(TOKENS, HEADS, SIZE), randn(TOKENS, KV_HEADS, SIZE), randn(TOKENS, KV_HEADS, SIZE)
    angles = torch.rand(TOKENS, SIZE // 2, device="cuda").repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    caches = [torch.zeros(TOKENS // BLOCK, BLOCK, KV_HEADS, SIZE, device="cuda", dtype=DTYPE) for _ in range(2)]
    slots = torch.randperm(TOKENS, device="cuda")
    written = q.nbytes + k.nbytes + v.nbytes
    uses: list[tuple[str, tuple[torch.Tensor, ...], int]] = [
        ("rms_norm", (x, weight), 2 * x.nbytes),
        ("add_rms_norm", (x, residual, weight), 4 * x.nbytes),
        ("silu_mul", (gate, up), 3 * gate.nbytes),
        ("gelu_tanh_mul", (gate, up), 3 * gate.nbytes),
        ("rope", (q, k, cos, sin), 2 * (q.nbytes + k.nbytes) + 2 * cos.nbytes),
        ("rope_write", (q, k, v, cos, sin, *caches, slots), 2 * written + 2 * cos.nbytes),
    ]
    for operation, arguments, num_bytes in uses:
        kernel = make(operation)
        with torch.no_grad():
            taken = clock.milliseconds(lambda kernel=kernel, arguments=arguments: kernel(*arguments))  # type: ignore[misc]
        rate = num_bytes / taken * 1e3
        yield Line(f"`{operation}`", taken, rate / 1e9, rate / bandwidth, POINTWISE_TARGET)


def decode(clock: Clock, bandwidth: float, quick: bool) -> Iterator[Line]:
    room = torch.cuda.mem_get_info()[0] * 0.6
    for batch in (1, 16, 256) if quick else (1, 4, 16, 64, 256):
        for length in (512, 8192) if quick else (512, 2048, 8192, 32_768, 131_072):
            num_bytes = 2 * batch * length * KV_HEADS * SIZE * DTYPE.itemsize
            if num_bytes > room:
                continue
            layers = max(1, min(LAYERS, LAYERS_BYTES // num_bytes))
            taken = clock.replayed(decodes(batch, length, layers)) / layers
            copied = clock.replayed(copies(num_bytes, layers)) / layers
            rate = num_bytes / taken * 1e3
            name = f"batch {batch}, context {length:,} (copy: {copied:.4f} ms)"
            yield Line(name, taken, rate / 1e9, rate / bandwidth, DECODE_TARGET)


def copies(num_bytes: int, count: int) -> Callable[[], None]:
    """As many bytes read and written together."""
    pairs = torch.zeros(count, 2, num_bytes // 2, dtype=torch.uint8, device="cuda")

    def launch() -> None:
        for source, target in pairs:
            target.copy_(source)

    return launch


def decodes(batch: int, length: int, layers: int) -> Callable[[], None]:
    """A decode step's attention in some layers, over random pages in shuffled blocks."""
    spec = AttentionSpec((LayerAttention(HEADS, KV_HEADS, SIZE, SIZE**-0.5),) * layers, "bfloat16")
    device, blocks = torch.device("cuda"), length // BLOCK
    backend = PagedTritonAttention(PagedTritonAttention.Config(block_size=BLOCK))
    cache = backend.allocate(spec, [batch * blocks], device)
    for pages in (*cache.keys, *cache.values):
        pages.normal_()
    table = torch.randperm(batch * blocks, device=device, dtype=torch.int32).view(batch, blocks)
    slots = table[:, -1].long() * BLOCK + BLOCK - 1
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    starts = whole_batch([1] * batch, device).query_starts
    step = AttentionBatch([1] * batch, [length - 1] * batch, starts, lengths, (table,), (slots,))
    q = randn(batch, HEADS, SIZE)

    def launch() -> None:
        attending = backend.begin(spec, step, cache)
        assert isinstance(attending, TakesWritten)
        for layer in range(layers):
            attending.attend_written(layer, q)

    return launch


def packed(clock: Clock, bandwidth: float, quick: bool) -> Iterator[Line]:
    """Products by packed weights, and plain ones beside them: the bytes of the weights, by the time of a layer in a
    replayed graph in which every layer has weights of its own."""
    kernels, layers = TritonKernels(TritonKernels.Config()), 8
    types = [number for number, kind in BLOCK_TYPES.items() if not quick or kind.name in ("Q8_0", "Q4_K")]
    uses: list[tuple[str, str, dict[str, float]]] = [("linear", "bfloat16", {})]
    uses += [("linear_gguf", BLOCK_TYPES[number].name, {"type": float(number)}) for number in types]
    uses += [("linear_int4", "groups of 64", {"group": 64.0}), ("linear_int8", "by row", {})]
    for operation, what, params in uses:
        spec = KernelSpec(operation, "cuda", "bfloat16", {"I": FEATURES, "O": INNER}, params)
        product, weights = kernels.make(spec), [_weights(operation, params) for _ in range(layers)]
        num_bytes = sum(tensor.nbytes for tensor in weights[0])
        for rows in (1, 16) if quick else (1, 2, 4, 16, 64, 512):
            x = randn(rows, FEATURES)

            def launch(x: torch.Tensor = x, product: Callable[..., object] = product, weights: Any = weights) -> None:
                for tensors in weights:
                    product(x, *tensors, None)

            with torch.no_grad():
                taken = clock.replayed(launch) / layers
            rate = num_bytes / taken * 1e3
            yield Line(f"`{operation}`, {what}, {rows}", taken, rate / 1e9, rate / bandwidth, PACKED_TARGET)


def _weights(operation: str, params: Mapping[str, float]) -> tuple[torch.Tensor, ...]:
    """Of any bytes."""
    if operation == "linear":
        return (randn(INNER, FEATURES),)
    if operation == "linear_int8":
        return _bytes(INNER, FEATURES).view(torch.int8), torch.rand(INNER, device="cuda")
    if operation == "linear_int4":
        scales, mins = torch.rand(2, INNER, FEATURES // int(params["group"]), device="cuda", dtype=DTYPE)
        return _bytes(INNER, FEATURES // 2), scales, mins
    return (_bytes(INNER, BLOCK_TYPES[int(params["type"])].row_bytes(FEATURES)),)


def _bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")


def prefill(clock: Clock, bandwidth: float, quick: bool) -> Iterator[Line]:
    """Milliseconds of torch's fastest backend, as a share of ours."""
    layer = LayerAttention(HEADS, KV_HEADS, SIZE, SIZE**-0.5)
    spec, device = AttentionSpec((layer,), "bfloat16"), torch.device("cuda")
    backend = PagedTritonAttention(PagedTritonAttention.Config())
    peers = _peers()
    for length in (1024, 4096) if quick else (512, 1024, 2048, 4096, 8192, 16_384):
        count = max(1, 16_384 // length)
        heads = (HEADS, KV_HEADS, KV_HEADS)
        own = [randn(count * length, n, SIZE, grad=True) for n in heads]
        theirs = [x.detach().view(count, length, -1, SIZE).transpose(1, 2).requires_grad_() for x in own]
        step = backend.begin(spec, whole_batch([length] * count, device), None)
        products = 2 * count * HEADS * length * length * SIZE  # two products, half of each hidden
        for name, factor in (("forward", 1.0), ("backward", 2.5)):
            mine = _times(clock, lambda: step.attend(0, *own), own, name)  # noqa: B023
            best, peer = min((_peer_times(clock, kind, theirs, name), kind.name) for kind in peers)
            rate = products * factor / mine / 1e9
            told = f"{count} x {length:,}, {name} (torch: {peer.lower()}, {best:.3f} ms)"
            yield Line(told, mine, rate, best / mine, PREFILL_TARGET)


def _torch_attention(inputs: list[torch.Tensor]) -> torch.Tensor:
    return functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)


def _peers() -> list[SDPBackend]:
    """Those of torch's backends that take such heads; what the others say is printed once."""
    inputs = [randn(1, n, 256, SIZE, grad=True) for n in (HEADS, KV_HEADS, KV_HEADS)]
    peers = []
    for kind in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        with sdpa_kernel(kind), warnings.catch_warnings(record=True) as reasons:
            warnings.simplefilter("always")
            try:
                _torch_attention(inputs).sum().backward()
                peers.append(kind)
            except RuntimeError:
                said = " ".join(str(warning.message).splitlines()[0] for warning in reasons)
                print(f"torch's {kind.name} refuses: {said}", file=sys.stderr)
    return peers


def _peer_times(clock: Clock, kind: SDPBackend, inputs: list[torch.Tensor], name: str) -> float:
    with sdpa_kernel(kind):
        return _times(clock, lambda: _torch_attention(inputs), inputs, name)


def _times(clock: Clock, attend: Callable[[], torch.Tensor], inputs: list[torch.Tensor], name: str) -> float:
    if name == "forward":
        with torch.no_grad():
            return clock.milliseconds(attend)
    out = attend()
    grad = torch.randn_like(out)
    return clock.milliseconds(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))


SECTIONS: dict[str, tuple[str, str, str, Callable[[Clock, float, bool], Iterator[Line]]]] = {
    "pointwise": (
        "Norms, activations, rotary embedding",
        "GB/s",
        "| kernel | ms | rate | share of copy | 85% |",
        pointwise,
    ),
    "decode": ("Decode attention", "GB/s", "| batch | ms | rate | share of copy | 80% |", decode),
    "packed": ("Products by packed weights", "GB/s", "| product, rows | ms | rate | share of copy | 60% |", packed),
    "prefill": ("Prefill attention", "TFLOP/s", "| sequences | ms | rate | of torch's best | 90% |", prefill),
}
"""name -> title, unit, head of the table, and what measures its lines."""


def page(tables: dict[str, tuple[str, str, list[Line]]], bandwidth: float, command: str) -> str:
    properties = torch.cuda.get_device_properties(0)
    lines = [
        "# Benchmarks on a GPU",
        "",
        f"{datetime.date.today()}, {properties.name} ({properties.multi_processor_count} processors,",
        f"{properties.total_memory / 2**30:.0f} GiB), torch {torch.__version__}, triton {triton.__version__},",
        f"bfloat16, the shape of an 8B Llama. Medians of {REPEATS} launches with a cold cache. A copy of 1 GiB reaches",
        f"{bandwidth / 1e9:,.0f} GB/s.",
        "",
        "```console other",
        f"$ {command}",
        "```",
    ]
    for title, (unit, head, rows) in tables.items():
        lines += ["", f"## {title}", "", head, "|---|---|---|---|---|", *(row.cells(unit) for row in rows)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parts = [*SECTIONS, "serving"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes; prints and writes nothing")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="some parts; prints and writes nothing")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page to write")
    serving.add_options(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this machine has no GPU that torch can use; nothing was measured and nothing written")
    torch.manual_seed(0)
    clock = Clock()
    bandwidth = copy_bandwidth(clock)
    tables = {
        title: (unit, head, list(lines(clock, bandwidth, options.quick)))
        for name, (title, unit, head, lines) in SECTIONS.items()
        if name in options.only
    }
    text = page(tables, bandwidth, "make bench-gpu")
    del clock
    serving.free_memory()
    if "serving" in options.only and not options.quick:
        text += "\n".join(["", *serving.section(options, bandwidth), ""])
    print(text)
    if not options.quick and set(options.only) == set(parts):
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
