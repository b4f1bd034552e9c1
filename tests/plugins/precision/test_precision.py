"""A precision names its formats by torch's names, and refuses a platform that does not compute in them."""

from __future__ import annotations

import pytest
import torch

from drivetrain.contracts.platform import PlatformFacts
from drivetrain.contracts.plugin import ProbeContext
from drivetrain.contracts.precision import Dtypes, LossScaling, Precision
from drivetrain.plugins.precision.bf16 import Bf16Precision
from drivetrain.plugins.precision.fp16 import Fp16Precision
from drivetrain.plugins.precision.fp32 import Fp32Precision


def on_platform(*dtypes: str) -> ProbeContext:
    return ProbeContext(platform=PlatformFacts("some", "cpu", "a device", 1, frozenset(dtypes), "none", "gloo"))


def make(precision: type[Precision]) -> Precision:
    return precision(precision.Config())


def test_fp32_is_float32_throughout() -> None:
    assert make(Fp32Precision).dtypes() == Dtypes("float32", "float32", master_weight=None, loss_scale=None)


def test_bf16_sums_and_keeps_master_weights_in_float32() -> None:
    assert make(Bf16Precision).dtypes() == Dtypes("bfloat16", "float32", master_weight="float32", loss_scale=None)


def test_bf16_may_do_without_master_weights_and_round_at_random() -> None:
    precision = Bf16Precision(Bf16Precision.Config(master_weights=False, rounding="stochastic"))
    assert precision.dtypes() == Dtypes("bfloat16", "float32", master_weight=None, rounding="stochastic")


def test_fp16_scales_the_loss_and_is_refused_on_a_processor() -> None:
    dtypes = Fp16Precision(Fp16Precision.Config(initial_scale=8.0, growth_steps=5)).dtypes()
    assert dtypes.master_weight == dtypes.reduce == "float32"
    assert dtypes.loss_scale == LossScaling(initial=8.0, growth_steps=5)
    probe = Fp16Precision.probe(on_platform("float32", "bfloat16"))
    assert (probe.ok, probe.wanted, probe.offered) == (False, "float16", "bfloat16, float32")


@pytest.mark.parametrize("precision", [Fp32Precision, Bf16Precision, Fp16Precision])
def test_every_name_is_a_floating_type_of_torch(precision: type[Precision]) -> None:
    dtypes = make(precision).dtypes()
    for name in (dtypes.param, dtypes.reduce, dtypes.master_weight):
        assert name is None or getattr(torch, name).is_floating_point


def test_a_platform_without_the_type_is_refused_with_what_it_has() -> None:
    probe = Bf16Precision.probe(on_platform("float32", "float16"))
    assert (probe.ok, probe.code) == (False, "unsupported_dtype")
    assert (probe.wanted, probe.offered) == ("bfloat16", "float16, float32")
    assert Bf16Precision.probe(on_platform("float32", "bfloat16")).ok
    assert Fp32Precision.probe(on_platform("float32")).ok


def test_an_unknown_platform_is_no_reason_to_refuse() -> None:
    assert Bf16Precision.probe(ProbeContext()).ok
    assert Fp32Precision.probe(ProbeContext()).ok
