"""Everything in float32."""

from __future__ import annotations

from drivetrain.contracts.plugin import Probe, ProbeContext
from drivetrain.contracts.precision import Dtypes, Precision


class Fp32Precision(Precision):
    """Parameters, products and reductions in float32: the reference, and the fastest on CPUs."""

    def dtypes(self) -> Dtypes:
        return Dtypes(param="float32", reduce="float32")

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return cls.probe_dtype(context, "float32")
