"""float16 parameters and products, with a loss scale."""

from __future__ import annotations

from pydantic import Field

from drivetrain.contracts.plugin import PluginConfig, Probe, ProbeContext
from drivetrain.contracts.precision import Dtypes, LossScaling, Precision


class Fp16Precision(Precision):
    """Parameters and products in float16; the loss is scaled, and sums and master weights are in float32."""

    class Config(PluginConfig):
        initial_scale: float = Field(65536.0, gt=0, description="training: the first loss scale")
        growth_steps: int = Field(
            2000, ge=1, description="training: steps without an overflow after which it is doubled"
        )

    config: Config

    def dtypes(self) -> Dtypes:
        # float16 holds nothing below 6e-8, and many gradients are smaller: hence the scale (Micikevicius et al. 2018).
        scaling = LossScaling(initial=self.config.initial_scale, growth_steps=self.config.growth_steps)
        return Dtypes(param="float16", reduce="float32", master_weight="float32", loss_scale=scaling)

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return cls.probe_dtype(context, "float16")
