"""An operation is bound once, to the first provider that covers it or to one that was measured to be faster; whoever
was passed over is remembered with the reason."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from drivetrain.binding import Binding, KernelBinder, kernel_providers, served_operations
from drivetrain.contracts.kernels import KernelProvider, KernelSpec
from drivetrain.contracts.plugin import PluginConfig, ProbeContext, Tier
from drivetrain.contracts.source import Progress
from drivetrain.errors import KernelBuildError, NoCandidateError
from drivetrain.kernel_record import ROW_CLASSES, KernelRecord
from drivetrain.registry import PartRequest, PluginRef, Registry, Selection, Selector
from support.fake_plugins import FakeKernels, ref
from support.kernel_records import measured


def provider(device_type: str = "cpu", *names: str) -> FakeKernels:
    return FakeKernels(FakeKernels.Config(names=names or ("silu_mul",), device_type=device_type))


SILU = KernelSpec("silu_mul", "cpu", "float32", {"E": 8})
ROPE = KernelSpec("rope", "cpu", "float32")


def test_the_first_provider_that_covers_the_use_serves_it() -> None:
    binder = KernelBinder([("one", provider()), ("two", provider())])
    assert binder.bind(SILU)(1, 2) == ("cpu", "silu_mul", (1, 2))
    assert binder.bindings == [Binding(SILU, "one", (), "the first in order that covers it")]


def test_whoever_lacks_or_refuses_the_use_is_passed_over_with_the_reason() -> None:
    binder = KernelBinder([("lacks", provider("cpu", "rope")), ("refuses", provider("cuda")), ("has", provider())])
    binder.bind(SILU)
    assert binder.bindings == [
        Binding(
            SILU, "has", ("lacks: has no silu_mul", "refuses: works on cuda only"), "the next in order that covers it"
        ),
    ]


def test_nobody_covers_the_use() -> None:
    binder = KernelBinder([("lacks", provider("cpu", "rope")), ("refuses", provider("cuda"))])
    with pytest.raises(NoCandidateError, match=r"\(lacks: has no silu_mul; refuses: works on cuda only\)"):
        binder.bind(SILU)
    assert binder.bindings == []


def test_an_unknown_operation_names_the_nearest() -> None:
    with pytest.raises(NoCandidateError, match=r"'rms_nrm'; allowed: .*gelu_tanh_mul, .*Did you mean 'rms_norm'\?"):
        KernelBinder([("one", provider())]).bind(KernelSpec("rms_nrm", "cpu", "float32"))


def test_lookups_and_uses_are_counted() -> None:
    binder = KernelBinder([("one", provider("cpu", "rope")), ("two", provider())])
    for spec in (SILU, SILU, ROPE):
        binder.bind(spec)
    assert binder.num_lookups == 3
    assert binder.by_operation() == {"silu_mul": {"two": 2}, "rope": {"one": 1}}


class Failing(FakeKernels):
    def make(self, spec: KernelSpec) -> Callable[..., Any]:
        raise OSError("no compiler")


def test_an_implementation_that_could_not_be_made_is_not_called_bound() -> None:
    binder = KernelBinder([("failing", Failing(FakeKernels.Config()))])
    with pytest.raises(OSError, match="no compiler"):
        binder.bind(SILU)
    assert binder.bindings == []


def test_who_would_serve_a_use_is_told_without_binding_it() -> None:
    providers = [("lacks", provider("cpu", "rope")), ("slow", provider()), ("fast", provider())]
    figures = record(slow=2e-6, fast=1e-6)
    assert KernelBinder(providers, record=figures).provider_of(SILU) == "slow"
    binder = KernelBinder(providers, is_auto=True, record=figures)
    assert binder.provider_of(SILU) == "fast"
    assert binder.provider_of(KernelSpec("linear", "cpu", "float32")) is None
    assert binder.bindings == []


# --- an implementation that can't be made --------------------------------------------------------------------------


class Uncompiled(FakeKernels):
    """Promises what its compiler does not hold."""

    num_tries = 0

    def make(self, spec: KernelSpec) -> Callable[..., Any]:
        self.num_tries += 1
        raise KernelBuildError("the source does not compile", where=f"{spec.operation}.cpp")


def uncompiled(*names: str) -> Uncompiled:
    return Uncompiled(FakeKernels.Config(names=names or ("silu_mul",)))


def test_what_was_asked_for_by_name_and_can_not_be_made_is_an_error() -> None:
    binder = KernelBinder([("mine", uncompiled()), ("reference", provider())])
    with pytest.raises(KernelBuildError, match=r"silu_mul\.cpp: kernels 'mine' can't make silu_mul: the source"):
        binder.bind(SILU)
    assert binder.bindings == []
    assert binder.fallbacks == ()


def test_under_auto_the_next_provider_takes_over_and_the_user_is_told(caplog: pytest.LogCaptureFixture) -> None:
    mine = uncompiled("silu_mul", "rope")
    binder = KernelBinder([("mine", mine), ("reference", provider("cpu", "silu_mul", "rope"))], is_auto=True)
    with caplog.at_level(logging.WARNING):
        for spec in (SILU, SILU, ROPE):
            assert binder.bind(spec)()[1] == spec.operation
    assert binder.by_operation() == {"silu_mul": {"reference": 2}, "rope": {"reference": 1}}
    assert mine.num_tries == 2, "an operation that failed is not tried for each of its uses"
    assert binder.bindings[0].refused == ("mine: silu_mul.cpp: the source does not compile",)
    (told,) = binder.fallbacks
    assert told == (
        "kernels 'mine' could not be made; rope, silu_mul by 'reference': silu_mul.cpp: the source does not compile; "
        "rope.cpp: the source does not compile"
    )
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def test_when_nobody_can_make_it_every_reason_is_told() -> None:
    binder = KernelBinder([("one", uncompiled()), ("two", provider("cpu", "rope"))], is_auto=True)
    with pytest.raises(NoCandidateError, match=r"\(one: silu_mul\.cpp: the source does not compile; two: has no"):
        binder.bind(SILU)


class BuildsFirst(FakeKernels):
    """Compiles everything at once."""

    error: KernelBuildError | None = None

    def __init__(self, config: PluginConfig) -> None:
        super().__init__(config)
        self.built: list[Progress] = []

    def build_ahead(self, progress: Progress) -> None:
        self.built.append(progress)
        if self.error is not None:
            raise self.error


def heard(what: str, done: int, total: int | None, unit: str = "bytes") -> None:
    raise AssertionError("nothing here takes long")


def test_a_provider_builds_ahead_once_and_only_when_it_is_used() -> None:
    one, two = BuildsFirst(FakeKernels.Config()), BuildsFirst(FakeKernels.Config())
    binder = KernelBinder([("one", one), ("two", two)], progress=heard)
    for _ in range(3):
        binder.bind(SILU)
    assert (one.built, two.built) == ([heard], [])


def test_a_provider_that_can_not_build_ahead_is_asked_for_nothing_more() -> None:
    one = BuildsFirst(FakeKernels.Config(names=("silu_mul", "rope")))
    one.error = KernelBuildError("no c++ compiler is here")
    binder = KernelBinder([("one", one), ("two", provider("cpu", "silu_mul", "rope"))], is_auto=True)
    for spec in (SILU, ROPE):
        binder.bind(spec)
    assert len(one.built) == 1
    assert binder.by_operation() == {"silu_mul": {"two": 1}, "rope": {"two": 1}}
    assert binder.fallbacks == ("kernels 'one' could not be made; rope, silu_mul by 'two': no c++ compiler is here",)


# --- the measured record -------------------------------------------------------------------------------------------


def record(**seconds: float) -> KernelRecord:
    return KernelRecord(tuple(m for name, time in seconds.items() for m in measured(SILU, name, time)))


FIRST = "the first in order that covers it"
RECORD = "the measured record of 2026-11-25"


@pytest.mark.parametrize(
    ("times", "chosen", "reason"),
    [
        ({"one": 2e-6, "two": 1e-6}, "two", f"{RECORD} has it 2.00x as fast as 'one'"),
        ({"one": 1e-6, "two": 2e-6}, "one", f"{FIRST}; measured on 2026-11-25"),
        ({"one": 1.04e-6, "two": 1e-6}, "one", f"{FIRST}; measured on 2026-11-25"),
        ({"two": 1e-6}, "one", FIRST),
        (
            {"one": 4e-6, "reference": 6e-6},
            "one",
            "the first in order that covers it; measured on 2026-11-25: 1.50x reference",
        ),
        (
            {"one": 6e-6, "reference": 4e-6},
            "reference",
            "the measured record of 2026-11-25 has it 1.50x as fast as 'one'",
        ),
        ({"one": 6e-6, "absent": 4e-6}, "one", f"{FIRST}; measured on 2026-11-25"),
    ],
)
def test_under_auto_a_faster_one_by_the_record_goes_first(times: dict[str, float], chosen: str, reason: str) -> None:
    providers = [(name, provider()) for name in ("one", "two", "reference")]
    binder = KernelBinder(providers, is_auto=True, record=record(**times))
    binder.bind(SILU)
    assert (binder.bindings[0].provider, binder.bindings[0].reason) == (chosen, reason)


def test_a_name_that_was_asked_for_is_used_whatever_the_record_says() -> None:
    binder = KernelBinder([("one", provider()), ("reference", provider())], record=record(one=9e-6, reference=1e-6))
    binder.bind(SILU)
    assert binder.bindings[0].provider == "one"
    assert binder.bindings[0].reason.endswith("measured on 2026-11-25: 0.11x reference")


def test_the_record_of_another_use_says_nothing() -> None:
    binder = KernelBinder([("one", provider()), ("two", provider())], is_auto=True, record=record(one=9e-6, two=1e-6))
    binder.bind(KernelSpec("silu_mul", "cpu", "float32", {"E": 16}))
    binder.bind(KernelSpec("silu_mul", "cpu", "bfloat16", {"E": 8}))
    assert binder.by_operation() == {"silu_mul": {"one": 2}}


def test_the_row_classes_count_alike() -> None:
    """Twice as slow on one row and eight times as fast on many: 16^(1/3) / 2 as fast in all."""
    slow_on_one = [
        m for rows, time in zip(ROW_CLASSES, (2.0, 1.0, 0.125), strict=True) for m in measured(SILU, "two", time, rows)
    ]
    even = [m for rows in ROW_CLASSES for m in measured(SILU, "one", 1.0, rows)]
    order, reason = KernelRecord((*slow_on_one, *even)).order(SILU, ["one", "two"])
    assert order == ["two", "one"]
    assert "1.59x" in reason


def test_what_was_not_measured_at_every_number_of_rows_is_not_compared() -> None:
    record = KernelRecord((*measured(SILU, "one", 1.0), *measured(SILU, "two", 0.1, rows=1)))
    assert record.seconds(SILU) == {"one": pytest.approx(1.0)}
    assert record.order(SILU, ["one", "two"]) == (["one", "two"], "")


def test_the_bound_uses_are_told_with_sizes_provider_and_reason() -> None:
    binder = KernelBinder([("lacks", provider("cpu", "rope")), ("has", provider())])
    for _ in range(2):
        binder.bind(SILU)
    assert binder.explained() == [
        {
            "operation": "silu_mul",
            "dtype": "float32",
            "sizes": {"E": 8},
            "provider": "has",
            "uses": 2,
            "reason": "the next in order that covers it",
            "refused": ["lacks: has no silu_mul"],
        }
    ]


# --- who may be asked ----------------------------------------------------------------------------------------------


class Tuned(FakeKernels):
    tier = Tier.TUNED


class Unmakeable(FakeKernels):
    def __init__(self, config: PluginConfig) -> None:
        raise OSError("the disk is full")


def choose(name: str, *refs: PluginRef) -> tuple[Registry, KernelProvider, Selection]:
    registry = Registry(refs)
    selector = Selector(registry, {"kernels": PartRequest("kernels", name)})
    plugin = selector.choose("kernels", ProbeContext())
    assert isinstance(plugin, KernelProvider)
    return registry, plugin, selector.report["kernels"]


REFERENCE = ref("kernels", "reference", FakeKernels)
OTHER = ref("kernels", "other", FakeKernels)
TUNED = ref("kernels", "tuned", Tuned)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("auto", ["tuned", "other", "reference"]),
        ("other", ["other", "reference"]),
        ("reference", ["reference"]),
    ],
)
def test_under_auto_every_candidate_may_serve_and_by_name_only_that_one_and_the_reference(
    name: str, names: list[str]
) -> None:
    registry, plugin, selection = choose(name, REFERENCE, OTHER, TUNED)
    providers = kernel_providers(registry, plugin, selection)
    assert [name for name, _ in providers] == names
    assert providers[0][1] is plugin


def test_one_that_can_not_be_created_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    registry, plugin, selection = choose("auto", REFERENCE, TUNED, ref("kernels", "broken", Unmakeable))
    with caplog.at_level(logging.WARNING):
        providers = kernel_providers(registry, plugin, selection)
    assert [name for name, _ in providers] == ["tuned", "reference"]
    assert "the disk is full" in caplog.text


def test_which_operation_goes_where_is_told_before_a_model_is_built() -> None:
    providers = [("one", provider()), ("reference", provider("cpu", "silu_mul", "rope"))]
    table = list(served_operations(providers, record(one=1e-6, reference=3e-6), "cpu", "float32", is_auto=True))
    assert table == [
        ("rope", "reference", "one has no rope"),
        ("silu_mul", "one", "measured on 2026-11-25: 3.00x reference"),
    ]
