"""No public contract changes without a new version: what the code says is compared with the committed snapshot."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from drivetrain import __version__
from drivetrain.contracts.kinds import KINDS
from drivetrain.contracts.versions import deprecated
from support.contract_snapshot import (
    SHARED,
    complaints,
    describe,
    differences,
    digest,
    read,
    rewritten,
    take,
    text,
)
from support.distributions import run_python

PLAN = ("scheduler", "content", "drivetrain.contracts.scheduler", "Scheduler", "members", "plan")


def test_no_contract_changed_without_a_new_version() -> None:
    assert not (found := complaints(read(), take())), "\n".join(found)


def test_the_snapshot_is_the_same_in_every_process() -> None:
    code = "import json; from support.contract_snapshot import take; print(json.dumps(take()))"
    assert json.loads(run_python(code, Path(__file__).parents[1])) == take()


def test_every_kind_and_what_they_share_is_in_the_snapshot() -> None:
    now = take()
    assert set(now) == {SHARED, *KINDS}
    assert {name: entry["version"] for name, entry in now.items() if name in KINDS} == {
        kind.name: kind.version for kind in KINDS.values()
    }
    for kind in KINDS.values():
        module, _, name = kind.contract.partition(":")
        methods = now[kind.name]["content"][module][name]["members"].values()
        assert any("abstract" in method for method in methods), kind.name


def test_no_contract_class_sets_the_version_for_the_plugins_that_inherit_from_it() -> None:
    for kind in KINDS.values():
        module, _, name = kind.contract.partition(":")
        assert "contract_version" not in vars(getattr(importlib.import_module(module), name))


# --- the rules, on altered copies ----------------------------------------------------------------------------------


def altered(path: tuple[str, ...], value: Any, version: str | None = None) -> dict[str, Any]:
    """The present contracts with one entry changed, or removed by None."""
    now = copy.deepcopy(take())
    node: Any = now
    for part in path[:-1]:
        node = node[part]
    if value is None:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    if version:
        now[path[0]]["version"] = version
    return now


def committed(released: dict[str, dict[str, str]] | None = None) -> dict[str, Any]:
    return {"released": released or {}, "contracts": take()}


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (PLAN, None, "removed  drivetrain.contracts.scheduler.Scheduler.members.plan"),
        ((*PLAN[:-1], "reset"), "method(self)", "added    drivetrain.contracts.scheduler.Scheduler.members.reset"),
        (PLAN, "method(self)", "changed  drivetrain.contracts.scheduler.Scheduler.members.plan"),
        ((*PLAN[:3], "Limits", "order"), "max_running", "changed  drivetrain.contracts.scheduler.Limits.order"),
        ((*PLAN[:2], "kind", "default"), "'priority'", "changed  kind.default"),
    ],
)
def test_a_change_of_the_same_version_is_told_with_what_changed_and_what_to_do(
    path: tuple[str, ...], value: Any, said: str
) -> None:
    (complaint,) = complaints(committed(), altered(path, value))
    assert said in complaint
    assert "the contract 'scheduler' changed, and is still 1.0: raise it" in complaint
    assert "or undo the change" in complaint


def test_a_change_with_a_new_version_asks_for_a_new_snapshot_and_then_passes() -> None:
    now = altered(PLAN, "method(self)", "1.1")
    (complaint,) = complaints(committed(), now)
    assert "went from version 1.0 to 1.1: rewrite the snapshot" in complaint
    assert complaints(rewritten(committed(), now, unreleased=False, release=False), now) == []


def test_a_new_version_without_a_change_is_told() -> None:
    now = copy.deepcopy(take())
    now["loader"]["version"] = "1.1"
    assert complaints(committed(), now) == ["the contract 'loader' has version 1.1 without a change"]


def test_rewriting_does_not_hide_an_unversioned_change() -> None:
    now = altered(PLAN, "method(self)")
    with pytest.raises(ValueError, match=r"'scheduler' changed and is still 1\.0 \(--unreleased"):
        rewritten(committed(), now, unreleased=False, release=False)
    assert complaints(rewritten(committed(), now, unreleased=True, release=False), now) == []


def test_a_released_version_can_not_change_even_if_the_file_is_rewritten_by_hand() -> None:
    closed = rewritten(committed(), take(), unreleased=False, release=True)
    assert closed["released"]["scheduler"] == {"1.0": digest(take()["scheduler"]["content"])}
    now = altered(PLAN, "method(self)")
    with pytest.raises(ValueError, match="and it is released"):
        rewritten(closed, now, unreleased=True, release=False)
    by_hand = {**closed, "contracts": now}
    assert complaints(by_hand, now) == ["version 1.0 of the contract 'scheduler' is released: it can't change any more"]
    assert complaints(closed, take()) == []


def test_a_kind_that_appears_or_goes_is_a_change() -> None:
    more = {**take(), "oracle": {"version": "1.0", "content": {"m": {"Oracle": {"members": {"ask": "method(self)"}}}}}}
    assert list(differences(take(), more)) == ["oracle"]
    assert list(differences(more, take())) == ["oracle"]
    assert "went from version None to 1.0" in complaints(committed(), more)[0]


# --- what is described ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sample:
    first: int
    second: frozenset[str] = frozenset({"b", "a"})

    @property
    def third(self) -> int:
        return 3

    @staticmethod
    def fourth(x: int = 4) -> int:
        return x


def test_fields_defaults_properties_and_signatures_are_described() -> None:
    assert describe(Sample) == {
        "bases": ["object"],
        "fields": {"first": "int", "second": "frozenset[str] = {'a', 'b'}"},
        "order": "first, second",
        "frozen": True,
        "members": {"third": "property -> int", "fourth": "staticmethod(x: 'int' = 4) -> 'int'"},
    }


def test_a_deprecation_is_part_of_the_contract() -> None:
    class Holder:
        @deprecated(since="0.2", removal="0.4", instead="use other()")
        def old(self, x: int) -> int:
            return x

    assert describe(Holder)["members"] == {"old": "method(self, x: 'int') -> 'int', removed in 0.4"}
    assert describe(Holder.old)["deprecated"]["removal"] == "0.4"


def due(source: str) -> list[str]:
    """Deprecations in ``source`` whose time to be removed has come."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    removals = [
        keyword.value.value
        for call in calls
        for keyword in call.keywords
        if keyword.arg == "removal" and isinstance(keyword.value, ast.Constant)
    ]
    return [text for text in removals if numbers(text) <= numbers(__version__)]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def test_what_was_to_be_removed_by_now_is_removed() -> None:
    assert due(f'deprecated(since="0.0", removal="{__version__}", instead="x")') == [__version__]
    core = Path(__file__).parents[2] / "core"
    assert {path.name: due(path.read_text()) for path in core.rglob("*.py") if due(path.read_text())} == {}


def test_a_value_without_a_lasting_text_is_an_error() -> None:
    with pytest.raises(TypeError, match="the same in every process"):
        text(object())
