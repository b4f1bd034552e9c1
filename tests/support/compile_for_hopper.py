"""Compiles every Triton kernel for an H100 on a machine without a GPU, and prints what came of it as JSON lines.

Run as a script, in a process without the interpreter: a driver that knows its target but has no device takes the place
of Triton's own, the wrappers are called with small tensors in main memory, and every launch ends after compiling.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from drivetrain.contracts.attention import FULL_KV, SCALED_KV, AttentionSpec, LayerAttention
from drivetrain.contracts.kernels import KernelSpec
from drivetrain.kernels.triton import TritonKernels, operators, tuner_of
from drivetrain.kernels.triton import launch as launching
from drivetrain.kernels.triton.tuning import Tuner
from drivetrain.plugins.attention import paged_triton
from drivetrain.plugins.attention.paged_triton import PagedTritonAttention
from drivetrain.testing.attention_oracle import BlockBook, opened, whole_batch

CPU = torch.device("cpu")
DTYPE = torch.bfloat16


class HopperWithoutADevice:
    """What Triton asks a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


known_counts: list[bool] = []
"""Not empty while what is compiled differs from what came before in counts of tokens, rows and sequences alone."""


def compile_only() -> None:
    """From here on, a launch compiles and prints, and nothing runs."""
    driver.set_active(HopperWithoutADevice())
    launch, seen = JITFunction.run, set()

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
        if kernel.metadata.hash not in seen:
            seen.add(kernel.metadata.hash)
            ptx = kernel.asm["ptx"]
            facts = {
                "kernel": f"{self.fn.__module__.rpartition('.')[2]}.{self.__name__}",
                "shared_bytes": kernel.metadata.shared,
                "tensor_core_products": ptx.count("wgmma.mma_async") + ptx.count("mma.sync"),
                "wide_loads": ptx.count(".v4.b32"),
                "bulk_copies": ptx.count("cp.async.bulk.tensor"),
                "for_a_count": bool(known_counts),
            }
            print(json.dumps(facts), flush=True)
        return kernel

    JITFunction.run = run
    for module in (launching, *_modules()):
        if hasattr(module, "num_processors"):
            module.num_processors = lambda device: 132
    operators.DEVICE_TYPES = ("cpu",)


def _modules() -> tuple[Any, ...]:
    from drivetrain.kernels.triton import decode, hopper, norms, product_tiles

    return decode, hopper, norms, product_tiles


def randn(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, dtype=DTYPE, requires_grad=grad)


def make(operation: str, **params: float) -> Any:
    kernels = TritonKernels(TritonKernels.Config(tune=False))
    return kernels.make(KernelSpec(operation, "cuda", "bfloat16", {}, params))


class EveryCandidate(Tuner):
    """Launches all there are."""

    def choose(self, key: str, candidates: Any, launch: Any, worth_it: bool = True, output: Any = None) -> Any:
        for candidate in candidates:
            launch(candidate)
        return candidates[0]


def pointwise() -> None:
    weight = randn(4096, grad=True)
    make("rms_norm")(randn(16, 4096, grad=True), weight).sum().backward()
    normed, summed = make("add_rms_norm")(randn(16, 4096, grad=True), randn(16, 4096), weight)
    (normed.sum() + summed.sum()).backward()
    for operation in ("silu_mul", "gelu_tanh_mul"):
        make(operation)(randn(16, 1024, grad=True), randn(16, 1024)).sum().backward()
    angles = torch.randn(2, 16, 128)
    q, k = make("rope")(randn(16, 8, 128, grad=True), randn(16, 2, 128, grad=True), *angles)
    (q.sum() + k.sum()).backward()
    caches, slots = randn(2, 3, 16, 2, 128), torch.arange(16)
    make("rope_write")(randn(16, 8, 128), randn(16, 2, 128), randn(16, 2, 128), *angles, *caches, slots)


def vocabulary() -> None:
    x, weight = randn(8, 64, grad=True), randn(4096, 64)
    make("linear_cross_entropy", soft_cap=30.0)(x, weight, torch.arange(8)).sum().backward()
    one = torch.ones(4)
    make("sample")(randn(4, 32_768), one, torch.ones(4, dtype=torch.int64), one, one, one.double() / 2)


