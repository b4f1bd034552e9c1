"""Kept activations wait in the host's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from drivetrain.contracts.checkpoint import CheckpointPolicy
from drivetrain.contracts.plugin import PluginConfig, Probe, ProbeContext

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts.checkpoint import UnitActivations


class OffloadedActivations(CheckpointPolicy):
    """Copies kept activations to the host while the device computes on, and back before backward needs them."""

    class Config(PluginConfig):
        smallest: int = Field(65536, ge=0, description="bytes below which a tensor stays where it is")
        ahead: int = Field(4, ge=1, description="tensors that are on their way back before they are needed")

    config: Config

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        if context.platform is not None and context.platform.device_type == "cpu":
            return Probe.no(
                "nothing_to_offload",
                "activations are in the host's memory already",
                wanted="a device with memory of its own",
                offered="cpu",
            )
        return Probe.yes("the device has memory of its own")

    def kept(self, unit: UnitActivations, number: int) -> int:
        return unit.input

    def apply(self, model: torch.nn.Module, units: tuple[str, ...]) -> torch.nn.Module:
        from drivetrain.plugins.checkpoint.moving import Mover
        from drivetrain.plugins.checkpoint.recomputing import change_call, submodules

        mover = Mover(model, self.config.smallest, self.config.ahead)
        for _, unit in submodules(model, units):
            change_call(unit, mover.run)
        return model
