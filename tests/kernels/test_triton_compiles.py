"""Every kernel compiles for an H100, fits into its memory, and is what it is meant to be: products on tensor cores,
loads of 128 bits where memory is the bound. The interpreter takes code that the compiler refuses; this needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.interpreted import has_triton

pytestmark = [pytest.mark.slow, has_triton, pytest.mark.timeout(900)]

SHARED_BYTES_OF_AN_H100 = 232_448
ON_TENSOR_CORES = {
    "products._by_row", "products._by_group", "products._gated", "rounded_products._by_block", "decode._decode",
    "flash._forward", "flash_backward._key_gradients", "flash_backward._query_gradients",
    "hopper_forward.forward", "hopper_backward.backward", "gguf._more_rows",
    "int4_tiles.some_rows",
}  # fmt: skip
BOUND_BY_MEMORY = {
    "one_row._product", "int4_threads.few_rows",
    "norms._forward", "norms._backward", "activations._forward", "activations._backward", "rotary._rope",
    "decode._write", "decode._decode", "cross_entropy._losses", "cross_entropy._logit_gradients", "sampling._sample",
    "rounding._round_row", "rounding._round_blocks", "expansion._groups",
}  # fmt: skip
AT_EVEN_ADDRESSES = {"gguf._one_row", "expansion._blocks"}
"""Bound by memory, but blocks of most GGUF types lie where no more than two bytes can be loaded at once."""
OTHERS = {
    "product_tiles._sum_parts", "decode._list", "flash._list_tiles", "flash_backward._row_products", "hopper._means",
    "hopper._scale",
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    folder = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", str(folder / "support" / "compile_for_hopper.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    head, *lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert "triton" in head
    return lines


def test_every_kernel_is_compiled(compiled: list[dict[str, Any]]) -> None:
    assert {facts["kernel"] for facts in compiled} == ON_TENSOR_CORES | BOUND_BY_MEMORY | AT_EVEN_ADDRESSES | OTHERS


def test_each_fits_into_the_shared_memory(compiled: list[dict[str, Any]]) -> None:
    for facts in compiled:
        assert facts["shared_bytes"] <= SHARED_BYTES_OF_AN_H100, facts


def test_products_are_those_of_the_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    for facts in compiled:
        assert (facts["tensor_core_products"] > 0) == (facts["kernel"] in ON_TENSOR_CORES), facts


def test_loads_are_as_wide_as_can_be(compiled: list[dict[str, Any]]) -> None:
    for facts in compiled:
        assert facts["wide_loads"] > 0 or facts["kernel"] not in BOUND_BY_MEMORY, facts


def test_kernels_of_a_hopper_gpu_have_its_copies(compiled: list[dict[str, Any]]) -> None:
    for facts in compiled:
        is_its_own = facts["kernel"] in ("hopper_forward.forward", "hopper_backward.backward")
        assert (facts["bulk_copies"] > 0) == is_its_own, facts


def test_steps_of_any_counts_take_the_same_kernels(compiled: list[dict[str, Any]]) -> None:
    """Compiling takes up to a second, while all requests wait."""
    assert [facts["kernel"] for facts in compiled if facts["for_a_count"]] == []
