"""``drivetrain doctor``: versions, devices, compilers, and every plugin loaded and probed in a process of its own.

A plugin that hangs, crashes, exits or prints harms nothing here: it is reported, and the next one is examined.
"""

from __future__ import annotations

import dataclasses
import platform
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import importlib_metadata

from drivetrain import __version__
from drivetrain.contracts.kinds import KINDS
from drivetrain.contracts.source import Progress, silent
from drivetrain.errors import ConfigError, PluginError
from drivetrain.hardware import HostMemory, PciDevice, Processor, TorchBuild, read_machine, read_torch_build
from drivetrain.registry.discovery import ForeignGroup, PluginRef, discover, foreign_groups, normalized
from drivetrain.registry.fork_server import ForkServer
from drivetrain.registry.installation import Shadowed, Stale, find_copies, find_shadowed, find_stale
from drivetrain.registry.lock import compare_lock, read_lock
from drivetrain.registry.selection import AUTO, Registry

if TYPE_CHECKING:
    from drivetrain.config import Settings

DEFAULT_TIME_LIMIT_SECONDS = 20.0
_AT_ONCE = 2
_COMPILERS = ("g++", "clang++", "nvcc", "hipcc", "icpx")
_COMPILER_LIMIT_SECONDS = 10.0
_PROGRAM = "drivetrain.registry.probe_child"
_MANY = 8
"""Plugins for which it is worth to import torch beforehand."""

_SHOWN_OUTPUT_CHARACTERS = 120


class Status(StrEnum):
    """How a plugin fared."""

    OK = "ok"
    REFUSED = "refused"
    BROKEN = "broken"
    HUNG = "hung"


@dataclass(frozen=True)
class PluginHealth:
    """One plugin after loading and probing it with an empty context.

    code, reason, wanted, offered: the probe's answer; for a broken or hung plugin what went wrong.
    import_seconds: importing its module, torch aside where many are examined; None when that did not succeed.
    notes:          what it may not do and did all the same: print, start threads, change the environment, ...
    deprecated:     what it still uses of the contracts that is going to be removed.
    abilities:      optional abilities it claims.
    pci_vendors:    for a platform, the vendors whose devices it drives.
    facts:          for a platform that says yes, the facts of its first device.
    hint:           what the error itself advises; empty when it advises nothing.
    """

    plugin: PluginRef
    status: Status
    code: str
    reason: str
    wanted: str = ""
    offered: str = ""
    import_seconds: float | None = None
    notes: tuple[str, ...] = ()
    deprecated: tuple[str, ...] = ()
    abilities: tuple[str, ...] = ()
    pci_vendors: tuple[int, ...] = ()
    facts: Mapping[str, Any] | None = None
    hint: str = ""


@dataclass(frozen=True)
class Package:
    """A package that Drivetrain uses. version: None when it is not installed. extra: the extra that asks for it."""

    name: str
    version: str | None
    extra: str | None = None


@dataclass(frozen=True)
class Versions:
    """torch: None when it is not installed. packages: what Drivetrain's own metadata asks for, by name."""

    drivetrain: str
    python: str
    system: str
    torch: TorchBuild | None
    packages: tuple[Package, ...]


@dataclass(frozen=True)
class Accelerator:
    """A PCI device and the platforms that drive it. missing: what keeps each of them from it."""

    device: PciDevice
    driven_by: tuple[str, ...]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Devices:
    """The machine's hardware, whether or not a plugin drives it."""

    processor: Processor
    memory: HostMemory
    accelerators: tuple[Accelerator, ...]


@dataclass(frozen=True)
class Compiler:
    """path: None when it is not on PATH. version: the line that names its version; None when it does not answer."""

    name: str
    path: str | None
    version: str | None


@dataclass(frozen=True)
class Clash:
    """One short name that several distributions register for one kind."""

    kind: str
    name: str
    distributions: tuple[str, ...]


@dataclass(frozen=True)
class Unmatched:
    """A name in a configuration that matches nothing. setting: its place and dotted path."""

    setting: str
    text: str
    hint: str


