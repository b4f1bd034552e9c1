"""Discovery reads metadata only; whatever one distribution is, the others are found; loading checks the contract."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from drivetrain.contracts.kinds import KINDS
from drivetrain.errors import AmbiguousPluginError, ContractError, PluginLoadError, UnknownPluginError
from drivetrain.registry import PluginRef, Registry, discover, discovery, foreign_groups, load, summary_of
from drivetrain.registry.discovery import contract_class, entry_points, find_source
from support import fake_plugins as fakes
from support.distributions import run_python, write_distribution

SCHEDULER = "drivetrain.scheduler.v1"
FINE = '''
from drivetrain.contracts.scheduler import Limits, Scheduler, StepPlan


class Fine(Scheduler):
    """Schedules fine."""

    def limits(self):
        return Limits(8, 2)

    def key(self, request):
        return (request.sequence_number,)

    def plan(self, view):
        return StepPlan(())
'''

LIST_ALL = """
import json, sys
import drivetrain
from drivetrain.registry import discover, foreign_groups, summary_of
refs = discover()
found = {ref.qualified: summary_of(ref) for ref in refs}
foreign = [(group.group, group.distribution, list(group.names), group.reason) for group in foreign_groups()]
print(json.dumps({"found": found, "foreign": foreign, "modules": sorted(sys.modules)}))
"""


def listing(*folders: Path) -> dict[str, dict[str, str]]:
    answer: dict[str, dict[str, str]] = json.loads(run_python(LIST_ALL, *folders))
    return answer


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the head of this process's path."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def found_in(distribution: str) -> list[PluginRef]:
    return [ref for ref in discover() if ref.distribution == distribution]


# --- metadata only -------------------------------------------------------------------------------------------------


def test_listing_imports_no_plugin_and_not_torch(tmp_path: Path) -> None:
    bomb = (
        '"""The module."""\nraise RuntimeError("imported")\n\n\nclass Bomb:\n    """Explodes when it is imported."""\n'
    )
    write_distribution(
        tmp_path, "acme", {SCHEDULER: {"bomb": "acme.bomb:Bomb"}}, {"acme/__init__.py": bomb, "acme/bomb.py": bomb}
    )
    answer = listing(tmp_path)
    assert answer["found"]["acme/bomb"] == "Explodes when it is imported."
    assert not {"torch", "acme", "acme.bomb", "drivetrain.plugins", "drivetrain.backends"} & set(answer["modules"])


def test_every_built_in_plugin_is_discovered_in_resolution_order_with_a_summary() -> None:
    own = found_in("drivetrain")
    assert {ref.kind for ref in own} == set(KINDS)
    assert [list(KINDS).index(ref.kind) for ref in own] == sorted(list(KINDS).index(ref.kind) for ref in own)
    assert [str(ref) for ref in own if not summary_of(ref)] == []


def test_discover_of_one_kind_gives_that_kind() -> None:
    assert {ref.kind for ref in discover("scheduler")} == {"scheduler"}
    assert set(discover("scheduler")) == {ref for ref in discover() if ref.kind == "scheduler"}


def test_three_hundred_distributions_are_listed_in_half_a_second(tmp_path: Path) -> None:
    for number in range(300):
        module = f"acme{number}/plugin.py"
        groups = {SCHEDULER: {f"s{number}": f"acme{number}.plugin:Fine"}}
        write_distribution(tmp_path, f"acme-{number}", groups, {f"acme{number}/__init__.py": "", module: FINE})
    timed = """
