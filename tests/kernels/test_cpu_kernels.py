"""Rules of the C++ kernels: for every architecture and vector width they compute what plain torch computes, from memory
that lies as it happens to lie; what they can't do they refuse, or leave to the layers themselves."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from drivetrain.binding import KernelBinder
from drivetrain.contracts.attention import AttentionSpec, LayerAttention, OpensPages
from drivetrain.contracts.kernels import OPERATIONS, KernelSpec
from drivetrain.contracts.model import BuildContext
from drivetrain.contracts.source import silent
from drivetrain.errors import ConfigError, KernelBuildError
from drivetrain.fusion import fuse
from drivetrain.hardware import read_processor
from drivetrain.kernels.cpu import CpuKernels, cross_entropy, library
from drivetrain.kernels.cpu.cross_entropy import LinearLoss
from drivetrain.kernels.cpu.decoder import CoarseDecoder
from drivetrain.kernels.cpu.library import ROW_FORMATS, VARIANTS, open_library, runnable_variants
from drivetrain.kernels.cpu.operations import matrix_fields
from drivetrain.kernels.reference import ReferenceKernels
from drivetrain.kernels.reference.decoder import decoder_layers
from drivetrain.kernels.reference.pointwise import rope_write
from drivetrain.plugins.attention.paged_cpu import PagedCpuAttention
from drivetrain.plugins.attention.sdpa import SdpaAttention
from drivetrain.plugins.model.decoder import DecoderModel
from drivetrain.testing.kernel_oracle import ORACLES
from support.paging import Pages, whole_batch
from support.tiny_models import VOCAB_SIZE, FolderCheckpoint, save_tiny, tiny_configs

torch.set_num_threads(1)

CPU = torch.device("cpu")
NAMES = sorted(tiny_configs())
REFERENCE = ReferenceKernels(ReferenceKernels.Config())
HERE = runnable_variants()
needs_amx = pytest.mark.skipif("amx" not in HERE, reason="this processor has no matrix unit (AMX)")

STEPS: Sequence[dict[int, int]] = (
    {0: 5, 1: 1, 2: 17},
    {0: 1, 1: 3, 2: 1, 3: 20},
    {0: 1, 1: 1, 2: 1, 3: 1, 4: 33},
    dict.fromkeys(range(5), 1),
    {0: 7, 5: 18},
    dict.fromkeys(range(6), 1),
)
"""Prompts of every size, chunks, decodes and mixtures of all; sequence -> new tokens."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def checkpoints(folders: Path) -> dict[str, FolderCheckpoint]:
    made = {}
    for name in NAMES:
        save_tiny(name, folders / name)
        made[name] = FolderCheckpoint(folders / name)
    return made


def provider(variant: str = "auto") -> CpuKernels:
    return CpuKernels(CpuKernels.Config.model_validate({"instructions": variant}))


def build(checkpoint: FolderCheckpoint, kernels: CpuKernels | None, dtype: torch.dtype = torch.float32) -> Any:
    providers = [("cpu", kernels)] if kernels is not None else []
    bind = KernelBinder([*providers, ("reference", REFERENCE)]).bind
    return DecoderModel(DecoderModel.Config()).build(checkpoint, BuildContext(CPU, dtype, bind, None, silent))


@torch.inference_mode()
def scores(
    module: Any,
    backend: type[SdpaAttention],
    block_size: int = 4,
    kv: str = "auto",
    ends_only: bool = False,
    steps: Sequence[dict[int, int]] = STEPS,
) -> torch.Tensor:
    """Scores of every token of these steps, or of each sequence's last one in a step, fed over a paged cache."""
    spec = dataclasses.replace(module.spec.attention, kv=kv)
    attention = backend(backend.Config(block_size=block_size))
    sequences = 1 + max(max(step) for step in steps)
    pages = Pages(spec, block_size, 80 if steps is STEPS else 8 * sequences)
    cache = attention.allocate(spec, pages.num_blocks, CPU)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, VOCAB_SIZE, (60,), generator=generator) for _ in range(sequences)]
    parts = []
    for new_tokens in steps:
        done = [pages.lengths.get(s, 0) for s in range(len(ids))]
        batch = dataclasses.replace(pages.batch(new_tokens), ends_only=ends_only)
        flat = torch.cat([ids[s][done[s] : done[s] + new] for s, new in new_tokens.items()])
        hidden = module(flat, pages.positions(batch), attention.begin(spec, batch, cache))
        parts.append(module.logits(hidden[batch.query_starts[1:] - 1] if ends_only else hidden))
    return torch.cat(parts).float()


def ends(every: torch.Tensor) -> torch.Tensor:
    """Of scores of every token, those of each sequence's last one in a step."""
    return every[torch.tensor([new for step in STEPS for new in step.values()]).cumsum(0) - 1]


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, FolderCheckpoint]) -> dict[str, torch.Tensor]:
    return {name: scores(build(checkpoint, None), SdpaAttention) for name, checkpoint in checkpoints.items()}


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", HERE)
def test_every_architecture_scores_as_the_plain_loop_does(
    checkpoints: dict[str, FolderCheckpoint], expected: dict[str, torch.Tensor], variant: str
) -> None:
    """All layers in one call, in each vector width that this processor runs."""
    for name, checkpoint in checkpoints.items():
        found = scores(build(checkpoint, provider(variant)), PagedCpuAttention)
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("variant", HERE)
def test_the_last_layer_may_compute_last_tokens_alone(
    checkpoints: dict[str, FolderCheckpoint], expected: dict[str, torch.Tensor], variant: str
) -> None:
    """Their scores are the same, and so are those of later steps, which read the keys of all tokens."""
    for name, checkpoint in checkpoints.items():
        module = build(checkpoint, provider(variant))
        found = scores(module, PagedCpuAttention, ends_only=True)
        told = functools.partial(str.__add__, name)
        torch.testing.assert_close(found, ends(expected[name]), rtol=1e-4, atol=1e-4, msg=told)
        scaled = scores(module, PagedCpuAttention, kv="int8", ends_only=True)
        every = scores(module, PagedCpuAttention, kv="int8")
        assert (scaled - ends(every)).square().mean().sqrt() <= 0.003 * every.std(), name


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_many_decodes_ask_for_the_next_layers_keys_meanwhile(
    checkpoints: dict[str, FolderCheckpoint], name: str, threads: int
) -> None:
    """More rows than are a tile, so that keys of the next layer, of another window perhaps, are planned for ahead."""
    steps = [{s: 1 + s % 7 for s in range(40)}, dict.fromkeys(range(40), 1), {**dict.fromkeys(range(25), 1), 30: 20}]
    torch.set_num_threads(threads)
    try:
        module = build(checkpoints[name], provider())
        plain = scores(build(checkpoints[name], None), SdpaAttention, steps=steps)
        native = scores(module, PagedCpuAttention, steps=steps)
        torch.testing.assert_close(native, plain, rtol=2e-4, atol=2e-4)
    finally:
        torch.set_num_threads(1)
        provider().make(KernelSpec("linear", "cpu", "float32"))  # leaves the library's pool at one thread