class Level(StrEnum):
    """A problem makes ``doctor`` fail; a notice is worth knowing."""

    PROBLEM = "problem"
    NOTICE = "notice"


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be, and what to do about it."""

    level: Level
    subject: str
    text: str
    hint: str = ""


@dataclass(frozen=True)
class DoctorReport:
    """Everything that ``doctor`` found.

    shadowed:   copies of distributions that others hide.
    stale:      distributions whose files are gone.
    unmatched:  what the examined configuration names and nothing matches.
    """

    versions: Versions
    devices: Devices
    compilers: tuple[Compiler, ...]
    plugins: tuple[PluginHealth, ...]
    clashes: tuple[Clash, ...]
    foreign: tuple[ForeignGroup, ...]
    seconds: float
    shadowed: tuple[Shadowed, ...] = ()
    stale: tuple[Stale, ...] = ()
    unmatched: tuple[Unmatched, ...] = ()
    findings: tuple[Finding, ...] = field(default=())

    @property
    def num_problems(self) -> int:
        return sum(finding.level is Level.PROBLEM for finding in self.findings)

    @property
    def has_problems(self) -> bool:
        return self.num_problems > 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, as ``doctor --json`` prints it."""
        return {**dataclasses.asdict(self), "num_problems": self.num_problems}


def examine(
    *,
    time_limit_seconds: float = DEFAULT_TIME_LIMIT_SECONDS,
    refs: Iterable[PluginRef] | None = None,
    settings: Settings | None = None,
    progress: Progress = silent,
) -> DoctorReport:
    """Examine this machine and ``refs``, or every installed plugin.

    time_limit_seconds: for loading and probing one plugin.
    settings:           a configuration whose names are looked up too.
    """
    started = time.monotonic()
    plugins = tuple(refs) if refs is not None else discover()
    health = examine_plugins(plugins, time_limit_seconds, progress)
    machine = read_machine()
    report = DoctorReport(
        versions=read_versions(),
        devices=Devices(machine.processor, machine.memory, match_devices(machine.accelerators, health)),
        compilers=tuple(find_compiler(name) for name in _COMPILERS),
        plugins=health,
        clashes=find_clashes(plugins),
        foreign=foreign_groups(),
        seconds=time.monotonic() - started,
        shadowed=tuple(find_shadowed(find_copies())),
        stale=tuple(find_stale(plugins)),
        unmatched=tuple(find_unmatched(settings, Registry(plugins))) if settings is not None else (),
    )
    return dataclasses.replace(report, findings=tuple(_findings(report)))


# --- plugins -------------------------------------------------------------------------------------------------------


def examine_plugins(
    refs: Sequence[PluginRef], time_limit_seconds: float, progress: Progress = silent
) -> tuple[PluginHealth, ...]:
    """Load and probe each plugin in a process of its own, two at a time; the answers are in the order of ``refs``.

    Where there are many, these processes are forks that have torch already: importing it is most of what each would do.
    """
    health: dict[PluginRef, PluginHealth] = {}
    is_warm = len(refs) >= _MANY
    with ExitStack() as stack, ThreadPoolExecutor(max_workers=_AT_ONCE, thread_name_prefix="doctor") as pool:
        idle: SimpleQueue[ForkServer] = SimpleQueue()
        for _ in range(_AT_ONCE):
            idle.put(stack.enter_context(ForkServer(_PROGRAM, is_warm=is_warm)))

        def examine_next(ref: PluginRef) -> PluginHealth:
            server = idle.get()
            try:
                return _examine_on(server, ref, time_limit_seconds)
            finally:
                idle.put(server)

        for done in as_completed([pool.submit(examine_next, ref) for ref in refs]):
            health[done.result().plugin] = done.result()
            progress("examining plugins", len(health), len(refs), "plugins")
    return tuple(health[ref] for ref in refs)


def examine_plugin(ref: PluginRef, time_limit_seconds: float) -> PluginHealth:
    """Load and probe one plugin in a process of its own, which is killed with all it started at the time limit."""
    with ForkServer(_PROGRAM, is_warm=False) as server:
        return _examine_on(server, ref, time_limit_seconds)


def _examine_on(server: ForkServer, ref: PluginRef, time_limit_seconds: float) -> PluginHealth:
    ended = server.call(dataclasses.asdict(ref), time_limit_seconds)
    answer = ended.answer("status")
    notes = _notes(ended.output, ended.has_orphans)
    if ended.status is None:
        return _hung(ref, answer is not None, ended.stage, time_limit_seconds, notes)
    if answer is None:
        return _died(ref, ended.status, ended.stage, ended.errors, notes)
    return _answered(ref, answer, notes)


def _notes(printed: str, has_orphans: bool) -> tuple[str, ...]:
    notes = []
    if printed.strip():
        shown = printed.strip().splitlines()[0][:_SHOWN_OUTPUT_CHARACTERS]
        notes.append(f"prints on standard output when it is imported or probed: {shown!r}")
    if has_orphans:
        notes.append("leaves a process running when it is imported or probed")
    return tuple(notes)


