"""The program that examines one plugin's manners: what changes in a process when the plugin is imported and probed.

It is run in a fork of a process that has torch already, and writes ``{"stage": ...}`` before a step that may never
return, and the answer at last. Run by file, it is the new process that imports and probes once more: with the number of
an open file as its only argument, and the request as JSON on standard input.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_EXIT_SAME, _EXIT_OTHER, _EXIT_RAISED = 0, 3, 4
_FORK_SECONDS = 20.0
_DEVICE_FILES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/", "/dev/accel")
_PROCESS_EVENTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system")
_TORCH_PLACES = ("torch", "torch.nn.functional", "torch.Tensor", "torch.nn.Module", "torch.nn.Linear")

Snapshot = dict[str, Any]


def main() -> None:
    answer_file = int(sys.argv[1])
    request = json.load(sys.stdin)
    # The parent's search path, before anything of this project is imported: both must see the same plugins.
    sys.path[:] = request["sys_path"]
    sys.exit(_import_and_probe(request, answer_file))


def prepare() -> None:
    """Import torch and the core: what may not change while a plugin is imported and probed."""
    import numpy  # noqa: F401
    import torch  # noqa: F401

    import drivetrain.contracts.kinds
    import drivetrain.contracts.plugin
    import drivetrain.registry.selection  # noqa: F401  # its attributes are watched too
    from drivetrain.contracts.kinds import KINDS
    from drivetrain.registry.discovery import contract_class

    for kind in KINDS:
        contract_class(kind)


def run(request: Mapping[str, Any], write: Callable[[Mapping[str, Any]], object]) -> None:
    """Examine the plugin that ``request`` names: with its options, or in a new process."""
    if request["is_afresh"]:
        write(examine_afresh(request["plugin"], write))
    else:
        write(examine(request["plugin"], request["options"], write))


def examine(
    plugin: Mapping[str, str], options: Mapping[str, Any], write: Callable[[Mapping[str, Any]], object]
) -> dict[str, Any]:
    """Import and probe the plugin whose PluginRef has these fields; the answer's keys are those of Manners.

    options: for its Config, of which a platform that says yes is created and asked for its facts.
    """
    write({"stage": "preparation"})
    prepare()
    modules = sorted(name for name in sys.modules if name.startswith("drivetrain."))
    before, watch = _snapshots(modules), _Watch()
    write({"stage": "import"})
    with watch:
        target, failure = _load(plugin)
        if target is not None:
            write({"stage": "probe"})
            probe = _probe(target)
            if plugin["kind"] == "platform" and probe.ok:
                write({"stage": "facts"})
                target(target.Config.model_validate(options)).facts()
    if target is None:
        return {"failure": failure, "breaches": {}}
    breaches = watch.breaches()
    for topic, found in _snapshots(modules).items():
        breaches.setdefault(topic, []).extend(_differences(before[topic], found))
    write({"stage": "fork"})
    breach = _in_a_fork(target, probe)
    breaches["fork"] = [breach] if breach else []
    return {"failure": None, "breaches": breaches}


def examine_afresh(plugin: Mapping[str, str], write: Callable[[Mapping[str, Any]], object]) -> dict[str, Any]:
    """Import and probe the plugin here and in a new process; the answer's keys are those of Afresh."""
    write({"stage": "import"})
    target, failure = _load(plugin)
    if target is None:
        return {"failure": failure, "breach": "", "import_seconds": None, "imports_torch": False}
    write({"stage": "probe"})
    probe = _probe(target)
    write({"stage": "spawn"})
    seconds, imports_torch, breach = _spawned(plugin, probe)
    return {"failure": None, "breach": breach, "import_seconds": seconds, "imports_torch": imports_torch}


def _load(plugin: Mapping[str, str]) -> tuple[Any, str | None]:
    from drivetrain.errors import PluginError
    from drivetrain.registry.discovery import PluginRef, load

    try:
        return load(PluginRef(**plugin)), None
    except PluginError as error:
        return None, str(error)


def _probe(target: Any) -> Any:
    from drivetrain.contracts.plugin import ProbeContext
    from drivetrain.registry.selection import probe_safely

    return probe_safely(target, ProbeContext())


