"""The resolved choices of a run as one JSON document with a digest, and the handshake of processes that share it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from drivetrain import __version__
from drivetrain.errors import ConfigError
from drivetrain.registry.differences import ABSENT, Difference, DifferencesError
from drivetrain.registry.selection import SelectionReport


@dataclass(frozen=True)
class Plan:
    """What every process of a run must load, and nothing else.

    Two processes with equal digests run the same parts in the same versions with the same options.
    """

    model: str | None
    purpose: str
    parts: dict[str, dict[str, Any]]
    core_version: str = __version__

    @classmethod
    def of(cls, report: SelectionReport, *, model: str | None, purpose: str) -> Plan:
        parts = {
            selection.kind: {
                "name": selection.chosen.name,
                "distribution": selection.chosen.distribution,
                "version": selection.chosen.version,
                "target": selection.chosen.target,
                "options": dict(selection.options),
            }
            for selection in report.selections
        }
        return cls(model, purpose, parts)

    def to_json(self) -> str:
        """Canonical text: sorted keys, no spaces, so that equal plans are equal bytes."""
        content = {"core": self.core_version, "model": self.model, "purpose": self.purpose, "parts": self.parts}
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises ConfigError when ``text`` is no plan."""
        try:
            content = json.loads(text)
            if not all(isinstance(part, dict) for part in content["parts"].values()):
                raise TypeError("a part is no table")
            return cls(content["model"], content["purpose"], content["parts"], content["core"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"not a plan: {type(error).__name__}: {error}", where="plan") from error

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical text, as 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def compare(self, other: Plan) -> list[Difference]:
        """What this plan (ours) and ``other`` (theirs) say differently, by path; empty when the digests are equal."""
        ours, theirs = (dict(_leaves(json.loads(plan.to_json()))) for plan in (self, other))
        return [
            Difference(path, ours.get(path, ABSENT), theirs.get(path, ABSENT))
            for path in sorted(ours.keys() | theirs.keys())
            if ours.get(path) != theirs.get(path)
        ]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every value below ``value`` that is no table, as JSON text under its dotted path. An empty table is a value."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            step = key if key and not {".", '"'} & set(key) else json.dumps(key)  # so that no two paths are alike
            yield from _leaves(item, f"{path}.{step}" if path else step)
    else:
        yield path, json.dumps(value, sort_keys=True)


def check_handshake(ours: Plan, theirs: Plan | str, *, who: str = "the other process") -> None:
    """Agree that two processes run the same parts, before either touches a device.

    theirs: the other's plan, or its JSON as it came over the wire.
    who:    what to call the other in the message: ``"rank 3 on node-b"``.

    Raises DifferencesError, a PluginError whose message ends with a table of what differs; ConfigError when ``theirs``
    is no plan.
    """
    other = Plan.from_json(theirs) if isinstance(theirs, str) else theirs
    if ours.digest == other.digest:
        return
    differences = ours.compare(other)
    raise DifferencesError(
        f"{who} has another plan ({other.digest[:16]}) than this process ({ours.digest[:16]}): "
        f"{len(differences)} {'difference' if len(differences) == 1 else 'differences'}",
        differences,
        columns=("setting", "here", who),
        where="plan",
        hint="Give both the same configuration, and the same versions of drivetrain and its plugins.",
    )
