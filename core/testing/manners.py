"""A plugin's manners: what importing and probing it does to the process, seen in a child process."""

from __future__ import annotations

import atexit
import dataclasses
import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from drivetrain.registry.discovery import PluginRef
from drivetrain.registry.doctor import useful_line
from drivetrain.registry.fork_server import Ended, ForkServer
from drivetrain.testing.pytest_plugin import ENVIRONMENT, FOLDER

TOPICS = ("device", "threads", "processes", "environment", "process", "torch", "drivetrain", "output", "fork")
"""What is looked at. Each topic of :class:`Manners` holds the breaches that were seen."""


@dataclass(frozen=True)
class Manners:
    """What was seen.

    failure:  why the examination came to no end (crash, hang, an import that fails); None when it did.
    breaches: topic -> what was done that may not be done.
    """

    failure: str | None
    breaches: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Afresh:
    """What a new process made of a plugin.

    failure:        as in :class:`Manners`.
    breach:         how the new process differs from the one that started it; empty when it does not.
    import_seconds: importing the plugin there; None when that did not succeed.
    imports_torch:  whether that import brought torch in.
    """

    failure: str | None
    breach: str = ""
    import_seconds: float | None = None
    imports_torch: bool = False


def examine_manners(ref: PluginRef, options: Mapping[str, Any], time_limit_seconds: float) -> Manners:
    """Import and probe a plugin in a process of its own, and again in a fork of it.

    options: for its Config; a platform that says yes is created with them and asked for its facts too.

    Cached: the tests of one plugin share the examination. The process is killed with all it started at the time limit.
    """
    return _examine(ref, json.dumps(dict(options), sort_keys=True), time_limit_seconds)


def examine_afresh(ref: PluginRef, time_limit_seconds: float) -> Afresh:
    """Import and probe a plugin in a process of its own, and again in a new one, which knows nothing of the first."""
    ended = _server().call({"plugin": dataclasses.asdict(ref), "options": {}, "is_afresh": True}, time_limit_seconds)
    answer = ended.answer("import_seconds")
    if answer is None or ended.status is None:
        return Afresh(f"{ended.stage}: {_death(ended, time_limit_seconds)}")
    return Afresh(answer["failure"], answer["breach"], answer["import_seconds"], answer["imports_torch"])


@lru_cache(maxsize=256)
def _examine(ref: PluginRef, options: str, time_limit_seconds: float) -> Manners:
    request = {"plugin": dataclasses.asdict(ref), "options": json.loads(options), "is_afresh": False}
    ended = _server().call(request, time_limit_seconds)
    answer = ended.answer("breaches")
    if answer is None or ended.status is None:
        return Manners(f"{ended.stage}: {_death(ended, time_limit_seconds)}", {})
    breaches = {topic: tuple(found) for topic, found in answer["breaches"].items()}
    if ended.has_orphans:
        breaches["processes"] = (*breaches.get("processes", ()), "leaves a process running")
    printed = ended.output.strip()
    if printed:
        breaches["output"] = (f"prints on standard output: {printed.splitlines()[0][:100]!r}",)
    return Manners(answer["failure"], breaches)


@cache
def _server() -> ForkServer:
    """It starts as this process was before the first plugin was imported, whenever that is."""
    server = ForkServer("drivetrain.testing.manners_child", is_warm=True, environment=ENVIRONMENT, folder=FOLDER)
    atexit.register(server.close)
    return server


def _death(ended: Ended, time_limit_seconds: float) -> str:
    if ended.status is None:
        return f"did not return within {time_limit_seconds:g} s"
    status = ended.status
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended the process with status {status}"
    said = useful_line(ended.errors)
    return f"{how}: {said}" if said else how
