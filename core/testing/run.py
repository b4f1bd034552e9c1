"""Run suites on plugins in a child process, and read what every test came to.

A plugin that crashes, hangs or ends its process takes a child down and not the caller: the test that was running is
reported as failed, and a new child goes on with the next one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from drivetrain.contracts.source import Progress, silent
from drivetrain.errors import ConfigError, DrivetrainError, MissingDependencyError
from drivetrain.registry.doctor import useful_line
from drivetrain.testing import SUITES

TEST_TIME_LIMIT_SECONDS = 120.0
TIME_LIMIT_SECONDS = 1800.0
_POLL_SECONDS = 0.05
_START_SECONDS = 60.0
_TEST_FILE = "test_conformance.py"
_PYTEST = "drivetrain.testing.pytest_plugin"

_INI = """[pytest]
addopts = --import-mode=importlib
python_files = test_conformance.py
python_classes = Examined
"""

_CONFTEST = """import sys
sys.path[:] = {path!r}
import pytest
pytest.register_assert_rewrite(*{modules!r})
import torch
torch.set_num_threads(1)
"""


class Outcome(StrEnum):
    """What a test came to. NOT_RUN is claimed by the plugin and can't be shown on this machine: it is no pass."""

    PASSED = "passed"
    FAILED = "failed"
    ERROR = "error"
    SKIPPED = "skipped"
    NOT_RUN = "not_run"


@dataclass(frozen=True)
class Target:
    """One plugin and the suite it is put through.

    suite:   a kind, whose own suite is meant, or ``module:Class`` of a suite.
    plugin:  an installed plugin's name, or ``module:Class``.
    options: for its Config. JSON-able.
    tests:   names of the tests to run; empty for all.
    """

    suite: str
    plugin: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tests: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.suite}/{self.plugin}"


@dataclass(frozen=True)
class Result:
    """What one test came to for one plugin.

    rule:       what the test's docstring says has to hold.
    message:    why it failed, was skipped or could not be run.
    properties: figures that the test recorded, such as ``import_time``.
    """

    target: Target
    test: str
    rule: str
    outcome: Outcome
    message: str
    seconds: float
    properties: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All results, in the order in which the tests ran."""

    results: tuple[Result, ...]
    seconds: float

    @property
    def counts(self) -> dict[str, int]:
        """Outcome -> number of tests; every outcome is there."""
        counted = Counter(result.outcome for result in self.results)
        return {outcome.value: counted[outcome] for outcome in Outcome}

    @property
    def failures(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.outcome in (Outcome.FAILED, Outcome.ERROR))

    def of(self, target: Target) -> tuple[Result, ...]:
        """The results of one target."""
        return tuple(result for result in self.results if result.target == target)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, as ``plugins test --json`` prints it."""
        return {
            "results": [dataclasses.asdict(result) for result in self.results],
            "counts": self.counts,
            "seconds": self.seconds,
        }


def run_suites(
    targets: Sequence[Target],
    *,
    test_time_limit_seconds: float = TEST_TIME_LIMIT_SECONDS,
    time_limit_seconds: float = TIME_LIMIT_SECONDS,
    progress: Progress = silent,
) -> Report:
    """Put plugins through their suites in a child pytest, which knows nothing of the caller's ini, conftest or plugins.

    test_time_limit_seconds: for one test; one that takes longer has failed.
    time_limit_seconds:      for all of them; what has not started by then is reported as an error.

    Raises MissingDependencyError without pytest, ConfigError for a kind that has no suite.
    """
    if find_spec("pytest") is None:
        raise MissingDependencyError("pytest", needed_by="the conformance kit", extra="test")
    for target in targets:
        if ":" not in target.suite and target.suite not in SUITES.values():
            raise ConfigError("no suite exists for this kind", found=target.suite, allowed=sorted(SUITES.values()))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="drivetrain-test-") as folder:
        run = _Run(Path(folder), targets, test_time_limit_seconds, started + time_limit_seconds, progress)
        run.to_the_end()
        return Report(tuple(run.results()), time.monotonic() - started)


