"""GPTQ, AWQ and SmoothQuant beside their plain formulas, and what holds for any weights and inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.contracts.quantizer import InputStatistics
from drivetrain.errors import ConfigError
from drivetrain.packed import decode
from drivetrain.plugins.quantizer.calibrated.awq import awq_factors, awq_grid, compensated_factors
from drivetrain.plugins.quantizer.calibrated.clipping import best_shares, diagonal_blocks, group_losses
from drivetrain.plugins.quantizer.calibrated.gptq import gptq, inverse_factor
from drivetrain.plugins.quantizer.calibrated.grids import Rounding, check_group, check_range
from drivetrain.plugins.quantizer.calibrated.refining import damped, refined
from drivetrain.plugins.quantizer.calibrated.smooth import smoothing_factors

roundings = st.builds(Rounding, bits=st.sampled_from([3, 4]), group=st.sampled_from([16, 32]), symmetric=st.booleans())


def weights(seed: int, rows: int = 24, width: int = 96, scale: float = 0.1) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale


def statistics(seed: int, width: int = 96, tokens: int = 300) -> InputStatistics:
    """Inputs that hang together, some of them much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    x = torch.randn(tokens, width, generator=generator) @ mixed * torch.rand(width, generator=generator).mul(3).exp()
    return InputStatistics(tokens, x.abs().mean(0), x.abs().amax(0), x.T @ x / tokens)


def loss(weight: torch.Tensor, rounded: torch.Tensor, known: InputStatistics) -> float:
    error = (rounded - weight).double()
    assert known.gram_II is not None
    return float(((error @ known.gram_II.double()) * error).sum())


def plain_gptq(weight: np.ndarray, gram: np.ndarray, rounding: Rounding, damping: float) -> np.ndarray:
    """Column by column in float64, every column behind updated at once: Frantar et al., equations 2 and 3, by the
    inverse of what is left of the second moments rather than by a Cholesky factor."""
    weight = weight.copy()
    gram = gram + np.eye(len(gram)) * damping * np.diag(gram).mean()
    inverse = np.linalg.inv(gram)
    out = np.zeros_like(weight)
    for column in range(weight.shape[1]):
        if column % rounding.group == 0:
            block = torch.from_numpy(weight[:, column : column + rounding.group]).float().unsqueeze(1)
            scales, zeros = (t.double().numpy()[:, 0] for t in rounding.grids(block))
        values = np.clip(np.rint(weight[:, column] / scales + zeros), 0, rounding.highest)
        out[:, column] = (values - zeros) * scales
        error = (weight[:, column] - out[:, column]) / inverse[column, column]
        weight[:, column + 1 :] -= np.outer(error, inverse[column, column + 1 :])
        # What is left once this column is settled: one step of Gaussian elimination.
        inverse -= np.outer(inverse[:, column], inverse[column, :]) / inverse[column, column]
    return out


@pytest.mark.parametrize("rounding", [Rounding(4, 32, False), Rounding(3, 16, False), Rounding(4, 16, True)], ids=str)
def test_gptq_is_the_plain_algorithm(rounding: Rounding) -> None:
    """The same numbers, but for single ones that lie just between two values."""
    weight, known = weights(1), statistics(2)
    assert known.gram_II is not None
    found = gptq("layer", weight, known, rounding, clips=False, damping=0.01).weights()
    wanted = plain_gptq(weight.double().numpy(), known.gram_II.double().numpy(), rounding, 0.01)
    same = np.isclose(found.numpy(), wanted, rtol=1e-3, atol=1e-5)
    assert same.mean() > 0.97
    assert loss(weight, found, known) == pytest.approx(loss(weight, torch.from_numpy(wanted).float(), known), rel=0.03)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_loses_far_less_than_rounding_to_nearest(bits: int, clips: bool, act_order: bool) -> None:
    rounding = Rounding(bits, 32, False)
    for seed in range(3):
        weight, known = weights(seed), statistics(seed + 10)
        nearest = loss(weight, rounding.grid(weight).weights(), known)
        found = gptq("layer", weight, known, rounding, act_order=act_order, clips=clips)
        assert loss(weight, found.weights(), known) < 0.75 * nearest


def test_gptq_with_inputs_that_do_not_hang_together_is_rounding_to_nearest() -> None:
    """There is nothing then by which one column could make up for another."""
    rounding, weight = Rounding(4, 32, False), weights(3)
    flat = InputStatistics(100, torch.ones(96), torch.ones(96), torch.eye(96))
    found = gptq("layer", weight, flat, rounding, clips=False)
    assert torch.equal(found.weights(), rounding.grid(weight).weights())