def rounded() -> None:
    from drivetrain.kernels.triton import rounding

    x = randn(3, 1024)
    rounding.to_int8_rows(x)
    rounding.to_int8_rows(randn(3, 20_000))
    rounding.to_int8_blocks(x)
    rounding.to_int8_blocks(x, even_first=True)
    for dtype in (torch.float8_e4m3fn, torch.float16):
        rounding.to_float8_rows(x, torch.zeros(()), dtype)


def products_() -> None:
    from drivetrain.kernels.triton import products, rounded_products

    int8, fp8 = torch.zeros(256, 1024, dtype=torch.int8), torch.zeros(256, 1024).to(torch.float8_e4m3fn)
    int4, groups = torch.zeros(256, 512, dtype=torch.uint8), torch.ones(256, 8)
    low, high, zeros = torch.zeros(256, 256).byte(), torch.zeros(256, 128).byte(), torch.ones(256, 8).byte()
    for rows in (1, 300):
        x = randn(rows, 1024)
        make("linear_int8")(x, int8, torch.ones(256), randn(256))
        make("linear_fp8")(x, fp8, torch.ones(256), None)
        make("linear_int4", group=128)(x, int4, groups, groups, None)
        make("linear_int3", group=128)(x, low, high, groups, zeros, None)
        make("linear_w8a8")(x, int8, torch.ones(256), randn(256))
        make("linear_int4_a8", group=128)(x, int4, groups, zeros, None)
        for is_native in (True, False):
            rounded_products.multiplies_float8 = lambda device, is_native=is_native: is_native
            make("linear_fp8a8")(x, fp8, torch.ones(256), torch.zeros(()), None)
        make("linear")(x, randn(256, 1024), randn(256))
    few_rows = products.make_linear(KernelSpec("linear", "cuda", "bfloat16", {}, {}), EveryCandidate())
    for rows in (3, 64):
        few_rows(randn(rows, 4096), randn(4096, 4096), None)
    for rows in (1, 40):
        make("gated_linear", activation=0)(randn(rows, 1024), randn(256, 1024), randn(256, 1024))


