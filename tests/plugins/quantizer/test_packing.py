"""What the built-in quantizers make of numbers that are known, and that each of their options passes the kit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drivetrain.errors import ConfigError
from drivetrain.packed import PackedLinear, decode
from drivetrain.plugins.quantizer.fp8 import Fp8Quantizer, round_to_float8
from drivetrain.plugins.quantizer.int4 import Int4Quantizer, pack_int4
from drivetrain.plugins.quantizer.int8 import pack_int8
from drivetrain.plugins.quantizer.w8a8 import W8A8Quantizer
from drivetrain.testing.run import Outcome, Target, run_suites

IN_CHILD = (
    "test_the_call_keeps_its_form",
    "test_products_are_as_close_as_the_bits_allow",
    "test_products_are_not_scaled",
    "test_zero_weights_give_zero",
    "test_an_outlier_stays_finite",
    "test_memory_is_what_the_bits_say",
    "test_a_group_that_does_not_divide_is_an_error",
    "test_on_the_meta_device_it_makes_the_same_form",
    "test_a_packed_layer_multiplies_by_what_it_decodes_to",
    "test_rows_of_a_packed_weight_stand_for_themselves",
    "test_bits_of_a_packed_weight_are_those_claimed",
    "test_the_input_has_a_gradient_and_the_weight_says_that_it_has_none",
)

OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("int4", {"group": 128, "rounding": "search"}),
    ("int4", {"group": 32, "symmetric": True, "scale_dtype": "float32"}),
    ("int4", {"group": 64, "symmetric": True, "rounding": "search"}),
    ("int4", {"group": 64, "activations": "int8"}),
    ("w8a8", {"scales": "block"}),
    ("fp8", {"activations": "dynamic"}),
    ("fp8", {"activations": "static", "activation_range": 8.0}),
)


@pytest.mark.slow
def test_every_option_passes_the_kit() -> None:
    targets = [Target("quantizer", name, options=options, tests=IN_CHILD) for name, options in OPTIONS]
    report = run_suites(targets)
    failures = [
        f"{target.plugin} {dict(target.options)}: {result.test}: {result.message}"
        for target in targets
        for result in report.of(target)
        if result.outcome in (Outcome.FAILED, Outcome.ERROR, Outcome.NOT_RUN)
    ]
    assert not failures, "\n".join(failures)
    assert all(report.of(target) for target in targets)


def weights(rows: int = 24, width: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_integers_times_a_scale_survive_int8() -> None:
    """Rows of whole multiples that reach 127: nothing is rounded."""
    codes = torch.randint(-126, 127, (8, 64), generator=torch.Generator().manual_seed(0)).float()
    codes[:, 0] = 127
    weight = codes * torch.arange(1, 9)[:, None] / 64
    assert torch.equal(decode(pack_int8(weight)), weight)


@pytest.mark.parametrize("is_symmetric", [False, True])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
def test_sixteen_values_survive_int4(group: int, is_symmetric: bool) -> None:
    """Groups of whole multiples over the whole range of codes: nothing is rounded, group by group."""
    generator = torch.Generator().manual_seed(group)
    codes = torch.randint(0, 16, (8, 256 // group, group), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15
    scales = 2.0 ** torch.randint(-6, 2, (8, 256 // group, 1), generator=generator)
    least = -8 * scales if is_symmetric else 3 * scales
    weight = (codes * scales + least).flatten(1)
    packed = pack_int4(weight, group, is_symmetric=is_symmetric)
    assert torch.equal(decode(packed), weight)
    assert packed.bits_per_weight == 4 + 32 / group


@pytest.mark.parametrize("is_symmetric", [False, True])
def test_the_search_is_never_worse_in_any_group(is_symmetric: bool) -> None:
    """And clearly better over all of them."""
    weight = weights() * torch.linspace(0.01, 3, 24)[:, None]
    weight[:, ::37] *= 4
    plain, searched = (
        (decode(pack_int4(weight, 64, is_symmetric=is_symmetric, searches=searches)) - weight).unflatten(1, (-1, 64))
        for searches in (False, True)
    )
    errors = [part.square().sum(-1) for part in (plain, searched)]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()


def test_rounded_activations_have_the_same_weights_and_need_whole_blocks() -> None:
    linear = torch.nn.Linear(96, 8)
    exact, rounded = (
        Int4Quantizer(Int4Quantizer.Config(activations=form)).convert("layer", linear) for form in ("none", "int8")
    )
    assert rounded.packed.operation == "linear_int4_a8"
    assert torch.equal(decode(rounded.packed), decode(exact.packed))
    narrow = Int4Quantizer(Int4Quantizer.Config(group=16, activations="int8"))
    with pytest.raises(ConfigError, match="48"):
        narrow.convert("layer", torch.nn.Linear(48, 8))


def test_equal_weights_of_a_group_are_kept() -> None:
    """A group without a range has a scale of 0, and its minimum says it all."""
    weight = torch.full((4, 64), 0.5)
    assert torch.equal(decode(pack_int4(weight, 32)), weight)
    assert torch.equal(decode(pack_int4(weight, 32, searches=True)), weight)


def test_a_scale_beyond_float16_is_an_error_with_the_way_out() -> None:
    linear = torch.nn.Linear(64, 4)
    with torch.no_grad():
        linear.weight[2, 5] = 1e6
    with pytest.raises(ConfigError, match=r"up: 1 scales and minima are too large for float16.*scale_dtype: float32"):
        Int4Quantizer(Int4Quantizer.Config.model_validate({})).convert("up", linear)
    wide = Int4Quantizer(Int4Quantizer.Config.model_validate({"scale_dtype": "float32"}))
    packed = wide.convert("up", linear)
    assert isinstance(packed, PackedLinear)
    assert decode(packed.packed)[2, 5] == pytest.approx(1e6, rel=1e-3)


def test_float8_keeps_powers_of_two_of_the_largest() -> None:
    weight = torch.tensor([[448.0, -224.0, 28.0, 0.0], [7.0, 3.5, -7.0, 0.4375]])
    made = round_to_float8(weight)
    assert torch.equal(made["weight"].float() * made["scales"][:, None], weight)


@pytest.mark.parametrize("options", [{"activations": "static"}, {"activation_range": 3.0}])
def test_a_range_goes_with_static_activations_only(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="activation_range goes with activations: static"):
        Fp8Quantizer.Config.model_validate(options)


def test_blocks_of_w8a8_disturb_each_other_less() -> None:
    """One large activation: with a scale for each token all others are coarse, with blocks only its neighbours."""
    linear, x = torch.nn.Linear(256, 32, bias=False), weights(8, 256, seed=2)
    x[:, 5] = 300.0
    from drivetrain.testing.suites.quantizer import reference_binder

    errors = []
    for scales in ("token", "block"):
        layer = W8A8Quantizer(W8A8Quantizer.Config.model_validate({"scales": scales})).convert("up", linear)
        assert isinstance(layer, PackedLinear)
        layer.bind(reference_binder().bind(layer.spec("cpu", torch.float32)))
        with torch.no_grad():
            wanted = torch.nn.functional.linear(x, decode(layer.packed))
            errors.append(float((layer(x) - wanted).norm()))
    assert errors[1] < 0.5 * errors[0]
