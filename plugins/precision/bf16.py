"""bfloat16 parameters and products, float32 sums."""

from __future__ import annotations

from drivetrain.contracts.plugin import Probe, ProbeContext
from drivetrain.contracts.precision import Dtypes, Precision


class Bf16Precision(Precision):
    """Parameters and products in bfloat16; gradients summed and master weights kept in float32."""

    def dtypes(self) -> Dtypes:
        # bfloat16 has float32's range, so small gradients do not vanish and no loss scale is needed; its 8 bits of
        # mantissa would lose small updates, hence the float32 master weights.
        return Dtypes(param="bfloat16", reduce="float32", master_weight="float32")

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return cls.probe_dtype(context, "bfloat16")
