"""Run by ``tests/kernels/test_triton_kernels.py`` in a process with Triton's interpreter on: weights of a few bits in
full, which are a candidate beside the kernels that multiply by their codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.kernels.reference import ReferenceKernels
from drivetrain.kernels.triton import expansion, gguf, products
from drivetrain.kernels.triton.product_tiles import LIBRARY
from drivetrain.kernels.triton.tuning import Blocks, Tuner
from drivetrain.packed import DECODERS
from drivetrain.packed.gguf import BLOCK_TYPES
from support.gguf_models import KIND, random_blocks

torch.set_num_threads(1)


class ByLibrary(Tuner):
    """Takes the weight in full."""

    def choose(self, key: str, candidates: Any, launch: Any, worth_it: bool = True, output: Any = None) -> Blocks:
        return LIBRARY


def grouped(operation: str, outputs: int, group: int, groups: int, zeros: bool) -> tuple[torch.Tensor, ...]:
    """The weight arguments of such a product."""
    inputs = group * groups
    widths = (inputs // 2,) if operation == "linear_int4" else (inputs // 4, inputs // 8)
    values = [torch.randint(0, 256, (outputs, width), dtype=torch.uint8) for width in widths]
    scales = torch.rand(outputs, groups) / 16
    mins = torch.randint(0, 16, scales.shape, dtype=torch.uint8) if zeros else torch.randn(outputs, groups)
    return *values, scales, mins


@pytest.mark.parametrize("operation", ["linear_int4", "linear_int3"])
@pytest.mark.parametrize(("outputs", "group", "groups"), [(5, 32, 1), (19, 64, 3), (33, 128, 9)])
@pytest.mark.parametrize("zeros", [False, True])
def test_groups_are_what_they_stand_for(operation: str, outputs: int, group: int, groups: int, zeros: bool) -> None:
    torch.manual_seed(1)
    *values, scales, mins = grouped(operation, outputs, group, groups, zeros)
    wanted = DECODERS[operation](*values, scales, mins, torch.float32, {})
    full = expansion.groups_in_full(values, scales, mins, group, torch.float32)
    torch.testing.assert_close(full, wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(expansion.groups_in_full(values, scales, mins, group, torch.float16), full.half())


@pytest.mark.parametrize("number", BLOCK_TYPES)
@pytest.mark.parametrize(("outputs", "count"), [(7, 1), (21, 3), (32, 64)])
def test_blocks_are_what_they_stand_for(number: int, outputs: int, count: int) -> None:
    """Also where tiles of the kernel end behind a row, or behind all."""
    kind = BLOCK_TYPES[number]
    count = min(count, 1 << 11 >> kind.size.bit_length())
    blocks = torch.from_numpy(random_blocks(KIND(number), outputs, count * kind.size, seed=number, size=4.0))
    wanted = DECODERS["linear_gguf"](blocks, torch.float32, {"type": float(number)})
    torch.testing.assert_close(expansion.blocks_in_full(number, blocks, torch.float32), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("has_bias", [False, True])
def test_products_with_them_equal_the_reference(has_bias: bool) -> None:
    torch.manual_seed(2)
    x, bias = torch.randn(2, 3, 192).half(), torch.randn(19).half() if has_bias else None
    blocks = torch.from_numpy(random_blocks(KIND(2), 19, 192, seed=2, size=4.0))
    uses: list[tuple[str, dict[str, float], Any, tuple[torch.Tensor, ...]]] = [
        ("linear_int4", {"group": 64.0}, products.make_linear_by_group, grouped("linear_int4", 19, 64, 3, False)),
        ("linear_int3", {"group": 64.0}, products.make_linear_by_group, grouped("linear_int3", 19, 64, 3, True)),
        ("linear_gguf", {"type": 2.0}, gguf.make_linear_gguf, (blocks,)),
    ]
    with torch.no_grad():
        for operation, params, make, weights in uses:
            spec = KernelSpec(operation, "cpu", "float16", {}, params)
            wanted = ReferenceKernels(ReferenceKernels.Config()).make(spec)(x, *weights, bias)
            found = make(spec, ByLibrary())(x, *weights, bias)
            torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3 * float(wanted.abs().max()))


def test_only_half_precision_and_many_rows_have_it_as_a_candidate() -> None:
    plain, expansion.INTERPRETED = expansion.INTERPRETED, False
    try:
        assert [expansion.worth_trying(rows, 2) for rows in (1, 16, 64, 4096)] == [False, False, True, True]
        assert not expansion.worth_trying(4096, 4)
        for spec, make, inputs in (
            (KernelSpec("linear_int4", "cuda", "bfloat16", {}, {"group": 64.0}), products.LinearByGroup, 4096),
            (KernelSpec("linear_gguf", "cuda", "bfloat16", {}, {"type": 12.0}), gguf._LinearGGUF, 4096),
        ):
            for rows, itemsize, is_in in ((16, 2, False), (256, 2, True), (256, 4, False)):
                assert (LIBRARY in make(spec, Tuner()).candidates(rows, 4096, inputs, 132, itemsize)) == is_in
        rounded = gguf._LinearGGUF(KernelSpec("linear_gguf_a8", "cuda", "bfloat16", {}, {"type": 12.0}), Tuner())
        assert LIBRARY not in rounded.candidates(256, 4096, 4096, 132, 2)
    finally:
        expansion.INTERPRETED = plain
