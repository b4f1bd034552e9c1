"""Contract of a precision: the number formats of parameters, computing and reductions."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from drivetrain.contracts.plugin import Plugin, Probe, ProbeContext


@dataclass(frozen=True)
class Dtypes:
    """The formats of one run, by torch name (``"float32"``, ``"bfloat16"``).

    param:         what parameters are stored in and products are computed in.
    reduce:        what gradients are summed in over ranks.
    master_weight: what the optimizer keeps a copy in; None when the parameters are that copy.
    loss_scale:    True when small gradients would vanish without scaling (float16).
    """

    param: str
    reduce: str
    master_weight: str | None = None
    loss_scale: bool = False


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
