"""What was measured of kernels on this machine: one file a machine, written by ``drivetrain bench kernels``.

The record decides between providers where the platform has no preference, and ``drivetrain explain`` cites it. What was
measured on another machine, or with another version of torch, drivetrain or the provider, says nothing about this run:
it is left out, and the reason is kept.

Reading a record imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drivetrain import __version__
from drivetrain.caching import exclusive, user_cache, write_whole
from drivetrain.contracts.kernels import KernelSpec
from drivetrain.contracts.platform import PlatformFacts
from drivetrain.errors import ConfigError
from drivetrain.hardware import read_torch_build
from drivetrain.registry.discovery import PluginRef
from drivetrain.registry.selection import Standing

FORMAT = 1
"""Raised when older files would be misread."""

ROW_CLASSES = (1, 16, 512)
"""Numbers of rows at which an operation is measured: one decode, a batch of them, a chunk of a prompt."""

REFERENCE = "reference"

_SAME_SPEED = 1.05
"""Two providers whose times are closer than this are equal: repeated runs differ by as much."""

_UNTIMED_PARAMS = frozenset({"eps"})
"""Constants of an operation that do not change what it costs."""


@dataclass(frozen=True)
class Measurement:
    """One use of an operation by one provider, at one number of rows.

    provider, version: short name, and distribution with version, such as ``"drivetrain 0.1.0"``.
    median_seconds:    of one call; low and high are the 10th and 90th percentile of the samples.
    moved_bytes:       that any implementation has to read and write; flops: that it has to compute.
    share:             of the machine's ceiling: the time that the slower of the two would take, over the median.
    date:              day of the measurement, ``"2026-11-25"``.
    """

    operation: str
    device_type: str
    dtype: str
    sizes: Mapping[str, int]
    params: Mapping[str, float]
    rows: int
    provider: str
    version: str
    median_seconds: float
    low_seconds: float
    high_seconds: float
    num_samples: int
    moved_bytes: int
    flops: int
    share: float
    date: str

    @property
    def use(self) -> str:
        """The use of the operation, as text that is equal for equal uses."""
        return use_of(KernelSpec(self.operation, self.device_type, self.dtype, self.sizes, self.params))

    @property
    def place(self) -> tuple[str, int, str]:
        """What a later measurement of the same replaces."""
        return self.use, self.rows, self.provider


@dataclass(frozen=True)
class Ceilings:
    """What this machine can do at best, measured in the same run as the kernels.

    read_bytes_per_second: of memory far larger than the caches.
    flops_per_second:      torch dtype name -> rate of a large matrix product.
    """

    read_bytes_per_second: float
    flops_per_second: Mapping[str, float]

    def floor_seconds(self, moved_bytes: int, flops: int, dtype: str) -> float:
        """The time that no implementation can stay below: the slower of moving and computing."""
        fastest = max(self.flops_per_second.get(dtype, 0.0), self.flops_per_second["float32"])
        return max(moved_bytes / self.read_bytes_per_second, flops / fastest)


@dataclass(frozen=True)
class KernelRecord:
    """The measurements that hold for this run.

    ignored: why there are none although a file is there, or why some of them were left out; empty otherwise.
    """

    measurements: tuple[Measurement, ...] = ()
    ceilings: Ceilings | None = None
    ignored: str = ""

    def current(self, refs: Iterable[PluginRef]) -> KernelRecord:
        """Without what was measured of other versions than the installed ones."""
        installed = {ref.name: version_of(ref) for ref in refs}
        kept = tuple(m for m in self.measurements if installed.get(m.provider) == m.version)
        stale = sorted({f"{m.provider} of {m.version}" for m in self.measurements if m not in kept})
        ignored = f"what was measured of {', '.join(stale)} is not of what is installed" if stale else ""
        return dataclasses.replace(self, measurements=kept, ignored=self.ignored or ignored)

    def seconds(self, spec: KernelSpec) -> dict[str, float]:
        """Provider -> geometric mean of its medians over the row classes; those that lack one of them are left out."""
        times = self._medians.get(use_of(spec), {})
        rows = set().union(*times.values()) if times else set()
        return {name: _geometric_mean(by.values()) for name, by in times.items() if by.keys() == rows}

    def order(self, spec: KernelSpec, names: Sequence[str]) -> tuple[list[str], str]:
        """``names`` with a faster one moved to the front, and the reason; the reason is empty where nothing is moved.

        A provider has to be more than 5% faster than the first of ``names`` to come before it.
        """
        times = {name: seconds for name, seconds in self.seconds(spec).items() if name in names}
        first = names[0] if names else ""
        if first not in times:
            return list(names), ""
        best = min(times, key=lambda name: times[name])
        if times[best] * _SAME_SPEED >= times[first]:
            return list(names), ""
        reason = f"the measured record of {self._date(spec.operation)} has it {times[first] / times[best]:.2f}x as fast"
        return [best, *(name for name in names if name != best)], f"{reason} as {first!r}"

    def cite(self, spec: KernelSpec, name: str) -> str:
        """How fast provider ``name`` was, in words; empty where nothing was measured."""
        times = self.seconds(spec)
        if name not in times:
            return ""
        if name == REFERENCE or REFERENCE not in times:
            return f"measured on {self._date(spec.operation)}"
        return f"measured on {self._date(spec.operation)}: {times[REFERENCE] / times[name]:.2f}x reference"

    def standing(self, provider: str, device_type: str, dtype: str | None) -> Standing:
        """How ``provider`` stands as a whole: the geometric mean over all uses that were measured of anybody.

        A use that it was not measured in counts as the reference's own speed, and so does a provider that was never
        measured: a claim that nobody checked ranks with the reference, and tier decides.
        """
        if provider == REFERENCE:
            return Standing(1.0, "what the others are measured against")
        ratios, uses = [], 0
        for spec in self.uses():
            if spec.device_type == device_type and dtype in (None, spec.dtype):
                times = self.seconds(spec)
                is_known = provider in times and REFERENCE in times
                ratios.append(times[REFERENCE] / times[provider] if is_known else 1.0)
                uses += is_known
        if not uses:
            return Standing(1.0, "not measured on this machine")
        score = _geometric_mean(ratios)
        when = max(m.date for m in self.measurements if m.provider == provider)
        return Standing(
            round(score, 1),
            f"{score:.2f}x the reference by the measured record of {when} ({uses} of {len(ratios)} uses)",
        )

    @property
    def summary(self) -> str:
        """What there is, in a sentence."""
        if self.ignored:
            return f"no measured record holds: {self.ignored}" if not self.measurements else self.ignored
        if not self.measurements:
            return "no measured record of this machine; drivetrain bench kernels makes one"
        return f"measured record of {max(m.date for m in self.measurements)}: {len(self._medians)} uses of operations"

    def uses(self) -> Iterator[KernelSpec]:
        """Every use that was measured, once."""
        seen = set()
        for m in self.measurements:
            if m.use not in seen:
                seen.add(m.use)
                yield KernelSpec(m.operation, m.device_type, m.dtype, m.sizes, m.params)

    @functools.cached_property
    def _medians(self) -> dict[str, dict[str, dict[int, float]]]:
        """use -> provider -> rows -> seconds."""
        table: dict[str, dict[str, dict[int, float]]] = {}
        for m in self.measurements:
            table.setdefault(m.use, {}).setdefault(m.provider, {})[m.rows] = m.median_seconds
        return table

    def _of_operation(self, operation: str) -> Iterator[Measurement]:
        return (measurement for measurement in self.measurements if measurement.operation == operation)

    def _date(self, operation: str) -> str:
        return max(measurement.date for measurement in self._of_operation(operation))


def _machine(facts: PlatformFacts) -> dict[str, str]:
    """What makes one machine's figures differ from another's."""
    return {
        "device_type": facts.device_type,
        "device_name": facts.device_name,
        "architecture": facts.architecture,
        "cores": facts.details.get("cores", ""),
    }


def _identity(facts: PlatformFacts) -> dict[str, str]:
    """The machine and the software that a file speaks of."""
    build = read_torch_build()
    torch_version = build.version if build is not None else "not installed"
    return {**_machine(facts), "torch": torch_version, "drivetrain": __version__}


def record_path(facts: PlatformFacts, cache: Path | None = None) -> Path:
    """The file of this machine's record, in folder ``cache``; by default ``drivetrain/kernels`` in the user's cache."""
    digest = hashlib.sha256(json.dumps(_machine(facts), sort_keys=True).encode()).hexdigest()
    name = re.sub("[^a-z0-9]+", "-", facts.device_name.lower()).strip("-")
    return (cache if cache is not None else user_cache("kernels")) / f"{name}-{digest[:12]}.json"


def read_record(facts: PlatformFacts, cache: Path | None = None) -> KernelRecord:
    """This machine's record; an empty one, with the reason, where there is none that holds."""
    path = record_path(facts, cache)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return KernelRecord()
    except (OSError, ValueError) as error:
        return KernelRecord(ignored=f"{path} can't be read: {type(error).__name__}: {error}")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        return KernelRecord(ignored=f"{path} is of format {found!r}, and this version reads {FORMAT}")
    try:
        told = content["identity"]
        differences = [f"{k} {told.get(k)!r} (here {v!r})" for k, v in _identity(facts).items() if told.get(k) != v]
        if differences:
            return KernelRecord(ignored=f"{path} was measured with {', '.join(differences)}")
        ceilings = Ceilings(**content["ceilings"]) if content["ceilings"] else None
        return KernelRecord(tuple(_measurement(entry) for entry in content["measurements"]), ceilings)
    except (KeyError, TypeError, ValueError) as error:
        return KernelRecord(ignored=f"{path} is damaged: {type(error).__name__}: {error}")


