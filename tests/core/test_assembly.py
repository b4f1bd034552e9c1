"""Parts are resolved kind by kind, each probe seeing the choices before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drivetrain.assembly import (
    Parts,
    build_engine,
    resolve_parts,
    sampling_defaults,
)
from drivetrain.config import Settings, load_settings
from drivetrain.contracts.kinds import KINDS
from drivetrain.contracts.plugin import Purpose
from drivetrain.errors import (
    ConfigError,
    LoaderError,
    ModelNotFoundError,
    NoCandidateError,
    PluginRefusedError,
    UnknownArchitectureError,
    UnknownPluginError,
)
from drivetrain.observers import Observers, hookimpl
from drivetrain.registry import PluginRef, Registry, Selection
from support import fake_plugins as fakes
from support.fake_plugins import ref, serving_registry

# --- choosing ------------------------------------------------------------------------------------------------------


def resolve(*refs: PluginRef, settings: dict[str, Any] | None = None, **how: Any) -> Parts:
    return resolve_parts(load_settings(None, settings), registry=serving_registry(*refs), **how)


def test_every_kind_that_serving_needs_is_chosen_in_order() -> None:
    parts = resolve(settings={"model": "tiny-model"})
    needed = [kind.name for kind in KINDS.values() if "serve" in kind.purposes]
    assert list(parts.plugins) == needed
    assert [selection.kind for selection in parts.report.selections] == needed
    assert parts.report.open_kinds == {}
    assert parts.path == fakes.FakeSource.here / "tiny-model"
    assert parts.checkpoint is not None
    assert parts.spec is not None
    assert parts.spec.attention.dtype == "float32"


def test_each_part_is_reached_by_its_kind() -> None:
    parts = resolve(settings={"model": "tiny-model"})
    for kind in parts.plugins:
        if kind not in ("source", "loader"):
            assert getattr(parts, kind) is parts.plugins[kind]


def test_a_probe_that_needs_the_model_sees_it() -> None:
    parts = resolve(settings={"model": "tiny-model"})
    assert parts.report["attention"].chosen.name == "wide"
    assert parts.report.fallbacks == ()


def test_without_a_model_its_kinds_stay_open_and_the_rest_is_chosen() -> None:
    parts = resolve()
    assert parts.report.open_kinds == dict.fromkeys(("source", "loader", "model"), "no model is named")
    assert not {"source", "loader", "model"} & set(parts.plugins)
    # Nobody has told wide of a model, so the platform's second choice is taken, and the report says so.
    assert parts.report["attention"].chosen.name == "narrow"
    assert parts.report.fallbacks == ("attention 'narrow' is used in place of 'wide': it must know the model",)


def test_a_model_that_is_not_here_is_fetched_only_when_asked_to() -> None:
    told: list[str] = []
    far = {"model": "far-model"}
    parts = resolve(settings=far, fetch=False, progress=lambda what, *_: told.append(what))
    assert (told, parts.path) == ([], None)
    assert parts.report["source"].chosen.name == "fake"
    assert parts.report.open_kinds == dict.fromkeys(("loader", "model"), "the model's files are not on this machine")
    parts = resolve(settings=far, progress=lambda what, *_: told.append(what))
    assert told == ["far-model"]
    assert parts.spec is not None


def test_an_unknown_model_names_the_nearest_known_one() -> None:
    broken = ref("source", "broken", "acme_that_is_not_there:X")
    with pytest.raises(ModelNotFoundError, match=r"'tiny-modle'; .*or a short name. Did you mean 'tiny-model'\?"):
        resolve(broken, settings={"model": "tiny-modle"})


def test_an_architecture_nobody_builds_is_an_error_with_what_each_said() -> None:
    with pytest.raises(UnknownArchitectureError, match=r"builds OddForCausalLM. .*tiny: does not build OddForCausalLM"):
        resolve(settings={"model": "odd-model"})


def test_files_that_nobody_reads_are_an_error_that_names_them() -> None:
    refs = [ref for ref in fakes.serving_refs() if ref.kind != "loader"]
    with pytest.raises(LoaderError, match=r"tiny-model: no loader recognizes these files"):
        resolve_parts(Settings("tiny-model"), registry=Registry(refs))


def test_a_kind_without_any_plugin_is_an_error() -> None:
    with pytest.raises(NoCandidateError, match="no plugin of kind 'platform' is installed"):
        resolve_parts(Settings(), registry=Registry([]))


def test_a_dtype_the_platform_does_not_have_is_refused_by_its_precision() -> None:
    half = ref("precision", "fp16", fakes.HalfPrecision)
    with pytest.raises(PluginRefusedError, match=r"does not compute in float16; found 'float32'; allowed: float16"):
        resolve(half, settings={"precision": "fp16"})


def test_kinds_may_be_left_out() -> None:
    parts = resolve(leave_out=("frontend",))
    assert "frontend" not in parts.plugins
    assert "frontend" not in parts.report.open_kinds


def test_a_setting_for_a_kind_that_is_not_needed_is_noted_and_its_name_checked() -> None:
    partitioner = ref("partitioner", "zero9", "never_imported:X")
    parts = resolve(partitioner, settings={"partitioner": "zero9", "frontend": "openai"}, leave_out=("frontend",))
    assert parts.report.open_kinds["partitioner"] == "nothing here needs it"
    assert parts.report.open_kinds["frontend"] == "nothing here needs it"
    with pytest.raises(UnknownPluginError, match="Did you mean 'zero9'"):
        resolve(partitioner, settings={"partitioner": "zero8"})


def test_a_name_for_a_kind_that_waits_for_the_model_is_checked_too() -> None:
    with pytest.raises(UnknownPluginError, match="no installed plugin of kind 'loader' is named 'nonsense'"):
        resolve(settings={"loader": "nonsense"})


def test_allow_narrows_the_choice_to_named_distributions() -> None:
    other = ref("attention", "other", fakes.NarrowAttention, distribution="other-kit")
    parts = resolve(other, settings={"plugins": {"allow": ["Fakes"]}})
    assert {selection.chosen.distribution for selection in parts.report.selections} == {"fakes"}
    with pytest.raises(PluginRefusedError, match=r"Add other-kit to plugins.allow"):
        resolve(other, settings={"plugins": {"allow": ["fakes"]}, "attention": "other"})
    allowed = resolve(other, settings={"plugins": {"allow": ["fakes", "other_kit"]}, "attention": "other"})
    assert allowed.report["attention"].chosen == other


def test_observers_are_told_of_each_choice_in_order() -> None:
    class Watcher:
        def __init__(self) -> None:
            self.kinds: list[str] = []

        @hookimpl
        def part_selected(self, selection: Selection) -> None:
            self.kinds.append(selection.kind)

    watcher, observers = Watcher(), Observers(installed=False)
    observers.register(watcher)
    parts = resolve(settings={"model": "tiny-model"}, observers=observers)
    assert watcher.kinds == list(parts.plugins)


def test_equal_settings_give_equal_plans_and_any_option_another() -> None:
    digests = [
        resolve(settings=settings).plan.digest
        for settings in (
            {"model": "tiny-model"},
            {"model": "tiny-model"},
            {"model": "tiny-model", "scheduler": {"max_running": 5}},
            {"model": "tiny-model", "attention": "narrow"},
            {},
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_the_installed_plugins_resolve_for_training_without_a_model() -> None:
    parts = resolve_parts(Settings(), purpose=Purpose.TRAIN)
    wanted = {kind.name for kind in KINDS.values() if "train" in kind.purposes}
    assert set(parts.plugins) == wanted - {"source", "loader", "model"}
    assert parts.plan.purpose == "train"


def test_recommended_sampling_is_checked_before_anybody_is_served() -> None:
    """Found with the first request, it would be an error of a client that said nothing of the kind."""
    checkpoint = fakes.FakeCheckpoint(Path("a-model"))
    checkpoint.generation_config = {"temperature": 0.5, "top_k": None, "max_length": 20}
    assert sampling_defaults(checkpoint) == {"temperature": 0.5}
    checkpoint.generation_config = {"temperature": "hot"}
    with pytest.raises(LoaderError, match=r"a-model: .*temperature must be .*'hot'.*generation_config\.json"):
        sampling_defaults(checkpoint)


def test_no_engine_without_a_model() -> None:
    with pytest.raises(ConfigError, match=r"no model is named. Give one with --model"):
        build_engine(resolve())
