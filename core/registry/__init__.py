"""Finding, loading and choosing plugins; the report of what was chosen and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain.registry.discovery import ForeignGroup, PluginRef, discover, foreign_groups, load, summary_of

if TYPE_CHECKING:
    from drivetrain.registry.plan import Plan, check_handshake
    from drivetrain.registry.selection import (
        CandidateReport,
        Outcome,
        PartRequest,
        Registry,
        Selection,
        SelectionReport,
        Selector,
    )

__all__ = [
    "CandidateReport",
    "ForeignGroup",
    "Outcome",
    "PartRequest",
    "Plan",
    "PluginRef",
    "Registry",
    "Selection",
    "SelectionReport",
    "Selector",
    "check_handshake",
    "discover",
    "foreign_groups",
    "load",
    "summary_of",
]


def __getattr__(name: str) -> Any:
    # Choosing needs the validation library; finding and listing do not.
    if name in __all__:
        from drivetrain.registry import plan, selection

        return getattr(plan if name in ("Plan", "check_handshake") else selection, name)
    raise AttributeError(f"module 'drivetrain.registry' has no attribute {name!r}")
