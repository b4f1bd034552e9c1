"""A provider that can't be made: an error where it was asked for by name, a fallback that is told of under auto.

The model, the C++ source and the missing compiler are real.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain.assembly import ServingStack, build_engine, resolve_parts
from drivetrain.config import load_settings
from drivetrain.errors import KernelBuildError
from drivetrain.kernel_record import Ceilings, save_record
from drivetrain.native import find_compiler
from drivetrain.registry import PluginRef, Registry, discover
from drivetrain.serving.swap import prepare
from support.kernel_records import measured
from support.native_kernels import NativeNorm, WithoutCompiler
from support.tiny_models import save_tiny

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / "llama3"
    save_tiny("llama3", folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def stack_with(folder: Path, plugin: type, kernels: str = "auto", **others: Any) -> ServingStack:
    return build_engine(parts_with(folder, plugin, kernels, **others))


def parts_with(folder: Path, plugin: type, kernels: str = "auto", **others: Any) -> Any:
    ours = [ref for ref in discover() if ref.kind != "kernels" or ref.name == "reference"]
    mine = PluginRef("kernels", "mine", "acme", "1.0", f"{plugin.__module__}:{plugin.__name__}")
    settings = {"model": str(folder), "kernels": kernels, "platform": {"name": "cpu", "threads": 1}, **others}
    return resolve_parts(load_settings(None, settings), registry=Registry([*ours, mine]), leave_out=("frontend",))


def test_a_provider_that_works_serves_what_it_has_and_the_reference_the_rest(folder: Path) -> None:
    stack = stack_with(folder, NativeNorm)
    bindings = stack.selection_dict()["bindings"]
    assert list(bindings["rms_norm"]) == ["mine"]
    assert list(bindings["linear"]) == ["reference"]
    assert stack.engine.metrics.snapshot()["fallbacks"] == 0
    (norm,) = [use for use in stack.selection_dict()["bound"] if use["operation"] == "rms_norm"]
    assert norm["reason"] == "the first in order that covers it"
    assert norm["uses"] == bindings["rms_norm"]["mine"]


def test_under_auto_the_reference_takes_over_with_a_warning_that_is_counted(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stack = stack_with(folder, WithoutCompiler)
    report = stack.selection_dict()
    assert {operation: list(by) for operation, by in report["bindings"].items()} == {
        operation: ["reference"] for operation in report["bindings"]
    }
    (told,) = report["fallbacks"]
    assert told.startswith(
        "kernels 'mine' could not be made; rms_norm by 'reference': native library native-norm: no c++"
    )
    assert stack.parts.report["kernels"].fallback == told
    assert stack.engine.metrics.snapshot()["fallbacks"] == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_asked_for_by_name_it_is_an_error_with_the_reason_and_the_next_move(folder: Path) -> None:
    with pytest.raises(KernelBuildError) as raised:
        stack_with(folder, WithoutCompiler, "mine")
    assert str(raised.value) == (
        "native library native-norm: kernels 'mine' can't make rms_norm: no c++ compiler is here; found 'none of them "
        "on PATH'; allowed: no-such-compiler. Install g++ or clang, or name the compiler by its path."
    )


def test_a_swap_to_what_can_not_be_made_is_an_error_and_one_to_auto_falls_back(folder: Path) -> None:
    stack = stack_with(folder, WithoutCompiler, "reference", attention={"name": "sdpa", "block_size": 4})
    with pytest.raises(KernelBuildError, match="can't make rms_norm"):
        prepare(stack, load_settings(None, {"kernels": "mine"}).parts)
    prepared = prepare(stack, load_settings(None, {"kernels": "auto"}).parts)
    assert "kernels 'mine' could not be made" in str(prepared.parts.report["kernels"].fallback)


def test_what_was_measured_to_be_slower_is_served_by_the_reference_and_the_record_is_cited(folder: Path) -> None:
    parts = parts_with(folder, NativeNorm)
    specs = {binding.spec.operation: binding.spec for binding in build_engine(parts).binder.bindings}
    norm = specs["rms_norm"]
    version = next(f"{ref.distribution} {ref.version}" for ref in discover() if ref.name == "reference")
    figures = [*measured(norm, "mine", 3e-6, version="acme 1.0"), *measured(norm, "reference", 1e-6, version=version)]
    save_record(parts.platform.facts(), figures, Ceilings(1e9, {"float32": 1e9}))
    stack = stack_with(folder, NativeNorm)
    selection = stack.parts.report["kernels"]
    assert selection.chosen.name == "reference"
    assert "'mine' is 0.33x the reference by the measured record of 2026-11-25 (1 of 1 uses)" in selection.reason
    assert stack.selection_dict()["bindings"]["rms_norm"].keys() == {"reference"}
    by_name = stack_with(folder, NativeNorm, "mine")
    assert by_name.selection_dict()["bindings"]["rms_norm"].keys() == {"mine"}


def test_attention_that_can_not_be_built_gives_way_under_auto_and_is_an_error_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that is there and does not work: the engine serves on plain torch, and says why."""
    bad = tmp_path / "bin" / "g++"
    bad.parent.mkdir()
    bad.write_text(
        "#!/bin/sh\ncase $1 in --version) echo broken 1.0;; *) echo 'error: no such header' >&2; exit 1;; esac\n"
    )
    bad.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bad.parent}:/usr/bin:/bin")
    monkeypatch.setattr("drivetrain.kernels.cpu.library._OPENED", {})
    platform = {"name": "cpu", "threads": 1}
    settings = {"model": str(folder), "platform": platform, "precision": "fp32"}
    stack = build_engine(resolve_parts(load_settings(None, settings), leave_out=("frontend",)))
    report = stack.parts.report
    assert report.chosen_names["attention"] == "sdpa"
    assert "'sdpa' is used in place of 'paged-cpu'" in (report["attention"].fallback or "")
    assert any(c.name == "paged-cpu" and c.code == "not_built" for c in report["attention"].candidates)
    assert list(stack.selection_dict()["bindings"]["linear"]) == ["reference"]
    assert stack.engine.metrics.snapshot()["fallbacks"] == 2
    for named in ({"attention": "paged-cpu"}, {"kernels": "cpu"}):
        with pytest.raises(KernelBuildError, match="no such header"):
            build_engine(resolve_parts(load_settings(None, {**settings, **named}), leave_out=("frontend",)))