def _hung(ref: PluginRef, has_answered: bool, stage: str, limit: float, notes: tuple[str, ...]) -> PluginHealth:
    when = "its process answered but did not end" if has_answered else f"its {stage} did not return"
    return PluginHealth(ref, Status.HUNG, "time_limit", f"{when} within {limit:g} s", notes=notes)


def _died(ref: PluginRef, code: int, stage: str, errors: str, notes: tuple[str, ...]) -> PluginHealth:
    """A child that ended without an answer: by a signal, or by ending the process itself."""
    if code < 0:
        kind, how = "signal", f"was killed by {signal.Signals(-code).name} in its {stage}"
    else:
        kind, how = "exit", f"ended the process with status {code} in its {stage}"
    said = useful_line(errors)
    return PluginHealth(ref, Status.BROKEN, kind, f"{how}{f': {said}' if said else ''}", notes=notes)


def _answered(ref: PluginRef, answer: Mapping[str, Any], notes: tuple[str, ...]) -> PluginHealth:
    return PluginHealth(
        ref,
        Status(answer["status"]),
        answer["code"],
        answer["reason"],
        wanted=answer.get("wanted", ""),
        offered=answer.get("offered", ""),
        import_seconds=answer.get("import_seconds"),
        notes=(*notes, *answer.get("notes", ())),
        deprecated=tuple(answer.get("deprecated", ())),
        abilities=tuple(answer.get("abilities", ())),
        pci_vendors=tuple(answer.get("pci_vendors", ())),
        facts=answer.get("facts"),
        hint=answer.get("hint", ""),
    )


def useful_line(errors: str) -> str:
    """The most telling line of a program's standard error: the end of a traceback, else the first that is not blank."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    if not lines:
        return ""
    return lines[-1] if any(line.startswith("Traceback ") for line in lines) else lines[0]


# --- machine -------------------------------------------------------------------------------------------------------


def match_devices(devices: Iterable[PciDevice], health: Iterable[PluginHealth]) -> tuple[Accelerator, ...]:
    """Which platform drives which device, and what keeps the others from it."""
    platforms = [entry for entry in health if entry.plugin.kind == "platform"]
    matched = []
    for device in devices:
        claiming = [entry for entry in platforms if device.vendor_id in entry.pci_vendors]
        driving = tuple(entry.plugin.name for entry in claiming if entry.status is Status.OK)
        missing: tuple[str, ...] = ()
        if device.can_compute and not driving:
            missing = tuple(f"{entry.plugin.name}: {entry.reason}" for entry in claiming)
            missing = missing or (f"no installed platform plugin drives devices of {device.vendor}",)
        matched.append(Accelerator(device, driving, missing))
    return tuple(matched)


def read_versions() -> Versions:
    """Drivetrain, Python, torch, and the packages in Drivetrain's metadata, but for those of its development extras."""
    return Versions(
        drivetrain=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        torch=read_torch_build(),
        packages=tuple(_packages(importlib_metadata.requires("drivetrain") or ())),
    )


def _packages(requirements: Iterable[str]) -> Iterable[Package]:
    for requirement in requirements:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", requirement)
        if name is None or (extra and extra[1] in ("test", "lint")):
            continue
        try:
            version: str | None = importlib_metadata.version(name[0])
        except importlib_metadata.PackageNotFoundError:
            version = None
        yield Package(name[0], version, extra[1] if extra else None)


def find_compiler(name: str) -> Compiler:
    """Where a compiler lies and what it says its version is."""
    path = shutil.which(name)
    if path is None:
        return Compiler(name, None, None)
    try:
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMPILER_LIMIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        # Being there without answering is what the report then says of it: a path and no version.
        return Compiler(name, path, None)
    lines = [line.strip() for line in done.stdout.splitlines()]
    return Compiler(name, path, next((line for line in lines if re.search(r"\d+\.\d+", line)), None))


def find_clashes(refs: Iterable[PluginRef]) -> tuple[Clash, ...]:
    """Short names that more than one distribution registers for one kind."""
    owners: dict[tuple[str, str], list[str]] = {}
    for ref in refs:
        owners.setdefault((ref.kind, ref.name), []).append(ref.distribution)
    return tuple(Clash(kind, name, tuple(of)) for (kind, name), of in owners.items() if len(of) > 1)


