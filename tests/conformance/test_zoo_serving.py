"""Plain plugins without a fault pass all of their suite, claims included that no built-in makes: the zoo derives from
them, so that each of its plugins is caught for its one fault and for nothing else."""

from __future__ import annotations

import pytest

from drivetrain.testing.run import Outcome, Report, Target, run_suites, suite_class
from drivetrain.testing.suite import Suite

SOUND = {"attention": "zoo.zoo_attention:PlainPaged", "quantizer": "zoo.zoo_quantizer:PlainInt8"}


INVARIANCE = {"test_a_sequence_does_not_feel_its_neighbours", "test_a_row_does_not_feel_the_others"}


def target(kind: str) -> Target:
    shared = set(vars(Suite))
    tests = [name for name in dir(suite_class(kind)) if name.startswith("test_") and name not in shared]
    return Target(kind, SOUND[kind], tests=tuple(tests))


@pytest.fixture(scope="module")
def report() -> Report:
    return run_suites([target(kind) for kind in SOUND])


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_plugin_passes(report: Report, kind: str) -> None:
    """Nothing fails, and each skip is for a claim that was not made."""
    results = report.of(target(kind))
    failures = [f"{r.test}: {r.message}" for r in results if r.outcome in (Outcome.FAILED, Outcome.ERROR)]
    assert not failures, "\n".join(failures)
    assert sum(result.outcome is Outcome.PASSED for result in results) > 30
    unclaimed = [r.message for r in results if r.outcome is Outcome.SKIPPED]
    assert all(message.startswith("not claimed: ") for message in unclaimed), unclaimed


@pytest.mark.parametrize("kind", SOUND)
def test_batch_invariance_is_examined_where_it_is_claimed(report: Report, kind: str) -> None:
    """The plain attention claims it and shows it; the plain quantizer does not claim it."""
    (invariance,) = [r for r in report.of(target(kind)) if r.test in INVARIANCE]
    assert invariance.outcome is (Outcome.PASSED if kind == "attention" else Outcome.SKIPPED)
