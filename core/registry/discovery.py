"""Find plugins by their metadata, describe them without importing them, and load the one that is wanted.

Entry points are read with importlib-metadata; nothing here imports a plugin but :func:`load`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import importlib_metadata

from drivetrain.contracts.kinds import KINDS
from drivetrain.errors import ContractError, PluginLoadError

if TYPE_CHECKING:
    from drivetrain.contracts.plugin import Plugin

_GROUP = re.compile(r"^drivetrain\.(?P<kind>[a-z_]+)\.v(?P<major>\d+)$")
_OBSERVERS = "drivetrain.observer"
_PARENTHESES = r"(?:\((?:[^()]|\([^()]*\))*\))?"
_DOCSTRING = r"""[rR]?(\"{3}|'{3})\s*(.*?)\s*(?:\n|\1)"""


@dataclass(frozen=True)
class PluginRef:
    """An installed plugin, as its distribution's metadata tells of it.

    target: what the entry point names, ``"module:Class"``.
    """

    kind: str
    name: str
    distribution: str
    version: str
    target: str

    @property
    def qualified(self) -> str:
        """``dist/name``, which stays unique when two distributions claim one short name."""
        return f"{self.distribution}/{self.name}"

    def __str__(self) -> str:
        return f"{self.kind}/{self.name} ({self.distribution} {self.version})"


@dataclass(frozen=True)
class ForeignGroup:
    """Entry points that look like ours and that this core can't use.

    group:  the entry-point group; ``entry_points.txt`` where the whole file can't be read.
    names:  the entry points' names; empty where they can't be read.
    reason: an unknown kind, another major version, no version at all, or unreadable metadata.
    hint:   what to do about it.
    """

    group: str
    distribution: str
    names: tuple[str, ...]
    reason: str
    hint: str = ""


@dataclass(frozen=True)
class EntryPoint:
    """One line of a distribution's ``entry_points.txt``."""

    group: str
    name: str
    value: str
    distribution: str
    version: str


@dataclass(frozen=True)
class _Unreadable:
    """A distribution whose metadata can't be read. It is reported, and the others are found all the same."""

    distribution: str
    reason: str


def normalized(distribution: str) -> str:
    """The form in which two spellings of a distribution's name are equal (PyPA specification of names)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def entry_points(group: str) -> tuple[EntryPoint, ...]:
    """Every entry point of one group, whatever else is installed."""
    return tuple(point for point in _scan() if isinstance(point, EntryPoint) and point.group == group)


def _scan() -> Iterator[EntryPoint | _Unreadable]:
    """Every entry point in a ``drivetrain.`` group.

    As with imports, the first distribution of a name on ``sys.path`` hides later ones.
    """
    seen: set[str] = set()
    for distribution in importlib_metadata.distributions():
        try:
            found = _points_of(distribution)
        except Exception as error:  # whatever one distribution's metadata is, the others must still be found
            path = getattr(distribution, "_path", None)  # the folder's name is all that such a one is known by
            yield _Unreadable(getattr(path, "name", "unknown"), f"unreadable metadata: {type(error).__name__}: {error}")
            continue
        if not found or normalized(found[0].distribution) in seen:
            continue
        seen.add(normalized(found[0].distribution))
        yield from found


def registering_distributions() -> Iterator[importlib_metadata.Distribution]:
    """Every installed distribution with a readable entry point in a ``drivetrain.`` group, the first of each name."""
    seen: set[str] = set()
    for distribution in importlib_metadata.distributions():
        try:
            found = _points_of(distribution)
        except Exception:  # reported by foreign_groups, and nothing of it can be loaded
            continue
        if found and normalized(found[0].distribution) not in seen:
            seen.add(normalized(found[0].distribution))
            yield cast(importlib_metadata.Distribution, distribution)


def _points_of(distribution: Any) -> list[EntryPoint]:
    text = distribution.read_text("entry_points.txt")
    if not text or "drivetrain." not in text:
        return []
    metadata = distribution.metadata  # read and parsed whenever it is asked for
    name, version = metadata["Name"], metadata["Version"]
    if not name:
        raise ValueError("the metadata has no Name")
    return [
        EntryPoint(point.group, point.name, point.value, name, version)
        for point in distribution.entry_points
        if point.group.startswith("drivetrain.")
    ]


def discover(kind: str | None = None) -> tuple[PluginRef, ...]:
    """All installed plugins, of one kind or of all, by kind (in resolution order), name and distribution."""
    order = list(KINDS)
    refs = []
    for point in _scan():
        if isinstance(point, _Unreadable):  # told of by foreign_groups
            continue
        match = _GROUP.match(point.group)
        if not match or match["kind"] not in KINDS or int(match["major"]) != KINDS[match["kind"]].major:
            continue
        if kind is None or match["kind"] == kind:
            target = point.value.replace(" ", "")
            refs.append(PluginRef(match["kind"], point.name, point.distribution, point.version, target))
    return tuple(sorted(refs, key=lambda ref: (order.index(ref.kind), ref.name, ref.distribution)))


def foreign_groups() -> tuple[ForeignGroup, ...]:
    """Entry points that look like ours and that nothing here would ever load, with the reason."""
    grouped: dict[tuple[str, str], list[str]] = {}
    foreign = []
    for point in _scan():
        if isinstance(point, EntryPoint):
            grouped.setdefault((point.group, point.distribution), []).append(point.name)
        else:
            hint = f"Reinstall or uninstall {point.distribution}."
            foreign.append(ForeignGroup("entry_points.txt", point.distribution, (), point.reason, hint))
    for (group, distribution), names in sorted(grouped.items()):
        why = _why_foreign(group, distribution)
        if why:
            foreign.append(ForeignGroup(group, distribution, tuple(sorted(names)), *why))
    return tuple(foreign)


def _why_foreign(group: str, distribution: str) -> tuple[str, str] | None:
    """Reason and hint; None for a group that is used here."""
    match = _GROUP.match(group)
    upgrade_core = "Run: pip install --upgrade drivetrain"
    if group == _OBSERVERS:
        return None
    if not match:
        return "not of the form drivetrain.KIND.vN", f"Upgrade {distribution}, or tell its authors."
    if match["kind"] not in KINDS:
        return f"unknown kind {match['kind']!r}", upgrade_core
    spoken, found = KINDS[match["kind"]].major, int(match["major"])
    if found != spoken:
        upgrade = upgrade_core if found > spoken else f"Run: pip install --upgrade {distribution}"
        return f"contract version {found}; this core speaks {spoken}", upgrade
    return None


# --- one line about a plugin, without importing it -----------------------------------------------------------------


def find_source(module: str) -> Path | None:
    """The source file of ``module``, found without importing it or any package it lies in."""
    found = _locate(module)
    return found[0] if found else None


def is_module(name: str) -> bool:
    """Whether importing ``name`` would find something, with or without source, which is not imported to find out."""
    return _locate(name) is not None


def _locate(module: str) -> tuple[Path | None, list[str]] | None:
    """The source file of ``module``, if it has one, and the folders of its submodules; None when it is not there."""
    search: list[str] = []
    origin: Path | None = None
    parts = module.split(".")
    if not all(part.isidentifier() for part in parts):  # finders may raise for what is no name of a module
        return None
    for depth, part in enumerate(parts):
        if depth and not search:  # what was found so far is a module, which has no submodules
            return None
        found = _beside(search, part) or _through_finders(".".join(parts[: depth + 1]), search or None)
        if found is None:
            return None
        origin, search = found
    return origin, search


def _beside(search: list[str], part: str) -> tuple[Path | None, list[str]] | None:
    """A submodule or subpackage as a plain file or folder in one of the package's folders."""
    portions = []
    for folder in search:
        package = Path(folder, part)
        if (package / "__init__.py").is_file():
            return package / "__init__.py", [str(package)]
        if package.with_name(f"{part}.py").is_file():
            return package.with_name(f"{part}.py"), []
        if package.is_dir():
            portions.append(str(package))
    return (None, portions) if portions else None


def _through_finders(name: str, search: list[str] | None) -> tuple[Path | None, list[str]] | None:
    """A module as the import system would find it: top-level names, and packages that an editable install maps."""
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        spec = find_spec(name, search, None) if find_spec else None
        if spec is not None:
            origin = Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
            return origin, list(spec.submodule_search_locations or [])
    return None


def _first_docstring_line(source: str, class_name: str) -> str:
    """First line of the class's docstring, else of the module's, read from the text alone."""
    header = rf"^class {re.escape(class_name)}\b\s*{_PARENTHESES}\s*:[^\n]*\n(?:[ \t]*#[^\n]*\n|\s)*"
    match = re.search(header + _DOCSTRING, source, re.MULTILINE)
    match = match or re.match(r"(?:[ \t]*#[^\n]*\n|\s)*" + _DOCSTRING, source)
    return match[2] if match else ""


def summary_of(ref: PluginRef) -> str:
    """One line about the plugin: the first of its class's docstring, else of its module's; empty without source.

    Reads the source file; imports nothing.
    """
    module, _, class_name = ref.target.partition(":")
    path = find_source(module)
    if path is None:
        return ""
    try:
        source = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        return f"(its source can't be read: {error.strerror})"
    return _first_docstring_line(source, class_name)


def defined_classes(path: Path) -> list[str]:
    """Classes at the top level of a source file, for messages about a target that is not there."""
    tree = ast.parse(path.read_bytes())
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


# --- loading -------------------------------------------------------------------------------------------------------

_CHECKED: WeakKeyDictionary[type[Plugin], type[Plugin]] = WeakKeyDictionary()
"""Plugin -> the contract whose signatures it was found to keep: a selection loads all candidates of a kind, and does so
again for each model and each swap."""


def contract_class(kind: str) -> type[Plugin]:
    """The contract class of a kind."""
    module, _, name = KINDS[kind].contract.partition(":")
    contract: type[Plugin] = getattr(importlib.import_module(module), name)
    return contract


def load(ref: PluginRef) -> type[Plugin]:
    """Import the plugin's target and check it against its kind's contract.

    Raises PluginLoadError when the import fails, whatever the module raised, and ContractError when the target does not
    fulfil the contract.
    """
    module_name, _, attribute = ref.target.partition(":")
    if not module_name or not attribute.isidentifier():
        raise PluginLoadError(
            "the entry point's value is malformed", where=str(ref), found=ref.target, allowed="package.module:ClassName"
        )
    try:
        target = getattr(importlib.import_module(module_name), attribute, None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # A plugin may raise anything on import, SystemExit too; whatever it is must not take the caller down.
        raise PluginLoadError(
            f"importing {module_name} failed with {type(error).__name__}: {error}",
            where=str(ref),
            hint=_after_failed_import(ref, error),
        ) from error
    if target is None:
        path = find_source(module_name)
        raise PluginLoadError(
            f"module {module_name} has no {attribute!r}",
            where=str(ref),
            found=ref.target,
            allowed=[f"{module_name}:{name}" for name in defined_classes(path)] if path else None,
        )
    return conformed(ref, target)


def _after_failed_import(ref: PluginRef, error: BaseException) -> str:
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "drivetrain":
        return "It may be written for a newer drivetrain. Run: pip install --upgrade drivetrain"
    return f"Run: drivetrain plugins info {ref.kind}/{ref.qualified} --debug"


def check_contract(ref: PluginRef, target: Any) -> None:
    """Raise ContractError unless ``target`` is a complete plugin class of the kind it is registered for."""
    conformed(ref, target)


def conformed(ref: PluginRef, target: Any) -> type[Plugin]:
    """The class to use for ``target``: itself, or, when it was written for an older minor of the contract, what the
    adapters make of it.

    Raises ContractError when it is no complete plugin class of the kind that ``ref`` registers it for.
    """
    from drivetrain.contracts.plugin import PluginConfig, Tier
    from drivetrain.contracts.versions import fit

    contract = contract_class(ref.kind)
    where = str(ref)
    if not (isinstance(target, type) and issubclass(target, contract)):
        raise ContractError(
            f"{ref.target} must be a subclass of {KINDS[ref.kind].contract}",
            where=where,
            found=target.__name__ if isinstance(target, type) else type(target).__name__,
        )
    if not (isinstance(target.Config, type) and issubclass(target.Config, PluginConfig)):
        raise ContractError(f"{target.__name__}.Config must be a subclass of PluginConfig", where=where)
    if not isinstance(target.tier, Tier):
        raise ContractError(f"{target.__name__}.tier must be a Tier", where=where, found=target.tier, allowed=Tier)
    plugin = fit(ref.kind, target, where=where)
    missing = sorted(getattr(plugin, "__abstractmethods__", ()))
    if missing:
        raise ContractError(
            f"{plugin.__name__} lacks {', '.join(missing)}", where=where, hint="Implement what is missing."
        )
    if _CHECKED.get(plugin) is not contract:
        _check_signatures(where, contract, plugin)
        _CHECKED[plugin] = contract
    return plugin


def _check_signatures(where: str, contract: type[Plugin], target: type[Plugin]) -> None:
    """Every method must accept the call that the contract's signature promises to callers."""
    for name, _ in inspect.getmembers(contract, callable):
        actual = inspect.getattr_static(target, name)
        if name.startswith("_") or name == "Config" or actual is inspect.getattr_static(contract, name):
            continue
        wanted = _signature_as_called(contract, name)
        shown: object = actual
        try:
            given = _signature_as_called(target, name)
            shown = f"{name}{given}"
            if _is_of_class(contract, name) and not _is_of_class(target, name):
                raise TypeError("it must be a classmethod")
            positional = [p for p in wanted.parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
            keywords = [p.name for p in wanted.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
            given.bind(*positional, **dict.fromkeys(keywords))
        except (TypeError, ValueError) as error:  # inspect raises them for what is not callable or has no signature
            raise ContractError(
                f"{target.__name__}.{name} can't be called as the contract says: {error}",
                where=where,
                found=shown,
                allowed=f"{name}{wanted}",
            ) from error


def _is_of_class(owner: type, name: str) -> bool:
    return isinstance(inspect.getattr_static(owner, name), classmethod | staticmethod)


def _signature_as_called(owner: type, name: str) -> inspect.Signature:
    """The parameters that a caller fills in: without ``self`` or ``cls``."""
    member = getattr(owner, name)
    if not callable(member):
        raise TypeError("it is not callable")
    signature = inspect.signature(member)
    if _is_of_class(owner, name):
        return signature
    return signature.replace(parameters=list(signature.parameters.values())[1:])
