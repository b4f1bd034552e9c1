"""A lock holds what registers plugins; whatever differs afterwards is refused with a table, before it is loaded."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from drivetrain.config import load_settings
from drivetrain.errors import ConfigError, PluginError
from drivetrain.registry import lock as locking
from drivetrain.registry.differences import DifferencesError
from drivetrain.registry.lock import check_lock, compare_lock, read_installed, read_lock, write_lock
from support.distributions import write_distribution

SCHEDULER = "drivetrain.scheduler.v1"
MODULES = {"acme_locked/__init__.py": "", "acme_locked/part.py": "X = 1\n"}


def record_line(folder: Path, file: str) -> str:
    content = (folder / file).read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{file},sha256={digest},{len(content)}"


def install(
    folder: Path,
    name: str = "acme-locked",
    version: str = "1.0",
    modules: Mapping[str, str] = MODULES,
    *more: str,
    groups: Mapping[str, Mapping[str, str]] | None = None,
) -> Path:
    """A distribution as pip leaves it, with a RECORD; returns its dist-info folder. more: other lines of the RECORD."""
    info = write_distribution(folder, name, groups or {SCHEDULER: {name: "acme_locked.part:X"}}, modules, version)
    (info / "INSTALLER").write_text("pip\n")
    files = [*modules, f"{info.name}/METADATA", f"{info.name}/entry_points.txt", f"{info.name}/INSTALLER"]
    lines = [record_line(folder, file) for file in files]
    (info / "RECORD").write_text("\n".join([*lines, *more, f"{info.name}/RECORD,,"]) + "\n")
    return info


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "plugins.lock"


# --- what is locked ------------------------------------------------------------------------------------------------


def test_everything_that_registers_plugins_is_locked_and_nothing_else(site: Path, file: Path) -> None:
    install(site)
    install(site, "watcher", groups={"drivetrain.observer": {"w": "acme_locked"}})
    install(site, "bystander", groups={"console_scripts": {"b": "acme_locked:b"}})
    written = write_lock(file)
    assert {"acme-locked", "watcher", "drivetrain"} <= set(written)
    assert "bystander" not in written
    assert read_lock(file) == written == read_installed()
    assert written["acme-locked"].version == "1.0"
    assert len(written["acme-locked"].record or "") == 64
    check_lock(file)


def test_an_editable_distribution_is_locked_by_its_version_and_marked(site: Path, file: Path) -> None:
    info = install(site)
    (info / "direct_url.json").write_text('{"dir_info": {"editable": true}, "url": "file:///somewhere"}')
    assert write_lock(file)["acme-locked"] == locking.LockedDistribution("1.0", None, True)
    assert json.loads(file.read_text())["distributions"]["acme-locked"]["editable"] is True
    (site / "acme_locked" / "part.py").write_text("X = 2\n")
    check_lock(file)


def test_a_distribution_without_a_record_is_locked_by_its_version(site: Path, file: Path) -> None:
    write_distribution(site, "bare", {SCHEDULER: {"bare": "bare:X"}})
    assert str(write_lock(file)["bare"]) == "1.0 without RECORD"
    check_lock(file)


def test_one_wheel_has_one_hash_on_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the installer adds differs from machine to machine: scripts, bytecode, its own notes, the order of lines."""
    hashes = []
    for name, more in (
        ("one", ("../../../bin/acme,sha256=AAAA,219", "acme_locked/__pycache__/part.cpython-311.pyc,,")),
        ("two", ("../../../bin/acme,sha256=BBBB,305",)),
    ):
        folder = tmp_path / name
        info = install(folder, "acme-locked", "1.0", MODULES, *more)
        if name == "two":
            record = info / "RECORD"
            record.write_text("\n".join(reversed(record.read_text().splitlines())) + "\n")
            (info / "INSTALLER").write_text("uv\n")
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            hashes.append(read_installed()["acme-locked"].record)
    assert hashes[0] == hashes[1]


# --- what is refused -----------------------------------------------------------------------------------------------


def differing(file: Path) -> dict[str, tuple[str, str]]:
    return {d.path: (d.ours, d.theirs) for d in compare_lock(read_lock(file))}


def test_another_version_is_refused_with_a_table(site: Path, file: Path) -> None:
    info = install(site)
    write_lock(file)
    for path in info.iterdir():
        path.unlink()
    info.rmdir()
    install(site, version="1.1")
    with pytest.raises(DifferencesError) as caught:
        check_lock(file)
    head, row = caught.value.table.splitlines()
    assert head.split() == ["distribution", "locked", "installed"]
    assert row.split()[:2] == ["acme-locked", "1.0"]
    assert row.split()[3] == "1.1"
    assert str(caught.value) == f"{caught.value.line}\n{caught.value.table}"
    assert caught.value.line.startswith(f"{file}: 1 of the distributions that register plugins differ")
    assert "drivetrain plugins lock --file" in caught.value.line