def int4_by_words() -> None:
    """By threads and by tensor cores, with minima and with zero points, and with a rest of a row."""
    from drivetrain.kernels.triton import int4_words, products

    class OneOfEach(Tuner):
        def choose(self, key: str, candidates: Any, launch: Any, worth_it: bool = True, output: Any = None) -> Any:
            of_each = {dict(one.sizes)["WORDS"]: one for one in candidates if "WORDS" in dict(one.sizes)}
            for candidate in of_each.values():
                launch(candidate)
            return candidates[0]

    int4_words.has_gluon = int4_words._copies_to_shared_memory = lambda device: True
    for rows, inputs, group in ((1, 1024, 32), (3, 1152, 128), (16, 4096, 64), (40, 1024, 256)):
        spec = KernelSpec("linear_int4", "cuda", "bfloat16", {}, {"group": group})
        codes, scales = torch.zeros(256, inputs // 2).byte(), torch.ones(256, inputs // group).half()
        mins = scales.byte() if rows == 16 else scales
        products.LinearByGroup(spec, OneOfEach())(randn(rows, inputs), codes, scales, mins, randn(256))


def gguf_blocks() -> None:
    """Blocks at even addresses, at multiples of 16 bytes, and with codes in two places; one row, a few, and many."""
    from drivetrain.packed.gguf import BLOCK_TYPES

    for number, rows, operation in (
        (2, 1, "linear_gguf"),
        (13, 1, "linear_gguf"),
        (14, 1, "linear_gguf_a8"),
        (7, 16, "linear_gguf"),
        (12, 300, "linear_gguf"),
        (14, 300, "linear_gguf_a8"),
    ):
        blocks = torch.zeros(256, BLOCK_TYPES[number].row_bytes(1024), dtype=torch.uint8)
        make(operation, type=float(number))(randn(rows, 1024), blocks, randn(256))


def in_full() -> None:
    from drivetrain.kernels.triton import expansion
    from drivetrain.packed.gguf import BLOCK_TYPES

    int4, low, high = (torch.zeros(256, count).byte() for count in (512, 256, 128))
    groups, zeros = torch.ones(256, 8), torch.ones(256, 8).byte()
    expansion.groups_in_full([int4], groups, groups, 128, DTYPE)
    expansion.groups_in_full([low, high], groups, zeros, 128, DTYPE)
    for number, kind in BLOCK_TYPES.items():
        expansion.blocks_in_full(number, torch.zeros(256, kind.row_bytes(1024)).byte(), DTYPE)


def attention() -> None:
    backend = PagedTritonAttention(PagedTritonAttention.Config(tune=False, chunk_size=32))
    for layer in (LayerAttention(8, 2, 128, 0.1), LayerAttention(4, 4, 80, 0.1, window=40, soft_cap=30.0)):
        heads = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
        for kv in (FULL_KV, *SCALED_KV):
            spec = AttentionSpec((layer,), "bfloat16", kv)
            book = BlockBook(spec, 16, 64)
            cache = backend.allocate(spec, book.num_blocks, CPU)
            for new_tokens, is_open in (({0: 70, 1: 1}, False), ({0: 1, 1: 1}, False), ({0: 70, 1: 1}, True)):
                batch = book.batch(new_tokens, CPU)
                batch = opened(batch) if is_open else batch
                rows = [randn(batch.num_tokens, count, layer.head_size) for count in heads]
                backend.begin(spec, batch, cache).attend(0, *rows)
        rows = [randn(70, count, layer.head_size, grad=True) for count in heads]
        backend.begin(spec, whole_batch([70], CPU), None).attend(0, *rows).sum().backward()


def attention_without_a_cache() -> None:
    """The kernels for this GPU alone, forward and back."""
    from drivetrain.kernels.triton import hopper

    hopper.is_hopper = lambda device: True
    backend = PagedTritonAttention(PagedTritonAttention.Config(tune=False))
    for heads, kv_heads, size in ((8, 2, 128), (3, 1, 64)):
        spec = AttentionSpec((LayerAttention(heads, kv_heads, size, 0.1),), "bfloat16")
        rows = [randn(70, count, size, grad=True) for count in (heads, kv_heads, kv_heads)]
        backend.begin(spec, whole_batch([70], CPU), None).attend(0, *rows).sum().backward()


def rows_of_a_step(rows: int) -> None:
    """What a serving step launches of ``rows`` tokens, but for attention."""
    x, angles = randn(rows, 1024), torch.randn(2, rows, 128)
    make("rms_norm")(x, randn(1024))
    make("add_rms_norm")(x, randn(rows, 1024), randn(1024))
    make("silu_mul")(x, randn(rows, 1024))
    caches, slots = randn(2, 3, 16, 2, 128), torch.arange(rows)
    make("rope_write")(randn(rows, 8, 128), randn(rows, 2, 128), randn(rows, 2, 128), *angles, *caches, slots)
    ones, groups, zeros = torch.ones(256), torch.ones(256, 8), torch.zeros(256, 8).byte()
    make("gated_linear", activation=0)(x, randn(256, 1024), randn(256, 1024))
    make("linear_int8")(x, torch.zeros(256, 1024, dtype=torch.int8), ones, None)
    make("linear_w8a8")(x, torch.zeros(256, 1024, dtype=torch.int8), ones, None)
    make("linear_int4", group=128)(x, torch.zeros(256, 512).byte(), groups, groups, None)
    make("linear_int4_a8", group=128)(x, torch.zeros(256, 512).byte(), groups, zeros, None)
    make("linear_gguf", type=2.0)(x, torch.zeros(256, 576).byte(), None)


def steps_of_all_counts() -> None:
    """Counts that are 1, multiples of 16 and neither: for each Triton would compile kernels of its own."""
    backend = PagedTritonAttention(PagedTritonAttention.Config(tune=False))
    spec = AttentionSpec((LayerAttention(8, 2, 128, 0.1),), "bfloat16")
    book = BlockBook(spec, 16, 200)
    cache = backend.allocate(spec, book.num_blocks, CPU)
    for rows, prompt, decodes in ((64, 256, 15), (49, 2, 14), (33, 10, 1)):
        rows_of_a_step(rows)
        batch = book.batch({0: prompt, **dict.fromkeys(range(1, 1 + decodes), 1)}, CPU)
        backend.begin(spec, batch, cache).attend(0, *(randn(batch.num_tokens, count, 128) for count in (8, 2, 2)))
        known_counts.append(True)
    known_counts.clear()


PARTS = (
    pointwise,
    vocabulary,
    rounded,
    products_,
    int4_by_words,
    gguf_blocks,
    in_full,
    attention,
    attention_without_a_cache,
    steps_of_all_counts,
)


if __name__ == "__main__":
    compile_only()
    paged_triton.tuner_of = lambda folder, tune: Tuner()
    tuner_of.cache_clear()
    print(json.dumps({"triton": triton.__version__}))
    for part in PARTS:
        part()
