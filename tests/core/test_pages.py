"""Rules of the paged layouts: what a scaled page gives back, and that the C++ kernels write what plain torch writes."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from drivetrain.contracts.attention import (
    SCALED_KV,
    AttentionSpec,
    LayerAttention,
    PagedCache,
    ScaledCache,
    ScaledPages,
)
from drivetrain.pages import (
    LEAST,
    PagedBackend,
    lazy_zeros,
    read_blocks,
    scale_rows,
    scaled_cache,
    tensors_of,
    unscale_rows,
    write_tokens,
)
from drivetrain.plugins.attention.paged_cpu import PagedCpuAttention
from drivetrain.plugins.attention.sdpa import SdpaAttention
from support.paging import Pages

torch.set_num_threads(1)

CPU = torch.device("cpu")
FORMATS = {kv: getattr(torch, dtype) for kv, (dtype, _) in SCALED_KV.items()}
ERRORS = {"int8": 0.5 / 127, "fp8": 16 / 448}
"""The farthest that a number can be from what comes back, of the largest of its row: half a step of int8, and of fp8
half of its largest step, between 256 and 448."""


def round_trip(x_TGD: torch.Tensor, kv: str) -> torch.Tensor:
    return unscale_rows(*scale_rows(x_TGD, FORMATS[kv]), torch.float32)


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("loudness", [1e-25, 1e-3, 1.0, 300.0, 1e30, 1e38])
def test_the_error_of_a_number_is_bound_by_the_largest_of_its_row(loudness: float, kv: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x_TGD = (torch.rand(200, 3, 48, generator=generator) * 2 - 1) * loudness
    error = (round_trip(x_TGD, kv).double() - x_TGD.double()).abs()
    bound = x_TGD.double().abs().amax(-1, keepdim=True) * ERRORS[kv] * (1 + 1e-6)
    assert (error <= bound).all()
    assert (error.amax(-1, keepdim=True) > bound / 4).any(), "the bound says nothing"


def test_small_numbers_of_fp8_keep_their_own_precision() -> None:
    """What int8 rounds to zero beside a large number, fp8 keeps to four bits."""
    x_TGD = torch.tensor([[[100.0, 0.3, -0.02]]])
    assert not round_trip(x_TGD, "int8")[0, 0, 1:].any()
    torch.testing.assert_close(round_trip(x_TGD, "fp8"), x_TGD, rtol=1 / 16, atol=0)


@pytest.mark.parametrize("kv", FORMATS)
def test_the_largest_number_comes_back_as_it_was(kv: str) -> None:
    x_TGD = torch.tensor([[[0.7, -3.1, 2.2]], [[1e-20, 0.0, 0.0]]])
    torch.testing.assert_close(round_trip(x_TGD, kv).amin(-1), x_TGD.amin(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(round_trip(x_TGD, kv)[1, 0, 0], x_TGD[1, 0, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kv", FORMATS)
def test_rows_of_zeros_and_of_next_to_nothing(kv: str) -> None:
    rows = torch.tensor([0.0, LEAST / 2, 1e-45]).view(3, 1, 1).expand(3, 1, 8)
    codes, scales = scale_rows(rows, FORMATS[kv])
    assert scales.isfinite().all()
    assert (scales > 0).all()
    found = unscale_rows(codes, scales, torch.float32)
    assert not found[0].any()
    assert (found - rows).abs().max() <= LEAST


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stays_so_and_its_neighbours_do_not_feel_it(bad: float, kv: str) -> None:
    x_TGD = torch.ones(2, 3, 5)
    x_TGD[0, 1, 2] = bad
    found = round_trip(x_TGD, kv)
    assert not found[0, 1].isfinite().any()
    found[0, 1] = 1.0
    torch.testing.assert_close(found, torch.ones(2, 3, 5))


@pytest.mark.parametrize("kv", FORMATS)
def test_tokens_are_read_as_they_were_said_to_be(kv: str) -> None:
    """What ``write_tokens`` returns is what ``read_blocks`` gives, in the layers' own dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        pages = ScaledPages(lazy_zeros((4, 3, 2, 8), FORMATS[kv], CPU), lazy_zeros((4, 3, 2), torch.float32, CPU))
        new_TGD = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
        kept_TGD = write_tokens(pages, torch.tensor([3, 4, 5, 9, 10]), new_TGD)
        assert kept_TGD.dtype == dtype
        read = read_blocks(pages, torch.tensor([1, 3]), dtype)
        assert torch.equal(read[:5], kept_TGD)
        assert not read[5].any()


def test_pages_begin_with_a_cache_line() -> None:
    for size in (1, 63, 5000, 10**6):
        assert lazy_zeros((size,), torch.int8, CPU).data_ptr() % 64 == 0


def spec_of(kv: str, dtype: str = "float32", size: int = 24) -> AttentionSpec:
    layers = (LayerAttention(4, 2, size, 0.2), LayerAttention(4, 2, size, 0.2, window=9))
    return AttentionSpec(layers, dtype, kv)


def filled(backend: PagedBackend, spec: AttentionSpec) -> PagedCache | ScaledCache:
    cache = backend.allocate(spec, [6, 6], CPU)
    generator = torch.Generator().manual_seed(3)
    for layer in range(2):
        for pages in (cache.keys[layer], cache.values[layer]):
            write_tokens(pages, torch.arange(24), torch.randn(24, 2, 24, generator=generator))
    return cache


