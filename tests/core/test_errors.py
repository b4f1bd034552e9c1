"""Every error says what, where, found, allowed and the next move, in one line, and survives a process border."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain import errors
from drivetrain.errors import ConfigError, DrivetrainError, MissingDependencyError, RequestError, nearest

ALL = [error for _, error in inspect.getmembers(errors, inspect.isclass) if issubclass(error, DrivetrainError)]


def test_the_parts_are_told_in_order() -> None:
    error = ConfigError("it is wrong", where="run.yaml:4", found=3, allowed=["a", "b"], hint="Change it.")
    assert str(error) == "run.yaml:4: it is wrong; found 3; allowed: a, b. Change it."
    assert (error.what, error.where, error.found, error.allowed) == ("it is wrong", "run.yaml:4", 3, "a, b")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, "it is wrong"),
        ({"where": "here"}, "here: it is wrong"),
        ({"found": ""}, "it is wrong; found ''"),
        ({"found": 0}, "it is wrong; found 0"),
        ({"found": None}, "it is wrong"),
        ({"allowed": ()}, "it is wrong"),
        ({"allowed": "1..5"}, "it is wrong; allowed: 1..5"),
        ({"allowed": (x for x in (1, 2))}, "it is wrong; allowed: 1, 2"),
        ({"hint": "Do this."}, "it is wrong. Do this."),
    ],
)
def test_parts_that_are_absent_leave_no_trace(parts: dict[str, object], expected: str) -> None:
    assert str(ConfigError("it is wrong", **parts)) == expected  # type: ignore[arg-type]


def test_a_hint_after_a_full_stop_has_one_full_stop() -> None:
    assert str(ConfigError("It is wrong.", hint="Do this.")) == "It is wrong. Do this."


@pytest.mark.parametrize(
    ("found", "expected"),
    [("schedular", "scheduler"), ("scheduler", "scheduler"), ("zzz", None), ("", None), ("fcfs2", "fcfs")],
)
def test_the_nearest_spelling(found: str, expected: str | None) -> None:
    assert nearest(found, iter(["fcfs", "scheduler", "sampler"])) == expected


def test_a_missing_dependency_gives_the_install_line() -> None:
    assert str(MissingDependencyError("torch", needed_by="serving")).endswith("Run: pip install torch")
    with_extra = MissingDependencyError("transformers", needed_by="model/transformers", extra="transformers")
    assert str(with_extra).endswith('Run: pip install "drivetrain[transformers]"')
    assert "'transformers', which is not installed" in str(with_extra)


def make(error: type[DrivetrainError]) -> DrivetrainError:
    if issubclass(error, MissingDependencyError):
        return error("torch", needed_by="this")
    if issubclass(error, RequestError):
        return error("it is wrong", param="top_p", found=2)
    return error("it is wrong", where="here", found=2, allowed=[1])


@pytest.mark.parametrize("error", ALL)
def test_errors_survive_pickling_and_copying(error: type[DrivetrainError]) -> None:
    original = make(error)
    for twin in (pickle.loads(pickle.dumps(original)), copy.copy(original)):
        assert type(twin) is error
        assert str(twin) == str(original)
        assert vars(twin) == vars(original)


@pytest.mark.parametrize("error", ALL)
def test_every_error_has_a_docstring_of_its_own(error: type[DrivetrainError]) -> None:
    assert error.__doc__
    assert error.__doc__ != error.__bases__[0].__doc__


@pytest.mark.parametrize("error", [error for error in ALL if issubclass(error, RequestError)])
def test_request_errors_carry_what_a_frontend_answers_with(error: type[RequestError]) -> None:
    assert 400 <= error.status < 600
    assert error.type
    assert error("x", param="n").param == "n"


@given(st.text(max_size=20), st.lists(st.text(max_size=8), max_size=5))
def test_nearest_gives_one_of_the_allowed_or_nothing(found: str, allowed: list[str]) -> None:
    close = nearest(found, allowed)
    assert close is None or close in allowed
