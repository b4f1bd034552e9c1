"""Triton's interpreter in a process of its own: it has to be on before Triton is imported. It is slow, so that suites
are thinned out; ``TRITON_INTERPRET=1 drivetrain plugins test kernels/triton`` runs them whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest

from drivetrain.contracts.attention import AttentionBackend
from drivetrain.testing.kernel_oracle import Case
from drivetrain.testing.run import Outcome, Report, Result, Target, run_suites
from drivetrain.testing.suite import Suite
from drivetrain.testing.suites.attention import HEADS, AttentionSuite
from drivetrain.testing.suites.kernels import ORACLES, KernelsSuite
from support.quick_interpreter import quicken


def _why_not() -> str | None:
    if find_spec("triton") is None:
        return "there is no Triton for this machine"
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of Triton before 3.7 does not work with numpy 2.4"
    return None


has_triton = pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton for this machine")
has_interpreter = pytest.mark.skipif(_why_not() is not None, reason=str(_why_not()))

INTERPRETER = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
if os.environ.get("TRITON_INTERPRET") == "1" and _why_not() is None:  # in a process that runs suites
    quicken()

TESTS_FOLDER = Path(__file__).resolve().parents[1]
MANNERS = frozenset(name for name in vars(Suite) if name.startswith(("test_import_and_probe_", "test_works_in_a_")))
"""What ``tests/conformance`` looks at, without the interpreter."""


class InterpretedKernels(KernelsSuite):
    """Every second of the supported cases, of many every fifth, of very many every thirteenth; the three dtypes change
    fastest: all are met. A quarter of them for what hangs neither on shapes nor, in the interpreter, on addresses."""

    thinned: ClassVar[int] = 1

    @classmethod
    def covered(cls, operation: str, *dtypes: str) -> list[tuple[Case, str, str]]:
        found = super().covered(operation, *dtypes)
        return found[:: cls.thinned * (2 if len(found) <= 60 else 5 if len(found) < 240 else 13)]

    @pytest.mark.parametrize("operation", sorted(ORACLES))
    def test_inputs_are_left_unchanged(self, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """In fewer cases."""
        monkeypatch.setattr(type(self), "thinned", 4)
        super().test_inputs_are_left_unchanged(operation)

    @pytest.mark.parametrize("operation", sorted(ORACLES))
    def test_misaligned_inputs(self, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """In fewer cases."""
        monkeypatch.setattr(type(self), "thinned", 4)
        super().test_misaligned_inputs(operation)

    def visible(self, operation: str) -> list[tuple[Case, str, str, Callable[..., Any]]]:
        """In two dtypes: a third shows torch nothing new."""
        return super().visible(operation)[:2]


class InterpretedAttention(AttentionSuite):
    """With blocks of one size: smaller than a tile, and no divisor of it. Of head layouts, dtypes and formats every two
    are met, if not all three; of windows, one token, less than a block, more than a tile, and more than there is."""

    @classmethod
    def backends(cls) -> list[AttentionBackend]:
        return [cls.make(block_size=6)]

    @pytest.mark.parametrize(("heads", "dtype"), zip(HEADS, ("float32", "bfloat16") * 3, strict=True), ids=str)
    def test_mixed_batches_equal_the_plain_loop(self, heads: tuple[int, int, int], dtype: str) -> None:
        """Every head layout, in one dtype each."""
        super().test_mixed_batches_equal_the_plain_loop(heads, dtype)

    @pytest.mark.parametrize(
        ("heads", "dtype", "kv"),
        zip(HEADS, ("bfloat16", "float32") * 3, ("int8", "int8", "fp8", "fp8", "int8", "fp8"), strict=True),
        ids=str,
    )
    def test_scaled_keys_stay_near_the_plain_loop(self, heads: tuple[int, int, int], dtype: str, kv: str) -> None:
        """Every head layout, in one dtype and format each; every dtype with every format."""
        super().test_scaled_keys_stay_near_the_plain_loop(heads, dtype, kv)

    @pytest.mark.parametrize("window", [1, 5, 17, 100])
    def test_windows_equal_the_plain_loop(self, window: int) -> None:
        """Fewer of them."""
        super().test_windows_equal_the_plain_loop(window)

    @pytest.mark.parametrize(("cap", "windows"), [(0.7, (None, None)), (30.0, (None, 3))], ids=str)
    def test_soft_caps_equal_the_plain_loop(self, cap: float, windows: tuple[int | None, ...]) -> None:
        """A low one without windows, a high one with some."""
        super().test_soft_caps_equal_the_plain_loop(cap, windows)


def names_of_tests(suite: type[Suite]) -> list[str]:
    return sorted({name for name in dir(suite) if name.startswith("test_")} - MANNERS)


def run_interpreted_suite(suite: type[Suite], plugin: str) -> Report:
    """All tests of the suite but those of manners."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in INTERPRETER.items():
            patch.setenv(name, value)
        target = Target(f"{suite.__module__}:{suite.__qualname__}", plugin, tests=tuple(names_of_tests(suite)))
        return run_suites([target], test_time_limit_seconds=280)


def expect_no_failure(report: Report, test: str, *, may_skip: Sequence[str] = ()) -> None:
    """The test ran, none of its cases failed, and only tests that the suite skips by a claim came to nothing."""
    results = [result for result in report.results if result.test.partition("[")[0] == test]
    assert results, f"{test} did not run"
    bad = [result for result in results if result.outcome not in (Outcome.PASSED, Outcome.SKIPPED)]
    assert not bad, "\n".join(map(_told, bad))
    if test not in may_skip:
        assert any(result.outcome is Outcome.PASSED for result in results), "\n".join(map(_told, results))


def _told(result: Result) -> str:
    return f"{result.test}: {result.outcome}: {result.message}"


def run_in_interpreter(folder: Path, *names: str) -> None:
    """Run files of tests in a pytest of their own with the interpreter on; fails with what it printed."""
    own_warnings = "ignore::DeprecationWarning:triton.runtime.interpreter"
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "pyproject.toml"]
    done = subprocess.run(
        [*command, "-W", own_warnings, *(str(folder / name) for name in names)],
        cwd=TESTS_FOLDER.parent,
        env={**os.environ, **INTERPRETER},
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
