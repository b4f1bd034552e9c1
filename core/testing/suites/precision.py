"""What every precision has to do."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from drivetrain.contracts.platform import PlatformFacts
from drivetrain.contracts.plugin import ProbeContext
from drivetrain.contracts.precision import Dtypes, Precision
from drivetrain.testing.suite import Suite

_SMALLEST_SAFE_NORMAL = 1e-30
"""Gradients of large models go down to about this; a format that can't hold it loses them without a loss scale."""


def facts_with(*dtypes: str) -> PlatformFacts:
    """A platform that computes in ``dtypes``."""
    return PlatformFacts("pretend", "cpu", "a pretend device", 1, frozenset(dtypes), "none", "gloo")


class PrecisionSuite(Suite):
    """Formats that exist, that lose nothing on the way to the optimizer, and that the platform has."""

    kind = "precision"

    @classmethod
    def dtypes(cls) -> Dtypes:
        dtypes = cast(Precision, cls.make()).dtypes()
        assert isinstance(dtypes, Dtypes), f"dtypes() returned {type(dtypes).__name__}"
        return dtypes

    @classmethod
    def torch_dtype(cls, field: str) -> torch.dtype:
        name = getattr(cls.dtypes(), field)
        dtype = getattr(torch, name, None)
        assert isinstance(dtype, torch.dtype), f"{field}: torch has no dtype {name!r}"
        assert dtype.is_floating_point, f"{field}: {name} is not a floating-point type"
        return dtype

    def test_dtypes_exist(self) -> None:
        """Every format is one of torch's floating-point types."""
        for field in ("param", "reduce", *(["master_weight"] if self.dtypes().master_weight else [])):
            self.torch_dtype(field)

    def test_dtypes_are_repeatable(self) -> None:
        """Two instances with the same options tell of the same formats."""
        assert self.dtypes() == self.dtypes()

    def test_gradients_are_summed_at_least_as_exactly_as_computed(self) -> None:
        """The reduction's format is no coarser than the parameters'."""
        assert torch.finfo(self.torch_dtype("reduce")).eps <= torch.finfo(self.torch_dtype("param")).eps

    def test_master_weights_are_at_least_as_exact_as_parameters(self) -> None:
        """The optimizer's copy loses no bit of the parameters."""
        if self.dtypes().master_weight is None:
            pytest.skip("not claimed: master weights")
        assert torch.finfo(self.torch_dtype("master_weight")).eps <= torch.finfo(self.torch_dtype("param")).eps

    def test_a_narrow_range_has_a_loss_scale(self) -> None:
        """A format that can't hold small gradients asks for loss scaling."""
        smallest = torch.finfo(self.torch_dtype("param")).tiny
        if smallest > _SMALLEST_SAFE_NORMAL:
            assert self.dtypes().loss_scale, f"gradients below {smallest:g} would vanish without a loss scale"

    def test_says_yes_where_the_platform_computes_in_it(self) -> None:
        """On a platform that lists the format the probe says yes, and told of no platform it does not refuse."""
        param = self.dtypes().param
        assert self.plugin_class().probe(ProbeContext()).ok
        probe = self.plugin_class().probe(ProbeContext(platform=facts_with(param, self.dtypes().reduce)))
        assert probe.ok, probe.reason

    def test_refuses_where_the_platform_does_not_compute_in_it(self) -> None:
        """On a platform that does not list the format the probe says no, with what it wanted and what there is."""
        param = self.dtypes().param
        other = "bfloat16" if param != "bfloat16" else "float32"
        probe = self.plugin_class().probe(ProbeContext(platform=facts_with(other)))
        assert not probe.ok, f"the probe takes a platform that does not compute in {param}"
        assert param in probe.wanted, "the refusal does not say which format it wanted"
        assert other in probe.offered, "the refusal does not say which formats there are"
