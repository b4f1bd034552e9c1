"""The platform ``acme``: what Drivetrain asks of a family of devices, answered for the Acme One."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from drivetrain.contracts.platform import MemoryInfo, Platform, PlatformFacts
from drivetrain.contracts.plugin import PluginConfig, Probe, ProbeContext, Tier
from pydantic import Field

if TYPE_CHECKING:
    import torch

    from acme_accelerator.card import Card

_MIB = 2**20


class AcmePlatform(Platform):
    """The Acme One: the processor in disguise, with a memory of its own that is limited and counted."""

    contract_version = "1.0"
    # A real device would be VENDOR, and `auto` would take it wherever its probe says yes. This one wants to be named.
    tier = Tier.REFERENCE
    preferences: ClassVar[Mapping[str, tuple[str, ...]]] = {"precision": ("fp32",), "attention": ("acme", "sdpa")}

    class Config(PluginConfig):
        memory_mib: int = Field(1024, ge=1, description="Memory of the card in MiB.")
        threads: int = Field(1, ge=1, description="Threads that compute.")

    config: Config

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return Probe.yes("an Acme One can be imagined on every machine")

    def facts(self) -> PlatformFacts:
        return PlatformFacts(
            name="acme",
            device_type="cpu",
            device_name="Acme One",
            device_count=1,
            dtypes=frozenset({"float32"}),
            architecture="acme1",
            collective="gloo",
            total_memory_bytes=self.config.memory_mib * _MIB,
            details={"driver": "none, and none is needed"},
        )

    def activate(self) -> None:
        """Open the card. Imported here: describing the platform must not import torch."""
        import torch

        from acme_accelerator.card import open_card

        torch.set_num_threads(self.config.threads)
        open_card(self.config.memory_mib * _MIB)

    def device(self) -> torch.device:
        import torch

        return torch.device("cpu")

    def memory(self) -> MemoryInfo:
        """The card's memory, and what nothing holds of it."""
        card = self._card()
        return MemoryInfo(total_bytes=card.memory_bytes, free_bytes=card.free_bytes)

    def peak_memory_bytes(self) -> int:
        """The most that was resident: what plays the card also holds tensors that were not asked of the card."""
        resident_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return max(resident_bytes, self._card().peak_bytes)

    def _card(self) -> Card:
        from acme_accelerator.card import open_card

        return open_card(self.config.memory_mib * _MIB)