import sys, time
from drivetrain.registry import discover, summary_of
started = time.perf_counter()
summaries = [summary_of(ref) for ref in discover()]
seconds = time.perf_counter() - started
print(summaries.count("Schedules fine."), "torch" in sys.modules, seconds)
"""
    runs = [run_python(timed, tmp_path).split() for _ in range(3)]
    assert {(count, torch) for count, torch, _ in runs} == {("300", "False")}
    assert min(float(seconds) for _, _, seconds in runs) < 0.5


# --- distributions of every sort -----------------------------------------------------------------------------------


def test_the_first_of_two_copies_of_a_distribution_hides_the_other(tmp_path: Path) -> None:
    for folder, version in (("first", "2.0"), ("second", "1.0")):
        write_distribution(tmp_path / folder, "Acme_Kit", {SCHEDULER: {"fine": f"{folder}:Fine"}}, version=version)
    code = "from drivetrain.registry import discover\nprint([r.version for r in discover() if r.name == 'fine'])"
    assert run_python(code, tmp_path / "first", tmp_path / "second").strip() == "['2.0']"
    assert run_python(code, tmp_path / "second", tmp_path / "first").strip() == "['1.0']"


def _without_metadata(info: Path) -> None:
    (info / "METADATA").unlink()


def _without_name(info: Path) -> None:
    (info / "METADATA").write_text("Metadata-Version: 2.1\n", encoding="utf-8")


def _not_text(info: Path) -> None:
    (info / "entry_points.txt").write_bytes(b"[drivetrain.scheduler.v1]\n\xff\xfe = a:b\n")


def _no_assignment(info: Path) -> None:
    (info / "entry_points.txt").write_text(f"[{SCHEDULER}]\nnonsense\n", encoding="utf-8")


@pytest.mark.parametrize("spoil", [_without_metadata, _without_name, _not_text, _no_assignment])
def test_a_distribution_with_broken_metadata_is_reported_and_hides_no_other(
    site: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(write_distribution(site, "spoilt", {SCHEDULER: {"bad": "spoilt:Bad"}}))
    write_distribution(site, "wholesome", {SCHEDULER: {"good": "wholesome:Good"}})
    assert [ref.name for ref in found_in("wholesome")] == ["good"]
    (report,) = [group for group in foreign_groups() if "spoilt" in group.distribution]
    assert report.reason.startswith("unreadable metadata: ")
    assert len(entry_points(SCHEDULER)) == len(discover("scheduler"))


def test_groups_that_this_core_does_not_speak_are_told_apart(site: Path) -> None:
    groups = {
        "drivetrain.scheduler.v2": {"next": "acme:Next"},
        "drivetrain.oracle.v1": {"b": "acme:B", "a": "acme:A"},
        "drivetrain.scheduler": {"plain": "acme:Plain"},
        "drivetrain.observer": {"watch": "acme:watch"},
        SCHEDULER: {"fine": "acme:Fine"},
    }
    write_distribution(site, "acme-foreign", groups)
    found = {g.group: (g.names, g.reason) for g in foreign_groups() if g.distribution == "acme-foreign"}
    assert found == {
        "drivetrain.scheduler.v2": (("next",), "contract version 2; this core speaks 1"),
        "drivetrain.oracle.v1": (("a", "b"), "unknown kind 'oracle'"),
        "drivetrain.scheduler": (("plain",), "not of the form drivetrain.KIND.vN"),
    }
    assert [ref.name for ref in found_in("acme-foreign")] == ["fine"]


def test_two_distributions_that_claim_one_name_need_the_qualified_form(site: Path) -> None:
    for name in ("acme-one", "acme-two"):
        write_distribution(site, name, {SCHEDULER: {"twice": f"{name.replace('-', '_')}:Fine"}})
    registry = Registry()
    with pytest.raises(AmbiguousPluginError) as caught:
        registry.find("scheduler", "twice")
    assert "acme-one/twice, acme-two/twice" in str(caught.value)
    assert registry.find("scheduler", "acme-two/twice").distribution == "acme-two"
    assert registry.find("scheduler", "Acme_Two/twice").distribution == "acme-two"
    with pytest.raises(UnknownPluginError):
        registry.find("scheduler", "acme-three/twice")


# --- one line about a plugin ---------------------------------------------------------------------------------------


def summary(target: str) -> str:
    return summary_of(PluginRef("scheduler", "x", "acme", "1", target))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('class X:\n    """One line."""\n', "One line."),
        ('class X:\n    """\n    Second line.\n    """\n', "Second line."),
        ('class X(A, B[C], d=f(1)):\n    r"""First.\n\n    More.\n    """\n', "First."),
        ('class X(\n    A,\n    B,\n):\n    """After a long head."""\n', "After a long head."),
        ("class X:\n    # a comment\n\n    '''Other quotes.'''\n", "Other quotes."),
        ('class XY:\n    """Not this."""\n\n\nclass X:  # why\n    """This."""\n', "This."),
        ('"""The module."""\n\n\nclass X:\n    a = 1\n\n    def f(self):\n        """Not a class."""\n', "The module."),
        ('# head\n\n"""The module."""\nfrom .other import X\n', "The module."),
        ('\ufeff"""After a byte order mark."""\n', "After a byte order mark."),
        ('class X:\r\n    """Other line ends."""\r\n', "Other line ends."),
        ("class X: pass\n", ""),
        ("", ""),
    ],
)
def test_the_summary_is_the_first_line_of_the_docstring(site: Path, source: str, expected: str) -> None:
    (site / "acme_summary.py").write_bytes(source.encode())
    assert summary("acme_summary:X") == expected


def test_summaries_through_packages_namespaces_and_missing_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The namespace acme_ns has one portion in each folder, and so has its own subfolder inner.
    for folder, module in (("one", "first"), ("two", "second")):
        deep = tmp_path / folder / "acme_ns" / "inner"
        deep.mkdir(parents=True)
        (deep / f"{module}.py").write_text(f'class X:\n    """In {folder}."""\n', encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path / folder)
    (tmp_path / "one" / "acme_flat.py").write_text('class X:\n    """Flat."""\n', encoding="utf-8")
    (tmp_path / "one" / "acme_tail.py").write_text('class X:\n    """Of another."""\n', encoding="utf-8")
    assert summary("acme_ns.inner.first:X") == "In one."
    assert summary("acme_ns.inner.second:X") == "In two."
    assert summary("acme_flat:X") == "Flat."
    for missing in ("acme_gone:X", "acme_ns.inner.third:X", "acme_ns.inner:X", "acme_flat.acme_tail:X"):
        assert summary(missing) == "", missing
    for malformed in ("", ":", "acme_flat", "..:X", "acme_flat:X:Y", "-:X", "sys:X", "math:X"):
        assert summary(malformed) in ("", "Flat."), malformed


def test_a_summary_is_read_through_the_finder_of_an_editable_install(tmp_path: Path) -> None:
    source = tmp_path / "elsewhere"
    source.mkdir()
    (source / "__init__.py").write_text('raise RuntimeError("imported")\n', encoding="utf-8")
    (source / "part.py").write_text('class X:\n    """Mapped."""\n', encoding="utf-8")
    code = f"""
