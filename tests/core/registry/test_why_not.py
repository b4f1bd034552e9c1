""" "Why not X?" has an answer for every X: chosen, outranked, refused, broken, not asked, barred, not installed, ..."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drivetrain.assembly import resolve_parts
from drivetrain.config import load_settings
from drivetrain.errors import ConfigError, UnknownPluginError
from drivetrain.registry import PluginRef
from drivetrain.registry.why_not import Verdict, WhyNot, why_not
from support import fake_plugins as fakes
from support.distributions import write_distribution

ref = fakes.ref
EXTRA = (
    ref("scheduler", "refusing", fakes.RefusingScheduler),
    ref("scheduler", "raising", fakes.RaisingProbeScheduler),
    ref("scheduler", "unloadable", "acme_that_is_not_there:X"),
    ref("scheduler", "vendor", fakes.VendorScheduler),
    ref("scheduler", "plain", fakes.PlainScheduler, distribution="other-kit"),
    ref("partitioner", "none", "drivetrain.plugins.partitioner.none:NoPartitioner"),
)


def answers(wanted: str, *more: PluginRef, model: str | None = "tiny-model", **options: Any) -> tuple[WhyNot, ...]:
    settings = load_settings(None, {"model": model, **options})
    parts = resolve_parts(settings, registry=fakes.serving_registry(*EXTRA, *more), fetch=False)
    return why_not(wanted, parts.report, parts.registry)


def answer(wanted: str, *more: PluginRef, **options: Any) -> WhyNot:
    (found,) = answers(wanted, *more, **options)
    return found


def test_the_chosen_one_is_told_with_the_reason_for_the_choice() -> None:
    found = answer("attention/wide")
    assert found.verdict is Verdict.CHOSEN
    assert "first in the platform's order of preference (wide, narrow)" in found.reason


def test_one_that_ranks_below_is_told_which_rule_put_it_there() -> None:
    found = answer("attention/narrow")
    assert found.verdict is Verdict.OUTRANKED
    assert found.reason.endswith("ranks below 'wide': the platform's order of preference is wide, narrow")
    assert found.hint == "To use it: --attention narrow"
    assert "ranks below 'vendor': tier vendor is above portable" in answer("scheduler/fcfs", scheduler="auto").reason
    twin = ref("scheduler", "vendor-too", fakes.VendorScheduler)
    found = answer("scheduler/vendor-too", twin, scheduler="auto")
    assert found.reason.endswith("ranks below 'vendor': first by name among equals")


@pytest.mark.parametrize("requested", ["auto", "fcfs"])
def test_a_refusal_carries_what_was_wanted_and_offered(requested: str) -> None:
    found = answer("scheduler/refusing", scheduler=requested)
    assert found.verdict is (Verdict.REFUSED if requested == "auto" else Verdict.NOT_ASKED)
    assert "no: there is no such device here" in found.reason
    assert (found.code, found.wanted, found.offered) == ("no_device", "a device", "nothing")


@pytest.mark.parametrize(
    ("name", "said"), [("raising", "ZeroDivisionError: oh no"), ("unloadable", "acme_that_is_not_there")]
)
def test_a_broken_one_is_told_with_its_error_and_how_to_look(name: str, said: str) -> None:
    for requested, verdict in (("auto", Verdict.BROKEN), ("fcfs", Verdict.NOT_ASKED)):
        found = answer(f"scheduler/{name}", scheduler=requested)
        assert (found.verdict, found.code) == (verdict, "broken")
        assert said in found.reason
        assert found.hint == f"Run: drivetrain plugins info scheduler/fakes/{name} --debug"


class TooNew(fakes.PlainScheduler):
    contract_version = "1.9"


@pytest.mark.parametrize("requested", ["auto", "fcfs"])
def test_one_that_is_too_new_is_told_with_both_versions_and_the_pip_command(requested: str) -> None:
    found = answer("scheduler/ahead", ref("scheduler", "ahead", TooNew), scheduler=requested)
    assert "it needs version 1.9 of the scheduler contract" in found.reason
    assert "speaks 1.0" in found.reason
    assert found.hint == "Run: pip install --upgrade drivetrain"


def test_one_that_was_not_asked_is_asked_now_in_the_context_of_the_choice() -> None:
    found = answer("attention/wide", attention="narrow")
    assert found.verdict is Verdict.NOT_ASKED
    assert found.reason == (
        "nothing else was asked, since 'narrow' was asked for by name (command line); "
        "asked now, it says yes: it knows the model"
    )
    assert found.hint == "To use it: --attention wide"
    assert (
        "asked now, it says no: it must know the model"
        in answer("attention/wide", attention="narrow", model=None).reason
    )
    assert "'fcfs' is the default; asked now" in answer("scheduler/vendor").reason


def test_one_that_is_barred_is_told_so_and_not_loaded() -> None:
    bomb = ref("scheduler", "bomb", "acme_that_is_not_there:X", distribution="acme")
    found = answer("scheduler/bomb", bomb, plugins={"allow": ["fakes"]})
    assert found.verdict is Verdict.BARRED
    assert found.reason == "it is installed, but plugins.allow does not name acme"
    assert found.hint == "Add acme to plugins.allow."


def test_one_that_is_not_installed_is_told_with_the_nearest_name() -> None:
    found = answer("scheduler/vendr")
    assert (found.verdict, found.distribution) == (Verdict.NOT_INSTALLED, "")
    assert found.hint == "Did you mean 'vendor'?"
    assert "there are: fcfs, plain, raising" in found.reason


def test_one_for_another_version_of_the_contract_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    write_distribution(tmp_path, "acme-future", {"drivetrain.scheduler.v2": {"future": "acme:Future"}})
    found = answer("scheduler/future")
    assert (found.verdict, found.distribution) == (Verdict.REFUSED, "acme-future")
    assert "drivetrain.scheduler.v2: contract version 2; this core speaks 1" in found.reason
    assert found.hint == "Run: pip install --upgrade drivetrain"


def test_kinds_that_are_left_open_or_not_needed_are_told_apart() -> None:
    found = answer("model/tiny", model=None)
    assert (found.verdict, found.reason) == (Verdict.OPEN, "the kind is left open, since no model is named")
    found = answer("partitioner/none")
    assert (found.verdict, found.reason) == (Verdict.NOT_NEEDED, "nothing here needs a partitioner; it is for: train")


def test_a_name_of_two_distributions_has_two_answers_and_the_qualified_form_one() -> None:
    twin = ref("scheduler", "plain", fakes.TunedScheduler, distribution="third-kit")
    found = answers("scheduler/plain", twin)
    assert [a.distribution for a in found] == ["other-kit", "third-kit"]
    assert found[1].hint == "To use it: --scheduler third-kit/plain"
    assert answer("scheduler/third-kit/plain", twin).distribution == "third-kit"


@pytest.mark.parametrize("wanted", ["scheduler", "scheduler/", "/x", ""])
def test_a_malformed_name_is_an_error(wanted: str) -> None:
    with pytest.raises(ConfigError, match="not a plugin's name"):
        answers(wanted)


def test_an_unknown_kind_is_an_error_with_the_nearest() -> None:
    with pytest.raises(UnknownPluginError, match="Did you mean 'scheduler'"):
        answers("schedulr/fcfs")
