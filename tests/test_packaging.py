"""pyproject.toml lists exactly the packages and plugins that exist, and what is installed is what it lists."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import importlib_metadata
import pluggy
import pytest

import drivetrain
from drivetrain.contracts.kinds import KINDS
from drivetrain.errors import MissingDependencyError
from drivetrain.registry import discover

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS: dict[str, Any] = PROJECT["tool"]["setuptools"]
FOLDERS = {"core": "drivetrain", "plugins": "drivetrain.plugins"} | {
    name: f"drivetrain.{name}" for name in ("backends", "kernels")
}
PLUGINS = [
    (group, name, target)
    for group, points in PROJECT["project"]["entry-points"].items()
    for name, target in points.items()
    if group.startswith("drivetrain.")
]


def source_of(module: str) -> Path:
    """The file of one of our modules, found by the layout and not by importing."""
    folder, package = next(
        (folder, package)
        for folder, package in sorted(FOLDERS.items(), key=lambda item: -len(item[1]))
        if module == package or module.startswith(package + ".")
    )
    path = ROOT.joinpath(folder, *module[len(package) :].strip(".").split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_the_package_list_is_complete_and_exact() -> None:
    there = {
        ".".join([package, *path.relative_to(ROOT / folder).parent.parts])
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert sorted(SETUPTOOLS["packages"]) == sorted(there)
    assert SETUPTOOLS["package-dir"] == {package: folder for folder, package in FOLDERS.items()}


def test_every_package_has_an_init_file() -> None:
    assert [name for name in SETUPTOOLS["packages"] if not source_of(name).is_file()] == []


def test_every_data_pattern_finds_a_file() -> None:
    for package, patterns in SETUPTOOLS["package-data"].items():
        for pattern in patterns:
            assert list(source_of(package).parent.glob(pattern)), (package, pattern)


def test_every_file_that_is_no_source_is_covered_by_a_data_pattern() -> None:
    covered = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in source_of(package).parent.glob(pattern)
    }
    there = {
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert sorted(there - covered) == []


@pytest.mark.parametrize(("group", "name", "target"), PLUGINS, ids=lambda value: value.rpartition(":")[2])
def test_every_entry_point_names_a_class_that_exists(group: str, name: str, target: str) -> None:
    module, _, class_name = target.partition(":")
    tree = ast.parse(source_of(module).read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert class_name in defined | imported
    kind = group.removeprefix("drivetrain.").rpartition(".v")[0]
    assert KINDS[kind].group == group


def test_every_kind_has_a_built_in_plugin_and_its_default_among_them() -> None:
    names: dict[str, set[str]] = {}
    for group, name, _ in PLUGINS:
        names.setdefault(group, set()).add(name)
    assert set(names) == {kind.group for kind in KINDS.values()}
    for kind in KINDS.values():
        assert kind.default in {"auto", *names[kind.group]}


def test_what_is_installed_is_what_the_file_lists() -> None:
    """Fails when the installation is older than pyproject.toml: install it again."""
    installed = {
        (KINDS[ref.kind].group, ref.name, ref.target) for ref in discover() if ref.distribution == "drivetrain"
    }
    assert installed == set(PLUGINS)
    assert importlib_metadata.version("drivetrain") == PROJECT["project"]["version"] == drivetrain.__version__


def test_the_kit_is_where_pytest_looks_for_it() -> None:
    assert source_of(PROJECT["project"]["entry-points"]["pytest11"]["drivetrain"]).is_file()


def test_the_command_is_where_the_entry_point_says() -> None:
    module, _, function = PROJECT["project"]["scripts"]["drivetrain"].partition(":")
    tree = ast.parse(source_of(module).read_text(encoding="utf-8"))
    assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_gpu_tests_find_the_packages_of_the_machine_they_are_taken_to(tmp_path: Path) -> None:
    """Also where its Python is one of an environment, as here."""
    spec = importlib.util.spec_from_file_location("offline", ROOT / "tests" / "gpu" / "offline.py")
    assert spec is not None
    assert spec.loader is not None
    offline = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(offline)
    offline.make_environment(tmp_path / "made")
    asked = "import pluggy, sys; print(sys.prefix, pluggy.__file__)"
    done = subprocess.run(
        [tmp_path / "made" / "bin" / "python", "-c", asked], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "made"), pluggy.__file__]


def test_install_lines_in_errors_name_extras_that_exist() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(MissingDependencyError.__name__):
                for keyword in node.keywords:
                    if keyword.arg == "extra" and isinstance(keyword.value, ast.Constant):
                        assert keyword.value.value in {None, *extras}, path
