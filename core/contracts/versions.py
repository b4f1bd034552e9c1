"""Versions of the contracts: what a plugin was written for, what this core speaks, and what is on its way out.

A contract has a version ``major.minor``. The major is in the name of the entry-point group, so that a core never
imports a plugin of another major. The minor stands on the plugin's class, in ``contract_version``; a class that does
not say is of minor 0. No contract class of the core sets it: plugins would inherit a version they were not written for.

- A plugin whose minor is newer than the core's is refused: it may count on something that is not there.
- An older one runs through adapters, one for each minor in between.
"""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from drivetrain import __version__
from drivetrain.contracts.kinds import KINDS
from drivetrain.errors import ContractError

if TYPE_CHECKING:
    from drivetrain.contracts.kernels import KernelSpec
    from drivetrain.contracts.plugin import Plugin, Probe, ProbeContext

SHARED_VERSION = "1.0"
"""Version of what all kinds share: :mod:`drivetrain.contracts.plugin` and this module."""

_FORM = re.compile(r"(\d{1,4})\.(\d{1,4})")
_Deprecated = TypeVar("_Deprecated", bound=Callable[..., Any])


class ContractVersionError(ContractError):
    """The plugin was written for a version of its contract that this core can't run."""


@dataclass(frozen=True, order=True)
class ContractVersion:
    """``major.minor``; versions compare as numbers."""

    major: int
    minor: int

    @classmethod
    def parse(cls, text: object) -> ContractVersion:
        """Raises ValueError for anything else than a string of the form ``"1.0"``."""
        match = _FORM.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"{text!r} is no version of a contract")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def spoken(cls, kind: str) -> ContractVersion:
        """The version of ``kind``'s contract that this core speaks."""
        return cls(KINDS[kind].major, KINDS[kind].minor)

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


# --- adapters ------------------------------------------------------------------------------------------------------

Adapter = Callable[["type[Plugin]"], "type[Plugin]"]
"""Takes a class written for one minor and returns a subclass of it that fulfils the next minor and says so."""

ADAPTERS: dict[tuple[str, int], Adapter] = {}
"""(kind, minor that a class was written for) -> what lifts it to the next minor."""


def adapter(kind: str, from_minor: int) -> Callable[[Adapter], Adapter]:
    """Decorator: this function lifts plugins of ``kind`` from ``from_minor`` to the next minor.

    Raises ValueError when there is one already.
    """

    def register(wrap: Adapter) -> Adapter:
        if (kind, from_minor) in ADAPTERS:
            raise ValueError(f"there is an adapter for {kind} from minor {from_minor} already")
        ADAPTERS[kind, from_minor] = wrap
        return wrap

    return register


def fit(kind: str, plugin: type[Plugin], *, where: str) -> type[Plugin]:
    """The class to use in place of ``plugin``: itself when it is of the core's version, or lifted by adapters.

    where: what to call the plugin in an error. Raises ContractVersionError.
    """
    spoken = ContractVersion.spoken(kind)
    version = _version_of(plugin, where, spoken)
    if version.major != spoken.major:
        raise ContractVersionError(
            "the class was written for another version of the contract",
            where=where,
            found=str(version),
            allowed=f"{spoken.major}.x",
        )
    if version > spoken:
        raise ContractVersionError(
            f"it needs version {version} of the {kind} contract, and this core (drivetrain {__version__}) "
            f"speaks {spoken}",
            where=where,
            found=str(version),
            allowed=_up_to(spoken),
            hint="Run: pip install --upgrade drivetrain",
        )
    for minor in range(version.minor, spoken.minor):
        plugin = _lift(kind, plugin, minor, where, spoken)
    return plugin


def _version_of(plugin: type[Plugin], where: str, spoken: ContractVersion) -> ContractVersion:
    try:
        return ContractVersion.parse(plugin.contract_version)
    except ValueError as error:
        raise ContractVersionError(
            f"{plugin.__name__}.contract_version must be a string MAJOR.MINOR",
            where=where,
            found=plugin.contract_version,
            allowed=_up_to(spoken),
        ) from error


