"""docs/authors/conformance.md publishes the tolerances that the suites use, and names every suite."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from drivetrain.contracts.kernels import OPERATIONS
from drivetrain.testing import SUITES
from drivetrain.testing.suites import attention, kernels, model, quantizer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "authors" / "conformance.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]


def pair(values: tuple[float, float]) -> str:
    return f"{values[0]:g}, {values[1]:g}"


def test_every_suite_has_its_row() -> None:
    named = {cell for row in ROWS for cell in re.findall(r"`(\w+Suite)`", row[0])}
    assert named == set(SUITES)


def test_the_published_tolerances_of_kernels_are_those_in_use() -> None:
    for name, operation in OPERATIONS.items():
        (row,) = (row for row in ROWS if row[0] == f"`{name}`")
        assert row[1:] == [pair(operation.tolerance[dtype]) for dtype in ("float32", "bfloat16", "float16")]


@pytest.mark.parametrize("table", [attention.TOLERANCES, model.TOLERANCES], ids=["attention", "model"])
def test_the_published_tolerances_by_dtype_are_those_in_use(table: Mapping[str, tuple[float, float]]) -> None:
    for dtype, (relative, absolute) in table.items():
        assert [dtype, f"{relative:g}", f"{absolute:g}"] in ROWS


def test_the_published_error_bounds_of_quantizers_are_those_in_use() -> None:
    for bits, bound in quantizer.ERROR_BOUNDS.items():
        assert [str(bits), f"{bound:g}"] in ROWS


def test_every_operation_of_the_core_has_an_oracle_and_a_grid() -> None:
    """A new operation without one would be tested by nothing."""
    operations = {name for name, operation in OPERATIONS.items() if not operation.takes_modules}
    assert set(kernels.ORACLES) == operations
    for operation in operations:
        shapes = [case.shapes[0] for case in kernels.cases(operation)]
        assert {shape[0] for shape in shapes if shape} >= {0, 1, 3}, operation
