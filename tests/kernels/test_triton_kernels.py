"""The Triton kernels in Triton's interpreter: the conformance suite, and what it does not ask."""

from __future__ import annotations

from pathlib import Path

import pytest

from drivetrain.testing.run import Report
from support.interpreted import (
    InterpretedKernels,
    expect_no_failure,
    has_interpreter,
    names_of_tests,
    run_in_interpreter,
    run_interpreted_suite,
)

pytestmark = [pytest.mark.slow, has_interpreter]

NOT_CLAIMED = (
    "test_gradcheck",  # float64
    "test_runs_are_bitwise_equal",
    "test_rows_do_not_depend_on_each_other",
    "test_largest_outputs",
)


@pytest.fixture(scope="module")
def report() -> Report:
    return run_interpreted_suite(InterpretedKernels, "triton")


@pytest.mark.parametrize("test", names_of_tests(InterpretedKernels))
def test_the_suite_passes(report: Report, test: str) -> None:
    expect_no_failure(report, test, may_skip=NOT_CLAIMED)


def test_every_operation_is_compared(report: Report) -> None:
    passed = {result.test for result in report.results if result.outcome == "passed"}
    operations = {test.partition("[")[2].rstrip("]") for test in passed if test.startswith("test_parity")}
    assert operations == {
        "rms_norm", "add_rms_norm", "rope", "rope_write", "silu_mul", "gelu_tanh_mul", "gated_linear", "linear",
        "linear_cross_entropy", "sample", "linear_int8", "linear_int4", "linear_int4_a8", "linear_fp8", "linear_int3",
        "linear_w8a8", "linear_fp8a8", "linear_gguf", "linear_gguf_a8",
    }  # fmt: skip


@pytest.mark.timeout(900)
def test_what_the_suite_does_not_ask() -> None:
    folder = Path(__file__).parent / "interpreted"
    run_in_interpreter(folder, "check_kernels.py", "check_rounding.py", "check_gguf.py", "check_expansion.py")