KV_DISTANCE = {"int8": (0.003, 0.02), "fp8": (0.01, 0.1)}
"""How far scores may be, in the mean of squares and relative to their spread, from those of sdpa in the same format (a
last bit decides here and there to which code a number is rounded) and from those of full keys."""

CUT_STEPS: Sequence[dict[int, int]] = (
    {s: 1 + s % 7 for s in range(60)},
    {**dict.fromkeys(range(50), 1), 60: 40, 61: 58, 62: 1},
    dict.fromkeys(range(66), 1),
    {**dict.fromkeys(range(40), 1), 64: 25, 65: 31},
    dict.fromkeys(range(62), 1),
)
"""Rows enough for two threads, in the first two for three: cut within prompts, between them and between decodes."""


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_threads_have_rows_of_their_own(checkpoints: dict[str, FolderCheckpoint], name: str, threads: int) -> None:
    """Each through all layers; a prompt that is cut reads the keys that another thread writes meanwhile."""
    plain = scores(build(checkpoints[name], None), SdpaAttention, steps=CUT_STEPS)
    last = torch.tensor([new for step in CUT_STEPS for new in step.values()]).cumsum(0) - 1
    torch.set_num_threads(threads)
    try:
        module = build(checkpoints[name], provider())
        every = scores(module, PagedCpuAttention, steps=CUT_STEPS)
        torch.testing.assert_close(every, plain, rtol=2e-4, atol=2e-4)
        only_last = scores(module, PagedCpuAttention, steps=CUT_STEPS, ends_only=True)
        torch.testing.assert_close(only_last, plain[last], rtol=2e-4, atol=2e-4)
        scaled = scores(module, PagedCpuAttention, kv="int8", steps=CUT_STEPS)
        assert (scaled - plain).square().mean().sqrt() <= KV_DISTANCE["int8"][1] * plain.std()
    finally:
        torch.set_num_threads(1)
        provider().make(KernelSpec("linear", "cpu", "float32"))  # leaves the library's pool at one thread


@torch.inference_mode()
def test_only_where_no_other_row_is_read(checkpoints: dict[str, FolderCheckpoint]) -> None:
    """What is left of the other rows is not what the layers make of them."""
    module = build(checkpoints["smollm2"], provider())
    attention = PagedCpuAttention(PagedCpuAttention.Config(block_size=4))
    pages = Pages(module.spec.attention, 4, 80)
    cache = attention.allocate(module.spec.attention, pages.num_blocks, CPU)
    batch, ids = pages.batch({0: 9, 1: 7}), torch.arange(16)
    rows = []
    for ends_only in (False, True):
        step = attention.begin(module.spec.attention, dataclasses.replace(batch, ends_only=ends_only), cache)
        rows.append(module(ids, pages.positions(batch), step))
    is_end = torch.zeros(16, dtype=torch.bool)
    is_end[[8, 15]] = True
    torch.testing.assert_close(rows[0][is_end], rows[1][is_end], rtol=1e-4, atol=1e-4)
    assert ((rows[0] - rows[1]).abs().amax(1) > 1e-2)[~is_end].all()


@pytest.mark.parametrize("kv", KV_DISTANCE)
@pytest.mark.parametrize("variant", HERE)
def test_whole_steps_over_scaled_keys(
    checkpoints: dict[str, FolderCheckpoint], expected: dict[str, torch.Tensor], variant: str, kv: str
) -> None:
    """The coarse operation writes and reads keys and values with scales as sdpa does, and both stay near full ones."""
    for name in ("smollm2", "gemma2", "qwen3"):
        plain = scores(build(checkpoints[name], None), SdpaAttention, kv=kv)
        found = scores(build(checkpoints[name], provider(variant)), PagedCpuAttention, kv=kv)
        from_sdpa, from_full = (
            ((found - other).square().mean().sqrt() / expected[name].std()).item() for other in (plain, expected[name])
        )
        assert from_sdpa <= KV_DISTANCE[kv][0], name
        assert 1e-4 < from_full <= KV_DISTANCE[kv][1], name


@pytest.mark.parametrize("name", NAMES)
def test_each_part_works_without_the_other(
    checkpoints: dict[str, FolderCheckpoint], expected: dict[str, torch.Tensor], name: str
) -> None:
    """The kernels under sdpa's attention, and paged-cpu's attention between the reference's kernels."""
    for kernels, backend in ((provider(), SdpaAttention), (None, PagedCpuAttention)):
        found = scores(build(checkpoints[name], kernels), backend, block_size=16)
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["smollm2", "gemma2", "olmo2", "phi3", "qwen3"])
def test_bfloat16_is_as_near_to_float32_as_the_plain_loop(
    checkpoints: dict[str, FolderCheckpoint], expected: dict[str, torch.Tensor], name: str
) -> None:
    """The residual stream stays in float32, so that errors are smaller than the plain loop's, or as small."""
    plain = scores(build(checkpoints[name], None, torch.bfloat16), SdpaAttention)
    found = scores(build(checkpoints[name], provider(), torch.bfloat16), PagedCpuAttention)
    errors = [(result - expected[name]).square().mean().sqrt().item() for result in (found, plain)]
    assert errors[0] <= errors[1] * 1.05