class _Run:
    """The folder of one run: the test file that is examined, and the lines that the children add to the report."""

    def __init__(
        self, folder: Path, targets: Sequence[Target], test_limit: float, deadline: float, progress: Progress
    ) -> None:
        self._folder = folder.resolve()
        self._targets = targets
        self._test_limit = test_limit
        self._deadline = deadline
        self._progress = progress
        self._report = self._folder / "report.jsonl"
        self._report.touch()
        (self._folder / "pytest.ini").write_text(_INI, encoding="utf-8")
        modules = sorted({target.suite.partition(":")[0] for target in targets if ":" in target.suite})
        conftest = _CONFTEST.format(path=sys.path, modules=modules)
        (self._folder / "conftest.py").write_text(conftest, encoding="utf-8")
        (self._folder / _TEST_FILE).write_text(_test_file(targets), encoding="utf-8")

    def to_the_end(self) -> None:
        """Start children until one has come to the end of the tests. Each that dies has started at least one."""
        while True:
            before = len(self._started())
            with tempfile.TemporaryFile() as output:
                status, is_hung = self._child(output)
                unfinished = self._unfinished()
                if unfinished is not None:
                    self._note_death(unfinished, status, is_hung, output)
                    if time.monotonic() < self._deadline:
                        continue
                elif status not in (0, 1, 5) and len(self._started()) == before and not self._lines():
                    raise DrivetrainError(f"the tests could not be started: {_told(output)}", where=str(self._folder))
            return

    def _child(self, output: IO[bytes]) -> tuple[int, bool]:
        """Run pytest on what has not been started yet: its exit status, and whether it was killed for taking long."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        # Other pytest plugins of the caller's environment would change what a test comes to.
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        command = [sys.executable, "-P", "-m", "pytest", "-p", _PYTEST, "-p", "no:cacheprovider", "-q"]
        command += ["-c", "pytest.ini", "--rootdir", ".", "--confcutdir", ".", "--drivetrain-report", "report.jsonl"]
        child = subprocess.Popen(
            [*command, _TEST_FILE],
            cwd=self._folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return self._watch(child)
        finally:
            _kill_group(child)

    def _watch(self, child: subprocess.Popen[bytes]) -> tuple[int, bool]:
        size = before = self._report.stat().st_size
        changed = time.monotonic()
        while child.poll() is None:
            time.sleep(_POLL_SECONDS)
            now = time.monotonic()
            if self._report.stat().st_size != size:
                size, changed = self._report.stat().st_size, now
                self._tell_progress()
            # A child that has said nothing yet is still importing torch, and no test.
            limit = max(self._test_limit, _START_SECONDS) if size == before else self._test_limit
            if now - changed > limit or now > self._deadline:
                return -signal.SIGKILL, True
        return child.returncode, False

    # --- the report file ---------------------------------------------------------------------------------------------

    def _lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._report.read_text(encoding="utf-8").splitlines()]

    def _tell_progress(self) -> None:
        # The child may be in the middle of a line.
        lines = [json.loads(line) for line in self._report.read_text(encoding="utf-8").split("\n")[:-1]]
        total = sum(len(line["ids"]) for line in lines if line["event"] == "collected")
        done = sum(line["event"] == "ended" for line in lines)
        if total:
            self._progress("running tests", min(done, total), total, "tests")

    def _started(self) -> dict[str, dict[str, Any]]:
        return {line["id"]: line for line in self._lines() if line["event"] == "started"}

    def _unfinished(self) -> str | None:
        """The test that was running when the child ended, if one was."""
        ended = {line["id"] for line in self._lines() if line["event"] == "ended"}
        return next((test for test in self._started() if test not in ended), None)

    def _note_death(self, test: str, status: int, is_hung: bool, output: IO[bytes]) -> None:
        seconds = time.time() - self._started()[test]["time"]
        if is_hung:
            message = f"hung: it did not end within {self._test_limit:g} s"
        elif status < 0:
            message = f"crashed: the process was killed by {signal.Signals(-status).name}"
        else:
            message = f"ended the process with status {status}: {_told(output)}"
        line = {"event": "ended", "id": test, "outcome": "failed", "message": message, "seconds": seconds}
        with self._report.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def results(self) -> Iterator[Result]:
        """Raises DrivetrainError when the test file itself could not be read by pytest."""
        started = self._started()
        for line in self._lines():
            if line["event"] == "ended":
                if line["id"].count("::") < 2:
                    raise DrivetrainError(f"the tests could not be collected: {line['message']}", where=line["id"])
                yield self._result(line, started[line["id"]]["rule"] if line["id"] in started else "")
        collected = [test for line in self._lines() if line["event"] == "collected" for test in line["ids"]]
        for test in collected:
            if test not in started:
                message = "not started: the time limit for all tests had passed"
                yield self._result({"id": test, "outcome": "error", "message": message, "seconds": 0.0}, "")

    def _result(self, line: Mapping[str, Any], rule: str) -> Result:
        _, examined, test = line["id"].split("::", 2)
        target = self._targets[int(examined.removeprefix("Examined"))]
        outcome = Outcome(line["outcome"])
        return Result(target, test, rule, outcome, line["message"], line["seconds"], line.get("properties", {}))


def _test_file(targets: Iterable[Target]) -> str:
    """What an author would write for each target; the options travel as JSON, and so no value can be code."""
    lines = ["import json", "from drivetrain.testing.run import only, suite_class", ""]
    for index, target in enumerate(targets):
        lines += [
            f"class Examined{index}(suite_class({target.suite!r})):",
            f"    plugin = {target.plugin!r}",
            f"    options = json.loads({json.dumps(dict(target.options))!r})",
            "",
        ]
        if target.tests:
            lines += [f"only(Examined{index}, {tuple(target.tests)!r})", ""]
    return "\n".join(lines)


def suite_class(name: str) -> type:
    """The suite of a kind, or ``module:Class``."""
    import importlib

    if ":" in name:
        module, _, attribute = name.partition(":")
        found: type = getattr(importlib.import_module(module), attribute)
        return found
    testing = importlib.import_module("drivetrain.testing")
    of_the_kind: type = getattr(testing, next(suite for suite, kind in SUITES.items() if kind == name))
    return of_the_kind


def only(suite: type, tests: Sequence[str]) -> None:
    """Leave out all tests of a suite but ``tests``. Raises AttributeError for one that it does not have."""
    for name in tests:
        getattr(suite, name)
    for name in dir(suite):
        if name.startswith("test_") and name not in tests:
            setattr(suite, name, None)


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """End the child with everything it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    child.wait()


def _told(output: IO[bytes]) -> str:
    output.seek(0)
    return useful_line(output.read().decode(errors="replace"))[:300]
