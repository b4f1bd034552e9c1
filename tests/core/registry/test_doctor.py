"""Doctor examines plugins that hang, crash, exit, print or break the laws, says so of each, and is harmed by none."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from drivetrain.hardware import NVIDIA, PciDevice
from drivetrain.registry.discovery import PluginRef, discover
from drivetrain.registry.doctor import (
    DoctorReport,
    Level,
    PluginHealth,
    Status,
    examine,
    examine_plugin,
    examine_plugins,
    find_clashes,
    find_compiler,
    match_devices,
    read_versions,
    useful_line,
)

_HEAD = """
import os, signal, subprocess, sys, threading, time
from drivetrain.contracts.plugin import Probe
from drivetrain.contracts.precision import Dtypes, Precision
class Base(Precision):
    def dtypes(self):
        return Dtypes("float32", "float32")
"""

# Each entry: a whole module of a plugin named by the key.
_MODULES = {
    "fine": "class P(Base): pass",
    "refuses": """
class P(Base):
    @classmethod
    def probe(cls, context):
        return Probe.no("no_device", "no such device", wanted="a device", offered="none")
""",
    "raises_on_import": "raise ValueError('this module is broken')",
    "exits_on_import": "sys.exit(3)",
    "vanishes_on_import": "print('bye', file=sys.stderr, flush=True); os._exit(7)",
    "crashes_on_import": "print('about to crash', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs_on_import": "time.sleep(600)",
    "no_such_class": "class Q(Base): pass",
    "no_plugin": "P = 42",
    "hangs_in_probe": """
class P(Base):
    @classmethod
    def probe(cls, context):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        while True: time.sleep(1)
""",
    "raises_in_probe": """
class P(Base):
    @classmethod
    def probe(cls, context):
        return 1 / 0
""",
    "exits_in_probe": """
class P(Base):
    @classmethod
    def probe(cls, context):
        sys.exit("enough")
""",
    "answers_nonsense": """
class P(Base):
    @classmethod
    def probe(cls, context):
        return True
""",
    "prints": "print('welcome to my plugin'); class_made = None\nclass P(Base): pass",
    "fakes_an_answer": 'print(\'{"status": "ok"}\')\nos._exit(0)',
    "changes_environment": "os.environ['SOME_SETTING'] = '1'\nclass P(Base): pass",
    "starts_thread": "threading.Thread(target=time.sleep, args=(1.0,), name='busy').start()\nclass P(Base): pass",
    "leaves_thread": "threading.Thread(target=time.sleep, args=(600,)).start()\nclass P(Base): pass",
    "leaves_process": "subprocess.Popen(['sleep', '600'])\nclass P(Base): pass",
    "raises_in_abilities": """
class P(Base):
    @classmethod
    def abilities(cls):
        raise RuntimeError("not today")
""",
}


def install(site: Path, distribution: str, groups: dict[str, dict[str, str]]) -> None:
    """A distribution's metadata, as pip would leave it: group -> name -> target."""
    info = site / f"{distribution.replace('-', '_')}-1.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
    lines = []
    for group, entries in groups.items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages that this process and its children see."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    importlib.invalidate_caches()


def install_modules(site: Path, names: list[str]) -> tuple[PluginRef, ...]:
    for name in names:
        (site / f"strange_{name}.py").write_text(_HEAD + _MODULES[name])
    install(site, "strange-plugins", {"drivetrain.precision.v1": {name: f"strange_{name}:P" for name in names}})
    refs = tuple(ref for ref in discover("precision") if ref.distribution == "strange-plugins")
    assert {ref.name for ref in refs} == set(names)
    return refs


def examine_module(site: Path, name: str, time_limit_seconds: float = 20.0) -> PluginHealth:
    (ref,) = install_modules(site, [name])
    health = examine_plugin(ref, time_limit_seconds)
    assert health.plugin == ref
    assert f"strange_{name}" not in sys.modules, "examining must not import the plugin here"
    return health


def test_a_sound_plugin_is_ok_and_its_import_is_timed(site: Path) -> None:
    health = examine_module(site, "fine")
    assert (health.status, health.code, health.notes) == (Status.OK, "ok", ())
    assert health.import_seconds is not None
    assert 0 < health.import_seconds < 20


