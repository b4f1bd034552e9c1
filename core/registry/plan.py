"""The resolved choices of a run as one JSON document with a digest."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from drivetrain import __version__
from drivetrain.errors import ConfigError
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
            return cls(content["model"], content["purpose"], content["parts"], content["core"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"not a plan: {type(error).__name__}: {error}", where="plan") from error

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical text, as 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()