def test_all_threads_give_the_same(checkpoints: dict[str, FolderCheckpoint], expected: dict[str, torch.Tensor]) -> None:
    torch.set_num_threads(3)
    try:
        found = scores(build(checkpoints["smollm2"], provider()), PagedCpuAttention)
    finally:
        torch.set_num_threads(1)
        provider().make(KernelSpec("linear", "cpu", "float32"))  # leaves the library's pool at one thread
    torch.testing.assert_close(found, expected["smollm2"], rtol=1e-4, atol=1e-4)


def test_every_chunk_is_run_once_by_more_threads_than_there_are_cores() -> None:
    """Regions follow each other faster than a thread that was put aside comes back, so that others take its chunks."""
    torch.set_num_threads(7)
    try:
        linear = provider().make(KernelSpec("linear", "cpu", "float32", {"I": 40, "O": 1000}))
        generator = torch.Generator().manual_seed(1)
        for _ in range(400):
            outer, tokens = (int(torch.randint(1, most, (), generator=generator)) for most in (1000, 7))
            weight, x = (torch.randint(-4, 5, (n, 40), generator=generator).float() for n in (outer, tokens))
            assert torch.equal(linear(x, weight, None), x @ weight.T)
    finally:
        torch.set_num_threads(1)
        provider().make(KernelSpec("linear", "cpu", "float32"))  # leaves the library's pool at one thread


class _CountsCalls:
    """Counts what goes into the library."""

    def __init__(self, coarse: CoarseDecoder) -> None:
        self._library = coarse._library
        self.count = 0
        coarse._library = self  # type: ignore[assignment]

    def dt_decoder_forward(self, *arguments: Any) -> int:
        self.count += 1
        return int(self._library.dt_decoder_forward(*arguments))


def calls_of(module: Any) -> _CountsCalls:
    return _CountsCalls(module.model._run_layers)


def test_a_step_is_one_call(checkpoints: dict[str, FolderCheckpoint]) -> None:
    module = build(checkpoints["smollm2"], provider())
    calls = calls_of(module)
    scores(module, PagedCpuAttention)
    assert calls.count == len(STEPS)
    scores(module, SdpaAttention)  # keeps its pages to itself
    assert calls.count == len(STEPS)


def test_weights_that_move_are_read_where_they_are(checkpoints: dict[str, FolderCheckpoint]) -> None:
    module = build(checkpoints["smollm2"], provider())
    calls = calls_of(module)
    before = scores(module, PagedCpuAttention)
    with torch.no_grad():
        for parameter in module.parameters():
            moved = parameter.detach().clone() * 1.5
            parameter.detach().fill_(float("nan"))
            parameter.data = moved
    after = scores(module, PagedCpuAttention)
    assert calls.count == 2 * len(STEPS)
    assert after.isfinite().all()
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, scores(module, SdpaAttention), rtol=1e-4, atol=1e-4)


def test_threads_that_share_a_model_do_not_disturb_each_other(
    checkpoints: dict[str, FolderCheckpoint], expected: dict[str, torch.Tensor]
) -> None:
    """As a swap does when it warms new parts up beside the engine's own steps: one model, two caches."""
    module = build(checkpoints["smollm2"], provider())
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: [scores(module, PagedCpuAttention) for _ in range(10)], range(4)):
            for result in found:
                torch.testing.assert_close(result, expected["smollm2"], rtol=1e-4, atol=1e-4)