def _up_to(spoken: ContractVersion) -> str:
    return f"{spoken.major}.0 to {spoken}" if spoken.minor else str(spoken)


def _lift(kind: str, plugin: type[Plugin], minor: int, where: str, spoken: ContractVersion) -> type[Plugin]:
    """One step, from ``minor`` to the next."""
    wrap = ADAPTERS.get((kind, minor))
    if wrap is None:
        raise ContractVersionError(
            f"it was written for version {spoken.major}.{minor} of the {kind} contract, this core (drivetrain "
            f"{__version__}) speaks {spoken}, and no adapter leads from there to {spoken.major}.{minor + 1}",
            where=where,
            found=f"{spoken.major}.{minor}",
            allowed=str(spoken),
            hint="Upgrade the plugin's distribution, or install an older drivetrain.",
        )
    try:
        lifted = wrap(plugin)
        reached = ContractVersion.parse(lifted.contract_version)
        if not issubclass(lifted, plugin) or reached != ContractVersion(spoken.major, minor + 1):
            raise TypeError(f"it made {lifted.__name__}, of version {reached}, of {plugin.__name__}")
    except Exception as error:  # built over a third party's class, an adapter may meet anything in it
        said = f"{type(error).__name__}: {error}"
        raise ContractVersionError(
            f"the adapter from {spoken.major}.{minor} of the {kind} contract failed with {said}", where=where
        ) from error
    return lifted


def _as_it_is(plugin: type[Plugin], version: str) -> type[Plugin]:
    """For a minor version that brought only what no plugin has to have."""
    return _lifted(plugin, version)


def _lifted(plugin: type[Plugin], version: str, **more: Any) -> type[Plugin]:
    """A subclass of that version under the same name."""
    content = {"contract_version": version, "__doc__": plugin.__doc__, "__module__": plugin.__module__, **more}
    return type(plugin.__name__, (plugin,), content)


@adapter("platform", from_minor=0)
def _peaks(plugin: type[Plugin]) -> type[Plugin]:
    """1.1 brought the ability ``peaks``."""
    return _as_it_is(plugin, "1.1")


@adapter("kernels", from_minor=0)
def _more_operations(plugin: type[Plugin]) -> type[Plugin]:
    """1.1 brought operations, and more fields of :class:`Operation`."""
    return _as_it_is(plugin, "1.1")


@adapter("kernels", from_minor=1)
def _zero_points(plugin: type[Plugin]) -> type[Plugin]:
    """1.2 brought zero points in place of minima, which a provider of 1.1 would take for minima: it is not asked for
    them."""
    known: Any = plugin

    def supports(self: Any, spec: KernelSpec) -> Probe:
        from drivetrain.contracts.plugin import Probe

        if spec.params.get("zero_points"):
            return Probe.no(
                "older_contract",
                "was written for version 1.1 of the contract, which knows no zero points",
                wanted="kernels 1.2",
                offered="kernels 1.1",
            )
        answer: Probe = known.supports(self, spec)
        return answer

    return _lifted(plugin, "1.2", supports=supports)


@adapter("attention", from_minor=0)
def _open_pages(plugin: type[Plugin]) -> type[Plugin]:
    """1.1 brought the abilities ``opens_pages`` and ``takes_written``."""
    return _as_it_is(plugin, "1.1")


@adapter("attention", from_minor=1)
def _kv_formats(plugin: type[Plugin]) -> type[Plugin]:
    """1.2 brought KV formats, which a backend of 1.1 does not know: it must not be chosen where one is asked for."""
    known: Any = plugin

    def probe(cls: type[Plugin], context: ProbeContext) -> Probe:
        answer: Probe = known.refuses_kv(context) or known.probe(context)
        return answer

    return _lifted(plugin, "1.2", probe=classmethod(probe))


@adapter("attention", from_minor=2)
def _open_batches(plugin: type[Plugin]) -> type[Plugin]:
    """1.3 brought the ability ``graph_safe_prompts``, and the batches that only backends with it are given."""
    return _as_it_is(plugin, "1.3")


# --- deprecations --------------------------------------------------------------------------------------------------


class DrivetrainDeprecationWarning(DeprecationWarning):
    """Something of the contracts is going to be removed, and the distribution that the message names still uses it."""