def test_a_refusal_is_kept_with_what_was_wanted_and_offered(site: Path) -> None:
    health = examine_module(site, "refuses")
    assert (health.status, health.code, health.reason) == (Status.REFUSED, "no_device", "no such device")
    assert (health.wanted, health.offered) == ("a device", "none")


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("raises_on_import", "load_failed", "ValueError: this module is broken"),
        ("exits_on_import", "load_failed", "SystemExit: 3"),
        ("vanishes_on_import", "exit", "ended the process with status 7 in its import: bye"),
        ("crashes_on_import", "signal", "was killed by SIGSEGV in its import: about to crash"),
        ("no_such_class", "load_failed", "has no 'P'"),
        ("no_plugin", "load_failed", "must be a subclass of drivetrain.contracts.precision:Precision"),
        ("raises_in_probe", "broken", "ZeroDivisionError"),
        ("exits_in_probe", "broken", "sys.exit('enough')"),
        ("answers_nonsense", "broken", "returned bool instead of a Probe"),
        ("raises_in_abilities", "description_failed", "RuntimeError: not today"),
        ("fakes_an_answer", "exit", "ended the process with status 0 in its import"),
    ],
)
def test_a_broken_plugin_is_reported_with_what_it_did(site: Path, name: str, code: str, said: str) -> None:
    health = examine_module(site, name)
    assert (health.status, health.code) == (Status.BROKEN, code)
    assert said in health.reason


def test_a_plugin_that_hangs_is_stopped_at_the_limit(site: Path) -> None:
    stages = {
        "hangs_on_import": "its import",
        "hangs_in_probe": "its probe",
        "leaves_thread": "answered but did not end",
    }
    refs = install_modules(site, list(stages))
    limit = 6.0
    started = time.monotonic()
    with ThreadPoolExecutor(len(refs)) as pool:
        for health in pool.map(lambda ref: examine_plugin(ref, limit), refs):
            assert (health.status, health.code) == (Status.HUNG, "time_limit")
            assert stages[health.plugin.name] in health.reason
            assert "within 6 s" in health.reason
    assert time.monotonic() - started < 4 * limit


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("prints", "prints on standard output when it is imported or probed: 'welcome to my plugin'"),
        ("changes_environment", "changes the environment when it is imported or probed: SOME_SETTING"),
        ("starts_thread", "starts threads when it is imported or probed: busy"),
        ("leaves_process", "leaves a process running when it is imported or probed"),
    ],
)
def test_breaking_the_law_of_quiet_imports_is_noted(site: Path, name: str, note: str) -> None:
    health = examine_module(site, name)
    assert health.status is Status.OK
    assert note in health.notes
    assert "SOME_SETTING" not in os.environ


def test_what_a_plugin_started_is_gone_afterwards(site: Path) -> None:
    (ref,) = install_modules(site, ["leaves_process"])
    (site / "strange_leaves_process.py").write_text(
        _HEAD + f"child = subprocess.Popen(['sleep', '600'])\nopen({str(site / 'pid')!r}, 'w').write(str(child.pid))\n"
        "class P(Base): pass"
    )
    examine_plugin(ref, 20.0)
    status = Path("/proc", (site / "pid").read_text(), "status")
    deadline = time.monotonic() + 5
    while status.exists() and "zombie" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_bad_plugin_harms_no_other_and_the_order_is_kept(site: Path) -> None:
    refs = install_modules(site, ["crashes_on_import", "fine", "exits_on_import", "refuses"])
    told: list[tuple[int, int | None]] = []
    health = examine_plugins(refs, 20.0, lambda what, done, total, unit="": told.append((done, total)))
    assert {h.plugin.name: h.status for h in health} == {
        "crashes_on_import": Status.BROKEN,
        "fine": Status.OK,
        "exits_on_import": Status.BROKEN,
        "refuses": Status.REFUSED,
    }
    assert [h.plugin for h in health] == list(refs)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


# --- the whole report ----------------------------------------------------------------------------------------------


def findings(report: DoctorReport, level: Level) -> dict[str, str]:
    return {finding.subject: finding.text for finding in report.findings if finding.level is level}


def test_clashes_foreign_versions_and_broken_plugins_are_found(site: Path) -> None:
    refs = install_modules(site, ["fine", "raises_on_import"])
    install(
        site,
        "other-plugins",
        {
            "drivetrain.precision.v1": {"fine": "strange_fine:P"},
            "drivetrain.precision.v9": {"future": "future:P"},
            "drivetrain.coffee.v1": {"espresso": "coffee:P"},
        },
    )
    refs = tuple(ref for ref in discover("precision") if ref.distribution in ("strange-plugins", "other-plugins"))
    report = examine(refs=refs)
    assert [(clash.name, clash.distributions) for clash in report.clashes] == [
        ("fine", ("other-plugins", "strange-plugins"))
    ]
    problems = findings(report, Level.PROBLEM)
    assert problems["precision 'fine'"] == "registered by 2 distributions"
    assert "this module is broken" in problems["precision/raises_on_import"]
    notices = findings(report, Level.NOTICE)
    assert "other-plugins registers future: contract version 9" in notices["drivetrain.precision.v9"]
    assert "unknown kind 'coffee'" in notices["drivetrain.coffee.v1"]
    assert report.has_problems
    assert report.num_problems == 2