def save_record(
    facts: PlatformFacts, measurements: Sequence[Measurement], ceilings: Ceilings, cache: Path | None = None
) -> Path:
    """Add measurements to this machine's record, in place of older ones of the same; returns the file.

    A record that does not hold any more is replaced whole. Raises ConfigError when the folder can't be written.
    """
    path = record_path(facts, cache)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with exclusive(path.with_suffix(".lock"), lambda: None):
            places = {m.place: m for m in (*read_record(facts, cache).measurements, *measurements)}
            content = {
                "format": FORMAT,
                "identity": _identity(facts),
                "ceilings": dataclasses.asdict(ceilings),
                "measurements": [dataclasses.asdict(measurement) for measurement in places.values()],
            }
            write_whole(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(
            f"the record of kernels can't be written: {error.strerror or error}",
            where=str(error.filename or path),
            hint="Free space or permissions there, or set XDG_CACHE_HOME to another folder.",
        ) from error
    return path


def version_of(ref: PluginRef) -> str:
    """Distribution and version of a plugin, as measurements name them."""
    return f"{ref.distribution} {ref.version}"


def use_of(spec: KernelSpec) -> str:
    """A use of an operation as canonical text, without the constants that do not change its cost."""
    params = {name: value for name, value in spec.params.items() if name not in _UNTIMED_PARAMS and value}
    return json.dumps([spec.operation, spec.device_type, spec.dtype, dict(spec.sizes), params], sort_keys=True)


def _measurement(entry: Mapping[str, Any]) -> Measurement:
    measurement = Measurement(**entry)
    if not 0 < measurement.median_seconds < math.inf:
        raise ValueError(f"a median of {measurement.median_seconds!r} seconds")
    return measurement


def _geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))
