"""The pytest plugin of the conformance kit (entry point ``pytest11``). Imports nothing heavy.

It shows tests that could not be run for want of hardware apart from the passed and the skipped ones, and writes what
every test came to as JSON lines with ``--drivetrain-report FILE``: a line before a test starts and one when it has
ended, so that a reader knows which one brought the process down. Tests that the file says were started are left out:
a run that died goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

NOT_RUN = "NOT RUN: "
"""Begins the reason of a test that could not be run for want of hardware: shown apart, never counted as passed."""

ENVIRONMENT, FOLDER = dict(os.environ), os.getcwd()
"""As they were before the first plugin was imported. Children that a plugin's manners are examined in start with them:
what it has changed in this process would be no change there."""

_CATEGORY = "not run"
_SHOWN_LINES = 3
_SUITE_MODULES = ("drivetrain.testing.suite", "drivetrain.testing.suites")

# Without it a failing assertion in a suite would show no values: pytest rewrites test files only.
pytest.register_assert_rewrite(*_SUITE_MODULES)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("drivetrain")
    group.addoption(
        "--drivetrain-report",
        metavar="FILE",
        default=None,
        help="add what each test came to as JSON lines to FILE; tests that FILE says were started are left out",
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--drivetrain-report")
    if path is not None:
        config.pluginmanager.register(_Reporter(Path(path).absolute()), "drivetrain-reporter")


def reason_of_not_running(report: Any) -> str | None:
    """Why this test could not be run here; None for every other outcome."""
    if not report.skipped or not isinstance(report.longrepr, tuple | list):  # a list once it came through JSON
        return None
    text = str(report.longrepr[2]).removeprefix("Skipped: ")
    return text.removeprefix(NOT_RUN) if text.startswith(NOT_RUN) else None


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    return (_CATEGORY, "N", "NOT RUN") if reason_of_not_running(report) is not None else None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    not_run = terminalreporter.stats.get(_CATEGORY, [])
    if not_run:
        terminalreporter.section("NOT RUN: claimed, but this machine can't show it")
        for report in not_run:
            terminalreporter.line(f"{report.nodeid}: {reason_of_not_running(report)}")
    times = [
        f"{report.nodeid.rpartition('::')[0]}: {value}"
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == "import_time"
    ]
    if times:
        terminalreporter.section("import times of plugins")
        for line in times:
            terminalreporter.line(line)


class _Reporter:
    """Writes the JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reports: list[pytest.TestReport] = []

    def _write(self, **line: object) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        started = {line["id"] for line in map(json.loads, lines) if line["event"] == "started"}
        if not started:
            self._write(event="collected", ids=[item.nodeid for item in items])
        left_out = [item for item in items if item.nodeid in started]
        if left_out:
            items[:] = [item for item in items if item.nodeid not in started]
            config.hook.pytest_deselected(items=left_out)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            message = _telling_line(str(report.longrepr))
            self._write(event="ended", id=report.nodeid, outcome="error", message=message, seconds=0.0, properties={})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        rule = (getattr(getattr(item, "obj", None), "__doc__", None) or "").strip().partition("\n\n")[0]
        self._reports = []
        self._write(event="started", id=item.nodeid, rule=" ".join(rule.split()), time=time.time())
        started = time.perf_counter()
        result = yield
        outcome, message = _outcome(self._reports)
        properties = {name: value for report in self._reports for name, value in report.user_properties}
        seconds = time.perf_counter() - started
        self._write(
            event="ended", id=item.nodeid, outcome=outcome, message=message, seconds=seconds, properties=properties
        )
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)


def _outcome(reports: list[pytest.TestReport]) -> tuple[str, str]:
    """What the phases of one test (setup, call, teardown) come to, and a short reason."""
    for report in reports:
        if report.failed:
            return ("failed" if report.when == "call" else "error"), _failure(report)
    for report in reports:
        reason = reason_of_not_running(report)
        if reason is not None:
            return "not_run", reason
        if report.skipped:
            longrepr = report.longrepr
            text = str(longrepr[2]) if isinstance(longrepr, tuple | list) else str(longrepr)
            return "skipped", text.removeprefix("Skipped: ")
    return "passed", ""


def _failure(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return _telling_line(str(report.longrepr))
    # The first line has the error, the next ones the values that were compared.
    return "; ".join(line.strip() for line in str(crash.message).splitlines()[:_SHOWN_LINES] if line.strip())


def _telling_line(text: str) -> str:
    """The line that pytest marks as the error, else the last one."""
    lines = [line for line in text.splitlines() if line.strip()]
    marked = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (marked or [line.strip() for line in lines[-1:]] or [""])[0]
