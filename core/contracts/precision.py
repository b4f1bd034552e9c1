"""Contract of a precision: the number formats of parameters, computing and reductions."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from drivetrain.contracts.plugin import Plugin, Probe, ProbeContext


@dataclass(frozen=True)
class LossScaling:
    """How the loss is scaled so that small gradients don't vanish.

    The scale starts at ``initial``, is divided by ``factor`` when gradients overflow (that step is skipped, on every
    rank alike) and multiplied by it after ``growth_steps`` steps without an overflow. A run in which it would fall
    below ``minimum`` has gone wrong.
    """

    initial: float = 65536.0
    growth_steps: int = 2000
    factor: float = 2.0
    minimum: float = 2.0**-14


@dataclass(frozen=True)
class Dtypes:
    """The formats of one run, by torch name (``"float32"``, ``"bfloat16"``).

    param:         what parameters are stored in and products are computed in.
    reduce:        what gradients are summed in over ranks and micro-batches.
    master_weight: what the optimizer keeps a copy in; None when the parameters are that copy.
    loss_scale:    how the loss is scaled where small gradients would vanish (float16); None where they don't.
    rounding:      how the optimizer's result becomes ``param``: ``stochastic`` rounds up or down with the probabilities
                   that keep the mean, so that small updates are not lost without a master copy.
    """

    param: str
    reduce: str
    master_weight: str | None = None
    loss_scale: LossScaling | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"


class Precision(Plugin):
    """Number formats. Serving uses ``dtypes().param``; training uses all of it."""

    kind = "precision"

    @abstractmethod
    def dtypes(self) -> Dtypes:
        """The formats of this precision. Pure; may be called before anything is created on a device."""

    @classmethod
    def probe_dtype(cls, context: ProbeContext, dtype: str) -> Probe:
        """The usual probe: the chosen platform must list ``dtype``."""
        platform = context.platform
        if platform is None:
            return Probe.yes("no platform chosen yet")
        if dtype not in platform.dtypes:
            return Probe.no(
                "unsupported_dtype",
                f"platform {platform.name!r} does not compute in {dtype}",
                wanted=dtype,
                offered=", ".join(sorted(platform.dtypes)),
            )
        return Probe.yes(f"the platform computes in {dtype}")
