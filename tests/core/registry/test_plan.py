"""Equal plans have equal digests, different ones different digests, and a plan survives its JSON."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain.errors import ConfigError, PluginError
from drivetrain.registry import Plan, PluginRef, Selection, SelectionReport, check_handshake

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


# --- the handshake -------------------------------------------------------------------------------------------------


def test_plans_that_are_equal_shake_hands_and_have_no_difference() -> None:
    ours = plan({"scheduler": {"a": 1, "b": {"c": [1, 2]}}})
    check_handshake(ours, ours.to_json())
    check_handshake(ours, plan({"scheduler": {"b": {"c": [1, 2]}, "a": 1}}))
    assert ours.compare(Plan.from_json(ours.to_json())) == []


@given(parts, parts)
def test_plans_differ_exactly_where_their_digests_do(
    one: dict[str, dict[str, Any]], two: dict[str, dict[str, Any]]
) -> None:
    ours, theirs = plan(one), plan(two)
    found = ours.compare(theirs)
    assert bool(found) == (ours.digest != theirs.digest)
    assert [(d.path, d.theirs, d.ours) for d in found] == [(d.path, d.ours, d.theirs) for d in theirs.compare(ours)]


def test_a_key_with_a_point_in_it_is_not_taken_for_a_path() -> None:
    ours, theirs = plan({"scheduler": {"a.b": 1}}), plan({"scheduler": {"a": {"b": 1}}})
    assert [d.path for d in ours.compare(theirs)] == [
        'parts.scheduler.options."a.b"',
        "parts.scheduler.options.a.b",
    ]


def test_every_difference_is_told_with_its_path_and_both_sides() -> None:
    ours = plan({"scheduler": {"a": 1, "deep": {"x": [1]}}, "loader": {}})
    theirs = plan({"scheduler": {"a": "1", "deep": {"x": [2]}}}, model="other")
    theirs = dataclasses.replace(theirs, core_version="9.9.9")
    found = {d.path: (d.ours, d.theirs) for d in ours.compare(theirs)}
    assert found["core"][1] == '"9.9.9"'
    assert found["model"] == ('"m"', '"other"')
    assert found["parts.scheduler.options.a"] == ("1", '"1"')
    assert found["parts.scheduler.options.deep.x"] == ("[1]", "[2]")
    assert found["parts.loader.name"] == ('"x"', "(absent)")
    assert len(found) == 4 + 5


def test_a_handshake_that_fails_ends_with_a_table() -> None:
    ours, theirs = plan({"scheduler": {"a": 1}}), plan({"scheduler": {"a": 2}})
    with pytest.raises(PluginError) as caught:
        check_handshake(ours, theirs.to_json(), who="rank 3")
    message, head, row = str(caught.value).splitlines()
    assert message.startswith(f"plan: rank 3 has another plan ({theirs.digest[:16]}) than this process")
    assert "1 difference." in message
    assert head.split() == ["setting", "here", "rank", "3"]
    assert row.split() == ["parts.scheduler.options.a", "1", "2"]


@pytest.mark.parametrize("text", ["", "[]", '{"core": "1", "model": null, "purpose": "serve", "parts": {"a": 1}}'])
def test_what_is_no_plan_ends_a_handshake_with_a_clear_error(text: str) -> None:
    with pytest.raises(ConfigError, match="not a plan"):
        check_handshake(plan({"scheduler": {}}), text)


WORKER = """
import sys
from drivetrain.assembly import resolve_parts
from drivetrain.config import load_settings
from drivetrain.errors import PluginError
from drivetrain.registry import check_handshake
from support.fake_plugins import serving_registry

settings = load_settings(None, {"model": "tiny-model"}, ["scheduler.max_running=" + sys.argv[1]])
ours = resolve_parts(settings, registry=serving_registry()).plan
print(ours.to_json(), flush=True)
try:
    check_handshake(ours, sys.stdin.readline(), who="the other worker")
    print("agreed", flush=True)
except PluginError as error:
    print(error, flush=True)
"""


@pytest.mark.parametrize(("first", "second"), [(3, 3), (3, 4)])
def test_two_processes_exchange_their_plans_before_they_start(first: int, second: int) -> None:
    tests = str(Path(__file__).parents[2])
    workers = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", WORKER, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": tests},
        )
        for number in (first, second)
    ]
    try:
        plans = [worker.stdout.readline() for worker in workers if worker.stdout]
        answers = [worker.communicate(other, timeout=60)[0] for worker, other in zip(workers, plans[::-1], strict=True)]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    if first == second:
        assert plans[0] == plans[1]
        assert answers == ["agreed\n", "agreed\n"]
    else:
        for answer, (here, there) in zip(answers, [(3, 4), (4, 3)], strict=True):
            assert answer.splitlines()[-1].split() == ["parts.scheduler.options.max_running", str(here), str(there)]
            assert "the other worker has another plan" in answer
