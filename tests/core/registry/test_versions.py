"""A plugin newer than the core is refused with both versions; an older one runs through adapters; deprecations name
who still uses what is going."""

from __future__ import annotations

import dataclasses
import json
import warnings
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain import __version__
from drivetrain.contracts import versions
from drivetrain.contracts.kernels import KernelProvider, KernelSpec
from drivetrain.contracts.kinds import KINDS
from drivetrain.contracts.plugin import Probe
from drivetrain.contracts.versions import (
    ContractVersion,
    ContractVersionError,
    DrivetrainDeprecationWarning,
    adapter,
    deprecated,
    distribution_of,
    fit,
    warn_deprecated,
)
from drivetrain.errors import ContractError, PluginLoadError
from drivetrain.registry import PartRequest, Registry, Selector, load
from drivetrain.registry.discovery import check_contract
from support import fake_plugins as fakes
from support.distributions import run_python, write_distribution

# --- versions ------------------------------------------------------------------------------------------------------


def test_versions_compare_as_numbers() -> None:
    parsed = [ContractVersion.parse(text) for text in ("1.2", "1.10", "2.0")]
    assert parsed == sorted(parsed)
    assert [str(version) for version in parsed] == ["1.2", "1.10", "2.0"]


@pytest.mark.parametrize(
    "text", ["", "1", "1.", "1.x", "v1.0", "1.0.0", "-1.0", " 1.0", "1.0\n", 1.0, None, ("1", "0")]
)
def test_what_is_no_version_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is no version of a contract"):
        ContractVersion.parse(text)


def test_every_kind_speaks_the_version_that_its_group_and_minor_say() -> None:
    for kind in KINDS.values():
        assert ContractVersion.spoken(kind.name) == ContractVersion(kind.major, kind.minor)
        assert str(ContractVersion.spoken(kind.name)) == kind.version
        assert kind.group.endswith(f".v{kind.major}")


# --- a contract that has moved on ----------------------------------------------------------------------------------


class SchedulerOfToday(fakes.Scheduler):
    """The scheduler contract as if its minor had been raised: it gained a method."""

    @abstractmethod
    def weight(self) -> int:
        """What version 1.1 added."""


class Older(fakes.PlainScheduler, SchedulerOfToday):
    """Written for 1.0, when there was no weight."""


class Current(Older):
    contract_version = "1.1"

    def weight(self) -> int:
        return 5


class Newer(Current):
    contract_version = "1.7"


