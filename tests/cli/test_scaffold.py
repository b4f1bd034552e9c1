"""``drivetrain plugins new``: the package of a plugin of any kind, which is found, loads and does its work."""

from __future__ import annotations

import json
import keyword
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain.cli.scaffold import Scaffold
from drivetrain.contracts.kinds import KINDS
from drivetrain.errors import ConfigError, UnknownPluginError
from drivetrain.registry import discover
from drivetrain.testing import SUITES
from support.clean_environment import CleanEnvironment, build_wheels
from support.distributions import run_python, write_distribution

Cli = Callable[..., Any]

NAME = "acme-one"

LOAD_ALL = """
import json, warnings
warnings.simplefilter("error")
from drivetrain.contracts.plugin import Probe, ProbeContext
from drivetrain.registry import Registry, discover, load, summary_of
found = {}
for ref in discover():
    if ref.name == "acme-one":
        plugin = load(ref)
        made = plugin(plugin.Config())
        assert isinstance(plugin.probe(ProbeContext()), Probe)
        fields = plugin.Config.model_fields
        assert fields and all(field.description for field in fields.values()), ref
        found[ref.kind] = [type(made).__name__, summary_of(ref), ref.distribution]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> folder of a generated package."""
    root = tmp_path_factory.mktemp("scaffold")
    made = {}
    for kind in KINDS:
        scaffold = Scaffold(kind, NAME)
        made[kind] = root / scaffold.distribution
        scaffold.write(made[kind])
    return made


def project(folder: Path) -> dict[str, Any]:
    """The table [project] of a package."""
    table: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_has_everything_that_publishing_needs(packages: dict[str, Path], kind: str) -> None:
    folder = packages[kind]
    table = project(folder)
    assert table["entry-points"].keys() == {KINDS[kind].group}
    ((name, target),) = table["entry-points"][KINDS[kind].group].items()
    module, _, class_name = target.partition(":")
    source = folder.joinpath("src", *module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    assert name == NAME
    assert f"class {class_name}(" in source
    assert any(line.startswith("drivetrain>=") for line in table["dependencies"])
    assert table["optional-dependencies"]["test"] == ["drivetrain[test]"]
    package = module.partition(".")[0]
    for file in ("README.md", "LICENSE", ".github/workflows/test.yml", f"src/{package}/py.typed"):
        assert (folder / file).is_file(), file
    tests = (folder / "tests" / "test_conformance.py").read_text(encoding="utf-8")
    suite = next((name for name, of in SUITES.items() if of == kind), "Suite")
    assert f"class Test{class_name}({suite}):" in tests
    for path in folder.rglob("*"):
        if path.is_file():
            assert "$" not in path.read_text(encoding="utf-8").replace("$ ", "").replace("${{ matrix.python }}", ""), (
                path
            )


def test_every_package_is_found_loads_and_keeps_its_contract(packages: dict[str, Path], tmp_path: Path) -> None:
    for kind, folder in packages.items():
        table = project(folder)
        write_distribution(tmp_path, table["name"], table["entry-points"], version=table["version"])
        shutil.copytree(folder / "src", tmp_path, dirs_exist_ok=True)
        assert kind in table["keywords"]
    found = json.loads(run_python(LOAD_ALL, tmp_path))
    assert found.keys() == KINDS.keys()
    for kind, (class_name, summary, distribution) in found.items():
        assert class_name == Scaffold(kind, NAME).class_name
        assert summary.endswith(".")
        assert distribution == f"drivetrain-{kind}-acme-one"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["a", "x1", "layer", "plugin", "config", "a-b_c-3", "z" * 40])
def test_no_name_makes_code_that_does_not_compile_or_hides_another(kind: str, name: str) -> None:
    scaffold = Scaffold(kind, name)
    source = scaffold.files[f"src/{scaffold.package_name}/{kind}.py"]
    compile(source, f"{kind}.py", "exec")
    assert source.count(f"class {scaffold.class_name}(") == 1
    assert source.count(scaffold.class_name) == 1
    assert scaffold.class_name.isidentifier()
    assert not keyword.iskeyword(scaffold.package_name)


