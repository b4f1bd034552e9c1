"""The program that ``doctor`` has run for each plugin: load one plugin, probe it, write down what came of it.

It writes ``{"stage": ...}`` before a step that may never return, and the answer at last.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drivetrain.contracts.plugin import Plugin

_OUTPUT_LIMIT_BYTES = 64 * 2**20


def prepare() -> None:
    """Import torch, and what every examination does."""
    import torch  # noqa: F401

    import drivetrain.contracts.platform
    import drivetrain.registry.selection  # noqa: F401


def run(request: Mapping[str, Any], write: Callable[[Mapping[str, Any]], object]) -> None:
    """Examine the plugin that ``request`` names (the fields of a PluginRef)."""
    _bound_damage()
    write(answer(request, write))


def _bound_damage() -> None:
    """No core dump of a crash, and a bound on any one file: a plugin that prints for ever must not fill the disk."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = _OUTPUT_LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(hard, _OUTPUT_LIMIT_BYTES)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


def answer(request: Mapping[str, Any], write: Callable[[Mapping[str, Any]], object]) -> dict[str, Any]:
    """Load, probe and describe the plugin that ``request`` names (the fields of a PluginRef)."""
    from drivetrain.contracts.plugin import ProbeContext
    from drivetrain.contracts.versions import ContractVersionError, DrivetrainDeprecationWarning
    from drivetrain.errors import PluginError
    from drivetrain.registry.discovery import PluginRef, load
    from drivetrain.registry.selection import probe_safely

    environment = dict(os.environ)
    write({"stage": "import"})
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DrivetrainDeprecationWarning)
        try:
            plugin = load(PluginRef(**request))
        except PluginError as error:
            code = "contract_mismatch" if isinstance(error, ContractVersionError) else "load_failed"
            return {"status": "broken", "code": code, "reason": error.what, **_shown(error)}
        result: dict[str, Any] = {"import_seconds": time.perf_counter() - started}
        write({"stage": "probe"})
        probe = probe_safely(plugin, ProbeContext())
    status = "ok" if probe.ok else "broken" if probe.code == "broken" else "refused"
    result |= {"status": status} | dataclasses.asdict(probe)
    result["notes"] = _law_breaches(environment)
    found = [str(warning.message) for warning in caught if warning.category is DrivetrainDeprecationWarning]
    result["deprecated"] = list(dict.fromkeys(found))
    return result | _describe(plugin, probe.ok, write)


def _shown(error: Any) -> dict[str, str]:
    """What the error says beside its sentence. Of its advice, what a user can do: the rest is for plugin authors."""
    hint = error.hint if error.hint and "pip install" in error.hint else ""
    return {"wanted": error.allowed or "", "offered": str(error.found or ""), "hint": hint}


def _describe(plugin: type[Plugin], is_ok: bool, write: Callable[[Mapping[str, Any]], object]) -> dict[str, Any]:
    """Abilities, and for a platform that says yes the facts of its first device."""
    from drivetrain.contracts.platform import Platform

    write({"stage": "description"})
    try:
        described: dict[str, Any] = {"abilities": sorted(plugin.abilities())}
        if issubclass(plugin, Platform):
            described["pci_vendors"] = sorted(plugin.pci_vendors)
            if is_ok:
                facts = dataclasses.asdict(plugin(plugin.Config()).facts())
                described["facts"] = facts | {"dtypes": sorted(facts["dtypes"]), "details": dict(facts["details"])}
        return described
    except Exception as error:
        # A third party's code may raise anything; whatever it is becomes the report on that plugin.
        reason = f"describing it raised {type(error).__name__}: {error}"
        return {"status": "broken", "code": "description_failed", "reason": reason}


def _law_breaches(environment: Mapping[str, str]) -> list[str]:
    """What importing and probing changed although it must change nothing."""
    breaches = []
    changed = sorted(n for n in {*environment, *os.environ} if environment.get(n) != os.environ.get(n))
    if changed:
        breaches.append(f"changes the environment when it is imported or probed: {', '.join(changed)}")
    threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if threads:
        breaches.append(f"starts threads when it is imported or probed: {', '.join(threads)}")
    torch = sys.modules.get("torch")
    for name in ("cuda", "xpu"):
        if torch is not None and getattr(torch, name).is_initialized():
            breaches.append(f"opens a {name} device when it is imported or probed")
    return breaches