@pytest.fixture
def moved_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The core speaks version 1.1 of the scheduler contract, and has no adapters but those of the test."""
    monkeypatch.setitem(KINDS, "scheduler", dataclasses.replace(KINDS["scheduler"], minor=1))
    monkeypatch.setattr(versions, "ADAPTERS", {})
    monkeypatch.setattr("drivetrain.registry.discovery.contract_class", lambda kind: SchedulerOfToday)


def lift_to_1_1(cls: Any) -> Any:
    class Lifted(cls):  # type: ignore[misc]
        contract_version = "1.1"

        def weight(self) -> int:
            return 1

    return Lifted


def test_an_older_kernel_provider_is_carried_over_and_not_asked_for_zero_points() -> None:
    class Few(KernelProvider):
        """One operation."""

        def operations(self) -> frozenset[str]:
            return frozenset({"rms_norm"})

        def supports(self, spec: KernelSpec) -> Probe:
            return Probe.yes()

        def make(self, spec: KernelSpec) -> Callable[..., Any]:
            return lambda x, weight: x

    lifted = fit("kernels", Few, where="few")
    assert issubclass(lifted, Few)
    assert (lifted.contract_version, lifted.__name__, lifted.__doc__) == ("1.2", "Few", "One operation.")
    made = lifted(lifted.Config())
    assert isinstance(made, KernelProvider)
    assert made.operations() == {"rms_norm"}
    # It would take zero points for minima.
    assert made.supports(KernelSpec("linear_int4", "cpu", "float32", {}, {"group": 32})).ok
    refused = made.supports(KernelSpec("linear_int4", "cpu", "float32", {}, {"group": 32, "zero_points": 1}))
    assert (refused.ok, refused.code) == (False, "older_contract")


@pytest.mark.usefixtures("moved_on")
def test_a_plugin_of_the_same_minor_is_used_as_it_is() -> None:
    assert load(fakes.ref("scheduler", "x", Current)) is Current


@pytest.mark.usefixtures("moved_on")
def test_a_newer_plugin_is_refused_with_both_versions_and_the_pip_command() -> None:
    with pytest.raises(ContractVersionError) as caught:
        load(fakes.ref("scheduler", "x", Newer))
    assert str(caught.value) == (
        f"scheduler/x (fakes 1.0): it needs version 1.7 of the scheduler contract, and this core (drivetrain "
        f"{__version__}) speaks 1.1; found '1.7'; allowed: 1.0 to 1.1. Run: pip install --upgrade drivetrain"
    )
    assert isinstance(caught.value, ContractError)


@pytest.mark.usefixtures("moved_on")
def test_an_older_plugin_without_an_adapter_is_refused_with_both_versions() -> None:
    with pytest.raises(ContractVersionError, match=r"written for version 1\.0 .* speaks 1\.1, and no adapter leads"):
        load(fakes.ref("scheduler", "x", Older))


@pytest.mark.usefixtures("moved_on")
def test_an_older_plugin_runs_through_the_adapter() -> None:
    adapter("scheduler", from_minor=0)(lift_to_1_1)
    lifted: Any = load(fakes.ref("scheduler", "x", Older))
    assert issubclass(lifted, Older)
    assert lifted(lifted.Config()).weight() == 1
    assert lifted(lifted.Config()).limits() == fakes.Limits(8, 2)
    check_contract(fakes.ref("scheduler", "x", Older), Older)
    with pytest.raises(ValueError, match="there is an adapter for scheduler from minor 0 already"):
        adapter("scheduler", from_minor=0)(lift_to_1_1)


@pytest.mark.usefixtures("moved_on")
def test_an_adapted_plugin_is_chosen_like_any_other() -> None:
    adapter("scheduler", from_minor=0)(lift_to_1_1)
    registry = Registry([fakes.ref("scheduler", "older", Older)])
    plugin: Any = Selector(registry, {"scheduler": PartRequest("scheduler", "auto")}).choose(
        "scheduler", fakes.ProbeContext()
    )
    assert plugin.weight() == 1


def test_adapters_of_several_minors_are_chained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "ADAPTERS", {})
    monkeypatch.setitem(KINDS, "scheduler", dataclasses.replace(KINDS["scheduler"], minor=2))
    adapter("scheduler", 0)(lift_to_1_1)
    adapter("scheduler", 1)(lambda cls: type("Twice", (cls,), {"contract_version": "1.2", "weight": lambda self: 2}))
    lifted: Any = fit("scheduler", Older, where="here")
    assert [c.__name__ for c in lifted.__mro__[:3]] == ["Twice", "Lifted", "Older"]
    assert fit("scheduler", Current, where="here").__name__ == "Twice"


@pytest.mark.usefixtures("moved_on")
@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda cls: cls, "TypeError: it made Older, of version 1.0, of Older"),
        (lambda cls: Current.__base__, "TypeError: it made Older"),
        (lambda cls: type("Alien", (), {"contract_version": "1.1"}), "TypeError: it made Alien"),
        (lambda cls: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_an_adapter_that_fails_is_an_error_of_the_plugin_at_hand(wrap: Any, said: str) -> None:
    adapter("scheduler", 0)(wrap)
    with pytest.raises(ContractVersionError, match=r"the adapter from 1\.0 of the scheduler contract failed") as caught:
        load(fakes.ref("scheduler", "x", Older))
    assert said in str(caught.value)


def test_an_import_that_wants_more_of_drivetrain_than_there_is_names_the_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "acme_ahead.py").write_text("from drivetrain.contracts.scheduler import SurelyNoSuchThing\n")
    with pytest.raises(PluginLoadError, match=r"newer drivetrain\. Run: pip install --upgrade drivetrain"):
        load(fakes.ref("scheduler", "x", "acme_ahead:X"))


# --- deprecations --------------------------------------------------------------------------------------------------

USER = """
import warnings
from acme_core import old, Old, fresh, thing
warnings.simplefilter("always")


def call():
    return old(2)