def test_what_came_and_what_went_is_refused(site: Path, file: Path) -> None:
    info = install(site)
    write_lock(file)
    install(site, "newcomer")
    (info / "entry_points.txt").unlink()
    found = differing(file)
    assert found["newcomer"][0] == "(absent)"
    assert found["acme-locked"][1] == "(absent)"
    assert set(found) == {"newcomer", "acme-locked"}


def test_another_build_of_the_same_version_is_refused(site: Path, file: Path) -> None:
    install(site)
    write_lock(file)
    (site / "acme_locked-1.0.dist-info" / "RECORD").write_text(
        record_line(site, "acme_locked/part.py").replace("sha256=", "sha256=x") + "\n"
    )
    ((ours, theirs),) = differing(file).values()
    assert ours.split()[0] == theirs.split()[0] == "1.0"
    assert ours != theirs


@pytest.mark.parametrize("harm", ["changed", "gone"])
def test_a_file_that_was_changed_after_it_was_installed_is_refused(site: Path, file: Path, harm: str) -> None:
    install(site)
    write_lock(file)
    part = site / "acme_locked" / "part.py"
    part.write_text("X = 2\n") if harm == "changed" else part.unlink()
    assert differing(file)["acme-locked"][1] == "1.0, acme_locked/part.py changed"
    with pytest.raises(
        PluginError, match=r"differs from its own RECORD \(acme-locked: 1.0, acme_locked/part.py changed"
    ):
        write_lock(file)


def test_an_install_that_became_editable_is_refused(site: Path, file: Path) -> None:
    info = install(site)
    write_lock(file)
    (info / "direct_url.json").write_text('{"dir_info": {"editable": true}}')
    assert differing(file)["acme-locked"][1] == "1.0 editable"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "nonsense",
        '{"format": 2, "distributions": {}}',
        '{"format": 1}',
        '{"format": 1, "distributions": []}',
        '{"format": 1, "distributions": {"a": {}}}',
        '{"format": 1, "distributions": {"a": {"version": 1, "record": null, "editable": false}}}',
        '{"format": 1, "distributions": {"a": {"version": "1", "record": null, "editable": 1}}}',
        "[" * 5000,
    ],
)
def test_what_is_no_lock_file_is_an_error_with_the_next_step(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"no lock file of Drivetrain.*drivetrain plugins lock"):
        check_lock(file)


def test_a_lock_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't read the lock file: No such file"):
        check_lock(tmp_path / "none")
    with pytest.raises(ConfigError, match="can't write the lock file"):
        write_lock(tmp_path / "no-such-folder" / "plugins.lock")


@pytest.mark.parametrize("content", ["nonsense", "[]", '{"dir_info": null}', '{"dir_info": {"editable": "yes"}}'])
def test_an_odd_direct_url_does_not_pass_for_editable(site: Path, content: str) -> None:
    (install(site) / "direct_url.json").write_text(content)
    if content == "nonsense":
        with pytest.raises(PluginError, match=r"acme-locked: its direct_url.json is no JSON"):
            read_installed()
    else:
        assert not read_installed()["acme-locked"].is_editable


# --- the setting ---------------------------------------------------------------------------------------------------


def test_the_setting_is_read_from_the_file_and_replaced_by_an_option(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("plugins: {lock: one.lock, allow: [drivetrain]}\n")
    settings = load_settings(config)
    assert (settings.lock, settings.allow) == ("one.lock", ("drivetrain",))
    settings = load_settings(config, {"plugins": {"lock": "two.lock"}})
    assert (settings.lock, settings.allow) == ("two.lock", ("drivetrain",))
    config.write_text("plugins: {lock: one.lock}\n")
    assert load_settings(config).allow is None


@pytest.mark.parametrize(("value", "found"), [("", "nothing"), ("[a]", "['a']"), ("true", "True"), ("''", "''")])
def test_a_lock_that_is_no_name_is_refused(tmp_path: Path, value: str, found: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"plugins:\n  lock: {value}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:2: plugins.lock takes the name of a file") as caught:
        load_settings(config)
    assert found in str(caught.value)


def test_resolving_with_a_lock_that_differs_loads_nothing(site: Path, file: Path) -> None:
    from drivetrain.assembly import resolve_parts
    from drivetrain.registry import Registry

    write_lock(file)
    install(site, modules={"acme_locked/__init__.py": "", "acme_locked/part.py": "raise RuntimeError('loaded')\n"})
    settings = load_settings(None, {"plugins": {"lock": str(file)}})
    with pytest.raises(DifferencesError, match="acme-locked"):
        resolve_parts(settings, registry=Registry([]), fetch=False)
