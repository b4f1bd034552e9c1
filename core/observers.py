"""Observers: 1-to-all notices through pluggy. They are told what happened; they never choose.

A package registers a module or object with the hooks below in the entry-point group ``drivetrain.observer``. A hook
that raises is reported once an observer on the ``drivetrain`` logger and counted; the run goes on.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import importlib_metadata
import pluggy

from drivetrain.errors import PluginError
from drivetrain.registry.discovery import entry_points

if TYPE_CHECKING:
    import fastapi
    import typer

    from drivetrain.config import Settings
    from drivetrain.registry import Selection
    from drivetrain.serving.request import Request, RequestState
    from drivetrain.serving.timing import StepTiming

GROUP = "drivetrain.observer"
hookspec = pluggy.HookspecMarker("drivetrain")
hookimpl = pluggy.HookimplMarker("drivetrain")
"""Marks a function as an observer: ``@hookimpl`` above a function named as one of the hooks below."""

_log = logging.getLogger("drivetrain")


class Hooks:
    """Everything an observer can be told."""

    @hookspec
    def config_settled(self, settings: Settings) -> None:
        """The configuration is merged and checked."""

    @hookspec
    def part_selected(self, selection: Selection) -> None:
        """One kind's plugin is chosen and created."""

    @hookspec
    def request_changed_state(self, request: Request, old: RequestState, new: RequestState) -> None:
        """A sequence moved in its state machine. Not called for tokens."""

    @hookspec
    def step_done(self, seconds: float, num_tokens: int, num_running: int, timing: StepTiming) -> None:
        """The engine finished a step. Keep it short: it is on the step's path, though never on a token's.

        timing: what the step spent its time on, and how many requests ran and waited.
        """

    @hookspec
    def swap_done(self, kind: str, old: str, new: str, epoch: int) -> None:
        """A part was exchanged in a running engine."""

    @hookspec
    def state_saved(self, path: str, step: int) -> None:
        """A training state is complete on disk."""

    @hookspec
    def add_commands(self, app: typer.Typer) -> None:
        """The command line is being built: add commands to it."""

    @hookspec
    def add_routes(self, app: fastapi.FastAPI) -> None:
        """The HTTP application is being built: add routes to it."""


HOOK_NAMES = tuple(sorted(name for name in vars(Hooks) if not name.startswith("_")))
"""Every hook that an observer may have."""


def _is_wrapper(implementation: pluggy.HookImpl) -> bool:
    return implementation.wrapper or implementation.hookwrapper


class Observers:
    """The registered observers. ``notify`` costs one look-up when nobody listens to a hook."""

    def __init__(self, *, installed: bool = True) -> None:
        self._manager = pluggy.PluginManager("drivetrain")
        self._manager.add_hookspecs(Hooks)
        self.num_failures = 0
        self._reported: set[str] = set()
        if installed:
            self._load_installed()

    def register(self, observer: object, name: str | None = None) -> None:
        """Add an observer: any object with methods marked ``@hookimpl``.

        Raises PluginError, with nothing registered, for a hook that does not exist or takes other arguments, for an
        observer without hooks, and for one that is registered already.
        """
        shown = name or type(observer).__name__
        if self._manager.is_registered(observer):
            raise PluginError("this observer is registered already", where=shown)
        try:
            self._manager.register(observer, name)
            self._manager.check_pending()
        except (ValueError, pluggy.PluginValidationError) as error:
            self._drop(observer)
            raise PluginError(f"no observer of Drivetrain: {error}", where=shown, allowed=HOOK_NAMES) from error
        hooks = self._manager.get_hookcallers(observer) or []
        wrappers = [w.name for w in hooks for i in w.get_hookimpls() if i.plugin is observer and _is_wrapper(i)]
        if wrappers or not hooks:
            self._drop(observer)
            what = f"{wrappers[0]} can't be a wrapper: an observer is only told" if wrappers else "it marks no hook"
            raise PluginError(what, where=shown, allowed=HOOK_NAMES, hint="Mark its functions with @hookimpl.")

    def _drop(self, observer: object) -> None:
        if self._manager.is_registered(observer):
            self._manager.unregister(observer)

    def listens(self, hook: str) -> bool:
        return bool(getattr(self._manager.hook, hook).get_hookimpls())

    def notify(self, hook: str, **arguments: Any) -> None:
        """Tell every observer of ``hook``; one that raises does not keep the others from being told."""
        caller = getattr(self._manager.hook, hook)
        for implementation in reversed(caller.get_hookimpls()):
            try:
                implementation.function(*(arguments[name] for name in implementation.argnames))
            except (Exception, SystemExit):
                self.num_failures += 1
                if implementation.plugin_name not in self._reported:
                    self._reported.add(implementation.plugin_name)
                    _log.exception(
                        "observer %r failed in %s; further failures are only counted", implementation.plugin_name, hook
                    )

    def _load_installed(self) -> None:
        for point in entry_points(GROUP):
            name = f"{point.distribution}/{point.name}"
            try:
                observer = importlib_metadata.EntryPoint(point.name, point.value, point.group).load()
                self.register(observer, name)
            except (Exception, SystemExit):  # a third party's module may raise anything, and sys.exit too
                self.num_failures += 1
                _log.exception("observer %r could not be loaded from %s", name, point.value)
