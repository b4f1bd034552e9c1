"""A plugin's manners: what importing and probing it does to the process, seen in a child process."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from drivetrain.registry.discovery import PluginRef
from drivetrain.registry.doctor import useful_line
from drivetrain.testing.pytest_plugin import ENVIRONMENT, FOLDER

_CHILD = Path(__file__).with_name("manners_child.py")

TOPICS = ("device", "threads", "processes", "environment", "process", "torch", "drivetrain", "output", "fork", "spawn")
"""What is looked at. Each topic of :class:`Manners` holds the breaches that were seen."""


@dataclass(frozen=True)
class Manners:
    """What was seen.

    failure:        why the examination came to no end (crash, hang, an import that fails); None when it did.
    breaches:       topic -> what was done that may not be done.
    import_seconds: importing the plugin in a fresh process; None when that did not succeed.
    imports_torch:  whether that import brought torch in.
    """

    failure: str | None
    breaches: Mapping[str, tuple[str, ...]]
    import_seconds: float | None = None
    imports_torch: bool = False


def examine_manners(ref: PluginRef, options: Mapping[str, Any], time_limit_seconds: float) -> Manners:
    """Import and probe a plugin in a child process, again in a fork of it and in a new one.

    options: for its Config; a platform that says yes is created with them and asked for its facts too.

    Cached: the tests of one plugin share the examination. The child is killed with all it started at the time limit.
    """
    return _examine(ref, json.dumps(dict(options), sort_keys=True), time_limit_seconds)


@lru_cache(maxsize=256)
def _examine(ref: PluginRef, options: str, time_limit_seconds: float) -> Manners:
    with tempfile.TemporaryFile() as answers, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        request = {"plugin": dataclasses.asdict(ref), "options": json.loads(options), "sys_path": sys.path}
        child = subprocess.Popen(
            [sys.executable, "-P", str(_CHILD), str(answers.fileno())],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=errors,
            pass_fds=(answers.fileno(),),
            env=ENVIRONMENT,
            cwd=FOLDER,
            start_new_session=True,
        )
        try:
            child.communicate(json.dumps(request).encode(), timeout=time_limit_seconds)
            failure = None
        except subprocess.TimeoutExpired:
            failure = f"did not return within {time_limit_seconds:g} s"
        has_orphans = _kill_group(child) and failure is None
        lines = [json.loads(line) for line in _text_of(answers).splitlines()]
        stage = next((line["stage"] for line in reversed(lines) if "stage" in line), "start")
        answer = next((line for line in lines if "breaches" in line), None)
        if answer is None or failure is not None:
            return Manners(f"{stage}: {failure or _death(child.returncode, _text_of(errors))}", {})
        breaches = {topic: tuple(found) for topic, found in answer["breaches"].items()}
        if has_orphans:
            breaches["processes"] = (*breaches.get("processes", ()), "leaves a process running")
        printed = _text_of(output).strip()
        if printed:
            breaches["output"] = (f"prints on standard output: {printed.splitlines()[0][:100]!r}",)
        return Manners(answer["failure"], breaches, answer["import_seconds"], answer["imports_torch"])


def _death(status: int, errors: str) -> str:
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended the process with status {status}"
    said = useful_line(errors)
    return f"{how}: {said}" if said else how


def _kill_group(child: subprocess.Popen[bytes]) -> bool:
    """Kill what is left of the child's process group; True when something was."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    child.wait()
    return True


def _text_of(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