def find_unmatched(settings: Settings, registry: Registry) -> Iterable[Unmatched]:
    """Names of parts, of distributions in plugins.allow, and of a lock file, that match nothing here."""
    allowed = registry.allowing(settings.allow) if settings.allow is not None else registry
    for kind, request in settings.parts.items():
        if request.name != AUTO:
            try:
                allowed.find(kind, request.name)
            except PluginError as error:
                choices = f"; there are: {error.allowed}" if error.allowed else ""
                place = f"{request.origin}: {KINDS[kind].key}"
                yield Unmatched(place, f"{error.what}{choices}", error.hint or "")
    registering = {normalized(ref.distribution) for ref in registry.refs}
    for distribution in settings.allow or ():
        if normalized(distribution) not in registering:
            text = f"no installed distribution {distribution!r} registers a plugin"
            yield Unmatched("plugins.allow", text, f"Run: pip install {distribution}, or take it off the list.")
    if settings.lock is not None:
        try:
            differences = compare_lock(read_lock(Path(settings.lock)))
        except ConfigError as error:
            yield Unmatched("plugins.lock", f"{error.where}: {error.what}", error.hint or "")
        else:
            for entry in differences:
                text = f"{entry.path} is locked as {entry.ours}, and installed is {entry.theirs}"
                yield Unmatched("plugins.lock", text, "Install what is locked, or lock anew.")


# --- findings ------------------------------------------------------------------------------------------------------


def _findings(report: DoctorReport) -> Iterable[Finding]:
    yield from _version_findings(report.versions)
    for entry in report.plugins:
        yield from _plugin_findings(entry)
    for clash in report.clashes:
        qualified = ", ".join(f"{distribution}/{clash.name}" for distribution in clash.distributions)
        yield Finding(
            Level.PROBLEM,
            f"{clash.kind} {clash.name!r}",
            f"registered by {len(clash.distributions)} distributions",
            f"Name one in full ({qualified}), or uninstall one.",
        )
    for group in report.foreign:
        text = f"{group.distribution} registers {', '.join(group.names)}: {group.reason}"
        yield Finding(Level.NOTICE, group.group, text, group.hint)
    yield from _installation_findings(report)
    for name in report.unmatched:
        yield Finding(Level.PROBLEM, name.setting, name.text, name.hint)
    for accelerator in report.devices.accelerators:
        if accelerator.missing:
            text = f"no platform drives it ({'; '.join(accelerator.missing)})"
            yield Finding(Level.NOTICE, str(accelerator.device), text, "See docs/platform.md.")
    for compiler in report.compilers:
        if compiler.path and not compiler.version:
            yield Finding(Level.NOTICE, compiler.name, f"{compiler.path} --version fails or names no version")


def _version_findings(versions: Versions) -> Iterable[Finding]:
    for package in versions.packages:
        if package.version is None and package.extra is None:
            hint = f'Run: pip install "{package.name}"'
            yield Finding(Level.PROBLEM, package.name, "required, but not installed", hint)


def _installation_findings(report: DoctorReport) -> Iterable[Finding]:
    for shadowed in report.shadowed:
        used, hidden = shadowed.used, shadowed.hidden
        leftover = next((copy for copy in (used, hidden) if copy.is_leftover), None)
        if leftover is not None:
            text = f"{leftover.folder} is left over from an interrupted pip"
            yield Finding(Level.PROBLEM, used.distribution, text, f"Delete {leftover.folder}.")
            continue
        what = "registers other plugins" if used.version == hidden.version else f"is version {hidden.version}"
        text = f"{used} hides the copy in {hidden.folder}, which {what}"
        yield Finding(Level.PROBLEM, used.distribution, text, "Uninstall both, then install the one that is wanted.")
    for stale in report.stale:
        text = f"{stale.version} is installed, but not whole: {'; '.join(stale.missing)}"
        hint = f"Run: pip install --force-reinstall {stale.distribution}, or uninstall it."
        yield Finding(Level.PROBLEM, stale.distribution, text, hint)


def _plugin_findings(entry: PluginHealth) -> Iterable[Finding]:
    subject = f"{entry.plugin.kind}/{entry.plugin.name}"
    owner = f"{entry.plugin.distribution} {entry.plugin.version}"
    if entry.status in (Status.BROKEN, Status.HUNG):
        hint = entry.hint or f"Upgrade or uninstall {owner}."
        yield Finding(Level.PROBLEM, subject, f"{entry.status}: {entry.reason}", hint)
    for use in entry.deprecated:
        yield Finding(Level.NOTICE, subject, use, f"Upgrade {owner}, or tell its authors.")
    for note in entry.notes:
        yield Finding(Level.PROBLEM, subject, note, f"Tell the authors of {owner}.")