import sys
from importlib.util import spec_from_file_location
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "acme_mapped":
            folder = {str(source)!r}
            return spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
sys.meta_path.append(Finder)
from drivetrain.registry import PluginRef, summary_of
print(summary_of(PluginRef("scheduler", "x", "acme", "1", "acme_mapped.part:X")))
"""
    assert run_python(code).strip() == "Mapped."


def test_the_source_of_our_own_plugins_is_found_whether_installed_or_editable() -> None:
    path = find_source("drivetrain.plugins.scheduler.fcfs")
    assert path is not None
    assert path.parts[-2:] == ("scheduler", "fcfs.py")


# --- loading -------------------------------------------------------------------------------------------------------


def test_a_complete_plugin_loads(site: Path) -> None:
    (site / "acme_fine.py").write_text(FINE, encoding="utf-8")
    assert load(fakes.ref("scheduler", "fine", "acme_fine:Fine")).__name__ == "Fine"


@pytest.mark.parametrize("target", ["nothing", ":X", "module:", "", "a:b.c", "!!", "a:b[extra]", ".a:X", "a b:1x"])
def test_a_malformed_or_absent_target_is_a_load_error(target: str) -> None:
    with pytest.raises(PluginLoadError) as caught:
        load(PluginRef("scheduler", "x", "acme", "1.0", target))
    assert "scheduler/x (acme 1.0)" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("raise ValueError('no good')", "ValueError: no good"),
        ("import acme_that_is_not_there", "ModuleNotFoundError: No module named 'acme_that_is_not_there'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("class Own(BaseException): pass\nraise Own('mine')", "Own: mine"),
        ("def broken(:", "SyntaxError"),
        ("def __getattr__(name): raise OSError('lazy')", "OSError: lazy"),
    ],
)
def test_whatever_an_import_raises_is_a_load_error_with_its_cause(site: Path, source: str, expected: str) -> None:
    (site / "acme_raises.py").write_text(source, encoding="utf-8")
    with pytest.raises(PluginLoadError, match="importing acme_raises failed") as caught:
        load(fakes.ref("scheduler", "x", "acme_raises:X"))
    assert expected in str(caught.value)
    assert caught.value.__cause__ is not None


def test_an_interrupt_while_importing_is_no_load_error(site: Path) -> None:
    (site / "acme_interrupted.py").write_text("raise KeyboardInterrupt", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        load(fakes.ref("scheduler", "x", "acme_interrupted:X"))


def test_a_missing_target_names_the_classes_that_are_there(site: Path) -> None:
    (site / "acme_other.py").write_text(FINE, encoding="utf-8")
    with pytest.raises(PluginLoadError, match=r"module acme_other has no 'Finer'; .*allowed: acme_other:Fine"):
        load(fakes.ref("scheduler", "x", "acme_other:Finer"))


class Outdated(fakes.PlainScheduler):
    contract_version = "2.0"


class NumberedVersion(fakes.PlainScheduler):
    contract_version = 1.0  # type: ignore[assignment]


class NewerMinor(fakes.PlainScheduler):
    contract_version = "1.7"


class OddConfig(fakes.PlainScheduler):
    Config = dict  # type: ignore[assignment]


class OddTier(fakes.PlainScheduler):
    tier = "tuned"  # type: ignore[assignment]


class Unfinished(fakes.Scheduler):
    def limits(self) -> fakes.Limits:
        return fakes.Limits(1, 1)


class TooFew(fakes.PlainScheduler):
    def plan(self) -> fakes.StepPlan:  # type: ignore[override]
        return fakes.StepPlan(())


class TooMany(fakes.PlainScheduler):
    def plan(self, view: fakes.View, extra: int) -> fakes.StepPlan:  # type: ignore[override]
        return fakes.StepPlan(())


class KeywordMissing(fakes.PlainScheduler):
    def plan(self, view: fakes.View, *, needed: int) -> fakes.StepPlan:  # type: ignore[override]
        return fakes.StepPlan(())


class NoMethod(fakes.PlainScheduler):
    plan = 5  # type: ignore[assignment]


class APropertyInstead(fakes.PlainScheduler):
    @property
    def limits(self) -> fakes.Limits:  # type: ignore[override]
        return fakes.Limits(1, 1)


class InstanceProbe(fakes.PlainScheduler):
    def probe(self, context: fakes.ProbeContext) -> fakes.Probe:  # type: ignore[override]
        return fakes.Probe.yes()


class StaticProbe(fakes.PlainScheduler):
    @staticmethod
    def probe(context: fakes.ProbeContext) -> fakes.Probe:
        return fakes.Probe.yes()


class ClassLimits(fakes.PlainScheduler):
    @classmethod
    def limits(cls) -> fakes.Limits:
        return fakes.Limits(1, 1)


class Generous(fakes.PlainScheduler):
    def plan(self, *anything: object, **more: object) -> fakes.StepPlan:
        return fakes.StepPlan(())


class RenamedWithMore(fakes.PlainScheduler):
    def plan(self, state: fakes.View, extra: int = 0) -> fakes.StepPlan:
        return fakes.StepPlan(())


def a_function() -> None:
    """Not a class at all."""


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Outdated, "another version of the contract; found '2.0'; allowed: 1.x"),
        (NumberedVersion, "NumberedVersion.contract_version must be a string MAJOR.MINOR; found 1.0; allowed: 1.0"),
        (NewerMinor, "it needs version 1.7 of the scheduler contract"),
        (OddConfig, "OddConfig.Config must be a subclass of PluginConfig"),
        (OddTier, "OddTier.tier must be a Tier; found 'tuned'"),
        (Unfinished, "Unfinished lacks key, plan"),
        (TooFew, "found \"plan() -> 'fakes.StepPlan'\"; allowed: plan(view: 'View') -> 'StepPlan'"),
        (TooMany, "missing a required argument: 'extra'"),
        (KeywordMissing, "missing a required argument: 'needed'"),
        (NoMethod, "NoMethod.plan can't be called as the contract says: it is not callable; found 5"),
        (APropertyInstead, "APropertyInstead.limits can't be called as the contract says: it is not callable"),
        (InstanceProbe, "InstanceProbe.probe can't be called as the contract says"),
        (a_function, "must be a subclass of drivetrain.contracts.scheduler:Scheduler; found 'function'"),
        (fakes.FakePlatform, "must be a subclass of drivetrain.contracts.scheduler:Scheduler; found 'FakePlatform'"),
        (fakes.Scheduler, "Scheduler lacks key, limits, plan"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_breaks_the_contract_is_refused_with_both_sides(target: type, message: str) -> None:
    with pytest.raises(ContractError) as caught:
        load(fakes.ref("scheduler", "x", target))
    assert message in str(caught.value)
    assert "scheduler/x (fakes 1.0)" in str(caught.value)


@pytest.mark.parametrize("target", [StaticProbe, ClassLimits, Generous, RenamedWithMore])
def test_whatever_can_be_called_as_the_contract_says_is_accepted(target: type) -> None:
    assert load(fakes.ref("scheduler", "x", target)) is target


def test_signatures_are_compared_once_and_again_where_they_did_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fresh(fakes.PlainScheduler):
        pass

    class Wrong(TooFew):
        pass

    compared: list[type] = []
    check = discovery._check_signatures

    def noted(where: str, contract: type, target: type) -> None:
        compared.append(target)
        check(where, contract, target)

    monkeypatch.setattr(discovery, "_check_signatures", noted)
    for _ in range(2):
        discovery.check_contract(fakes.ref("scheduler", "x", Fresh), Fresh)
        with pytest.raises(ContractError, match="can't be called"):
            discovery.check_contract(fakes.ref("scheduler", "x", Wrong), Wrong)
    assert compared == [Fresh, Wrong, Wrong]


@pytest.mark.parametrize("kind", KINDS)
def test_no_contract_class_itself_passes_for_a_plugin(kind: str) -> None:
    """So each kind has at least one method that a plugin must have."""
    contract = contract_class(kind)
    with pytest.raises(ContractError, match="lacks"):
        load(fakes.ref(kind, "x", contract))


@pytest.mark.parametrize("ref", fakes.serving_refs(), ids=lambda ref: f"{ref.kind}-{ref.name}")
def test_the_fakes_of_these_tests_fulfil_their_contracts(ref: PluginRef) -> None:
    started = time.perf_counter()
    assert issubclass(load(ref), contract_class(ref.kind))
    assert time.perf_counter() - started < 1