def test_inputs_that_are_always_zero_cost_nothing() -> None:
    """Their weights become 0, and the others are as they would be without them."""
    rounding, weight, known = Rounding(4, 32, False), weights(4), statistics(5)
    assert known.gram_II is not None
    known.gram_II[40:50] = 0
    known.gram_II[:, 40:50] = 0
    found = gptq("layer", weight, known, rounding).weights()
    assert torch.isfinite(found).all()
    assert not found[:, 40:50].any()


def test_second_moments_of_few_tokens_are_damped_until_they_can_be_used() -> None:
    """3 tokens for 96 inputs: a matrix of rank 3."""
    rounding, weight, known = Rounding(4, 32, False), weights(6), statistics(7, tokens=3)
    found = gptq("layer", weight, known, rounding, damping=1e-12)
    assert torch.isfinite(found.weights()).all()
    assert loss(weight, found.weights(), known) < loss(weight, rounding.grid(weight).weights(), known)


@settings(max_examples=40, deadline=None)
@given(rounding=roundings, seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 0.1, 50]))
def test_what_lies_on_a_grid_stays_as_it_is(rounding: Rounding, seed: int, scale: float) -> None:
    """Groups that reach both ends of their values are rounded to themselves, whatever zero point they have: nothing is
    lost twice. (One that does not gets finer steps over its smaller range.)"""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, rounding.highest + 1, (24, 96 // rounding.group, rounding.group), generator=generator)
    values[..., 0], values[..., -1] = 0, rounding.highest
    zeros = torch.randint(1, rounding.highest + 1, values.shape[:2], generator=generator)
    if rounding.symmetric:
        zeros.fill_(rounding.middle)
    scales = (torch.rand(values.shape[:2], generator=generator) + 0.5).mul(scale).half()
    grid = rounding.stored(values.float().flatten(1), scales.float(), zeros.float())
    weight, known = grid.weights(), statistics(seed)
    for again in (rounding.grid(weight), gptq("layer", weight, known, rounding, clips=False, sweeps=2)):
        torch.testing.assert_close(again.weights(), weight, rtol=2e-3, atol=0)
        assert torch.equal(again.values_OI, grid.values_OI)


@settings(max_examples=40, deadline=None)
@given(rounding=roundings, seed=st.integers(0, 10**6), act_order=st.booleans(), scale=st.sampled_from([1e-3, 0.1, 50]))
def test_packed_weights_are_what_was_decided(rounding: Rounding, seed: int, act_order: bool, scale: float) -> None:
    """Values are in range, zero points fit the files, and the operation's layout stands for the same numbers."""
    weight, known = weights(seed, scale=scale), statistics(seed)
    grid = gptq("layer", weight, known, rounding, act_order=act_order)
    assert int(grid.values_OI.max()) <= rounding.highest
    assert 1 <= int(grid.zeros_ON.min()) <= int(grid.zeros_ON.max()) <= rounding.highest
    assert grid.scales_ON.dtype == torch.float16
    packed = grid.packed()
    assert packed.operation == f"linear_int{rounding.bits}"
    assert (packed.order is not None) == act_order
    torch.testing.assert_close(decode(packed), grid.weights(), rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(rounding=roundings, seed=st.integers(0, 10**6))
def test_a_cut_range_never_loses_more_in_its_group(rounding: Rounding, seed: int) -> None:
    weight, known = weights(seed), statistics(seed)
    assert known.gram_II is not None
    grouped, blocks = weight.unflatten(1, (-1, rounding.group)), diagonal_blocks(known.gram_II, rounding.group)
    shares = best_shares(grouped, blocks, rounding)
    whole = group_losses(rounding.rounded(grouped) - grouped, blocks)
    cut = group_losses(rounding.rounded(grouped, shares) - grouped, blocks)
    assert bool((cut <= whole * (1 + 1e-6)).all())


@settings(max_examples=25, deadline=None)
@given(rounding=roundings, seed=st.integers(0, 10**6))
def test_awq_s_factors_never_lose_more_than_none(rounding: Rounding, seed: int) -> None:
    """Over both layers that read the input, and clearly less where some inputs are much larger than others."""
    both, known = {"q": weights(seed), "k": weights(seed + 1, rows=40)}, statistics(seed)
    factors = awq_factors(both, known, rounding, steps=10)
    plain = sum(loss(w, rounding.grid(w).weights(), known) for w in both.values())
    assert factors is not None
    assert bool((factors > 0).all())
    found = sum(loss(w, rounding.grid(w * factors).weights() / factors, known) for w in both.values())
    assert found < 0.95 * plain


@pytest.mark.parametrize("bits", [3, 4])
def test_factors_for_columns_rounded_one_by_one_are_the_best_of_those_tried(bits: int) -> None:
    """Measured anew for each ratio with the inputs divided by it, and it is a gain over none that sweeps keep."""
    rounding, lost = Rounding(bits, 32, False), {"none": 0.0, "chosen": 0.0}
    for seed in range(4):
        both, known = {"q": weights(seed), "k": weights(seed + 1, rows=40)}, statistics(seed + 20)
        assert known.gram_II is not None
        wide = InputStatistics(known.num_tokens, known.mean_abs_I, known.max_abs_I, damped(known.gram_II, 0.1))
        tried = []
        for step in range(10):
            factors = known.mean_abs_I ** (step / 10)
            factors /= (factors.max() * factors.min()).sqrt()
            divided = wide.divided(factors)
            rounded = {n: gptq(n, w * factors, divided, rounding, damping=1e-9).weights() for n, w in both.items()}
            tried.append((sum(loss(w, rounded[n] / factors, wide) for n, w in both.items()), factors))
        chosen = compensated_factors(both, known, rounding, steps=10, damping=0.1)
        assert chosen is not None
        best, nearly = sorted(tried, key=lambda entry: entry[0])[:2]
        # Ranges are cut by the inputs without what is added to them: two ratios may be as good as each other.
        assert torch.allclose(chosen, best[1], rtol=1e-3) or nearly[0] < 1.02 * best[0]
        for name, factors in (("none", torch.ones(96)), ("chosen", chosen)):
            divided = known.divided(factors)
            for n, w in both.items():
                found = gptq(n, w * factors, divided, rounding, sweeps=4).weights() / factors
                lost[name] += loss(w, found, known)
    assert lost["chosen"] < 0.9 * lost["none"]


def test_inputs_that_are_divided_need_no_second_factor() -> None:
    """The Cholesky factor of the inverse is that of the inputs as they were, times the factors."""
    known, factors = statistics(3), torch.rand(96) + 0.5
    assert known.gram_II is not None
    divided = known.divided(factors).gram_II
    assert divided is not None
    found = inverse_factor("layer", known.gram_II, 1e-9) * factors
    torch.testing.assert_close(found, inverse_factor("layer", divided, 1e-9), rtol=1e-3, atol=1e-4)


def test_awq_rounds_after_its_factors_and_cuts() -> None:
    rounding, weight, known = Rounding(4, 32, False), weights(8), statistics(9)
    whole = awq_grid(weight, known, rounding, clips=False)
    assert torch.equal(whole.weights(), rounding.grid(weight).weights())
    cut = awq_grid(weight, known, rounding)
    assert loss(weight, cut.weights(), known) < loss(weight, whole.weights(), known)


def rounded_parts(weight: torch.Tensor, rounding: Rounding) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grouped = weight.unflatten(1, (-1, rounding.group))
    scales, zeros = rounding.grids(grouped)
    return rounding.values(grouped, scales.unsqueeze(-1), zeros.unsqueeze(-1)).flatten(1), scales, zeros


@settings(max_examples=25, deadline=None)
@given(rounding=roundings, seed=st.integers(0, 10**6), scale=st.sampled_from([1e-2, 0.1, 50]))
def test_every_sweep_loses_less_and_keeps_what_files_hold(rounding: Rounding, seed: int, scale: float) -> None:
    weight, known = weights(seed, scale=scale), statistics(seed)
    assert known.gram_II is not None
    start = rounded_parts(weight, rounding)
    losses = [loss(weight, rounding.stored(*start).weights(), known)]
    for sweeps in (1, 2, 8):
        values, scales, zeros = refined(weight, known.gram_II, rounding, start, sweeps=sweeps)
        assert torch.equal(scales, scales.half().float())
        assert torch.equal(zeros, start[2])
        assert 0 <= float(values.min()) <= float(values.max()) <= rounding.highest
        losses.append(loss(weight, rounding.stored(values, scales, zeros).weights(), known))
    assert losses[1] < 0.7 * losses[0]
    assert losses[2] <= losses[1] * (1 + 1e-4)
    assert losses[3] <= losses[2] * (1 + 1e-4)


def test_a_sweep_is_coordinate_descent_group_by_group() -> None:
    """Beside the plain form in float64, which measures the loss anew for each of the values that a weight can have."""
    rounding, weight, known = Rounding(3, 16, False), weights(1, rows=3, width=32), statistics(2, width=32)
    assert known.gram_II is not None
    start, gram = rounded_parts(weight, rounding), known.gram_II.double()
    found_values, found_scales, _ = refined(weight, known.gram_II, rounding, start, sweeps=1)
    wide = weight.double()
    values, scales, zeros = (part.double().clone() for part in start)
    for row in range(3):
        made = ((values[row].view(2, 16) - zeros[row, :, None]) * scales[row, :, None]).flatten()
        for group in range(2):
            columns = slice(16 * group, 16 * group + 16)
            centred = torch.zeros(32, dtype=torch.float64)
            centred[columns] = values[row, columns] - zeros[row, group]
            others = made.clone()
            others[columns] = 0
            best = (centred @ gram @ (wide[row] - others)) / (centred @ gram @ centred)
            scales[row, group] = best.half().double()
            made = others + centred * scales[row, group]
            for column in range(columns.start, columns.stop):
                tried = made.repeat(8, 1)
                tried[:, column] = (torch.arange(8) - zeros[row, group]) * scales[row, group]
                error = tried - wide[row]
                values[row, column] = int(((error @ gram) * error).sum(1).argmin())
                made = tried[int(values[row, column])]
    torch.testing.assert_close(found_scales.double(), scales, rtol=1e-3, atol=0)
    assert (found_values == values).double().mean() > 0.97


def test_weights_that_lose_nothing_are_left_as_they_are() -> None:
    rounding, known = Rounding(4, 32, False), statistics(9)
    weight = rounding.grid(weights(8)).weights()
    start = rounded_parts(weight, rounding)
    made = rounding.stored(*start).weights()
    assert known.gram_II is not None
    for part, before in zip(refined(made, known.gram_II, rounding, start, sweeps=4), start, strict=True):
        assert torch.equal(part, before)


@pytest.mark.parametrize("bits", [3, 4])
def test_sweeps_take_a_quarter_of_what_gptq_loses(bits: int) -> None:
    rounding = Rounding(bits, 32, False)
    for seed in range(3):
        weight, known = weights(seed), statistics(seed + 10)
        once = loss(weight, gptq("layer", weight, known, rounding, damping=0.01).weights(), known)
        found = gptq("layer", weight, known, rounding, damping=0.01, sweeps=8)
        assert loss(weight, found.weights(), known) < 0.75 * once


def test_damping_keeps_values_from_being_fitted_to_few_tokens() -> None:
    """Judged on other tokens of the same kind than those that were calibrated on."""
    rounding, lost = Rounding(4, 32, False), {0.01: 0.0, 0.1: 0.0}
    for seed in range(4):
        weight, few, many = weights(seed), statistics(seed, tokens=150), statistics(seed, tokens=20_000)
        for damping in lost:
            found = gptq("layer", weight, few, rounding, damping=damping, sweeps=8)
            lost[damping] += loss(weight, found.weights(), many)
    assert lost[0.1] < 0.95 * lost[0.01]


def test_smoothing_is_the_published_formula() -> None:
    both, known = [weights(1), weights(2, rows=40)], statistics(3)
    largest = torch.cat(both).abs().amax(0)
    for strength in (0.25, 0.5, 1.0):
        wanted = known.max_abs_I**strength / largest ** (1 - strength)
        torch.testing.assert_close(smoothing_factors(both, known, strength), wanted)
    # At a half, inputs and weights are equally hard to round, channel by channel.
    factors = smoothing_factors(both, known, 0.5)
    torch.testing.assert_close(known.max_abs_I / factors, largest * factors)


@pytest.mark.parametrize("symmetric", [False, True])
def test_zeros_and_constants_have_scales_too(symmetric: bool) -> None:
    rounding = Rounding(4, 16, symmetric)
    assert not rounding.grid(torch.zeros(2, 32)).weights().any()
    constant = rounding.grid(torch.full((2, 32), 0.37)).weights()
    torch.testing.assert_close(constant, torch.full((2, 32), 0.37), rtol=1e-3, atol=0)


def test_layers_that_do_not_fit_are_named_with_numbers() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.x: rows of 80 weights are no whole number of groups of 64.*divides 80"
    ):
        check_group("model.x", 80, Rounding(4, 64, False))
    with pytest.raises(ConfigError, match=r"model\.x: .*float16 holds no scale.*'1e\+06'; allowed: at most 5\.24e\+05"):
        check_range("model.x", torch.full((1, 16), 1e6), Rounding(4, 16, False))
