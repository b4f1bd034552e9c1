"""Doctor finds copies that hide each other, leftovers, files that are gone, and names that match nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from drivetrain.config import load_settings
from drivetrain.registry import PluginRef, Registry, discover
from drivetrain.registry.doctor import Level, Status, examine, examine_plugin, find_unmatched
from drivetrain.registry.installation import find_copies, find_shadowed, find_stale
from drivetrain.registry.lock import write_lock
from support import fake_plugins as fakes
from support.distributions import write_distribution

SCHEDULER = "drivetrain.scheduler.v1"
FINE = """
from drivetrain.contracts.scheduler import Limits, Scheduler, StepPlan
class P(Scheduler):
    '''Schedules fine.'''
    def limits(self):
        return Limits(8, 2)
    def key(self, request):
        return (request.sequence_number,)
    def plan(self, view):
        return StepPlan(())
"""
GROUPS = {SCHEDULER: {"fine": "acme_fine:P"}}


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two folders at the head of the path, the first before the second."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (second, first):
        folder.mkdir()
        monkeypatch.syspath_prepend(folder)
    return first, second


def shadowed(name: str) -> list[tuple[str, str]]:
    found = find_shadowed(find_copies())
    return [(s.used.version, s.hidden.version) for s in found if s.used.distribution.lower() == name]


def own(name: str) -> tuple[PluginRef, ...]:
    return tuple(ref for ref in discover() if ref.distribution == name)


# --- copies --------------------------------------------------------------------------------------------------------


def test_a_copy_of_another_version_that_is_hidden_is_found(sites: tuple[Path, Path]) -> None:
    write_distribution(sites[0], "Acme_Kit", GROUPS, {"acme_fine.py": FINE}, version="2.0")
    write_distribution(sites[1], "acme-kit", GROUPS, {"acme_fine.py": FINE}, version="1.0")
    assert shadowed("acme_kit") == [("2.0", "1.0")]
    (finding,) = [f for f in examine(refs=own("Acme_Kit")).findings if f.subject == "Acme_Kit"]
    assert finding.level is Level.PROBLEM
    assert f"Acme_Kit 2.0 in {sites[0]}" in finding.text
    assert f"hides the copy in {sites[1] / 'acme_kit-1.0.dist-info'}, which is version 1.0" in finding.text


def test_two_versions_in_one_folder_are_found(sites: tuple[Path, Path]) -> None:
    """What an interrupted upgrade leaves behind."""
    for version in ("1.0", "2.0"):
        write_distribution(sites[0], "acme-kit", GROUPS, version=version)
    assert len(shadowed("acme-kit")) == 1


def test_equal_copies_and_the_same_folder_twice_are_no_finding(
    sites: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for site in sites:
        write_distribution(site, "acme-kit", GROUPS)
    monkeypatch.syspath_prepend(sites[0])
    assert shadowed("acme-kit") == []
    assert shadowed("drivetrain") == []


def egg_info(folder: Path, version: str, groups: dict[str, dict[str, str]]) -> None:
    info = write_distribution(folder, "acme-kit", groups, version=version)
    (info / "METADATA").rename(info / "PKG-INFO")
    info.rename(folder / "acme_kit.egg-info")


def test_an_egg_info_beside_its_sources_is_a_finding_only_when_it_says_something_else(sites: tuple[Path, Path]) -> None:
    write_distribution(sites[1], "acme-kit", GROUPS)
    egg_info(sites[0], "1.0", GROUPS)
    assert shadowed("acme-kit") == []
    (sites[0] / "acme_kit.egg-info" / "entry_points.txt").write_text(f"[{SCHEDULER}]\nold = acme_old:P\n")
    assert shadowed("acme-kit") == [("1.0", "1.0")]
    texts = [f.text for f in examine(refs=()).findings if f.subject == "acme-kit"]
    assert "which registers other plugins" in texts[0]


def test_what_an_interrupted_pip_leaves_is_found(sites: tuple[Path, Path]) -> None:
    write_distribution(sites[0], "acme-kit", GROUPS)
    info = write_distribution(sites[1], "acme-kit", GROUPS)
    info.rename(info.with_name("~cme_kit-1.0.dist-info"))
    (finding,) = [f for f in examine(refs=()).findings if f.subject == "acme-kit"]
    assert "~cme_kit-1.0.dist-info is left over from an interrupted pip" in finding.text
    assert finding.hint.startswith("Delete ")


# --- files ---------------------------------------------------------------------------------------------------------


def test_an_entry_point_whose_module_is_gone_is_found(sites: tuple[Path, Path]) -> None:
    groups = {SCHEDULER: {"fine": "acme_fine:P", "gone": "acme_kit.gone:P"}}
    write_distribution(sites[0], "acme-kit", groups, {"acme_fine.py": FINE, "acme_kit/__init__.py": ""})
    (stale,) = find_stale(own("acme-kit"))
    assert stale.missing == ("scheduler/gone: no module acme_kit.gone",)
    (finding,) = [f for f in examine(refs=own("acme-kit")).findings if f.subject == "acme-kit"]
    assert finding.text == "1.0 is installed, but not whole: scheduler/gone: no module acme_kit.gone"
    assert "pip install --force-reinstall acme-kit" in finding.hint


def test_files_of_the_record_that_are_gone_are_found(sites: tuple[Path, Path]) -> None:
    info = write_distribution(sites[0], "acme-kit", GROUPS, {"acme_fine.py": FINE})
    lines = ["acme_fine.py,sha256=x,1", "acme_data/one.bin,sha256=x,1", "acme_data/two.bin,,", "__pycache__/a.pyc,,"]
    (info / "RECORD").write_text("\n".join(lines))
    (stale,) = find_stale(own("acme-kit"))
    assert stale.missing == ("2 of the 3 files in its RECORD, first acme_data/one.bin",)


def test_what_is_whole_is_no_finding() -> None:
    assert find_stale(own("drivetrain")) == []


# --- contracts -----------------------------------------------------------------------------------------------------


def test_a_plugin_for_a_newer_minor_is_told_with_the_pip_command(sites: tuple[Path, Path]) -> None:
    write_distribution(sites[0], "acme-kit", GROUPS, {"acme_fine.py": FINE + "    contract_version = '1.9'\n"})
    health = examine_plugin(own("acme-kit")[0], 20.0)
    assert (health.status, health.code) == (Status.BROKEN, "contract_mismatch")
    assert "it needs version 1.9 of the scheduler contract" in health.reason
    (finding,) = [f for f in examine(refs=own("acme-kit")).findings if f.subject == "scheduler/fine"]
    assert finding.hint == "Run: pip install --upgrade drivetrain"


def test_what_a_plugin_still_uses_though_it_is_deprecated_is_a_notice(sites: tuple[Path, Path]) -> None:
    warns = (
        "from drivetrain.contracts.versions import warn_deprecated\n"
        "warn_deprecated('reset()', since='0.2', removal='0.4', instead='use clear()', used_by=__name__)\n"
    )
    write_distribution(sites[0], "acme-kit", GROUPS, {"acme_fine.py": warns + FINE})
    (finding,) = [f for f in examine(refs=own("acme-kit")).findings if f.subject == "scheduler/fine"]
    assert finding.level is Level.NOTICE
    assert "reset() is deprecated since drivetrain 0.2 and will be removed in 0.4: use clear()" in finding.text
    assert "Still used by acme-kit 1.0" in finding.text


# --- a configuration's names ---------------------------------------------------------------------------------------


def unmatched(**options: object) -> list[tuple[str, str]]:
    registry = Registry([fakes.ref("scheduler", "plain", fakes.PlainScheduler)])
    return [(entry.setting, entry.text) for entry in find_unmatched(load_settings(None, options), registry)]


def test_names_that_match_are_no_finding() -> None:
    assert unmatched(scheduler="plain", attention="auto", plugins={"allow": ["Fakes"]}) == []


def test_names_of_parts_and_distributions_that_match_nothing_are_found() -> None:
    found = unmatched(scheduler="plan", plugins={"allow": ["fakes", "acme"]})
    assert found == [
        ("command line: scheduler", "no installed plugin of kind 'scheduler' is named 'plan'; there are: plain, auto"),
        ("plugins.allow", "no installed distribution 'acme' registers a plugin"),
    ]
    ((where, text),) = unmatched(scheduler="plain", plugins={"allow": ["drivetrain"]})[:1]
    assert where == "command line: scheduler"
    assert "plugins.allow does not name its distribution" in text


def test_a_lock_that_differs_or_is_not_there_is_found(tmp_path: Path, sites: tuple[Path, Path]) -> None:
    file = tmp_path / "plugins.lock"
    assert "can't read the lock file" in unmatched(plugins={"lock": str(file)})[0][1]
    write_lock(file)
    assert unmatched(plugins={"lock": str(file)}) == []
    write_distribution(sites[0], "acme-kit", GROUPS)
    assert unmatched(plugins={"lock": str(file)}) == [
        ("plugins.lock", "acme-kit is locked as (absent), and installed is 1.0 without RECORD")
    ]
