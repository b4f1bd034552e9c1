"""Equal plans have equal digests, different ones different digests, and a plan survives its JSON."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain.errors import ConfigError
from drivetrain.registry import Plan, PluginRef, Selection, SelectionReport

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
options = st.dictionaries(st.text(min_size=1, max_size=6), json_values, max_size=4)
parts = st.dictionaries(st.sampled_from(["platform", "attention", "scheduler", "loader"]), options, min_size=1)


def selection(kind: str, options: dict[str, Any], version: str = "1.0", name: str = "x") -> Selection:
    ref = PluginRef(kind, name, "fakes", version, f"fakes:{name}")
    return Selection(kind, name, "default", ref, options, "why", ())


def plan(parts: dict[str, dict[str, Any]], model: str | None = "m", purpose: str = "serve") -> Plan:
    selections = tuple(selection(kind, options) for kind, options in parts.items())
    return Plan.of(SelectionReport(selections), model=model, purpose=purpose)


def shuffled(value: Any, source: random.Random) -> Any:
    """The same value with the keys of every table in another order."""
    if isinstance(value, dict):
        items = [(key, shuffled(item, source)) for key, item in value.items()]
        source.shuffle(items)
        return dict(items)
    return [shuffled(item, source) for item in value] if isinstance(value, list) else value


@given(parts, st.randoms(use_true_random=False))
def test_the_digest_does_not_depend_on_any_order(parts: dict[str, dict[str, Any]], source: random.Random) -> None:
    assert plan(parts).digest == plan(shuffled(parts, source)).digest


@given(parts)
def test_a_plan_survives_its_json(parts: dict[str, dict[str, Any]]) -> None:
    original = plan(parts)
    restored = Plan.from_json(original.to_json())
    assert restored == original
    assert restored.digest == original.digest
    assert restored.to_json() == original.to_json()


@given(parts, st.data())
def test_any_other_option_changes_the_digest(parts: dict[str, dict[str, Any]], data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(parts)))
    name = data.draw(st.text(min_size=1, max_size=6))
    changed = {**parts, kind: {**parts[kind], name: [parts[kind].get(name)]}}
    assert plan(parts).digest != plan(changed).digest


def test_everything_that_decides_a_run_is_in_the_digest() -> None:
    base = plan({"scheduler": {"a": 1}})
    ref = PluginRef("scheduler", "x", "fakes", "1.0", "fakes:x")
    chosen = selection("scheduler", {"a": 1})
    others = [
        plan({"scheduler": {"a": 1}}, model="other"),
        plan({"scheduler": {"a": 1}}, model=None),
        plan({"scheduler": {"a": 1}}, purpose="train"),
        plan({"scheduler": {"a": 1}, "platform": {}}),
        plan({"scheduler": {"a": True}}),
        plan({"scheduler": {"a": "1"}}),
        plan({"scheduler": {}}),
        dataclasses.replace(base, core_version="9.9.9"),
    ] + [
        Plan.of(SelectionReport((dataclasses.replace(chosen, chosen=other),)), model="m", purpose="serve")
        for other in (
            dataclasses.replace(ref, version="1.1"),
            dataclasses.replace(ref, name="y"),
            dataclasses.replace(ref, distribution="z"),
            dataclasses.replace(ref, target="fakes:other"),
        )
    ]
    digests = [base.digest, *(other.digest for other in others)]
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 64 and int(digest, 16) for digest in digests)


def test_who_asked_and_why_is_not_in_the_digest() -> None:
    chosen = selection("scheduler", {"a": 1})
    asked = dataclasses.replace(chosen, origin="command line", requested="auto", reason="other")
    plans = [Plan.of(SelectionReport((one,)), model="m", purpose="serve") for one in (chosen, asked)]
    assert plans[0].digest == plans[1].digest


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "5", '{"model": 1}', '"text"'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a plan"):
        Plan.from_json(text)
