"""Sampling parameters are checked when they are made: each wrong value is refused with the parameter's name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drivetrain.errors import InvalidRequestError
from drivetrain.serving.types import (
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_STRINGS,
    Completion,
    FinishReason,
    GenerationResult,
    PromptInfo,
    RequestTiming,
    SamplingParams,
)

INTEGERS = {
    "max_tokens": (1, None),
    "min_tokens": (0, None),
    "n": (1, MAX_N),
    "top_k": (-1, None),
    "seed": (-(2**63), 2**63 - 1),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
NUMBERS = {
    "temperature": (0, 100),
    "top_p": (None, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
}
FLAGS = ("include_stop", "ignore_eos", "skip_special_tokens")
OPTIONAL = {"max_tokens", "seed", "logprobs", "prompt_logprobs"}
COLLECTIONS = ("stop", "stop_token_ids", "logit_bias")


def params(name: str, value: Any) -> SamplingParams:
    # max_tokens=None, so that min_tokens is judged by itself.
    return SamplingParams(**({"max_tokens": None} | {name: value}))


def assert_refused(name: str, value: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        params(name, value)
    assert caught.value.param == name
    assert name in str(caught.value) or name == "stop"
    assert caught.value.status == 400
    return caught.value


def test_these_tests_know_every_field() -> None:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert names == {*INTEGERS, *NUMBERS, *FLAGS, *COLLECTIONS}


def test_the_defaults_are_legal_and_sample() -> None:
    assert not SamplingParams().is_greedy
    assert SamplingParams(temperature=0).is_greedy
    assert SamplingParams(temperature=0.0).is_greedy


@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, False, "1", "", [1], {}, 1j, b"1", object()])
def test_what_is_no_finite_number_is_refused_by_every_number(name: str, value: object) -> None:
    assert_refused(name, value)


@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS, *FLAGS, *COLLECTIONS])
def test_none_is_refused_unless_it_means_something(name: str) -> None:
    if name in OPTIONAL:
        assert getattr(params(name, None), name) is None
    else:
        assert_refused(name, None)


@pytest.mark.parametrize("name", INTEGERS)
def test_a_fraction_is_refused_by_every_integer(name: str) -> None:
    assert "an integer" in str(assert_refused(name, 1.5))
    assert_refused(name, 1.0)


@pytest.mark.parametrize(("name", "bounds"), [*INTEGERS.items(), *NUMBERS.items()])
def test_the_bounds_themselves_are_legal_and_the_next_value_is_not(name: str, bounds: tuple[Any, Any]) -> None:
    low, high = bounds
    step = 1 if name in INTEGERS else 1e-9
    if low is not None:
        assert getattr(params(name, low), name) == low
        assert f">= {low}" in str(assert_refused(name, low - step))
    if high is not None:
        assert getattr(params(name, high), name) == high
        assert f"<= {high}" in str(assert_refused(name, high + step))


def test_zero_is_no_probability_to_keep() -> None:
    assert "> 0" in str(assert_refused("top_p", 0))
    assert_refused("top_p", 0.0)
    assert params("top_p", 1e-9).top_p == 1e-9


@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS])
def test_a_number_of_any_size_is_accepted_or_refused_but_never_a_crash(name: str) -> None:
    for value in (10**400, -(10**400)):
        unbounded = value > 0 and {**INTEGERS, **NUMBERS}[name][1] is None
        if unbounded:
            assert getattr(params(name, value), name) == value
        else:
            assert_refused(name, value)


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [0, 1, "true", "", None, []])
def test_a_flag_is_true_or_false(name: str, value: object) -> None:
    assert "true or false" in str(assert_refused(name, value))


def test_more_tokens_at_least_than_at_most_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"min_tokens \(5\) is greater than max_tokens \(4\)") as caught:
        SamplingParams(min_tokens=5, max_tokens=4)
    assert caught.value.param == "min_tokens"
    assert SamplingParams(min_tokens=4, max_tokens=4).min_tokens == 4
    assert SamplingParams(min_tokens=5, max_tokens=None).min_tokens == 5


@pytest.mark.parametrize(
    ("given_stop", "expected"),
    [("END", ("END",)), (["a", "b"], ("a", "b")), ((), ()), ([], ()), (("\n",), ("\n",)), (iter(["x"]), ("x",))],
)
def test_stop_strings_become_a_tuple(given_stop: Any, expected: tuple[str, ...]) -> None:
    assert SamplingParams(stop=given_stop).stop == expected


@pytest.mark.parametrize("value", ["", [""], ["a", ""], [1], [None], ["a", b"b"], 5, {"a": 1}, b"a", [["a"]]])
def test_a_stop_that_is_no_string_or_empty_is_refused(value: object) -> None:
    assert_refused("stop", value)


def test_the_number_of_stop_strings_is_bounded() -> None:
    assert len(SamplingParams(stop=["x"] * MAX_STOP_STRINGS).stop) == MAX_STOP_STRINGS
    assert f"at most {MAX_STOP_STRINGS}" in str(assert_refused("stop", ["x"] * (MAX_STOP_STRINGS + 1)))


@pytest.mark.parametrize("value", [5, "12", [-1], [1.0], [True], ["1"], [2**31], [10**400], {1: 2}, [None]])
def test_stop_tokens_that_are_no_token_ids_are_refused(value: object) -> None:
    assert_refused("stop_token_ids", value)


@pytest.mark.parametrize("value", [5, [1], "x", {"1": 1}, {-1: 1}, {True: 1}, {1.5: 1}, {2**31: 1}])
def test_a_bias_that_is_no_table_of_token_ids_is_refused(value: object) -> None:
    assert_refused("logit_bias", value)


@pytest.mark.parametrize("bias", [math.nan, math.inf, 101, -100.5, "2", True, None, 10**400])
def test_a_bias_that_is_no_number_from_minus_to_plus_100_is_refused(bias: object) -> None:
    assert_refused("logit_bias", {1: bias})


def test_collections_are_the_parameters_own() -> None:
    stop, tokens, bias = ["a"], [1], {1: 2.0}
    made = SamplingParams(stop=stop, stop_token_ids=tokens, logit_bias=bias)
    stop.append("")
    tokens.append(-1)
    bias[2] = math.nan
    assert (made.stop, made.stop_token_ids, made.logit_bias) == (("a",), (1,), {1: 2.0})
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.n = 2  # type: ignore[misc]


def test_a_replaced_parameter_is_checked_too() -> None:
    with pytest.raises(InvalidRequestError, match="top_p"):
        dataclasses.replace(SamplingParams(), top_p=2.0)


_any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.integers() | st.text(max_size=2), inner, max_size=3),
    max_leaves=4,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine takes seconds for the first
@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(SamplingParams)]), _any, max_size=4))
def test_any_values_give_parameters_or_one_kind_of_error(values: dict[str, Any]) -> None:
    try:
        made = SamplingParams(**values)
    except InvalidRequestError as error:
        refused = error.param
    else:
        refused = None
        numbers = [getattr(made, name) for name in NUMBERS]
        assert all(math.isfinite(number) for number in numbers)
    assert refused is None or refused in {field.name for field in dataclasses.fields(SamplingParams)}


def test_a_results_text_and_tokens_are_those_of_the_first_completion() -> None:
    completions = tuple(Completion(i, f"t{i}", (i,), FinishReason.STOP) for i in range(2))
    result = GenerationResult("r", PromptInfo((1,)), completions, RequestTiming(0.1, 0.2))
    assert (result.text, result.token_ids) == ("t0", (0,))