def test_a_package_name_of_ones_own_is_used_throughout() -> None:
    scaffold = Scaffold("scheduler", "shortest", "acme_scheduling")
    assert scaffold.distribution == "acme-scheduling"
    assert "src/acme_scheduling/scheduler.py" in scaffold.files
    assert 'shortest = "acme_scheduling.scheduler:ShortestScheduler"' in scaffold.files["pyproject.toml"]


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_names_the_files_and_the_next_step(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = cli("plugins", "new", "scheduler", "shortest")
    assert shown.status == 0, shown.err
    written = [Path(line) for line in shown.out.splitlines()]
    assert all(path.is_file() for path in written)
    assert sorted(written) == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert "cd drivetrain-scheduler-shortest" in shown.err
    folder = tmp_path / "deep" / "down"
    assert cli("plugins", "new", "source", "shelf", "--folder", folder, "--package", "shelf_models").status == 0
    assert (folder / "src" / "shelf_models" / "source.py").is_file()


def test_nothing_that_exists_is_touched(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    shown = cli("plugins", "new", "scheduler", "shortest", "--folder", folder)
    assert shown.status == 1
    assert "something at this place already" in shown.error
    assert [path.read_text() for path in folder.iterdir()] == ["mine"]
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert cli("plugins", "new", "scheduler", "shortest", "--folder", tmp_path / "dangling").status == 1


def test_a_folder_that_cannot_be_made_is_one_clear_error(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shown = cli("plugins", "new", "scheduler", "shortest", "--folder", tmp_path / "file" / "below")
    assert shown.status == 1
    assert shown.error.startswith("error: ")
    assert len(shown.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "name", ["", "A", "two words", "-x", "x-", "a--b", "1st", "é", "a/b", "../x", "auto", "a.b", "z" * 41, "$name"]
)
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not a name for a plugin"):
        Scaffold("attention", name)


@pytest.mark.parametrize("package", ["", "A", "a-b", "class", "_", "json", "drivetrain", "a.b", "../x"])
def test_a_bad_package_name_is_refused(package: str) -> None:
    with pytest.raises(ConfigError):
        Scaffold("attention", NAME, package)


def test_an_unknown_kind_is_told_the_nearest(cli: Cli) -> None:
    with pytest.raises(UnknownPluginError, match="Did you mean 'attention'"):
        Scaffold("atention", NAME)
    shown = cli("plugins", "new", "atention", NAME)
    assert (shown.status, len(shown.err.splitlines())) == (1, 1)


def test_a_name_that_is_taken_is_refused() -> None:
    for ref in discover():
        with pytest.raises(ConfigError, match=f"{ref.distribution} {ref.version}"):
            Scaffold(ref.kind, ref.name)


# --- style, types, and the packages installed ------------------------------------------------------------------------


@pytest.mark.slow
def test_the_code_is_in_the_house_style(packages: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    import subprocess

    folders = [str(folder) for folder in packages.values()]
    for words in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *words, "--no-cache", *folders], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_package_is_built_installed_and_passes_the_kit(packages: dict[str, Path], tmp_path: Path) -> None:
    """From nothing to a wheel in a clean environment, for every kind; the package's own tests run there."""
    wheels = build_wheels(list(packages.values()), tmp_path / "wheels")
    assert len(wheels) == len(KINDS)
    environment = CleanEnvironment(tmp_path / "environment")
    environment.install(wheels)
    listed = json.loads(environment.drivetrain("plugins", "list", "--json").stdout)
    assert {row["kind"] for row in listed if row["name"] == NAME} == set(KINDS)
    for kind in KINDS:
        shown = environment.drivetrain("plugins", "info", f"{kind}/{NAME}", "--json")
        assert shown.returncode == 0, shown.stderr
        assert Path(json.loads(shown.stdout)["target"].partition(":")[0]).name.endswith(kind)
    folders = [folder / "tests" for folder in packages.values()]
    done = environment.run(
        *("-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-W", "error"),
        *("--rootdir", tmp_path, "-c", "/dev/null", *folders),
        timeout_seconds=800,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
