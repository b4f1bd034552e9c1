"""The runner reports every outcome, and survives every way in which a plugin can bring a process down."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import drivetrain.testing
from drivetrain.cli import main
from drivetrain.errors import ConfigError, DrivetrainError, MissingDependencyError
from drivetrain.testing import run as run_module
from drivetrain.testing.run import Outcome, Report, Target, run_suites
from support.distributions import run_python

SUITE = "zoo.wild:RunnerSuite"
OUTCOMES = ("test_passes", "test_fails", "test_errs", "test_skips", "test_not_run", "test_twice")
FEW = ("test_dtypes_are_repeatable", "test_config_refuses_unknown_keys")
PROBED = (
    "test_probe_is_repeatable",
    "test_import_and_probe_leave_the_environment",
    "test_import_and_probe_leave_the_process",
)


@pytest.fixture(scope="module")
def report() -> Report:
    targets = [
        Target(SUITE, "zoo.wild:WithOption", {"param": "bfloat16"}, OUTCOMES),
        Target("precision", "zoo.wild:CrashesOnUse", tests=FEW),
        Target("precision", "zoo.wild:ExitsOnUse", tests=FEW),
        Target("precision", "fp32", tests=FEW),
        Target("precision", "zoo.wild:SetsTheEnvironment", tests=PROBED),
    ]
    return run_suites(targets)


def outcomes(report: Report, plugin: str) -> dict[str, Outcome]:
    return {result.test: result.outcome for result in report.results if result.target.plugin == plugin}


def test_each_outcome_is_told_apart(report: Report) -> None:
    assert outcomes(report, "zoo.wild:WithOption") == {
        "test_passes": Outcome.PASSED,
        "test_fails": Outcome.FAILED,
        "test_errs": Outcome.ERROR,
        "test_skips": Outcome.SKIPPED,
        "test_not_run": Outcome.NOT_RUN,
        "test_twice[1]": Outcome.PASSED,
        "test_twice[2]": Outcome.PASSED,
    }
    assert report.counts["not_run"] == 1
    assert sum(report.counts.values()) == len(report.results)


def test_rules_reasons_options_and_figures_arrive(report: Report) -> None:
    found = {result.test: result for result in report.results}
    assert found["test_passes"].rule == "Passing is told, with the whole rule."
    assert found["test_passes"].properties == {"figure": 7}
    assert "wrong format" in found["test_fails"].message
    assert "bfloat16" in found["test_fails"].message
    assert "no_such_fixture" in found["test_errs"].message
    assert found["test_skips"].message == "not claimed: surely_not_claimed"
    assert found["test_not_run"].message == "no such device"
    assert json.loads(json.dumps(report.to_dict()))["counts"] == report.counts


def test_a_crash_is_the_failure_of_the_test_that_was_running(report: Report) -> None:
    """The test that brought the process down has failed, and those behind it are run all the same."""
    for plugin, how in (("CrashesOnUse", "SIGSEGV"), ("ExitsOnUse", "status 0")):
        found = {r.test: r for r in report.results if r.target.plugin == f"zoo.wild:{plugin}"}
        assert found["test_dtypes_are_repeatable"].outcome is Outcome.FAILED
        assert how in found["test_dtypes_are_repeatable"].message
        assert found["test_config_refuses_unknown_keys"].outcome is Outcome.PASSED
    assert set(outcomes(report, "fp32").values()) == {Outcome.PASSED}


@pytest.mark.slow
def test_what_a_plugin_has_changed_in_the_kits_own_process_is_seen(report: Report) -> None:
    """It is probed there before its manners are examined in a child, which must not take the change over."""
    assert outcomes(report, "zoo.wild:SetsTheEnvironment") == {
        PROBED[0]: Outcome.PASSED,
        PROBED[1]: Outcome.FAILED,
        PROBED[2]: Outcome.FAILED,
    }
    messages = {result.test: result.message for result in report.results}
    assert "changes WILD_HOME" in messages[PROBED[1]]
    assert "changes the current folder" in messages[PROBED[2]]


def test_a_hang_is_the_failure_of_the_test_that_was_running() -> None:
    started = time.monotonic()
    targets = [Target("precision", "zoo.wild:HangsOnUse", tests=FEW), Target("precision", "fp32", tests=FEW)]
    report = run_suites(targets, test_time_limit_seconds=5)
    assert time.monotonic() - started < 120
    (hung,) = report.failures
    assert hung.test == "test_dtypes_are_repeatable"
    assert hung.message == "hung: it did not end within 5 s"
    assert report.counts["passed"] == 3


@pytest.mark.slow
def test_what_had_no_time_to_start_is_an_error() -> None:
    targets = [Target("precision", "zoo.wild:HangsOnUse", tests=FEW[:1]), Target("precision", "fp32", tests=FEW)]
    report = run_suites(targets, time_limit_seconds=10)
    assert len(report.failures) >= 2
    assert "hung" in report.failures[0].message or "time limit" in report.failures[0].message
    assert "time limit" in report.failures[-1].message


def test_a_suite_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no suite exists for this kind"):
        run_suites([Target("frontend", "openai")])
    with pytest.raises(DrivetrainError, match=r"could not be collected.*NoSuchSuite"):
        run_suites([Target("zoo.wild:NoSuchSuite", "fp32")])


def test_a_plugin_that_does_not_exist_fails_its_tests() -> None:
    report = run_suites([Target("precision", "zoo.wild:NoSuchPrecision", tests=FEW)])
    assert report.counts["failed"] == 2
    assert "has no 'NoSuchPrecision'" in report.failures[0].message


def test_without_pytest_the_install_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r'pip install "drivetrain\[test\]"'):
        run_suites([Target("precision", "fp32")])


# --- the pytest plugin -----------------------------------------------------------------------------------------------


def test_the_pytest_plugin_imports_nothing_heavy() -> None:
    """Every pytest run of the environment imports it: neither torch nor pydantic nor any plugin may come with it."""
    code = """
