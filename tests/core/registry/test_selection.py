"""A name is used or is an error; ``auto`` ranks who says yes; every outcome and reason is kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from drivetrain.contracts.plugin import Plugin, ProbeContext
from drivetrain.errors import (
    AmbiguousPluginError,
    ConfigError,
    NoCandidateError,
    PluginError,
    PluginLoadError,
    PluginRefusedError,
    UnknownPluginError,
)
from drivetrain.registry import Outcome, PartRequest, PluginRef, Registry, Selection, Selector
from support import fake_plugins as fakes
from support.fake_plugins import ref

PLAIN = ref("scheduler", "plain", fakes.PlainScheduler)
TUNED = ref("scheduler", "tuned", fakes.TunedScheduler)
VENDOR = ref("scheduler", "vendor", fakes.VendorScheduler)
REFUSING = ref("scheduler", "refusing", fakes.RefusingScheduler)
RAISING = ref("scheduler", "raising", fakes.RaisingProbeScheduler)
EXITING = ref("scheduler", "exiting", fakes.ExitingProbeScheduler)
RUBBISH = ref("scheduler", "rubbish", fakes.RubbishProbeScheduler)
OPTIONS = ref("scheduler", "options", fakes.OptionsScheduler)
UNLOADABLE = ref("scheduler", "unloadable", "acme_that_is_not_there:X")


def selector(*refs: PluginRef, name: str = "auto", origin: str = "run.yaml:3", **options: Any) -> Selector:
    return Selector(Registry(refs), {"scheduler": PartRequest("scheduler", name, options, origin)})


def choose(*refs: PluginRef, name: str = "auto", **options: Any) -> tuple[Plugin, Selection]:
    chooser = selector(*refs, name=name, **options)
    plugin = chooser.choose("scheduler", ProbeContext())
    return plugin, chooser.report["scheduler"]


def outcomes(selection: Selection) -> dict[str, Outcome]:
    return {candidate.name: candidate.outcome for candidate in selection.candidates}


# --- asked for by name ---------------------------------------------------------------------------------------------


def test_a_default_with_options_is_not_said_to_be_asked_for_by_name() -> None:
    request = PartRequest("scheduler", "plain", {}, "run.yaml:3", is_named=False)
    chooser = Selector(Registry([PLAIN]), {"scheduler": request})
    chooser.choose("scheduler", ProbeContext())
    assert chooser.report["scheduler"].reason == "'plain' is the default; options of it were asked for (run.yaml:3)"


def test_a_name_is_used_even_if_others_rank_higher() -> None:
    plugin, selection = choose(PLAIN, TUNED, VENDOR, name="plain")
    assert type(plugin) is fakes.PlainScheduler
    assert selection.chosen == PLAIN
    assert selection.reason == "'plain' was asked for by name (run.yaml:3)"
    assert outcomes(selection) == {"plain": "chosen", "tuned": "not asked", "vendor": "not asked"}
    assert selection.fallback is None


def test_candidates_that_were_not_asked_are_not_even_imported() -> None:
    _, selection = choose(PLAIN, UNLOADABLE, RAISING, name="plain")
    assert outcomes(selection) == {"plain": "chosen", "unloadable": "not asked", "raising": "not asked"}


def test_asking_what_would_be_chosen_notes_nothing() -> None:
    chooser = selector(PLAIN, TUNED)
    plugin, selection = chooser.would_choose("scheduler", ProbeContext())
    assert type(plugin) is fakes.TunedScheduler
    assert selection.chosen == TUNED
    assert not chooser.report.selections
    assert chooser.choose("scheduler", ProbeContext()) is not plugin
    assert chooser.report.selections == (selection,)


def test_a_default_is_called_a_default() -> None:
    chooser = Selector(Registry([ref("scheduler", "fcfs", fakes.PlainScheduler)]), {})
    chooser.choose("scheduler", ProbeContext())
    assert chooser.report["scheduler"].reason == "'fcfs' is the default"
    assert chooser.report["scheduler"].origin == "default"


def test_an_unknown_name_is_an_error_with_the_nearest() -> None:
    with pytest.raises(UnknownPluginError) as caught:
        choose(PLAIN, TUNED, name="plian")
    assert str(caught.value) == (
        "run.yaml:3: scheduler: no installed plugin of kind 'scheduler' is named 'plian'; "
        "allowed: plain, tuned, auto. Did you mean 'plain'?"
    )


def test_an_unknown_name_like_no_other_points_to_the_list() -> None:
    with pytest.raises(UnknownPluginError, match="Run: drivetrain plugins list --kind scheduler"):
        choose(PLAIN, name="zzz")


def test_a_refusal_is_an_error_and_nothing_else_is_tried() -> None:
    chooser = selector(REFUSING, PLAIN, name="refusing")
    with pytest.raises(PluginRefusedError) as caught:
        chooser.choose("scheduler", ProbeContext())
    for part in ("'refusing' (run.yaml:3)", "no such device here", "found 'nothing'", "allowed: a device", "explain"):
        assert part in str(caught.value)
    assert chooser.report.selections == ()


@pytest.mark.parametrize(
    ("broken", "said"),
    [(RAISING, "ZeroDivisionError: oh no"), (EXITING, r"sys.exit\(3\)"), (RUBBISH, "returned bool instead of a Probe")],
)
def test_a_named_plugin_whose_probe_breaks_is_an_error_that_says_how(broken: PluginRef, said: str) -> None:
    with pytest.raises(PluginRefusedError, match=said):
        choose(broken, PLAIN, name=broken.name)


def test_a_named_plugin_that_does_not_load_is_an_error() -> None:
    with pytest.raises(PluginLoadError, match="acme_that_is_not_there"):
        choose(UNLOADABLE, PLAIN, name="unloadable")


def test_one_name_in_two_distributions_is_an_error_until_it_is_qualified() -> None:
    other = ref("scheduler", "plain", fakes.TunedScheduler, distribution="other-kit")
    with pytest.raises(AmbiguousPluginError, match=r"run.yaml:3: scheduler: 2 .*fakes/plain, other-kit/plain"):
        choose(PLAIN, other, name="plain")
    plugin, selection = choose(PLAIN, other, name="other-kit/plain")
    assert type(plugin) is fakes.TunedScheduler
    assert selection.requested == "other-kit/plain"
    assert [candidate.distribution for candidate in selection.candidates] == ["other-kit", "fakes"]


# --- auto ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(PLAIN, TUNED, VENDOR), (VENDOR, TUNED, PLAIN), (TUNED, VENDOR, PLAIN)])
def test_auto_prefers_the_higher_tier_in_whatever_order_they_are_found(order: tuple[PluginRef, ...]) -> None:
    _, selection = choose(*order)
    assert selection.chosen == VENDOR
    assert selection.reason == "tier vendor is above tuned ('tuned')"
    assert [c.name for c in selection.candidates] == ["vendor", "tuned", "plain"]
    assert outcomes(selection) == {"vendor": "chosen", "tuned": "eligible", "plain": "eligible"}


def test_auto_goes_by_name_among_equals() -> None:
    equals = [ref("scheduler", name, fakes.PlainScheduler) for name in ("b", "a", "c")]
    _, selection = choose(*equals)
    assert (selection.chosen.name, selection.reason) == ("a", "first by name among equals")


def test_auto_with_one_candidate_repeats_what_its_probe_said() -> None:
    _, selection = choose(PLAIN, REFUSING)
    assert selection.reason == "the only candidate that can work here: no objection"


def test_auto_puts_the_platforms_preference_above_the_tier() -> None:
    chooser = selector(PLAIN, TUNED, VENDOR)
    chooser.prefer({"scheduler": ("tuned", "plain")})
    chooser.choose("scheduler", ProbeContext())
    selection = chooser.report["scheduler"]
    assert [c.name for c in selection.candidates] == ["tuned", "plain", "vendor"]
    assert "the platform's order of preference (tuned, plain)" in selection.reason
    assert selection.fallback is None


def test_a_preferred_candidate_that_refuses_makes_the_choice_a_fallback() -> None:
    chooser = selector(PLAIN, TUNED, REFUSING)
    chooser.prefer({"scheduler": ("refusing", "plain")})
    chooser.choose("scheduler", ProbeContext())
    selection = chooser.report["scheduler"]
    assert selection.chosen == PLAIN
    assert selection.fallback == ("scheduler 'plain' is used in place of 'refusing': there is no such device here")
    assert selection.reason.endswith("of those that can work here")
    assert chooser.report.fallbacks == (selection.fallback,)


def test_a_refusal_that_nobody_prefers_is_reported_but_no_fallback() -> None:
    _, selection = choose(PLAIN, REFUSING)
    assert selection.fallback is None
    (refused,) = [candidate for candidate in selection.candidates if candidate.outcome is Outcome.REFUSED]
    assert (refused.code, refused.wanted, refused.offered) == ("no_device", "a device", "nothing")


def test_a_refusal_that_is_preferred_less_than_the_choice_is_no_fallback() -> None:
    chooser = selector(PLAIN, REFUSING)
    chooser.prefer({"scheduler": ("plain", "refusing")})
    chooser.choose("scheduler", ProbeContext())
    assert chooser.report.fallbacks == ()


@pytest.mark.parametrize("broken", [RAISING, EXITING, RUBBISH, UNLOADABLE], ids=lambda ref: ref.name)
def test_a_broken_candidate_is_reported_and_does_not_keep_auto_from_choosing(broken: PluginRef) -> None:
    _, selection = choose(broken, PLAIN)
    assert outcomes(selection) == {"plain": "chosen", broken.name: "broken"}
    (report,) = [candidate for candidate in selection.candidates if candidate.name == broken.name]
    assert report.reason
    assert selection.fallback is not None
    assert report.reason in selection.fallback


def test_no_candidate_that_can_work_is_an_error_with_every_reason() -> None:
    with pytest.raises(NoCandidateError) as caught:
        choose(REFUSING, RAISING, UNLOADABLE)
    for part in ("refusing: there is no such device", "raising: its probe raised", "unloadable: importing"):
        assert part in str(caught.value)


def test_no_candidate_at_all_is_an_error_of_its_own() -> None:
    with pytest.raises(NoCandidateError, match="no plugin of kind 'scheduler' is installed"):
        choose(ref("frontend", "openai", fakes.FakeFrontend))


def test_each_probe_sees_what_is_chosen_already() -> None:
    fakes.WitnessScheduler.seen.clear()
    witness = ref("scheduler", "witness", fakes.WitnessScheduler)
    chooser = Selector(fakes.serving_registry(witness), {"scheduler": PartRequest("scheduler", "witness")})
    chooser.choose("platform", ProbeContext())
    chooser.choose("quantizer", ProbeContext())
    chooser.choose("scheduler", ProbeContext(model_name="m"))
    (context,) = fakes.WitnessScheduler.seen
    assert context.chosen == {"platform": "fake", "quantizer": "none"}
    assert context.model_name == "m"


# --- options -------------------------------------------------------------------------------------------------------


def test_options_reach_the_plugin_checked() -> None:
    plugin, selection = choose(OPTIONS, name="options", max_running=7)
    assert plugin.config == fakes.OptionsScheduler.Config(max_running=7)
    assert selection.options == {"max_running": 7}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"max_runing": 3},
            "has no option 'max_runing'; allowed: max_running, label, nested, anything. Did you mean 'max_running'?",
        ),
        ({"max_runing": 3}, "run.yaml:3: scheduler.max_runing: scheduler 'options' has no option 'max_runing'; "),
        ({"max_running": "many"}, "run.yaml:3: scheduler.max_running: Input should be a valid integer"),
        ({"max_running": 0}, "greater than or equal to 1; found 0. Run: drivetrain plugins info scheduler/options"),
        ({"nested": {"dept": 2}}, "run.yaml:3: scheduler.nested.dept: scheduler 'options' has no option 'nested.dept'"),
        ({"nested": {"depth": "deep"}}, "run.yaml:3: scheduler.nested.depth: "),
    ],
)
def test_a_wrong_option_is_an_error_that_names_place_path_and_nearest(
    options: Mapping[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        choose(OPTIONS, name="options", **options)
    assert expected in str(caught.value)


def test_an_option_of_a_plugin_that_has_none() -> None:
    with pytest.raises(ConfigError, match="'plain' has no option 'x'; allowed: no options"):
        choose(PLAIN, name="plain", x=1)


def test_a_wrong_option_is_placed_where_it_was_said() -> None:
    places: dict[tuple[str, ...], str] = {("max_running",): "command line", ("nested",): "run.yaml:9"}
    for options, expected in (
        ({"max_running": 0}, "command line: scheduler.max_running"),
        ({"nested": {"x": 1}}, "run.yaml:9: scheduler.nested.x"),
        ({"label": 5}, "run.yaml:3: scheduler.label"),
    ):
        request = PartRequest("scheduler", "options", options, "run.yaml:3", places)
        with pytest.raises(ConfigError) as caught:
            Selector(Registry([OPTIONS]), {"scheduler": request}).choose("scheduler", ProbeContext())
        assert str(caught.value).startswith(expected)


def test_options_for_auto_are_checked_against_the_choice() -> None:
    with pytest.raises(ConfigError, match="'options' has no option"):
        choose(OPTIONS, REFUSING, speed=1)


def test_what_a_plugin_raises_when_it_is_created_is_a_plugin_error_with_its_cause() -> None:
    with pytest.raises(PluginError, match=r"creating it failed with OSError: the disk is full") as caught:
        choose(ref("scheduler", "raising", fakes.RaisingScheduler))
    assert isinstance(caught.value.__cause__, OSError)


# --- what may be chosen --------------------------------------------------------------------------------------------


def test_allow_narrows_the_choice_and_the_report_says_so() -> None:
    other = ref("scheduler", "vendor", fakes.VendorScheduler, distribution="Other_Kit")
    registry = Registry([PLAIN, other])
    chooser = Selector(registry.allowing(["fakes"]), {"scheduler": PartRequest("scheduler", "auto")})
    chooser.choose("scheduler", ProbeContext())
    selection = chooser.report["scheduler"]
    assert selection.chosen == PLAIN
    (barred,) = [candidate for candidate in selection.candidates if candidate.name == "vendor"]
    assert (barred.outcome, barred.code) == (Outcome.REFUSED, "not_allowed")
    assert selection.fallback is None
    assert registry.allowing(["fakes", "other-kit"]).refs == registry.refs


def test_a_name_that_is_not_allowed_is_not_called_unknown() -> None:
    registry = Registry([PLAIN, ref("scheduler", "vendor", fakes.VendorScheduler, "other-kit")]).allowing(["fakes"])
    for name in ("vendor", "other-kit/vendor"):
        with pytest.raises(PluginRefusedError, match=r"found 'other-kit'. Add other-kit to plugins.allow"):
            registry.find("scheduler", name)


def test_allowing_nobody_leaves_no_candidate_and_says_why() -> None:
    with pytest.raises(NoCandidateError, match=r"plain: plugins.allow does not name fakes"):
        Selector(Registry([PLAIN]).allowing([]), {"scheduler": PartRequest("scheduler", "auto")}).choose(
            "scheduler", ProbeContext()
        )


# --- the report ----------------------------------------------------------------------------------------------------


def test_the_report_keeps_the_order_of_choosing_and_finds_by_kind() -> None:
    chooser = Selector(fakes.serving_registry(), {})
    for kind in ("platform", "precision", "scheduler"):
        chooser.choose(kind, ProbeContext())
    assert list(chooser.report.chosen_names.items()) == [
        ("platform", "fake"),
        ("precision", "fp32"),
        ("scheduler", "fcfs"),
    ]
    with pytest.raises(KeyError):
        chooser.report["frontend"]


def test_the_report_is_json_and_holds_every_candidate() -> None:
    chooser = selector(PLAIN, REFUSING, RAISING)
    chooser.choose("scheduler", ProbeContext())
    chooser.leave_open("source", "no model is named")
    content = json.loads(json.dumps(chooser.report.to_dict(), allow_nan=False))
    (selection,) = content["selections"]
    assert selection["chosen"]["name"] == "plain"
    assert [c["outcome"] for c in selection["candidates"]] == ["chosen", "refused", "broken"]
    assert content["open"] == {"source": "no model is named"}
    assert len(content["fallbacks"]) == 1


def test_a_name_for_a_kind_that_is_left_open_must_exist_all_the_same() -> None:
    chooser = selector(PLAIN, name="plian")
    with pytest.raises(UnknownPluginError, match="Did you mean 'plain'"):
        chooser.leave_open("scheduler", "nothing needs it")
    chooser = selector(PLAIN, name="plain")
    chooser.leave_open("scheduler", "nothing needs it")
    assert chooser.report.open_kinds == {"scheduler": "nothing needs it"}