@dataclass(frozen=True)
class Deprecation:
    """What is on its way out.

    what:    the name as its users know it: ``"AttentionBackend.reset"``.
    since:   release of drivetrain that first warned.
    removal: release that will be without it.
    instead: what to use, as an instruction: ``"use clear_blocks"``.
    """

    what: str
    since: str
    removal: str
    instead: str

    def message(self, user: str) -> str:
        """The whole sentence, with ``user`` as the one who still uses it."""
        return (
            f"{self.what} is deprecated since drivetrain {self.since} and will be removed in {self.removal}: "
            f"{self.instead}. Still used by {user}"
        )


def deprecated(*, since: str, removal: str, instead: str) -> Callable[[_Deprecated], _Deprecated]:
    """Decorator: whoever calls this function or method, or makes or subclasses this class, is warned by name.

    The deprecation itself is kept on it as ``__deprecated__``.
    """

    def mark(target: _Deprecated) -> _Deprecated:
        notice = Deprecation(target.__qualname__.replace("<locals>.", ""), since, removal, instead)
        marked = _mark_class(target, notice) if isinstance(target, type) else _mark_function(target, notice)
        marked.__deprecated__ = notice
        return marked

    return mark


def _mark_function(function: Any, notice: Deprecation) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _warn(notice)
        return function(*args, **kwargs)

    return wrapper


def _mark_class(cls: Any, notice: Deprecation) -> Any:
    original_init, own_subclass = cls.__init__, vars(cls).get("__init_subclass__")

    @functools.wraps(original_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is cls:  # a subclass was warned of when it was made
            _warn(notice)
        original_init(self, *args, **kwargs)

    def init_subclass(subclass: Any, **kwargs: Any) -> None:
        _warn(notice, used_by=subclass.__module__)
        if own_subclass is not None:
            own_subclass.__func__(subclass, **kwargs)
        else:
            super(cls, subclass).__init_subclass__(**kwargs)

    cls.__init__ = init
    cls.__init_subclass__ = classmethod(init_subclass)
    return cls


def warn_deprecated(what: str, *, since: str, removal: str, instead: str, used_by: str | None = None) -> None:
    """Warn of a use that no decorator sees: a parameter, a value, a method that a plugin still defines.

    used_by: the module that uses it; by default the one that called the function which warns.
    """
    _warn(Deprecation(what, since, removal, instead), used_by=used_by, skip=1)


def _warn(notice: Deprecation, used_by: str | None = None, skip: int = 0) -> None:
    """Warn at the first frame outside of this module, or ``skip`` frames above it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and (frame.f_globals.get("__name__") in (__name__, "abc") or skip):
        skip -= frame.f_globals.get("__name__") not in (__name__, "abc")
        frame, level = frame.f_back, level + 1
    module = used_by or str(frame.f_globals.get("__name__", "unknown"))
    owner = distribution_of(module)
    user = f"{owner} (module {module})" if owner else f"module {module}"
    warnings.warn(notice.message(user), DrivetrainDeprecationWarning, stacklevel=level)


@functools.lru_cache(maxsize=256)
def distribution_of(module: str) -> str | None:
    """``"name version"`` of the installed distribution that ``module`` belongs to; None when none does.

    A distribution that registers a plugin in the same package, the nearer the better, comes before one that lists the
    top-level name: several may share a namespace, and an editable install lists nothing.
    """
    import importlib_metadata

    parts = module.split(".")
    best, best_shared = None, 0
    for distribution in importlib_metadata.distributions():
        for point in distribution.entry_points:
            if point.group.startswith("drivetrain."):
                shared = _num_shared(parts, point.value.partition(":")[0].strip().split("."))
                if shared > best_shared:
                    best, best_shared = distribution, shared
    if best is not None:
        return f"{best.metadata['Name']} {best.version}"
    names = importlib_metadata.packages_distributions().get(parts[0])
    return f"{names[0]} {importlib_metadata.version(names[0])}" if names else None


def _num_shared(one: list[str], other: list[str]) -> int:
    """How many leading parts two dotted names share."""
    count = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        count += 1
    return count