class _Doubled(torch.nn.Module):
    """Stands for a layer that a quantizer has put in a linear layer's place."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.inner = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x) * 2
        return out


def test_small_products_do_not_wait_for_another_threads_large_ones() -> None:
    """They are of new parts, say, that are tried beside the ones that serve."""
    kernel = provider().make(KernelSpec("linear", "cpu", "float32"))
    large, small = (torch.randn(2048, 1024), torch.randn(1024, 1024)), (torch.randn(8, 64), torch.randn(300, 64))
    wanted = small[0] @ small[1].T
    ended = 0
    is_over = threading.Event()

    def keep_busy() -> None:
        nonlocal ended
        while not is_over.is_set():
            kernel(*large, None)
            ended += 1

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    open_library()  # its pool has as many
    try:
        with torch.inference_mode(), ThreadPoolExecutor(1) as pool:
            busy = pool.submit(torch.inference_mode()(keep_busy))
            while ended == 0 and not busy.done():
                time.sleep(0.001)
            before = ended
            for _ in range(300):
                torch.testing.assert_close(kernel(*small, None), wanted, rtol=1e-5, atol=1e-4)
            during = ended - before
            is_over.set()
            busy.result()
    finally:
        torch.set_num_threads(threads)
        open_library()
    assert during < 100, f"{during} large products ended while 300 small ones were computed"


def test_a_layer_that_is_no_plain_linear_is_called(checkpoints: dict[str, FolderCheckpoint]) -> None:
    module = build(checkpoints["smollm2"], provider())
    module.model.layers[1].mlp.up_proj = _Doubled(module.model.layers[1].mlp.up_proj)
    calls = calls_of(module)
    found = scores(module, PagedCpuAttention)
    assert calls.count == 0
    torch.testing.assert_close(found, scores(module, SdpaAttention), rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_the_layers(checkpoints: dict[str, FolderCheckpoint]) -> None:
    """Where they are asked for, the layers are called one by one, and their kernels are differentiable."""
    gradients = []
    for kernels, backend in ((None, SdpaAttention), (provider(), PagedCpuAttention)):
        module = build(checkpoints["qwen3"], kernels)
        attention = backend(backend.Config())
        step = attention.begin(module.spec.attention, whole_batch([9, 4]), None)
        ids = torch.arange(13)
        module.logits(module(ids, torch.cat([torch.arange(9), torch.arange(4)]), step)).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in module.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=lambda t, n=name: n + t)


def test_long_contexts_are_cut_and_joined() -> None:
    """One query over many keys is shared by all threads; a window and a soft cap hold there too."""
    torch.set_num_threads(4)
    try:
        for window, soft_cap, kv in (
            (None, None, "auto"),
            (1500, None, "auto"),
            (None, 5.0, "auto"),
            (None, None, "int8"),
            (1500, 5.0, "fp8"),
        ):
            layer = LayerAttention(6, 2, 20, 20**-0.5, window, soft_cap)
            spec = AttentionSpec((layer,), "float32", kv)
            results = []
            for backend in (SdpaAttention, PagedCpuAttention):
                attention, pages = backend(backend.Config()), Pages(spec, 16, 400)
                cache = attention.allocate(spec, pages.num_blocks, CPU)
                generator = torch.Generator().manual_seed(3)
                for new_tokens in ({0: 3000, 1: 40}, {0: 1, 1: 1}):
                    batch = pages.batch(new_tokens)
                    total = sum(new_tokens.values())
                    q, k, v = (torch.randn(total, heads, 20, generator=generator) for heads in (6, 2, 2))
                    step = attention.begin(spec, batch, cache)
                    results.append(step.attend(0, q, k, v))
            for plain, native in zip(results[:2], results[2:], strict=True):
                torch.testing.assert_close(native, plain, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(1)
        provider().make(KernelSpec("linear", "cpu", "float32"))  # leaves the library's pool at one thread


@pytest.mark.parametrize("seed", [0, None], ids=["shuffled", "in_order"])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("heads", [(9, 3, 64), (8, 2, 128), (5, 1, 40), (2, 2, 64)], ids=str)
def test_keys_are_read_where_they_lie(heads: tuple[int, int, int], block_size: int, seed: int | None) -> None:
    """Prompts, chunks and decodes over blocks that follow each other in memory or don't, of head sizes that have code
    of their own and of another."""
    num_heads, kv_heads, size = heads
    for window, kv, within in ((None, "auto", 1e-5), (70, "auto", 1e-5), (None, "int8", 4e-3)):  # to a code of int8
        spec = AttentionSpec((LayerAttention(num_heads, kv_heads, size, size**-0.5, window, None),), "float32", kv)
        results = []
        for backend in (SdpaAttention, PagedCpuAttention):
            attention = backend(backend.Config(block_size=block_size))
            pages = Pages(spec, block_size, 80, seed)
            cache = attention.allocate(spec, pages.num_blocks, CPU)
            generator = torch.Generator().manual_seed(3)
            for new_tokens in ({0: 150, 1: 30, 2: 1}, {0: 1, 1: 70, 2: 200}, {0: 50, 1: 1, 2: 16}, {0: 1, 1: 1, 2: 1}):
                batch, total = pages.batch(new_tokens), sum(new_tokens.values())
                q, k, v = (torch.randn(total, n, size, generator=generator) for n in (num_heads, kv_heads, kv_heads))
                results.append(attention.begin(spec, batch, cache).attend(0, q, k, v))
        for plain, native in zip(results[:4], results[4:], strict=True):
            torch.testing.assert_close(native, plain, rtol=within, atol=within)


def sharing_steps(spec: AttentionSpec, families: list[list[tuple[int, int]]], block_size: int) -> list[torch.Tensor]:
    """Attention of a step in which all decode and one begins, by sdpa and by paged-cpu.

    families: of each member the tokens in common with the first, and those of its own.
    """
    pages = Pages(spec, block_size, 2000)
    steps, decoding = [], []
    for family in families:
        parent = len(decoding)
        for number, (common, own) in enumerate(family):
            sequence = len(decoding)
            if number:
                pages.fork(parent, sequence, common // block_size * block_size)
            new = own + (common if number == 0 else common % block_size)
            steps.append(pages.batch({sequence: new}))
            decoding.append(sequence)
    random.Random(0).shuffle(decoding)
    prefilling = len(decoding)
    steps.append(pages.batch({prefilling: 20, **dict.fromkeys(decoding, 1)}))
    results, layer = [], spec.layers[0]
    for backend in (SdpaAttention, PagedCpuAttention):
        attention = backend(backend.Config())
        cache = attention.allocate(spec, pages.num_blocks, CPU)
        generator = torch.Generator().manual_seed(3)
        for batch in steps:
            heads = layer.num_heads, layer.num_kv_heads, layer.num_kv_heads
            q, k, v = (torch.randn(sum(batch.query_lengths), n, layer.head_size, generator=generator) for n in heads)
            out = attention.begin(spec, batch, cache).attend(0, q, k, v)
        results.append(out)
    return results


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize(("soft_cap", "window", "kv"), [(None, None, "auto"), (5.0, 4000, "int8"), (None, 300, "auto")])
def test_decodes_that_share_a_prefix_read_it_once(
    soft_cap: float | None, window: int | None, kv: str, threads: int
) -> None:
    """Families of every size, members with more and less in common, a prompt; windows that see all of it or not."""
    spec = AttentionSpec((LayerAttention(6, 2, 20, 20**-0.5, window, soft_cap),), "float32", kv)
    families = [
        [(512, 3 + n) for n in range(17)],
        [(160, 1), (160, 16), (128, 31)],
        [(1024, 40), (1024, 2), (64, 5), (144, 7), (1024, 90), (1008, 9)],
        [(256, 1)],
        [(140, 5), (140, 5)],
        [(96, 5), (96, 7), (96, 9), (96, 11)],
    ]
    torch.set_num_threads(threads)
    try:
        plain, native = sharing_steps(spec, families, 16)
        torch.testing.assert_close(native, plain, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(1)
        provider().make(KernelSpec("linear", "cpu", "float32"))  # leaves the library's pool at one thread


# --- single operations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", HERE)
def test_what_runs_once_a_row_stands_once_in_a_library(variant: str) -> None:
    """Inside of each kernel it made libraries of 2.5 to 3 MB, which took more than twice as long to compile."""
    assert Path(open_library(variant)._name).stat().st_size < 2_200_000


@pytest.mark.parametrize("variant", HERE)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 8, 9, 11, 13, *range(16, 28), 31, 32, 33, 70])
def test_products_of_every_number_of_rows(variant: str, rows: int) -> None:
    """Few rows and many, any rest that fills no vector, outputs that fill no tile, and inputs that fill no vector."""
    generator = torch.Generator().manual_seed(rows)
    for inner, outer in ((64, 96), (65, 101), (7, 3), (33, 48), (200, 49)):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1.6e-2)):
            spec = KernelSpec("linear", "cpu", str(dtype).removeprefix("torch."), {"I": inner, "O": outer})
            x, weight, bias = (
                torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, inner), (outer, inner), (outer,))
            )
            wanted = (x.double() @ weight.double().T + bias.double()).to(dtype)
            found = provider(variant).make(spec)(x, weight, bias)
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * 10)


def _sharpness(kind: str, rows: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab)
    normal = torch.randn(rows, vocab, generator=generator)
    return {
        "sharp": normal * 6,
        "as of a text": normal * 2.5,
        "flat": normal * 0.1,
        "equal": torch.zeros(rows, vocab),
        "few values": (normal * 2).round(),
        "most are forbidden": torch.where(torch.arange(vocab) % 50 == 1, normal * 2, -math.inf),
        "huge": normal * 1e30,
    }[kind]


@pytest.mark.parametrize("variant", HERE)
@pytest.mark.parametrize("vocab", [3, 70, 900])
@pytest.mark.parametrize("kind", ["sharp", "as of a text", "flat", "equal", "few values", "most are forbidden", "huge"])
def test_a_nucleus_is_drawn_from_as_a_sorted_vocabulary(variant: str, vocab: int, kind: str) -> None:
    """The token at a draw is where the cumulative sum over the kept tokens passes it, to the published tolerance."""
    top_p = torch.tensor([0.0, 1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 0.9999999] * 2)
    rows = len(top_p)
    generator = torch.Generator().manual_seed(1)
    scores, draws = _sharpness(kind, rows, vocab), torch.rand(rows, dtype=torch.float64, generator=generator)
    min_p = torch.tensor([0.0, 0.3]).repeat_interleave(rows // 2)
    heat = torch.full((rows,), 0.8)
    sample = provider(variant).make(KernelSpec("sample", "cpu", "float32", {"V": vocab}))
    found = sample(scores, heat, torch.zeros(rows, dtype=torch.int64), top_p, min_p, draws)
    wanted = ORACLES["sample"]({}, scores, heat, torch.zeros(rows, dtype=torch.int64), top_p, min_p, draws)
    assert wanted.gather(1, found[:, None]).all()


@pytest.mark.parametrize("variant", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_of_every_number_of_rows(variant: str, dtype: torch.dtype) -> None:
    """What the gates leave is packed for the next product, the rest as well."""
    generator = torch.Generator().manual_seed(1)
    make = provider(variant).make
    gated = make(KernelSpec("gated_linear", "cpu", str(dtype).removeprefix("torch."), {}, {"activation": 0.0}))
    gate, up = (torch.randn(101, 33, generator=generator).to(dtype) for _ in range(2))
    tolerance = 1e-5 if dtype is torch.float32 else 2**-7
    for rows in (1, 4, 5, 7, 9, 12, *range(16, 28), 32, 37, 50):
        x = torch.randn(rows, 33, generator=generator).to(dtype)
        wanted = torch.nn.functional.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
        torch.testing.assert_close(gated(x, gate, up).double(), wanted, rtol=tolerance, atol=tolerance)


def test_tensors_that_start_anywhere_in_memory() -> None:
    """Rows that begin at odd addresses, columns with gaps: the right answer, not a fault."""
    linear = provider().make(KernelSpec("linear", "cpu", "float32", {"I": 30, "O": 20}))
    buffer = torch.randn(5000)
    for offset in (1, 2, 3, 5, 7):
        x = buffer[offset : offset + 6 * 30].view(6, 30)
        weight = buffer[offset + 300 : offset + 300 + 20 * 30].view(20, 30)
        torch.testing.assert_close(linear(x, weight, None), x @ weight.T)
        gaps = buffer[: 6 * 60].view(6, 60)[:, ::2]
        torch.testing.assert_close(linear(gaps, weight, None), gaps @ weight.T)
        torch.testing.assert_close(linear(x, weight.T.contiguous().T, None), x @ weight.T)


def test_not_a_number_stays_one() -> None:
    """Nothing hides a fault of the weights or of the input."""
    linear = provider().make(KernelSpec("linear", "cpu", "float32", {"I": 40, "O": 8}))
    gated = provider().make(KernelSpec("silu_mul", "cpu", "float32", {"E": 40}))
    for rows in (1, 6):
        for bad in (float("nan"), float("inf")):
            x = torch.ones(rows, 40)
            x[-1, 33] = bad
            assert not linear(x, torch.ones(8, 40), None)[-1].isfinite().any()
            assert not gated(x, torch.ones(rows, 40))[-1].isfinite().all()


def product(variant: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T in float32, whatever the weight is kept in; of one variant."""
    if weight.dtype is torch.float32:
        return provider(variant).make(KernelSpec("linear", "cpu", "float32"))(x, weight, None)  # type: ignore[no-any-return]
    out = torch.empty(x.shape[0], weight.shape[0])
    fields = matrix_fields(weight)
    open_library(variant).dt_linear(x.data_ptr(), x.shape[0], ctypes.addressof(fields), 0, out.data_ptr())
    return out