import sys, time, pytest
started = time.perf_counter()
import drivetrain.testing.pytest_plugin
seconds = time.perf_counter() - started
heavy = [name for name in ("torch", "numpy", "pydantic", "typer", "drivetrain.plugins") if name in sys.modules]
print(seconds < 0.1, heavy)
"""
    assert run_python(code).strip() == "True []"


def test_the_kits_names_are_lazy() -> None:
    """Importing the kit imports neither pytest nor torch."""
    code = "import sys, drivetrain.testing; print([name for name in ('torch', 'pytest') if name in sys.modules])"
    assert run_python(code).strip() == "[]"
    assert set(drivetrain.testing.__all__) == {*drivetrain.testing.SUITES, "SUITES"}


def test_an_authors_file_shows_what_was_not_run_apart(tmp_path: Path) -> None:
    """A file of three lines is enough, and NOT RUN is neither passed nor skipped in what pytest prints."""
    (tmp_path / "test_mine.py").write_text(
        "from zoo.wild import RunnerSuite\n\nclass TestMine(RunnerSuite):\n    plugin = 'fp32'\n", encoding="utf-8"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = " + str(Path(__file__).parents[1]), encoding="utf-8")
    chosen = "test_passes or test_skips or test_not_run or test_works_in_a_spawned_process"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-k", chosen, "test_mine.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "test_not_run NOT RUN" in done.stdout
    assert "TestMine::test_not_run: no such device" in done.stdout
    assert re.search(r"2 passed, 1 skipped, \d+ deselected, 1 not run in", done.stdout)
    assert "import times of plugins" in done.stdout


ONLY = tuple(word for test in OUTCOMES for word in ("--only", test))


# --- the command -----------------------------------------------------------------------------------------------------


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["plugins", "test", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_command_prints_tests_outcomes_and_rules(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run_command(capsys, "precision/fp32", "--suite", SUITE, *ONLY)
    assert status == 1
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "NOT RUN" in lines["test_not_run"]
    assert "What this machine can't show is NOT RUN." in lines["test_not_run"]
    assert "wrong format" in lines["test_fails"]
    assert "2 failed" in err
    assert "1 NOT RUN" in err


def test_the_command_prints_json_and_takes_options(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("precision/zoo.wild:WithOption", "--options", "param=float16", "--json")
    only = ("--only", "test_a_narrow_range_has_a_loss_scale", "--only", "test_dtypes_exist")
    status, out, _ = run_command(capsys, *arguments, *only)
    found = {result["test"]: result for result in json.loads(out)["results"]}
    assert status == 1
    assert found["test_a_narrow_range_has_a_loss_scale"]["outcome"] == "failed"
    assert found["test_dtypes_exist"]["outcome"] == "passed"
    assert len(found) == 2
    assert found["test_dtypes_exist"]["target"]["options"] == {"param": "float16"}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("precision/bf17",), "Did you mean 'bf16'?"),
        (("precision",), "not a plugin's name"),
        (("precisions/bf16",), "Did you mean 'precision'?"),
        (("frontend/openai",), "no suite exists for this kind"),
        (("precision/bf16", "--options", "nothing"), "not an assignment"),
    ],
)
def test_wrong_words_are_one_clear_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], error: str
) -> None:
    status, out, err = run_command(capsys, *arguments)
    assert status == 1
    assert out == ""
    assert error in err
    assert len(err.splitlines()) == 1