# --- what is watched while it happens --------------------------------------------------------------------------------


class _Watch:
    """Sees what would leave no trace behind: threads and processes that have ended, devices that did not open."""

    def __init__(self) -> None:
        self._seen: dict[str, list[str]] = {}
        self._is_on = False
        sys.addaudithook(self._hear)

    def __enter__(self) -> None:
        import torch

        self._is_on = True
        # Opening a device that is not there raises, and a plugin may hide that; the attempt is what counts.
        modules: list[Any] = [torch.cuda, torch.xpu]
        self._openers = [(module, module._lazy_init) for module in modules]
        for module, opener in self._openers:
            module._lazy_init = self._noting(module.__name__, opener)
        # Not every Python audits the start of a thread.
        self._start = threading.Thread.start
        setattr(threading.Thread, "start", self._noting_start(self._start))  # noqa: B010  # a method, to type checkers

    def __exit__(self, *raised: object) -> None:
        self._is_on = False
        setattr(threading.Thread, "start", self._start)  # noqa: B010
        for module, opener in self._openers:
            module._lazy_init = opener

    def _noting_start(self, start: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
        def start_thread(thread: threading.Thread) -> None:
            self._note("threads", f"starts a thread ({thread.name})")
            start(thread)

        return start_thread

    def _noting(self, name: str, opener: Callable[[], None]) -> Callable[[], None]:
        def open_device() -> None:
            self._note("device", f"opens a device through {name}")
            opener()

        return open_device

    def _note(self, topic: str, text: str) -> None:
        self._seen.setdefault(topic, []).append(text)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_on:
            return
        if event in _PROCESS_EVENTS:
            self._note("processes", f"starts a process ({event}{': ' + str(arguments[0]) if arguments else ''})")
        elif event == "_thread.start_new_thread":
            self._note("threads", "starts a thread")
        elif event == "open" and str(arguments[0]).startswith(_DEVICE_FILES):
            self._note("device", f"opens {arguments[0]}")

    def breaches(self) -> dict[str, list[str]]:
        import torch

        for module in (torch.cuda, torch.xpu):
            if module.is_initialized() and "device" not in self._seen:
                self._note("device", f"opens a device of {module.__name__}")
        if threading.active_count() > 1 and "threads" not in self._seen:
            self._note("threads", f"leaves {threading.active_count() - 1} threads running")
        return {topic: list(dict.fromkeys(found)) for topic, found in self._seen.items()}


# --- what is compared before and after -------------------------------------------------------------------------------


def _snapshots(modules: Sequence[str]) -> dict[str, Snapshot]:
    return {
        "environment": dict(os.environ),
        "process": _of_the_process(),
        "torch": _of_torch(),
        "drivetrain": _of_drivetrain(modules),
    }


def _differences(before: Snapshot, after: Snapshot) -> list[str]:
    """Names whose value changed, appeared or went."""
    return [f"changes {name}" for name in sorted({*before, *after}) if before.get(name) != after.get(name)]


def _of_the_process() -> Snapshot:
    umask = os.umask(0o077)
    os.umask(umask)
    handlers = {f"signal handler {s.name}": str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)}
    return {
        "the current folder": os.getcwd(),
        "umask": umask,
        "sys.path": list(sys.path),
        "sys.excepthook": id(sys.excepthook),
        "sys.stdout": id(sys.stdout),
        "the recursion limit": sys.getrecursionlimit(),
        "warnings.filters": [str(entry) for entry in warnings.filters],
        "the root logger": (logging.root.level, [str(handler) for handler in logging.root.handlers]),
        "the start method of processes": multiprocessing.get_start_method(allow_none=True),
        **handlers,
    }


def _of_torch() -> Snapshot:
    import random

    import numpy
    import torch

    found = {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's number of threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch's grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "torch's float32 matmul precision": torch.get_float32_matmul_precision(),
        "torch's anomaly mode": torch.is_anomaly_enabled(),
        "torch's autocast": torch.is_autocast_enabled("cpu"),
        "torch's cuDNN settings": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "torch's random state": hash(torch.random.get_rng_state().numpy().tobytes()),
        "numpy's random state": hash(repr(numpy.random.get_state(legacy=True))),
        "Python's random state": hash(random.getstate()),
    }
    for place in _TORCH_PLACES:
        found |= _functions(place, vars(_resolve(place)))
    return found