@pytest.mark.parametrize("kv", FORMATS)
def test_a_full_cache_is_scaled_as_if_it_had_been_written_so(kv: str) -> None:
    """The blocks that are named become what a write would have made; others stay zero, and the full cache as it was."""
    backend = SdpaAttention(SdpaAttention.Config(block_size=4))
    full, scaled = spec_of("auto"), spec_of(kv)
    plain, wanted = filled(backend, full), filled(backend, scaled)
    before = [x.clone() for x in (*plain.keys, *plain.values)]
    made = backend.allocate(scaled, [6, 6], CPU)
    assert isinstance(plain, PagedCache)
    assert isinstance(made, ScaledCache)
    live = ([0, 1, 5], [2])
    scaled_cache(made, plain, scaled, live)
    for layer, blocks in enumerate(live):
        others = [block for block in range(6) if block not in blocks]
        for found, right in ((made.keys, wanted.keys), (made.values, wanted.values)):
            for one, other in zip(tensors_of(found[layer]), tensors_of(right[layer]), strict=True):
                assert torch.equal(one[blocks], other[blocks])
                assert not one[others].any()
    for one, other in zip((*plain.keys, *plain.values), before, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kv", FORMATS)
def test_a_block_takes_its_codes_and_its_scales(kv: str) -> None:
    backend = SdpaAttention(SdpaAttention.Config(block_size=16))
    scaled, full = spec_of(kv, size=64), spec_of("auto", size=64)
    sizes = [backend.bytes_per_block(spec, spec.groups[0]) for spec in (scaled, full)]
    assert sizes == [2 * 16 * 2 * (64 + 4), 2 * 16 * 2 * 64 * 4]
    assert backend.kv_contract(scaled) != backend.kv_contract(full)


# --- the C++ kernels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("size", [1, 7, 16, 19, 64, 100])
def test_the_kernels_write_the_same_codes(size: int, kv: str) -> None:
    """Scales are the same, and codes too but for a neighbour where the last bit of a product decides."""
    spec = AttentionSpec((LayerAttention(2, 2, size, 0.2),), "float32", kv)
    generator = torch.Generator().manual_seed(size)
    q, k, v = (torch.randn(40, 2, size, generator=generator) for _ in range(3))
    k[3], k[4, 0], k[5], v[6] = 0.0, math.nan, 1e30, 1e-42
    # Every number that fp8 has, and every middle between two.
    exact = torch.arange(0x7E).to(torch.uint8).view(torch.float8_e4m3fn).float()
    middles = torch.cat((exact, (exact[:-1] + exact[1:]) / 2))
    v[7:, :, 0] = 448.0
    if size > 1:
        v[7:, :, 1:] = middles[torch.randint(len(middles), (33, 2, size - 1), generator=generator)]
    caches = []
    for backend in (SdpaAttention, PagedCpuAttention):
        attention = backend(backend.Config(block_size=8))
        book = Pages(spec, 8, 8)
        cache = attention.allocate(spec, book.num_blocks, CPU)
        attention.begin(spec, book.batch({0: 40}), cache).attend(0, q, k, v)
        caches.append(cache)
    for plain, native in zip(*((c.keys[0], c.values[0]) for c in caches), strict=True):
        torch.testing.assert_close(native.scales, plain.scales, rtol=0, atol=0, equal_nan=True)
        finite = plain.scales.isfinite()
        codes = [x.codes.view(torch.uint8)[finite].int() for x in (plain, native)]
        differ = (codes[0] - codes[1]).abs()
        assert differ.max() <= 1
        assert (differ > 0).float().mean() < 1e-3
    exactly = [c.values[0].codes.view(torch.uint8).flatten(0, 1) for c in caches]
    assert kv != "fp8" or torch.equal(*exactly), "middles go to even codes"


def test_the_fields_of_a_spec_say_what_is_stored() -> None:
    assert dataclasses.replace(spec_of("int8"), kv="auto").kv_dtype == "float32"
    assert (spec_of("int8").kv_dtype, spec_of("fp8").kv_dtype) == ("int8", "float8_e4m3fn")


# --- memory ----------------------------------------------------------------------------------------------------------


def _resident_share(tensor: torch.Tensor) -> float:
    """Of the pages that a tensor lies in, how many the system has handed out. It tells without touching any."""
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - first
    found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    told = ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(first), ctypes.c_size_t(size), found)
    assert told == 0, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in found) / len(found)


def _shares_of_a_cache(kv: str, prefault: bool) -> list[float]:
    """Of the large stores of a new cache of 256 MiB, all of them zeros."""
    spec = AttentionSpec((LayerAttention(4, 2, 64, 0.1),) * 2, "float32", kv)
    backend = SdpaAttention(SdpaAttention.Config(prefault=prefault))
    num_blocks = (256 << 20) // backend.bytes_per_block(spec, spec.groups[0])
    cache = backend.allocate(spec, [num_blocks], CPU)
    stores = [tensor for pages in (*cache.keys, *cache.values) for tensor in tensors_of(pages)]
    shares = [_resident_share(tensor) for tensor in stores if tensor.nbytes >= 32 << 20]
    assert not any(tensor.any() for tensor in stores)
    return shares


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are there")


@on_linux
@pytest.mark.parametrize("kv", ["auto", *SCALED_KV])
def test_memory_of_a_cache_may_be_taken_when_it_is_made(kv: str) -> None:
    assert _shares_of_a_cache(kv, prefault=True) == [1.0] * 4


@on_linux
def test_memory_of_a_cache_is_taken_as_it_is_used() -> None:
    """In a process of its own: an allocator may hand out again what others have used."""
    ask = "from core.test_pages import _shares_of_a_cache as ask; print(max(ask('auto', False)))"
    folder = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", ask], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    assert float(done.stdout) < 0.1