def make():
    return Old(3)


def subclass():
    class Mine(Old):
        pass
    return Mine(4)


def parameter():
    return fresh(5, mode="x")


def method():
    return thing.gone()
"""

CORE = '''
from drivetrain.contracts.versions import deprecated, warn_deprecated


@deprecated(since="0.2", removal="0.4", instead="use new()")
def old(x):
    """The docstring."""
    return x + 1


@deprecated(since="0.2", removal="0.4", instead="use New")
class Old:
    def __init__(self, x):
        self.x = x


def fresh(x, mode=None):
    if mode is not None:
        warn_deprecated("the parameter mode of fresh()", since="0.3", removal="0.5", instead="leave it out")
    return x


class Thing:
    @deprecated(since="0.2", removal="0.4", instead="use here()")
    def gone(self):
        return "gone"


thing = Thing()
'''


def told(tmp_path: Path, name: str) -> tuple[list[Any], Any]:
    """The warnings that a function of a separately installed package causes, in a process of its own."""
    write_distribution(tmp_path / "core", "acme-core", {}, {"acme_core.py": CORE})
    info = write_distribution(tmp_path / "user", "acme-user", {}, {"acme_user/__init__.py": USER}, version="3.4")
    (info / "top_level.txt").write_text("acme_user\n")
    code = f"""
import json, warnings
import acme_user
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    result = acme_user.{name}()
shown = [(w.category.__name__, str(w.message), w.filename.rpartition("/")[2]) for w in caught]
print(json.dumps([shown, getattr(result, "x", result)]))
"""
    found, result = json.loads(run_python(code, tmp_path / "core", tmp_path / "user"))
    return found, result


@pytest.mark.parametrize(
    ("name", "result", "what"),
    [
        ("call", 3, "old is deprecated since drivetrain 0.2 and will be removed in 0.4: use new()"),
        ("make", 3, "Old is deprecated since drivetrain 0.2 and will be removed in 0.4: use New"),
        ("subclass", 4, "Old is deprecated since drivetrain 0.2 and will be removed in 0.4: use New"),
        ("method", "gone", "Thing.gone is deprecated since drivetrain 0.2 and will be removed in 0.4: use here()"),
        (
            "parameter",
            5,
            "the parameter mode of fresh() is deprecated since drivetrain 0.3 and will be removed in 0.5: leave it out",
        ),
    ],
)
def test_a_deprecation_says_since_removal_instead_and_who_still_uses_it(
    tmp_path: Path, name: str, result: object, what: str
) -> None:
    found, value = told(tmp_path, name)
    assert value == result
    message = f"{what}. Still used by acme-user 3.4 (module acme_user)"
    assert found == [["DrivetrainDeprecationWarning", message, "__init__.py"]]


def test_a_deprecated_thing_keeps_its_name_docstring_and_notice() -> None:
    @deprecated(since="0.2", removal="0.4", instead="use new()")
    def old() -> None:
        """The docstring."""

    assert (old.__name__, old.__doc__) == ("old", "The docstring.")
    assert vars(old)["__deprecated__"].instead == "use new()"
    with pytest.warns(DrivetrainDeprecationWarning, match=r"Still used by module .*test_versions"):
        old()


def test_a_use_can_be_told_of_another_module() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_deprecated("reset()", since="0.2", removal="0.4", instead="x", used_by="drivetrain.plugins.scheduler.fcfs")
    assert f"Still used by drivetrain {__version__} (module drivetrain.plugins.scheduler.fcfs)" in str(
        caught[0].message
    )


def test_the_owner_of_a_module_is_found_through_its_plugins_when_a_namespace_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("one", "two"):
        group = {"drivetrain.scheduler.v1": {part: f"acme_shared.{part}.plugin:P"}}
        info = write_distribution(tmp_path, f"acme-{part}", group)
        (info / "top_level.txt").write_text("acme_shared\n")
    monkeypatch.syspath_prepend(tmp_path)
    distribution_of.cache_clear()
    assert distribution_of("acme_shared.two.other") == "acme-two 1.0"
    assert distribution_of("acme_shared.one.plugin") == "acme-one 1.0"
    assert distribution_of("surely_of_nobody") is None
    distribution_of.cache_clear()