def ill_scaled(rows: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Of every size between 1e-8 and 1e8, in every row."""
    exponents = torch.rand(rows, size, generator=generator) * 16 - 8
    return torch.randn(rows, size, generator=generator) * 10**exponents


@needs_amx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_the_matrix_unit_are_as_exact_as_plain_float32(dtype: torch.dtype) -> None:
    """In three parts a float32 loses nothing. The error of a sum is measured by the sum of the sizes of its terms, as
    the bound of a float32 sum is: the largest is at most 1.5 times that of float32's own multiply-adds."""
    generator = torch.Generator().manual_seed(5)
    for make in (lambda *shape: torch.randn(shape, generator=generator), lambda *s: ill_scaled(*s, generator)):
        for size in (32, 576, 1536, 5000):
            x, weight = make(40, size), make(64, size).to(dtype)
            exact = x.double() @ weight.double().T
            terms = x.double().abs() @ weight.double().abs().T
            errors = [
                ((product(variant, x, weight).double() - exact).abs() / terms).max().item()
                for variant in ("amx", "avx512")
            ]
            assert errors[0] <= 1.5 * max(errors[1], 2**-24), (size, errors)


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The library as it is where pairs of bfloat16 are multiplied at once and no matrix unit is there."""
    if "avx512_bf16" not in read_processor().instruction_sets:
        pytest.skip("this processor multiplies no pairs of bfloat16 (AVX512_BF16)")
    monkeypatch.setattr(library, "runnable_variants", lambda: ("avx512",))
    monkeypatch.setattr(library, "_OPENED", {})
    assert "-mavx512bf16" in library.source_build("avx512").flags
    return open_library("avx512")


@pytest.mark.parametrize("rows", [5, 16, 17, 22, 26, 27, 32, 39, 70])
def test_products_of_pairs_sum_in_float32(pairs: ctypes.CDLL, rows: int) -> None:
    """Of bfloat16 rows nothing is lost before the result is rounded; odd numbers of inputs go another way."""
    generator = torch.Generator().manual_seed(rows)
    for inner, outer in ((64, 96), (66, 101), (2, 3), (34, 48), (576, 49), (33, 50)):
        buffer = torch.randn(rows * inner + outer * inner + 1, generator=generator).bfloat16()
        x = buffer[: rows * inner].view(rows, inner)
        for start in (rows * inner, rows * inner + 1):  # of which one is no multiple of 4 bytes
            weight = buffer[start : start + outer * inner].view(outer, inner)
            out, fields = torch.empty(rows, outer, dtype=torch.bfloat16), matrix_fields(weight)
            pairs.dt_linear(x.data_ptr(), rows, ctypes.addressof(fields), 1, out.data_ptr())
            exact = x.double() @ weight.double().T
            torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("name", ["smollm2", "gemma2", "olmo2", "phi3", "qwen3"])
def test_a_model_in_pairs_is_as_near_to_float32_as_the_plain_loop(
    pairs: ctypes.CDLL, checkpoints: dict[str, FolderCheckpoint], expected: dict[str, torch.Tensor], name: str
) -> None:
    plain = scores(build(checkpoints[name], None, torch.bfloat16), SdpaAttention)
    found = scores(build(checkpoints[name], provider("avx512"), torch.bfloat16), PagedCpuAttention)
    errors = [(result - expected[name]).square().mean().sqrt().item() for result in (found, plain)]
    assert 0 < errors[0] <= errors[1] * 1.05


@pytest.mark.parametrize("name", ["smollm2", "gemma2", "olmo2", "phi3", "qwen3"])
def test_threads_have_rows_in_pairs_of_their_own(
    pairs: ctypes.CDLL, checkpoints: dict[str, FolderCheckpoint], name: str
) -> None:
    exact = scores(build(checkpoints[name], None), SdpaAttention, steps=CUT_STEPS)
    plain = scores(build(checkpoints[name], None, torch.bfloat16), SdpaAttention, steps=CUT_STEPS)
    torch.set_num_threads(2)
    try:
        found = scores(build(checkpoints[name], provider("avx512"), torch.bfloat16), PagedCpuAttention, steps=CUT_STEPS)
    finally:
        torch.set_num_threads(1)
        pairs.dt_set_threads(1)
    errors = [(result - exact).square().mean().sqrt().item() for result in (found, plain)]
    assert 0 < errors[0] <= errors[1] * 1.05


@pytest.mark.parametrize("rows", [23, 40, 44])
@pytest.mark.parametrize("intermediate", [96, 98, 51])
def test_gates_of_pairs(pairs: ctypes.CDLL, intermediate: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(intermediate)
    x, gate, up = (torch.randn(n, 64, generator=generator).bfloat16() for n in (rows, intermediate, intermediate))
    gated = provider("avx512").make(KernelSpec("gated_linear", "cpu", "bfloat16", {}, {"activation": 0.0}))
    expected = torch.nn.functional.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    torch.testing.assert_close(gated(x, gate, up).double(), expected, rtol=2**-7, atol=1e-3)


def test_what_the_caches_do_best_is_asked_of_each_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    variant, here = HERE[0], read_processor()
    flags = {}
    for vendor in ("GenuineIntel", "AuthenticAMD", ""):
        monkeypatch.setattr(library, "read_processor", lambda vendor=vendor: dataclasses.replace(here, vendor=vendor))
        flags[vendor] = library.source_build(variant).flags
    assert flags["GenuineIntel"] == flags[""]
    assert set(flags["AuthenticAMD"]) - set(flags[""]) == {"-DDT_FETCH_FIRST"}


@needs_amx
@settings(max_examples=60, deadline=None)
@given(rows=st.integers(5, 80), outer=st.integers(1, 130), inner=st.integers(1, 140), seed=st.integers(0, 99))
def test_the_matrix_unit_takes_every_shape(rows: int, outer: int, inner: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight, up = (torch.randn(n, inner, generator=generator) for n in (rows, outer, outer))
    for dtype in (torch.float32, torch.bfloat16):
        found = product("amx", x, weight.to(dtype))
        torch.testing.assert_close(found, x @ weight.to(dtype).float().T, rtol=1e-5, atol=1e-4)
    gated = provider("amx").make(KernelSpec("gated_linear", "cpu", "float32", {}, {"activation": 0.0}))
    expected = torch.nn.functional.silu(x @ weight.T) * (x @ up.T)
    torch.testing.assert_close(gated(x, weight, up), expected, rtol=1e-5, atol=1e-3)


@needs_amx
def test_more_features_than_the_matrix_unit_takes_at_once() -> None:
    """Sums of several blocks of features, for one panel of tokens and for several."""
    generator = torch.Generator().manual_seed(6)
    for rows in (6, 20, 40, 100):
        x, weight, up = (torch.randn(n, 4500, generator=generator) for n in (rows, 70, 70))
        torch.testing.assert_close(product("amx", x, weight), product("avx512", x, weight), rtol=1e-5, atol=1e-3)
        makers = [provider(v).make(KernelSpec("gated_linear", "cpu", "float32")) for v in ("amx", "avx512")]
        torch.testing.assert_close(*(gated(x, weight, up) for gated in makers), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("variant", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_as_in_float32(variant: str, dtype: torch.dtype) -> None:
    """An infinity stays one where its other factor is no zero, and the largest numbers do not overflow on their own."""
    inf, largest = float("inf"), torch.finfo(torch.float32).max
    for place in (0, 17, 40):
        for value in (inf, -inf, float("nan"), largest, -largest, 3.3961775e38):
            x, weight = torch.full((7, 50), 0.5), torch.full((20, 50), 0.25).to(dtype)
            x[3, place] = value
            x[5, place] = 0.0
            torch.testing.assert_close(product(variant, x, weight), x @ weight.float().T, equal_nan=True)
            x[3, place] = 1.0
            weight[2, place] = value
            torch.testing.assert_close(product(variant, x, weight), x @ weight.float().T, equal_nan=True)


@needs_amx
def test_numbers_too_small_for_the_matrix_unit_are_zero() -> None:
    """As documented: what a part would need below 2^-126 is lost, which leaves an absolute error of that size."""
    x, ones = torch.full((6, 32), 2.0**-120 * 1.2345678), torch.ones(4, 32)
    torch.testing.assert_close(product("amx", x, ones), x @ ones.T, rtol=1e-2, atol=0)
    assert not product("amx", torch.full((6, 32), 1e-40), ones).any()


def test_a_variant_that_can_not_be_built_gives_way_under_auto(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A compiler may not know what the processor has. By name it is an error; ``auto`` takes the next, and says so."""
    if len(HERE) == 1:
        pytest.skip("this processor runs one variant only")
    monkeypatch.setitem(VARIANTS, HERE[0], ("-mno-such-instructions",))
    monkeypatch.setattr(library, "_OPENED", {})
    with pytest.raises(KernelBuildError):
        open_library(HERE[0])
    with caplog.at_level("WARNING", "drivetrain"):
        assert open_library("auto").variant == HERE[1]
    assert HERE[0] in caplog.text


@needs_amx
def test_a_system_that_refuses_the_matrix_unit_is_an_error_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its permission is asked for once a process; here the library answers for the system."""

    class Refuses:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: 1

    class Build:
        def library(self, progress: Any) -> Any:
            return Refuses()

    monkeypatch.setattr(library, "_OPENED", {})
    monkeypatch.setattr(library, "source_build", lambda variant: Build())
    monkeypatch.setattr(library, "_SIGNATURES", {})
    with pytest.raises(KernelBuildError, match="matrix unit"):
        open_library("amx")


def test_what_it_has_no_kernel_for_is_refused() -> None:
    for spec in (
        KernelSpec("linear", "cpu", "float16", {"I": 8, "O": 8}),
        KernelSpec("linear", "cuda", "float32", {"I": 8, "O": 8}),
        KernelSpec("no_such_operation", "cpu", "float32"),
    ):
        probe = provider().supports(spec)
        assert not probe.ok
        assert probe.reason
        with pytest.raises(ConfigError, match=spec.operation):
            provider().make(spec)


@pytest.mark.parametrize("dtype", list(ROW_FORMATS))
def test_keys_are_written_in_the_dtype_of_the_cache(dtype: torch.dtype) -> None:
    """Out of rows that hold queries, keys and values together, into pages that do not lie side by side."""
    generator = torch.Generator().manual_seed(4)
    kernel = provider().make(KernelSpec("rope_write", "cpu", str(dtype).removeprefix("torch.")))
    qkv = torch.randn(7, 6 + 2 * 2, 40, generator=generator).to(dtype)
    q, k, v = qkv.split((6, 2, 2), dim=1)
    cos, sin = torch.randn(2, 7, 36, generator=generator)
    slots = torch.tensor([9, 0, 23, 5, 17, 2, 11])
    for kept in ROW_FORMATS:
        caches = [torch.zeros(4, 2, 6, 2, 40, dtype=kept).transpose(0, 1) for _ in range(2)]
        found, wanted = (
            (make(q, k, v, cos, sin, cache[0], cache[1], slots), cache)
            for make, cache in zip((kernel, rope_write), caches, strict=True)
        )
        for one, other in zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
            torch.testing.assert_close(one, other, rtol=1.6e-2, atol=1e-2, check_dtype=True)
            assert torch.equal(one == 0, other == 0), "another slot was written to"


def test_a_slot_outside_of_the_cache_is_an_error() -> None:
    kernel = provider().make(KernelSpec("rope_write", "cpu", "float32"))
    x, angles, keys, values = torch.ones(2, 1, 8), torch.ones(2, 8), torch.zeros(3, 4, 1, 8), torch.zeros(3, 4, 1, 8)
    for slot in (-1, 12):
        with torch.inference_mode(), pytest.raises(ConfigError, match="0 to 11"):
            kernel(x, x, x, angles, angles, keys, values, torch.tensor([0, slot]))
    assert not keys.any()


def test_layers_that_are_called_one_by_one_write_rotated_keys(
    checkpoints: dict[str, FolderCheckpoint], expected: dict[str, torch.Tensor]
) -> None:
    """Where the coarse operation can't run a step, over pages of either backend, the fused layers rotate and write."""
    binder = KernelBinder([("cpu", provider()), ("reference", REFERENCE)])
    context = BuildContext(CPU, torch.float32, binder.bind, None, silent)
    module: Any = DecoderModel(DecoderModel.Config()).build(checkpoints["smollm2"], context)
    fuse(module, binder)
    module.model._run_layers = decoder_layers
    written = []
    for layer in module.model.layers:
        attention = layer.self_attn
        run = attention._rope_write
        attention._rope_write = lambda *given, run=run: written.append(given[5].data_ptr()) or run(*given)
    for backend in (PagedCpuAttention, SdpaAttention):
        written.clear()
        torch.testing.assert_close(scores(module, backend), expected["smollm2"], rtol=1e-4, atol=1e-4)
        assert len(set(written)) == len(module.model.layers), backend
    written.clear()
    scores(module, PagedCpuAttention, kv="int8")
    assert not written, "scales are the backend's"


class _KeepsLargest(TorchDispatchMode):
    """The bytes of the largest tensor that torch made while it was on."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize("dtype", list(ROW_FORMATS))
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_losses_in_chunks_are_those_of_all_logits(
    dtype: torch.dtype, cap: float, has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row at a time and some at a time, with losses that count alike and losses that do not; more logits than are
    summed at a time; on processors with instructions for bfloat16, and without."""
    monkeypatch.setattr(cross_entropy, "_multiplies_bfloat16", lambda: has_bfloat16)
    generator = torch.Generator().manual_seed(11)
    x, weight = (torch.randn(n, 24, generator=generator).mul(0.4).to(dtype) for n in (9, 2600))
    targets = torch.tensor([3, 2599, -100, 0, 2048, 77, -100, 2047, 5])
    spec = KernelSpec("linear_cross_entropy", "cpu", str(dtype).removeprefix("torch."), {}, {"soft_cap": cap})
    relative, absolute = OPERATIONS["linear_cross_entropy"].tolerance[spec.dtype]
    leaves = [tensor.float().requires_grad_() for tensor in (x, weight)]
    wanted = REFERENCE.make(dataclasses.replace(spec, dtype="float32"))(*leaves, targets)
    for chunk_bytes in (1, 4 * 2600 * 4, 1 << 20):
        loss = LinearLoss(open_library(), dtype, cap, chunk_bytes)
        torch.testing.assert_close(loss.losses(x, weight, targets), wanted, rtol=relative, atol=absolute)
        losses, *sums = loss.training(x, weight, targets, True)
        assert torch.equal(losses, loss.losses(x, weight, targets))
        for counts in (torch.full((9,), 0.3), torch.rand(9, generator=generator)):
            right = torch.autograd.grad((wanted * counts).sum(), leaves, retain_graph=True)
            for found, gradient in zip(loss.gradients(counts, x, weight, targets, *sums), right, strict=True):
                assert found.dtype == dtype
                torch.testing.assert_close(found.float(), gradient, rtol=relative * 10, atol=absolute * 10)


def test_all_logits_are_never_held() -> None:
    x, weight = torch.randn(64, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)
    with _KeepsLargest() as kept, torch.no_grad():
        loss = LinearLoss(open_library(), torch.float32, 0.0, chunk_bytes=16 * 500 * 4)
        loss.gradients(
            torch.rand(64), x, weight, torch.arange(64), *loss.training(x, weight, torch.arange(64), True)[1:]
        )
    assert 0 < kept.bytes <= 16 * 500 * 4


def test_a_frozen_head_gets_no_gradient_and_a_wrong_target_is_an_error() -> None:
    kernel = provider().make(KernelSpec("linear_cross_entropy", "cpu", "float32"))
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(20, 8)
    kernel(x, weight, torch.tensor([1, -100, 19])).sum().backward()
    assert x.grad is not None
    assert x.grad[0].any()
    assert not x.grad[1].any()
    assert weight.grad is None
    for target in (20, -1):
        with pytest.raises(ConfigError, match="0 to 19"):
            kernel(x, weight, torch.tensor([1, target, 2]))


def test_the_operators_of_losses_keep_torchs_rules() -> None:
    """That with the gradients of the sum is no operator that the suite finds: it gives more than the losses."""
    provider().make(KernelSpec("linear_cross_entropy", "cpu", "float32"))
    operators = getattr(torch.ops, f"drivetrain_cpu_{open_library().variant}_float32")
    x, weight, targets = torch.randn(3, 8), torch.randn(20, 8), torch.tensor([1, -100, 19])
    sums = operators.linear_cross_entropy_training(x, weight, targets, 2.0, True)[1:]
    leaves = (x.clone().requires_grad_(), weight.clone().requires_grad_())
    for operator, arguments in (
        (operators.linear_cross_entropy, (x, weight, targets, 2.0)),
        (operators.linear_cross_entropy_training, (*leaves, targets, 2.0, True)),
        (operators.linear_cross_entropy_gradients, (torch.rand(3), x, weight, targets, *sums, 2.0)),
    ):
        torch.library.opcheck(operator.default, arguments)


def test_the_step_opens_its_pages_and_sdpa_does_not() -> None:
    """Attention that was asked for by name is not replaced by a kernel's own."""
    from drivetrain.contracts.attention import AttentionSpec, LayerAttention

    spec = AttentionSpec((LayerAttention(2, 1, 8, 0.3),), "float32")
    pages = Pages(spec, 4, 10)
    for backend, opens in ((SdpaAttention, False), (PagedCpuAttention, True)):
        attention = backend(backend.Config(block_size=4))
        step = attention.begin(spec, pages.batch({0: 2}), attention.allocate(spec, pages.num_blocks, CPU))
        assert isinstance(step, OpensPages) is opens