def test_a_sound_set_of_plugins_has_no_problem_and_the_report_is_json(site: Path) -> None:
    report = examine(refs=install_modules(site, ["fine", "refuses"]))
    assert findings(report, Level.PROBLEM) == {}
    assert not report.has_problems
    told = json.loads(json.dumps(report.to_dict()))
    assert told["num_problems"] == 0
    assert [entry["status"] for entry in told["plugins"]] == ["ok", "refused"]
    assert told["plugins"][0]["plugin"]["distribution"] == "strange-plugins"
    assert told["devices"]["processor"]["physical_cores"] >= 1
    assert told["versions"]["torch"]["version"]
    assert {compiler["name"] for compiler in told["compilers"]} >= {"g++", "nvcc"}


def test_our_own_platforms_pass_and_tell_the_facts_of_the_device() -> None:
    health = {entry.plugin.name: entry for entry in examine_plugins(discover("platform"), 60.0)}
    assert health["cpu"].status is Status.OK
    assert health["cpu"].facts is not None
    assert health["cpu"].facts["dtypes"] == ["bfloat16", "float32"]
    assert health["cuda"].pci_vendors == (NVIDIA,)
    assert health["cuda"].abilities == ("graph_pieces", "graphs", "peaks", "shares", "streams")
    assert not any(entry.notes for entry in health.values())


def test_versions_tell_required_and_optional_packages() -> None:
    packages = {package.name: package for package in read_versions().packages}
    assert packages["torch"].version is not None
    assert packages["torch"].extra is None
    assert packages["transformers"].extra == "transformers"
    assert "ruff" not in packages


# --- parts ---------------------------------------------------------------------------------------------------------


def platform_health(name: str, status: Status, reason: str) -> PluginHealth:
    ref = PluginRef("platform", name, "drivetrain", "1", "m:P")
    return PluginHealth(ref, status, "code", reason, pci_vendors=(NVIDIA,))


def test_hardware_that_nothing_drives_is_shown_with_what_is_missing() -> None:
    gpu = PciDevice("0000:18:00.0", NVIDIA, 0x2330, 0x030200)
    screen = PciDevice("0000:02:00.0", 0x1A03, 0x2000, 0x030000)
    stranger = PciDevice("0000:03:00.0", 0x1E52, 1, 0x120000)
    refused = platform_health("cuda", Status.REFUSED, "torch was built without CUDA")
    matched = match_devices((gpu, screen, stranger), [refused])
    assert [(m.driven_by, m.missing) for m in matched] == [
        ((), ("cuda: torch was built without CUDA",)),
        ((), ()),
        ((), ("no installed platform plugin drives devices of Tenstorrent",)),
    ]
    (driven,) = match_devices((gpu,), [refused, platform_health("better", Status.OK, "fine")])
    assert (driven.driven_by, driven.missing) == (("better",), ())


def test_one_name_in_two_kinds_is_no_clash() -> None:
    ref = PluginRef("partitioner", "none", "drivetrain", "1", "m:P")
    assert find_clashes([ref, dataclasses.replace(ref, kind="checkpoint")]) == ()


def test_a_compiler_is_found_with_the_line_of_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, script in {
        "goodcc": "echo 'goodcc: a compiler'; echo 'Copyright (c) 2005-2025'; echo 'release 13.0, V13.0.88'",
        "badcc": "echo 'no license 1.0' >&2; exit 1",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    assert find_compiler("goodcc").version == "release 13.0, V13.0.88"
    assert find_compiler("badcc").path == str(tmp_path / "badcc")
    assert find_compiler("badcc").version is None
    assert find_compiler("no-such-compiler-anywhere").path is None


def test_the_most_telling_line_of_an_error_is_shown() -> None:
    assert useful_line("\n\nlibfoo: cannot start\nmore\n") == "libfoo: cannot start"
    assert useful_line("Traceback (most recent call last):\n  File x\nValueError: no\n\n") == "ValueError: no"
    assert useful_line(" \n") == ""
