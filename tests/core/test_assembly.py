"""Parts are resolved kind by kind, each probe seeing the choices before it; the cache is sized within the memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain.assembly import (
    Parts,
    _bytes_of_one,
    _longest_that_fits,
    _size_cache,
    build_engine,
    resolve_parts,
    share_blocks,
)
from drivetrain.config import Settings, load_settings
from drivetrain.contracts.attention import KVGroup
from drivetrain.contracts.kinds import KINDS
from drivetrain.contracts.plugin import Purpose
from drivetrain.contracts.scheduler import Limits
from drivetrain.errors import (
    ConfigError,
    LoaderError,
    MemoryBudgetError,
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


def test_no_engine_without_a_model() -> None:
    with pytest.raises(ConfigError, match=r"no model is named. Give one with --model"):
        build_engine(resolve())


# --- sizing --------------------------------------------------------------------------------------------------------

# One request of all 256 tokens takes 64 blocks of full attention and 7 of the window of 16 (15 + 8 tokens are 6 blocks,
# and one more as they need not start at a block's edge); a block is 4 tokens and 16 bytes.
LIMITS = Limits(max_batched_tokens=8, max_running=2)
ALL_OF_ONE = (64 + 7) * 16


def size(free_bytes: int = 2**20, **engine: Any) -> tuple[int, list[int], list[str]]:
    parts = resolve(settings={"model": "tiny-model", "platform": {"free_bytes": free_bytes}, "engine": engine})
    assert parts.spec is not None
    length, blocks = _size_cache(parts, parts.spec, LIMITS)
    return length, blocks, parts.notes


def test_with_memory_to_spare_every_running_request_can_be_as_long_as_the_model_allows() -> None:
    assert size() == (256, [128, 14], [])


def test_memory_for_one_request_is_enough() -> None:
    assert size(kv_memory=f"{ALL_OF_ONE}B") == (256, [64, 7], [])


def test_too_little_memory_shortens_requests_and_says_so() -> None:
    length, blocks, notes = size(kv_memory="600B")
    assert (length, blocks) == (120, [30, 7])
    assert len(notes) == 1
    assert "max_model_len is 120, not the model's 256" in notes[0]


def test_auto_takes_a_share_of_what_is_free() -> None:
    assert size(free_bytes=700)[0] == 128  # 630 bytes are 39 blocks: 32 and 7
    assert size(free_bytes=600, kv_memory="1MiB") == (256, [128, 14], [])


def test_a_length_that_was_asked_for_is_given_or_is_an_error() -> None:
    assert size(max_model_len=100) == (100, [50, 14], [])
    with pytest.raises(MemoryBudgetError, match=r"one request of 200 tokens needs .*max_model_len to at most 120"):
        size(max_model_len=200, kv_memory="600B")
    with pytest.raises(ConfigError, match=r"engine.max_model_len: .*found 300; allowed: 1..256"):
        size(max_model_len=300)


def test_memory_for_nothing_at_all_is_an_error_that_asks_for_more() -> None:
    for how in ({"kv_memory": "10B"}, {"kv_memory": "0"}, {"free_bytes": 30}):
        with pytest.raises(MemoryBudgetError, match=r"are there. Give more memory with engine.kv_memory"):
            size(**how)


# --- properties of sizing ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shares:
    """The arguments of share_blocks, with a budget that holds the least."""

    budget: int
    sizes: Sequence[int]
    least: Sequence[int]
    most: Sequence[int]


@st.composite
def shares(draw: st.DrawFn) -> Shares:
    num_groups = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 1000), min_size=num_groups, max_size=num_groups))
    least = draw(st.lists(st.integers(0, 50), min_size=num_groups, max_size=num_groups))
    most = [count + draw(st.integers(0, 200)) for count in least]
    needed = sum(count * size for count, size in zip(least, sizes, strict=True))
    return Shares(needed + draw(st.integers(0, 100_000)), sizes, least, most)


@given(shares())
def test_blocks_are_shared_within_the_budget_fairly_and_to_the_last_useful_one(s: Shares) -> None:
    counts = share_blocks(s.budget, s.sizes, s.least, s.most)
    spent = sum(count * size for count, size in zip(counts, s.sizes, strict=True))
    assert spent <= s.budget
    assert all(low <= count <= high for low, count, high in zip(s.least, counts, s.most, strict=True))
    # Whoever could take more got as many more as every other such group, and at least as many as the content ones.
    wanting = [g for g in range(len(counts)) if counts[g] < s.most[g]]
    extra = [count - low for count, low in zip(counts, s.least, strict=True)]
    assert len({extra[g] for g in wanting}) <= 1
    assert all(extra[g] >= max(extra) for g in wanting)
    # One more block for each of them would not fit.
    assert not wanting or s.budget - spent < sum(s.sizes[g] for g in wanting)


@given(shares(), st.integers(0, 10_000))
def test_more_memory_never_means_fewer_blocks_for_anyone(s: Shares, more: int) -> None:
    before = share_blocks(s.budget, s.sizes, s.least, s.most)
    after = share_blocks(s.budget + more, s.sizes, s.least, s.most)
    assert all(b <= a for b, a in zip(before, after, strict=True))


@st.composite
def groups(draw: st.DrawFn) -> list[KVGroup]:
    windows = draw(st.lists(st.none() | st.integers(1, 300), min_size=1, max_size=3, unique=True))
    return [KVGroup(index, (index,), window) for index, window in enumerate(windows)]


@given(groups(), st.integers(1, 64), st.integers(1, 512), st.integers(0, 2000), st.integers(0, 200_000), st.data())
def test_the_longest_request_fits_and_one_token_more_would_not(
    groups: list[KVGroup], block_size: int, chunk: int, wanted: int, budget: int, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4096), min_size=len(groups), max_size=len(groups)))
    length = _longest_that_fits(wanted, groups, sizes, block_size, chunk, budget)
    assert 0 <= length <= wanted
    assert _bytes_of_one(length, groups, sizes, block_size, chunk) <= budget
    assert length == wanted or _bytes_of_one(length + 1, groups, sizes, block_size, chunk) > budget
