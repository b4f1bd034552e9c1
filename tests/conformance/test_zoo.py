"""The kit examines itself: every plugin of the zoo has a fault, and the test that is named for it must fail."""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

from drivetrain.testing.run import Outcome, Report, Target, run_suites
from drivetrain.testing.suite import Suite

ZOO_FOLDER = Path(__file__).resolve().parents[1] / "zoo"
EIGHT_KINDS = {"platform", "kernels", "attention", "scheduler", "quantizer", "precision", "partitioner", "checkpoint"}
FEWEST = 25


def animals() -> list[Target]:
    """Every faulty plugin, with the one test that must catch it."""
    found = []
    for path in sorted(ZOO_FOLDER.glob("zoo_*.py")):
        module = import_module(f"zoo.{path.stem}")
        for plugin, test in module.ZOO.items():
            suite = getattr(module, "SUITE", plugin.kind)
            found.append(Target(suite, f"{module.__name__}:{plugin.__qualname__}", tests=(test,)))
    return found


ANIMALS = animals()
LENGTHY = [
    target
    for target in ANIMALS
    if target.tests[0].startswith(("test_import_and_probe_", "test_ranks_", "test_a_kill_"))
]
QUICK = [target for target in ANIMALS if target not in LENGTHY]


def name_of(target: Target) -> str:
    return target.plugin.rpartition(":")[2]


@pytest.fixture(scope="module")
def quick_report() -> Report:
    """All of them in one child process."""
    return run_suites(QUICK)


@pytest.fixture(scope="module")
def lengthy_report() -> Report:
    """Those that are examined in processes of their own."""
    return run_suites(LENGTHY)


@pytest.mark.slow
@pytest.mark.parametrize("target", QUICK, ids=name_of)
def test_the_fault_is_caught(quick_report: Report, target: Target) -> None:
    """The named test fails, and it fails on an assertion or an error of its own: not for want of a fixture."""
    expect_caught(quick_report, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", LENGTHY, ids=name_of)
def test_the_fault_is_caught_in_a_process_of_its_own(lengthy_report: Report, target: Target) -> None:
    """The named test of manners, or over ranks, fails."""
    expect_caught(lengthy_report, target)


def expect_caught(report: Report, target: Target) -> None:
    results = report.of(target)
    outcomes = {result.test: result.outcome for result in results}
    assert Outcome.FAILED in outcomes.values(), [(result.test, result.outcome, result.message) for result in results]
    assert Outcome.ERROR not in outcomes.values(), [(result.test, result.message) for result in results]


def test_the_zoo_is_large_enough() -> None:
    """At least 25 faulty plugins, and at least two of each of the eight kinds."""
    kinds = Counter(target.plugin.partition(":")[0].removeprefix("zoo.zoo_") for target in ANIMALS)
    assert kinds.total() >= FEWEST
    assert {kind for kind in EIGHT_KINDS if kinds[kind] < 2} == set()


def test_every_animal_says_what_its_fault_is() -> None:
    """Each has a docstring of its own, which says what is wrong with it."""
    for target in ANIMALS:
        module, _, name = target.plugin.partition(":")
        assert vars(getattr(import_module(module), name)).get("__doc__"), target.plugin


def test_every_manner_has_an_animal() -> None:
    """Each test of manners that a probe can fail is shown to catch something."""
    manners = {name for name in vars(Suite) if name.startswith("test_import_and_probe_")}
    assert manners - {target.tests[0] for target in ANIMALS} == set()
