"""The laws of the project that can be read off its source, and the cost of importing it."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

import drivetrain
from support.distributions import run_python

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("core", "plugins", "backends", "kernels")
OTHERS = re.compile(r"^drivetrain\.(plugins|backends|kernels)(\.|:|$)")
LONGEST_FUNCTION_LINES = 100


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def named_modules(tree: ast.AST, package: str) -> Iterator[tuple[ast.AST, str]]:
    """Every module that a file imports, and every string in it that could be handed to import_module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: -node.level + 1 or None] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield node, module
            yield from ((node, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node, node.value


def test_the_core_imports_no_plugin_no_backend_and_no_kernel() -> None:
    found = []
    for path in sources("core"):
        package = ".".join(["drivetrain", *path.relative_to(ROOT / "core").parent.parts])
        for node, module in named_modules(ast.parse(path.read_text(encoding="utf-8")), package):
            if OTHERS.match(module):
                found.append(f"{place(path, node)}: {module}")
    assert sorted(set(found)) == []


def test_the_check_above_sees_every_way_to_import() -> None:
    ways = (
        "import drivetrain.plugins.x",
        "from drivetrain.backends import cpu",
        "from drivetrain import kernels",
        "from .. import plugins",
        "from ..kernels.reference import x",
        "import_module('drivetrain.plugins.x')",
        "target = 'drivetrain.kernels.reference:X'",
        "def f():\n    import drivetrain.kernels",
    )
    for way in ways:
        assert any(OTHERS.match(module) for _, module in named_modules(ast.parse(way), "drivetrain.serving")), way
    fine = "from drivetrain.contracts.kernels import X\nfrom . import plugins\nname = 'drivetrain.kernels_of_mine'"
    assert not any(OTHERS.match(module) for _, module in named_modules(ast.parse(fine), "drivetrain.cli"))


def test_the_contracts_import_no_torch_at_run_time() -> None:
    modules = [f"drivetrain.contracts.{path.stem}" for path in sources("core/contracts") if path.stem != "__init__"]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\nprint('torch' in sys.modules)"
    )
    assert len(modules) > 10
    assert run_python(code).strip() == "False"


def test_importing_drivetrain_is_fast_and_imports_no_torch() -> None:
    code = """
import json, sys, time
started = time.perf_counter()
import drivetrain
print(json.dumps([time.perf_counter() - started, "torch" in sys.modules, "drivetrain.plugins" in sys.modules]))
"""
    runs = [json.loads(run_python(code)) for _ in range(5)]
    assert statistics.median(seconds for seconds, _, _ in runs) < 0.1
    assert not any(torch or plugins for _, torch, plugins in runs)


def test_checking_a_configuration_and_listing_plugins_import_no_torch(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\nscheduler: {name: fcfs, max_running: 3}\nengine: {kv_memory: 1GiB}\n", encoding="utf-8")
    code = f"""
import sys
from drivetrain.config import load_settings
from drivetrain.observers import Observers
from drivetrain.registry import discover, foreign_groups, summary_of
load_settings({str(file)!r}, {{"attention": "sdpa"}}, ["scheduler.max_running=4"])
Observers()
assert all(summary_of(ref) for ref in discover())
foreign_groups()
print("torch" in sys.modules)
"""
    assert run_python(code).strip() == "False"


def test_the_public_surface_is_sorted_complete_and_importable() -> None:
    names = drivetrain.__all__
    assert names == sorted(names, key=lambda name: (name.startswith("__"), not name.isupper(), name))
    assert len(set(names)) == len(names)
    assert dir(drivetrain) == sorted(names)
    for name in names:
        assert getattr(drivetrain, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = drivetrain.nothing


def test_whatever_a_module_of_the_core_exports_is_there() -> None:
    for path in sources("core"):
        relative = path.relative_to(ROOT / "core").with_suffix("")
        if "__all__" not in path.read_text(encoding="utf-8") or path.name == "probe_child.py":
            continue
        parts = [part for part in relative.parts if part != "__init__"]
        module = importlib.import_module(".".join(["drivetrain", *parts]))
        assert [name for name in module.__all__ if not hasattr(module, name)] == []


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_no_function_is_longer_than_a_hundred_lines() -> None:
    long = [
        f"{place(path, node)}: {node.name} has {node.end_lineno - node.lineno + 1}"
        for path in sources(*FOLDERS)
        for node in functions(path)
        if node.end_lineno is not None and node.end_lineno - node.lineno >= LONGEST_FUNCTION_LINES
    ]
    assert long == []


def does_nothing(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def test_no_exception_is_swallowed() -> None:
    """No bare ``except``, no handler that does nothing, no ``suppress`` of everything."""
    found = []
    for path in sources(*FOLDERS):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and (node.type is None or all(map(does_nothing, node.body))):
                found.append(place(path, node))
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
                if any(ast.unparse(argument) in ("Exception", "BaseException") for argument in node.args):
                    found.append(place(path, node))
    assert found == []


def test_every_module_of_the_project_has_a_docstring() -> None:
    missing = [
        place(path, ast.Pass()) for path in sources(*FOLDERS) if not ast.get_docstring(ast.parse(path.read_bytes()))
    ]
    assert missing == []


def test_every_public_method_of_a_contract_is_documented() -> None:
    missing = []
    for path in sources("core/contracts"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ClassDef):
                missing += [
                    f"{place(path, item)}: {node.name}.{item.name}"
                    for item in node.body
                    if isinstance(item, ast.FunctionDef)
                    and not item.name.startswith("_")
                    and any(ast.unparse(decorator) == "abstractmethod" for decorator in item.decorator_list)
                    and not ast.get_docstring(item)
                ]
    assert missing == []


def test_nothing_of_the_project_is_importable_under_its_folders_name() -> None:
    code = """
import importlib.util
print([name for name in ("core", "plugins", "backends", "kernels") if importlib.util.find_spec(name)])
"""
    assert run_python(code).strip() == "[]"


def test_the_laws_look_at_the_package_that_is_installed() -> None:
    installed = Path(inspect.getfile(drivetrain)).parent
    ours = {path.relative_to(ROOT / "core") for path in sources("core")}
    theirs = {path.relative_to(installed) for path in installed.rglob("*.py")}
    assert ours <= theirs
