"""bfloat16 parameters and products, float32 sums."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from drivetrain.contracts.plugin import PluginConfig, Probe, ProbeContext
from drivetrain.contracts.precision import Dtypes, Precision


class Bf16Precision(Precision):
    """Parameters and products in bfloat16; gradients summed and master weights kept in float32."""

    class Config(PluginConfig):
        master_weights: bool = Field(
            True, description="training: keep a float32 copy of the parameters, which the optimizer works on"
        )
        rounding: Literal["nearest", "stochastic"] = Field(
            "nearest",
            description="training: how the optimizer's result becomes bfloat16; without master weights, nearest loses "
            "small updates and stochastic keeps them on average",
        )

    config: Config

    def dtypes(self) -> Dtypes:
        # bfloat16 has float32's range, so small gradients do not vanish and no loss scale is needed; its 8 bits of
        # mantissa would lose small updates, hence the float32 master weights.
        master = "float32" if self.config.master_weights else None
        return Dtypes(param="bfloat16", reduce="float32", master_weight=master, rounding=self.config.rounding)

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return cls.probe_dtype(context, "bfloat16")
