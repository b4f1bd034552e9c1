"""Precisions with one fault each, and the test of the kit that must catch it."""

from __future__ import annotations

import torch

from drivetrain.contracts.plugin import Plugin, Probe, ProbeContext
from drivetrain.contracts.precision import Dtypes, Precision
from drivetrain.plugins.precision.bf16 import Bf16Precision
from drivetrain.plugins.precision.fp32 import Fp32Precision


class CoarseMaster(Fp32Precision):
    """Keeps the optimizer's copy in fewer bits than the parameters."""

    def dtypes(self) -> Dtypes:
        return Dtypes(param="float32", reduce="float32", master_weight="bfloat16")


class CoarseSum(Fp32Precision):
    """Sums gradients in fewer bits than they were computed in."""

    def dtypes(self) -> Dtypes:
        return Dtypes(param="float32", reduce="float16")


class HalfWithoutScale(Precision):
    """Trains in float16 without a loss scale."""

    def dtypes(self) -> Dtypes:
        return Dtypes(param="float16", reduce="float32", master_weight="float32")

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return cls.probe_dtype(context, "float16")


class TakesEveryPlatform(Bf16Precision):
    """Never looks at what the platform computes in."""

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return Probe.yes("surely")


class SetsTheDefaultDtype(Bf16Precision):
    """Changes torch's default dtype for the whole process when it is probed."""

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        torch.set_default_dtype(torch.bfloat16)
        return super().probe(context)


ZOO: dict[type[Plugin], str] = {
    CoarseMaster: "test_master_weights_are_at_least_as_exact_as_parameters",
    CoarseSum: "test_gradients_are_summed_at_least_as_exactly_as_computed",
    HalfWithoutScale: "test_a_narrow_range_has_a_loss_scale",
    TakesEveryPlatform: "test_refuses_where_the_platform_does_not_compute_in_it",
    SetsTheDefaultDtype: "test_import_and_probe_leave_torch",
}
"""Faulty precision -> the test that must fail for it."""
