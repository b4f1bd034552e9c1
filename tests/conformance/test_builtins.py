"""Every built-in plugin passes its kind's suite: the reference parts above all."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from drivetrain.contracts.plugin import Probe, ProbeContext
from drivetrain.registry import PluginRef, discover
from drivetrain.registry.selection import load_and_probe
from drivetrain.testing import SUITES
from drivetrain.testing.run import Outcome, Report, Target, run_suites, suite_class
from drivetrain.testing.suite import Suite
from drivetrain.testing.suites.partitioner import PartitionerSuite
from drivetrain.testing.suites.store import StoreSuite
from support.distributions import run_python

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
MANNERS |= {"test_facts_open_no_device"}
OVER_RANKS = {
    name for name in (*vars(PartitionerSuite), *vars(StoreSuite)) if name.startswith(("test_ranks_", "test_a_kill_"))
}
"""Tests that start processes of their own, as those of manners do."""

AFRESH = "test_works_in_a_spawned_process"
PROBE_ALL = """
import dataclasses, json
from drivetrain.contracts.plugin import ProbeContext
from drivetrain.registry import discover
from drivetrain.registry.selection import load_and_probe
found = {}
for ref in discover():
    if ref.distribution == "drivetrain":
        found[f"{ref.kind}/{ref.name}"] = dataclasses.astuple(load_and_probe(ref, ProbeContext()))
print(json.dumps(found))
"""

COMPILED = {"flex"}
"""Plugins that are compiled for every shape under test, which takes minutes."""

NOT_ON_EVERY_MACHINE = {"cuda", "rocm", "xpu", "triton", "paged-triton"}
BUILT_IN = [ref for ref in discover() if ref.distribution == "drivetrain"]
REFS = [ref for ref in BUILT_IN if ref.kind in SUITES.values()]


def suite_of(ref: PluginRef) -> str:
    return OWN_SUITES.get(f"{ref.kind}/{ref.name}", ref.kind)


def names_of_tests(ref: PluginRef) -> set[str]:
    return {name for name in dir(suite_class(suite_of(ref))) if name.startswith("test_")}


def target(ref: PluginRef, tests: set[str]) -> Target:
    return Target(suite_of(ref), ref.name, tests=tuple(sorted(tests)))


def quick_tests_of(ref: PluginRef) -> set[str]:
    return names_of_tests(ref) - MANNERS - OVER_RANKS


def manners_of(ref: PluginRef) -> set[str]:
    """Importing torch anew takes longer than all else together: one of each kind does, and all in one process."""
    is_first = ref == next(other for other in REFS if other.kind == ref.kind)
    return names_of_tests(ref) & MANNERS - (set() if is_first else {AFRESH})


def ranks_of(ref: PluginRef) -> set[str]:
    return names_of_tests(ref) & OVER_RANKS


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
    return run_suites([target(ref, quick_tests_of(ref)) for ref in REFS if ref.name not in COMPILED])


@pytest.fixture(scope="module")
def report_of_manners() -> Report:
    return run_suites([target(ref, manners_of(ref)) for ref in REFS])


@functools.cache
def report_over_ranks(kind: str) -> Report:
    return run_suites([target(ref, ranks_of(ref)) for ref in REFS if ref.kind == kind])


@pytest.mark.parametrize(
    "ref", [ref for ref in REFS if ref.name not in COMPILED], ids=lambda ref: f"{ref.kind}/{ref.name}"
)
def test_no_test_fails(report: Report, ref: PluginRef) -> None:
    expect_no_failure(report, ref, quick_tests_of(ref))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ref", [ref for ref in REFS if ref.name in COMPILED], ids=lambda ref: f"{ref.kind}/{ref.name}")
def test_no_test_of_what_is_compiled_fails(ref: PluginRef) -> None:
    tests = quick_tests_of(ref)
    expect_no_failure(run_suites([target(ref, tests)], test_time_limit_seconds=300), ref, tests)


@pytest.mark.slow
@pytest.mark.parametrize("ref", REFS, ids=lambda ref: f"{ref.kind}/{ref.name}")
def test_manners_are_good(report_of_manners: Report, ref: PluginRef) -> None:
    """Importing and probing it changes nothing, and where it is imported anew, the time of that is told."""
    tests = manners_of(ref)
    expect_no_failure(report_of_manners, ref, tests)
    told = [str(result.properties.get("import_time")) for result in report_of_manners.of(target(ref, tests))]
    assert any("ms" in time for time in told) == (AFRESH in tests)


@pytest.mark.slow
@pytest.mark.parametrize("ref", [ref for ref in REFS if ranks_of(ref)], ids=lambda ref: f"{ref.kind}/{ref.name}")
def test_no_test_over_ranks_fails(ref: PluginRef) -> None:
    expect_no_failure(report_over_ranks(ref.kind), ref, ranks_of(ref))


@pytest.mark.slow
def test_all_are_imported_and_probed_alike_in_a_new_process(tmp_path: Path) -> None:
    found = {name: Probe(*probe) for name, probe in json.loads(run_python(PROBE_ALL, tmp_path)).items()}
    assert found == {f"{ref.kind}/{ref.name}": load_and_probe(ref, ProbeContext()) for ref in BUILT_IN}


def test_every_kind_with_a_suite_has_a_built_in_plugin() -> None:
    assert {ref.kind for ref in REFS} == set(SUITES.values())