def _resolve(place: str) -> Any:
    import torch

    value: Any = torch
    for part in place.split(".")[1:]:
        value = getattr(value, part)
    return value


def _functions(place: str, names: Mapping[str, Any]) -> Snapshot:
    return {f"{place}.{name}": id(value) for name, value in names.items() if callable(value)}


def _of_drivetrain(modules: Sequence[str]) -> Snapshot:
    """Identity of every attribute of the core's modules and of their classes, and the contents of their tables."""
    found: Snapshot = {}
    for name in modules:
        found |= _attributes(name, sys.modules[name])
    return found


def _attributes(module_name: str, module: types.ModuleType) -> Snapshot:
    found: Snapshot = {}
    for name, value in vars(module).items():
        if name.startswith("__") or isinstance(value, types.ModuleType):
            continue
        found[f"{module_name}.{name}"] = _identity(value)
        if isinstance(value, type) and value.__module__ == module_name:
            members = {key: member for key, member in vars(value).items() if _is_authored(key, member)}
            found |= {f"{module_name}.{name}.{key}": _identity(member) for key, member in members.items()}
    return found


def _is_authored(name: str, member: object) -> bool:
    # Python and pydantic keep caches of their own under names with underscores.
    return isinstance(member, types.FunctionType | classmethod | staticmethod) or not name.startswith("_")


def _identity(value: object) -> Any:
    if isinstance(value, dict):
        return (id(value), [(str(key), id(entry)) for key, entry in value.items()])
    if isinstance(value, list):
        return (id(value), [id(entry) for entry in value])
    return id(value)


# --- other processes -------------------------------------------------------------------------------------------------


def _in_a_fork(target: Any, probe: Any) -> str:
    """Probe again in a fork of this process."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(_EXIT_SAME if _probe(target) == probe else _EXIT_OTHER)
        finally:
            os._exit(_EXIT_RAISED)
    deadline = time.monotonic() + _FORK_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return _judged("fork", os.waitstatus_to_exitcode(status))
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"its probe does not return within {_FORK_SECONDS:g} s in a forked process"


def _judged(how: str, status: int) -> str:
    """What is wrong; empty when nothing is."""
    if status == _EXIT_SAME:
        return ""
    if status == _EXIT_OTHER:
        return f"its probe answers differently in a {how}ed process"
    return f"probing it in a {how}ed process ends that process with status {status}"


def _spawned(plugin: Mapping[str, str], probe: Any) -> tuple[float | None, bool, str]:
    """Import and probe in a new process: seconds of the import, whether it brought torch in, and what was wrong."""
    request = {"plugin": dict(plugin), "sys_path": sys.path, "probe": dataclasses.astuple(probe)}
    reading, writing = os.pipe()
    command = [sys.executable, "-P", __file__, str(writing)]
    done = subprocess.run(command, input=json.dumps(request).encode(), pass_fds=(writing,), check=False)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    if not text:
        return None, False, _judged("spawn", done.returncode)
    told = json.loads(text)
    return told["import_seconds"], told["imports_torch"], _judged("spawn", done.returncode)


def _import_and_probe(request: Mapping[str, Any], answer_file: int) -> int:
    """What the new process does; returns its exit status."""
    import drivetrain.registry.selection  # noqa: F401  # now, so that the time below is the plugin's own
    from drivetrain.contracts.plugin import Probe

    had_torch = "torch" in sys.modules
    started = time.perf_counter()
    target, failure = _load(request["plugin"])
    seconds = time.perf_counter() - started
    if target is None:
        print(failure, file=sys.stderr)
        return _EXIT_RAISED
    told = {"import_seconds": seconds, "imports_torch": "torch" in sys.modules and not had_torch}
    os.write(answer_file, json.dumps(told).encode())
    return _EXIT_SAME if _probe(target) == Probe(*request["probe"]) else _EXIT_OTHER


if __name__ == "__main__":
    main()
