"""Where a suite's tests run: a platform that is on this machine and that the tested plugin accepts."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from drivetrain.contracts.model import ModelSpec
from drivetrain.contracts.platform import PlatformFacts
from drivetrain.contracts.plugin import ProbeContext, Purpose
from drivetrain.errors import DrivetrainError
from drivetrain.registry import Registry, load
from drivetrain.testing.suite import Suite, not_run


@dataclass(frozen=True)
class Place:
    """An opened device and what its platform says of it."""

    facts: PlatformFacts
    device: torch.device


@functools.cache
def open_platform(name: str) -> Place | str:
    """The device of a platform, opened once a process, or the reason why it can't be."""
    try:
        plugin = load(Registry().find("platform", name))
        probe = plugin.probe(ProbeContext())
        if not probe.ok:
            return f"{name}: {probe.reason}"
        platform = plugin(plugin.Config())
        threads = torch.get_num_threads()
        platform.activate()  # type: ignore[attr-defined]
        # A platform takes all cores for itself; a test run keeps the number it was started with.
        torch.set_num_threads(threads)
        return Place(platform.facts(), platform.device())  # type: ignore[attr-defined]
    except DrivetrainError as error:
        return f"{name}: {error}"


@functools.cache
def platforms_here() -> tuple[Place | str, ...]:
    """Every installed platform, opened, or why it can't be; accelerators before the processor, as ``auto`` has it."""
    opened = [open_platform(ref.qualified) for ref in Registry().candidates("platform")]
    return tuple(sorted(opened, key=lambda p: isinstance(p, str) or p.facts.device_type == "cpu"))


class DeviceSuite(Suite):
    """A suite whose tests compute.

    platform: name of the platform to compute on; None takes the first on this machine that the plugin accepts.
    """

    platform: ClassVar[str | None] = None

    @classmethod
    def place(cls) -> Place:
        """Where to compute; ends the test as NOT RUN when no platform of this machine will do."""
        if cls.platform is not None:
            place = open_platform(cls.platform)
            return not_run(place) if isinstance(place, str) else place
        reasons = []
        for candidate in platforms_here():
            if isinstance(candidate, str):
                reasons.append(candidate)
                continue
            probe = cls.plugin_class().probe(ProbeContext(platform=candidate.facts))
            if probe.ok:
                return candidate
            reasons.append(f"{candidate.facts.name}: {probe.reason}")
        return not_run("no platform of this machine will do (" + "; ".join(reasons) + ")")

    @classmethod
    def require_dtype(cls, dtype: str, model: ModelSpec | None = None, purpose: Purpose = Purpose.SERVE) -> torch.dtype:
        """The torch dtype of that name; skips the test when the platform does not list it or the probe refuses it."""
        facts = cls.place().facts
        if dtype not in facts.dtypes:
            pytest.skip(f"not claimed: {dtype} on {facts.name}, which lists {', '.join(sorted(facts.dtypes))}")
        probe = cls.plugin_class().probe(cls.context(dtype, model, purpose))
        if not probe.ok:
            pytest.skip(f"not claimed: {probe.reason}")
        found: torch.dtype = getattr(torch, dtype)
        return found

    @classmethod
    def context(cls, dtype: str, model: ModelSpec | None = None, purpose: Purpose = Purpose.SERVE) -> ProbeContext:
        """What the plugin's probe is told when the parts before it are chosen."""
        chosen = {"platform": cls.place().facts.name}
        context = ProbeContext(purpose=purpose, platform=cls.place().facts, dtype=dtype, chosen=chosen)
        return dataclasses.replace(context, model=model)
