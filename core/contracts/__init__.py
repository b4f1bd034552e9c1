"""The contracts: one module a kind. A plugin author needs nothing else from the core.

None of these modules imports torch at run time. The names below are loaded when they are first used, so that listing
plugins, which needs only their kinds, does not pay for the validation library either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain.contracts.kinds import KINDS, Kind

if TYPE_CHECKING:
    from drivetrain.contracts.plugin import Plugin, PluginConfig, Probe, ProbeContext, Purpose, Tier

__all__ = ["KINDS", "Kind", "Plugin", "PluginConfig", "Probe", "ProbeContext", "Purpose", "Tier"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from drivetrain.contracts import plugin

        return getattr(plugin, name)
    raise AttributeError(f"module 'drivetrain.contracts' has no attribute {name!r}")
