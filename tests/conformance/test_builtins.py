"""Every built-in plugin passes its kind's suite: the reference parts above all."""

from __future__ import annotations

import functools

import pytest

from drivetrain.registry import PluginRef, discover
from drivetrain.testing import SUITES
from drivetrain.testing.run import Outcome, Report, Target, run_suites, suite_class
from drivetrain.testing.suite import Suite
from drivetrain.testing.suites.partitioner import PartitionerSuite
from drivetrain.testing.suites.store import StoreSuite

OWN_SUITES = {
    f"source/{name}": f"conformance.suites_of_builtins:{suite}"
    for name, suite in (
        ("local", "LocalSuite"),
        ("hub", "HubSuite"),
        ("pypi", "PypiSuite"),
        ("catalogue", "CatalogueSuite"),
    )
} | {"attention/flex": "conformance.suites_of_builtins:FlexSuite"}
"""KIND/NAME -> the suite that is used in place of the kind's own."""

MANNERS = frozenset(name for name in vars(Suite) if name.startswith(("test_import_and_probe_", "test_works_in_a_")))
LENGTHY = MANNERS | {
    name for name in (*vars(PartitionerSuite), *vars(StoreSuite)) if name.startswith(("test_ranks_", "test_a_kill_"))
}
LENGTHY |= {"test_facts_open_no_device"}
"""Tests that start processes of their own."""

COMPILED = {"flex"}
"""Plugins that are compiled for every shape under test, which takes minutes."""

NOT_ON_EVERY_MACHINE = {"cuda", "rocm", "xpu", "triton", "paged-triton"}
REFS = [ref for ref in discover() if ref.distribution == "drivetrain" and ref.kind in SUITES.values()]


def suite_of(ref: PluginRef) -> str:
    return OWN_SUITES.get(f"{ref.kind}/{ref.name}", ref.kind)


def names_of_tests(ref: PluginRef) -> set[str]:
    return {name for name in dir(suite_class(suite_of(ref))) if name.startswith("test_")}


def target(ref: PluginRef, tests: set[str]) -> Target:
    return Target(suite_of(ref), ref.name, tests=tuple(sorted(tests)))


def lengthy_tests_of(ref: PluginRef) -> set[str]:
    return names_of_tests(ref) & LENGTHY


def expect_no_failure(report: Report, ref: PluginRef, tests: set[str]) -> None:
    """Each test ran and none failed; only a platform whose device is not here may be NOT RUN."""
    results = report.of(target(ref, tests))
    failures = [f"{r.test}: {r.message}" for r in results if r.outcome in (Outcome.FAILED, Outcome.ERROR)]
    assert not failures, "\n".join(failures)
    assert {result.test.partition("[")[0] for result in results} == tests
    assert any(result.outcome is Outcome.PASSED for result in results)
    if ref.name not in NOT_ON_EVERY_MACHINE:
        not_run = [f"{r.test}: {r.message}" for r in results if r.outcome is Outcome.NOT_RUN]
        assert not not_run, "\n".join(not_run)


@pytest.fixture(scope="module")
def report() -> Report:
    """All built-in plugins in one child process, but for the lengthy tests and what is compiled."""
    return run_suites([target(ref, names_of_tests(ref) - LENGTHY) for ref in REFS if ref.name not in COMPILED])


@functools.cache
def lengthy_report(kind: str) -> Report:
    """The lengthy tests of one kind's plugins, in one child process: all kinds together would take too long for it."""
    return run_suites([target(ref, lengthy_tests_of(ref)) for ref in REFS if ref.kind == kind])


@pytest.mark.parametrize(
    "ref", [ref for ref in REFS if ref.name not in COMPILED], ids=lambda ref: f"{ref.kind}/{ref.name}"
)
def test_no_test_fails(report: Report, ref: PluginRef) -> None:
    expect_no_failure(report, ref, names_of_tests(ref) - LENGTHY)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ref", [ref for ref in REFS if ref.name in COMPILED], ids=lambda ref: f"{ref.kind}/{ref.name}")
def test_no_test_of_what_is_compiled_fails(ref: PluginRef) -> None:
    tests = names_of_tests(ref) - LENGTHY
    expect_no_failure(run_suites([target(ref, tests)], test_time_limit_seconds=300), ref, tests)


@pytest.mark.slow
@pytest.mark.parametrize("ref", REFS, ids=lambda ref: f"{ref.kind}/{ref.name}")
def test_manners_are_good(ref: PluginRef) -> None:
    """Importing and probing it changes nothing, and the time of its import is told."""
    report = lengthy_report(ref.kind)
    expect_no_failure(report, ref, lengthy_tests_of(ref))
    results = report.of(target(ref, lengthy_tests_of(ref)))
    assert any("ms" in str(result.properties.get("import_time")) for result in results)


def test_every_kind_with_a_suite_has_a_built_in_plugin() -> None:
    assert {ref.kind for ref in REFS} == set(SUITES.values())
