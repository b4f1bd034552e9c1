"""int4 products of a few rows by words, run on plain numbers. That they compile is tested in
``test_triton_compiles.py``, and that a GPU gives the same in ``tests/gpu``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from drivetrain.contracts.kernels import OPERATIONS, KernelSpec
from drivetrain.kernels.reference import ReferenceKernels
from support.interpreted import has_triton

pytestmark = [has_triton]

torch.set_num_threads(1)

CPU = torch.device("cpu")


@pytest.fixture
def on_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run here, and this machine is taken for one that has them."""
    from drivetrain.kernels.triton import int4_threads, int4_tiles, int4_words, product_tiles
    from support.gluon_values import Kernel

    for name in ("has_gluon", "_copies_to_shared_memory"):
        monkeypatch.setattr(int4_words, name, lambda device: True)
    monkeypatch.setattr(int4_threads, "few_rows", Kernel(int4_threads.few_rows))
    monkeypatch.setattr(int4_tiles, "some_rows", Kernel(int4_tiles.some_rows))
    monkeypatch.setattr(product_tiles, "_sum_parts", _SumParts())
    monkeypatch.setattr(product_tiles, "num_processors", lambda device: 8)


class _SumParts:
    """In place of a kernel in Triton that is tested elsewhere."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(parts: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, *_: Any, **options: Any) -> None:
            out.copy_(parts.sum(0) + (0 if bias is None else bias.float()))

        return launch


def every_way(group: int, dtype: str) -> Iterator[Any]:
    """The product with each candidate by words in turn."""
    from drivetrain.kernels.triton.products import LinearByGroup
    from drivetrain.kernels.triton.tuning import Blocks, Tuner

    class ByWords(Tuner):
        number, count = 0, 1

        def choose(
            self, key: str, candidates: Any, launch: Any, worth_it: bool = True, output: torch.Tensor | None = None
        ) -> Blocks:
            found = [blocks for blocks in candidates if "WORDS" in dict(blocks.sizes)]
            self.count = len(found)
            assert found
            return found[self.number]  # type: ignore[no-any-return]

    tuner = ByWords()
    while tuner.number < tuner.count:
        yield LinearByGroup(KernelSpec("linear_int4", "cuda", dtype, {}, {"group": group}), tuner)
        tuner.number += 1


def packed(outputs: int, inputs: int, group: int, has_zeros: bool) -> tuple[torch.Tensor, ...]:
    codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
    scales = (torch.rand(outputs, inputs // group) / 64 + 0.001).half()
    mins = torch.randint(0, 16, scales.shape, dtype=torch.uint8) if has_zeros else -9 * scales
    return codes, scales, mins


def check(x: torch.Tensor, weights: tuple[torch.Tensor, ...], bias: torch.Tensor | None, group: int) -> None:
    dtype = str(x.dtype).removeprefix("torch.")
    spec = KernelSpec("linear_int4", "cpu", dtype, {}, {"group": group})
    wanted = ReferenceKernels(ReferenceKernels.Config()).make(spec)(x, *weights, bias).double()
    relative, absolute = OPERATIONS["linear_int4"].tolerance[dtype]
    scale = max(1.0, float(wanted.abs().max()))
    for product in every_way(group, dtype):
        torch.testing.assert_close(product(x, *weights, bias).double(), wanted, rtol=relative, atol=absolute * scale)


@pytest.mark.usefixtures("on_numbers")
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "group", "has_zeros", "dtype"),
    [
        (1, 5, 1024, 32, False, torch.bfloat16),
        (1, 9, 2048, 128, True, torch.float16),
        (1, 3, 1184, 32, True, torch.bfloat16),  # a rest of a row, and no whole tile
        (2, 21, 640, 64, False, torch.float16),
        (4, 19, 1152, 128, True, torch.bfloat16),
        (5, 64, 128, 32, True, torch.bfloat16),  # one tile
        (16, 65, 1024, 32, False, torch.bfloat16),  # inputs split over programs
        (16, 65, 768, 256, False, torch.float16),  # groups of two tiles, and an odd number of them
        (17, 40, 512, 64, True, torch.bfloat16),
        (33, 40, 512, 128, False, torch.float16),  # two programs of rows
        (64, 130, 256, 32, True, torch.bfloat16),
    ],
)
def test_products_by_words_are_those_of_the_reference(
    rows: int, outputs: int, inputs: int, group: int, has_zeros: bool, dtype: torch.dtype
) -> None:
    """In every way in which so many rows are launched."""
    torch.manual_seed(rows)
    x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(outputs).to(dtype)
    check(x, packed(outputs, inputs, group, has_zeros), bias if rows % 2 else None, group)


@pytest.mark.usefixtures("on_numbers")
def test_codes_of_the_far_ends_and_large_activations_are_exact() -> None:
    """All codes 0, all 15, and rows of one number: what the ones add is taken off again whole."""
    for code in (0, 15):
        codes = torch.full((8, 64), 17 * code, dtype=torch.uint8)
        scales = torch.full((8, 4), 0.5).half()
        for rows in (1, 8):
            check(torch.full((rows, 128), 1024.0).bfloat16(), (codes, scales, -7 * scales), None, 32)


@pytest.mark.usefixtures("on_numbers")
def test_they_serve_where_words_can_be_read() -> None:
    from drivetrain.kernels.triton import int4_words
    from drivetrain.kernels.triton.int4_words import ALSO_BY_TENSOR_CORES, BY_THREADS, NOWHERE

    wide, codes = torch.randn(65, 1056).bfloat16(), torch.zeros(8 * 512 + 16, dtype=torch.uint8)
    x, weight = wide[:4, :1024], codes[: 8 * 512].view(8, 512)
    cases = [
        (x, weight, ALSO_BY_TENSOR_CORES),
        (wide[:64, :1024], weight, ALSO_BY_TENSOR_CORES),
        (wide[:, :1024], weight, NOWHERE),  # too many
        (x.float(), weight, NOWHERE),
        (wide[:4, 1:1025], weight, NOWHERE),  # pairs of inputs at odd places
        (torch.randn(4, 1025).bfloat16()[:, :1024], weight, NOWHERE),
        (wide[:4, 2:1026], weight, BY_THREADS),  # places that are no multiples of 16 bytes
        (torch.randn(4, 1032).bfloat16()[:, :1024], weight, BY_THREADS),
        (wide[:4, :992], weight[:, :496].contiguous(), BY_THREADS),  # no whole tiles
        (x, codes[4 : 4 + 8 * 512].view(8, 512), BY_THREADS),
        (x, codes[1 : 1 + 8 * 512].view(8, 512), NOWHERE),
    ]
    for number, (rows, packed_weight, wanted) in enumerate(cases):
        assert int4_words.serving(rows, packed_weight) == wanted, number


def test_they_serve_on_no_other_device() -> None:
    from drivetrain.kernels.triton import int4_words, launch

    assert not launch.has_gluon(CPU)
    x, codes = torch.randn(1, 1024).bfloat16(), torch.zeros(8, 512, dtype=torch.uint8)
    assert int4_words.serving(x, codes) == int4_words.NOWHERE
    assert int4_words.candidates(int4_words.NOWHERE, 1, 8, 1024, 132) == []


# --- what the kernels are run with -----------------------------------------------------------------------------------


def test_what_has_not_arrived_in_shared_memory_is_garbage() -> None:
    from support.gluon_values import Copies, Pointer, Shared

    copies, shared = Copies(), Shared(torch.zeros(2, 3))
    for number in range(2):
        copies.load(shared.index(number), Pointer(torch.arange(3.0) + number, torch.arange(3)))
        copies.commit_group()
    assert shared.memory.isnan().all()
    copies.wait_group(1)
    assert shared.memory[0].tolist() == [0, 1, 2]
    assert shared.memory[1].isnan().all()
    copies.load(shared.index(0), Pointer(torch.arange(3.0), torch.arange(3)), mask=False)
    assert shared.memory.isnan().all()


def test_no_place_outside_a_tensor_is_read_or_written() -> None:
    from support.gluon_values import Pointer, load, store, values

    beyond = Pointer(torch.arange(3.0)) + torch.arange(4)
    with pytest.raises(IndexError, match="places 0 to 3 of 3"):
        load(beyond)
    with pytest.raises(IndexError):
        store(beyond + -1, values(torch.zeros(4)))
    assert load(beyond, mask=torch.arange(4) < 3, other=7.0).tolist() == [0, 1, 2, 7]
