"""Rules of the largest output of a product: it is the one of all outputs, whatever those are. Most are not computed
where the weight in int8 tells that they are smaller; all are where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.contracts.kernels import FindsLargest, KernelSpec
from drivetrain.errors import ConfigError
from drivetrain.kernels.cpu import CpuKernels
from drivetrain.kernels.cpu.largest import ScreenedLargest
from drivetrain.kernels.cpu.library import open_library, runnable_variants
from drivetrain.kernels.cpu.operations import Rows

HERE = runnable_variants()
CAN = bool(open_library(HERE[0]).dt_has_screen()) if HERE else False
needs_it = pytest.mark.skipif(not CAN, reason="this processor has no AVX2")
DTYPES = [torch.float32, torch.bfloat16]


def linear(dtype: torch.dtype, variant: str = "auto") -> Any:
    kernels = CpuKernels(CpuKernels.Config.model_validate({"instructions": variant}))
    return kernels.make(KernelSpec("linear", "cpu", str(dtype).removeprefix("torch.")))


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def products_of_all(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product with all outputs that is computed from now on."""
    rows: list[int] = []
    plain = Rows.linear

    def counted(self: Rows, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows.append(len(x))
        return plain(self, x, weight, bias)

    monkeypatch.setattr(Rows, "linear", counted)
    return rows


def check(find: Any, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Against float64: the output that is found is no smaller than any, but for rounding."""
    best, index = find(x)
    wanted = x.double() @ weight.double().T
    own = wanted.gather(1, index.unsqueeze(1)).squeeze(1)
    room = 1e-6 if x.dtype == torch.float32 else 2**-7
    scale = x.double().norm(dim=1) * weight.double().norm(dim=1).amax()
    assert (own >= wanted.amax(dim=1) - room * scale).all()
    torch.testing.assert_close(best.double(), own, rtol=room, atol=float(room * scale.max()))


@needs_it
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [*range(1, 20), 31, 33, 64, 100])
def test_it_is_found_among_any_number_of_rows_and_without_all_outputs(
    monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype
) -> None:
    weight = numbers(3001, 96, dtype=dtype)
    x = weight[torch.arange(rows) * 29] + numbers(rows, 96, seed=1, dtype=dtype)  # as states are near what follows
    find = linear(dtype).largest_of(weight)
    computed = products_of_all(monkeypatch)
    check(find, x, weight)
    assert find(x)[1].tolist() == (x.double() @ weight.double().T).argmax(dim=1).tolist()
    assert computed == []


@needs_it
@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 24),
    inner=st.sampled_from([1, 7, 64, 130, 576]),
    scale=st.sampled_from([1e-20, 1e-6, 1.0, 1e6]),
    outlier=st.sampled_from([1.0, 100.0, 1e5]),
    spread=st.sampled_from([0.0, 1e-6, 1e-3, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_it_is_the_largest_whatever_the_numbers_are(
    rows: int, inner: int, scale: float, outlier: float, spread: float, dtype: torch.dtype, seed: int
) -> None:
    """Tiny and huge numbers, one input far larger than the others, outputs that are equal or all but equal."""
    with torch.no_grad():
        weight = (numbers(1, inner, seed=seed) + spread * numbers(1100, inner, seed=seed + 1)).to(dtype)
        x = numbers(rows, inner, seed=seed + 2) * scale
        x[:, inner // 2] *= outlier
        x = x.to(dtype)
        check(linear(dtype).largest_of(weight), x, weight)


@needs_it
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_outputs_it_is_the_first(dtype: torch.dtype) -> None:
    weight = numbers(2000, 64, dtype=dtype)
    x = numbers(9, 64, seed=1, dtype=dtype)
    for row in range(9):
        for place in (1900 - row, 700 + row, 40 + row):
            weight[place] = 3 * x[row]
    assert linear(dtype).largest_of(weight)(x)[1].tolist() == [40 + row for row in range(9)]


@needs_it
def test_in_bfloat16_outputs_that_round_to_one_number_are_equal() -> None:
    """As they are where all outputs are computed: then the first of them is taken."""
    weight = torch.zeros(1024, 64, dtype=torch.bfloat16)
    weight[:, 0] = numbers(1024) / 100
    weight[500, 0], weight[900, 0] = 1.0, 1.0
    weight[900, 1] = 1 / 127  # the larger by less than bfloat16 can tell; int8 can
    x = torch.zeros(5, 64, dtype=torch.bfloat16)
    x[:, 0], x[:, 1] = 1.0, 0.25
    assert (x.double() @ weight.double().T).argmax(dim=1).tolist() == [900] * 5
    assert linear(torch.bfloat16).largest_of(weight)(x)[1].tolist() == [500] * 5


@needs_it
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.zero_(),
        lambda x: x.mul_(1e-25),
        lambda x: x[:, 5].fill_(float("nan")),
        lambda x: x[:, 5].fill_(float("inf")),
        lambda x: x[-1].fill_(3e38),
    ],
    ids=["zeros", "tiny", "nan", "infinity", "huge"],
)
def test_rows_that_do_not_tell_are_multiplied_by_the_whole_weight(
    monkeypatch: pytest.MonkeyPatch, spoil: Any, rows: int
) -> None:
    weight = numbers(1500, 64)
    x = numbers(rows, 64, seed=1)
    spoil(x)
    find = linear(torch.float32).largest_of(weight)
    outputs = linear(torch.float32)(x, weight, None)
    computed = products_of_all(monkeypatch)
    best, index = find(x)
    assert computed == [rows]
    wanted_best, wanted = outputs.max(dim=1)
    assert index.tolist() == wanted.tolist()
    torch.testing.assert_close(best, wanted_best, rtol=0, atol=0, equal_nan=True)


@needs_it
def test_more_outputs_near_the_largest_than_there_is_room_for_are_all_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = numbers(1, 64) * (1 + 1e-5 * numbers(5000, 1, seed=1))
    x = numbers(3, 64, seed=2)
    find = linear(torch.float32).largest_of(weight)
    computed = products_of_all(monkeypatch)
    check(find, x, weight)
    assert computed == [3]


@needs_it
@pytest.mark.parametrize("rows", [2, 12])
def test_weights_that_are_written_to_or_replaced_are_seen(rows: int) -> None:
    weight, other = torch.nn.Parameter(numbers(1500, 64)), numbers(1500, 64, seed=7)
    x = numbers(rows, 64, seed=1)
    find = linear(torch.float32).largest_of(weight)
    weight.copy_(other)
    check(find, x, other)
    weight.data = numbers(1500, 64, seed=8)
    check(find, x, weight)
    weight.data = numbers(64, 1500, seed=9).T  # in another order in memory
    check(find, x, weight)
    weight.data = numbers(1500, 64, seed=10)
    weight[3, 3] = float("nan")
    assert find(x)[1].tolist() == [3] * rows
    weight[3, 3] = 0.0
    check(find, x, weight)


@needs_it
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_all_threads_find_the_same(threads: int) -> None:
    """Equal outputs lie in the shares of two threads, late in the first and early in the second."""
    weight = numbers(48_000, 128)
    x = numbers(40, 128, seed=1)
    for row in range(40):
        weight[20_000 + row] = weight[26_000 + row] = 2 * x[row]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        find = linear(torch.float32).largest_of(weight)
        wanted = (x.double() @ weight.double().T).argmax(dim=1).tolist()
        for _ in range(20):
            assert find(x)[1].tolist() == wanted
            assert find(x[:3])[1].tolist() == wanted[:3]
    finally:
        torch.set_num_threads(before)


@needs_it
def test_few_outputs_are_computed_all() -> None:
    assert linear(torch.float32).largest_of(numbers(1023, 64)) is None
    assert isinstance(linear(torch.float32).largest_of(numbers(1024, 64)), ScreenedLargest)


@needs_it
def test_rows_of_another_size_or_dtype_are_refused() -> None:
    find = linear(torch.float32).largest_of(numbers(1500, 64))
    for x in (numbers(2, 63), numbers(2, 64, dtype=torch.bfloat16), numbers(2, 2, 64)):
        with pytest.raises(ConfigError):
            find(x)


@needs_it
def test_a_weight_whose_changes_torch_does_not_count_is_multiplied_whole() -> None:
    with torch.inference_mode():
        weight = numbers(1500, 64)
    assert linear(torch.float32).largest_of(weight) is None


@pytest.mark.parametrize("variant", HERE)
def test_only_where_there_are_the_instructions_is_it_offered(variant: str) -> None:
    assert isinstance(linear(torch.float32, variant), FindsLargest) == (variant in ("amx", "avx512", "avx2"))
