"""Run by ``tests/kernels/test_triton_kernels.py`` in a process with Triton's interpreter on: activations are rounded as
the contract says, bit by bit."""

from __future__ import annotations

import math

import pytest
import torch

from drivetrain.kernels.triton import rounding

torch.set_num_threads(1)

NO_SCALE = torch.tensor(0.0)


def rows(columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of different sizes, with gaps between them; one of zeros, and one whose numbers are all ties."""
    torch.manual_seed(0)
    x = torch.randn(6, columns + 3) * torch.tensor([1.0, 1e-3, 1e4, 0.0, 1.0, 1e-30])[:, None]
    x[4] = torch.arange(columns + 3).remainder(250) - 124.5
    x[4, 0] = 127.0
    return x.to(dtype)[:, :columns]


def quotients(x: torch.Tensor, largest_code: float, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """By the contract's words, in float32."""
    if scale is None:
        scale = x.float().abs().amax(-1) / largest_code
    return torch.where(scale[:, None] == 0, torch.zeros(()), x.float() / scale[:, None]), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [33, 20_001])  # a row in registers, and one that is read in parts
def test_int8_rows_are_those_of_the_contract(columns: int, dtype: torch.dtype) -> None:
    x = rows(columns, dtype)
    codes, scales = rounding.to_int8_rows(x)
    wanted, wanted_scales = quotients(x, 127)
    assert torch.equal(scales, wanted_scales)
    assert torch.equal(codes, wanted.round().to(torch.int8))
    assert codes.stride(0) % 16 == 0


@pytest.mark.parametrize("given", [0.0, 0.01])
@pytest.mark.parametrize("columns", [33, 20_001])
def test_float8_rows_are_those_of_the_contract(columns: int, given: float) -> None:
    x = rows(columns)
    codes, scales = rounding.to_float8_rows(x, torch.tensor(given, dtype=torch.float64))
    wanted, wanted_scales = quotients(x, 448, torch.full((6,), given) if given else None)
    wanted = wanted.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(scales, wanted_scales)
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.equal(codes.float(), wanted.float())
    halves, same = rounding.to_float8_rows(x, torch.tensor(given), torch.float16)
    assert torch.equal(halves, wanted.half())
    assert torch.equal(same, scales)


def test_float8_is_right_for_all_of_its_numbers_and_everything_half_way_between_two() -> None:
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (numbers[1:] + numbers[:-1]) / 2
    beside = torch.cat([between.nextafter(torch.tensor(bound)) for bound in (0.0, 1e9)])
    x = torch.cat((numbers, between, beside, torch.tensor([500.0, 1e30, math.inf])))
    x = torch.cat((x, -x, torch.tensor([math.nan])))[None, :]
    codes, scales = rounding.to_float8_rows(x, torch.ones(()))
    wanted = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8))
    assert scales.tolist() == [1.0]


@pytest.mark.parametrize("even_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_have_scales_of_their_own_and_sums(dtype: torch.dtype, even_first: bool) -> None:
    x = rows(96, dtype)
    codes, scales, sums = rounding.to_int8_blocks(x.unflatten(0, (2, 3)), even_first=even_first)
    wanted, wanted_scales = quotients(x.reshape(-1, 32), 127)
    in_order = wanted.round()
    if even_first:
        in_order = torch.cat((in_order[:, ::2], in_order[:, 1::2]), dim=1)
    assert torch.equal(codes.view(-1, 32), in_order.to(torch.int8))
    assert torch.equal(scales.flatten(), wanted_scales)
    assert torch.equal(sums.flatten(), in_order.sum(1) * wanted_scales)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_spoils_its_own_row_or_block_alone(bad: float) -> None:
    x = torch.ones(3, 64)
    x[1, 40] = bad
    for _, scales in (rounding.to_int8_rows(x), rounding.to_float8_rows(x, NO_SCALE)):
        assert scales.isnan().tolist() == [False, True, False]
    _, scales, sums = rounding.to_int8_blocks(x)
    for found in (scales, sums):
        assert found.isnan().tolist() == [[False, False], [False, True], [False, False]]
    for given in (math.nan, math.inf):
        assert rounding.to_float8_rows(x, torch.tensor(given))[1].isnan().all()


def test_numbers_below_the_normal_ones_keep_their_sign() -> None:
    """Their scale, if it is not 0, has so few bits that a quotient may be more than the largest code."""
    x = torch.tensor([[190.0, -190.0, 95.0], [1.0, -1.0, 0.0]]) * 2.0**-149
    codes, scales = rounding.to_int8_rows(x)
    assert codes.tolist() == [[127, -127, 95], [0, 0, 0]]
    assert scales.tolist() == [2.0**-149, 0.0]


def test_no_rows_are_rounded_to_none() -> None:
    x = torch.ones(0, 3, 64)
    assert [tensor.shape for tensor in rounding.to_int8_rows(x)] == [(0, 64), (0,)]
    assert [tensor.shape for tensor in rounding.to_float8_rows(x, NO_SCALE)] == [(0, 64), (0,)]
    assert [tensor.shape for tensor in rounding.to_int8_blocks(x)] == [(0, 64), (0, 2), (0, 2)]
