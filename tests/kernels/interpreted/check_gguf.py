"""Run by ``tests/kernels/test_triton_kernels.py`` in a process with Triton's interpreter on: products with GGUF blocks,
where the suite does not look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import LLM, SamplingParams
from drivetrain.contracts.kernels import KernelSpec
from drivetrain.errors import ConfigError
from drivetrain.kernels.reference import ReferenceKernels
from drivetrain.kernels.triton import gguf
from drivetrain.kernels.triton.tuning import Blocks, Tuner
from drivetrain.packed.gguf import BLOCK_TYPES
from support import gguf_models
from support.gguf_models import KIND, random_blocks, write_llama

torch.set_num_threads(1)

Q4_1, Q6_K = 3, 14


def spec_of(number: int, operation: str = "linear_gguf", dtype: str = "float32") -> KernelSpec:
    return KernelSpec(operation, "cpu", dtype, {}, {"type": float(number)})


def drawn(number: int, outputs: int, num_blocks: int) -> torch.Tensor:
    kind = BLOCK_TYPES[number]
    return torch.from_numpy(random_blocks(KIND(number), outputs, num_blocks * kind.size, seed=number, size=4.0))


class Fixed(Tuner):
    """Takes the blocks that it is given."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.blocks = blocks

    def choose(self, key: str, candidates: Any, launch: Any, worth_it: bool = True, output: Any = None) -> Blocks:
        return self.blocks


def test_units_make_up_the_blocks_of_every_type() -> None:
    assert gguf.LAYOUTS.keys() == BLOCK_TYPES.keys()
    for number, layout in gguf.LAYOUTS.items():
        assert layout.units * layout.unit_inputs == BLOCK_TYPES[number].size


@pytest.mark.parametrize(("rows", "depth", "splits"), [(1, 8, 4), (5, 8, 1), (5, 1, 4)])
@pytest.mark.parametrize("number", BLOCK_TYPES)
def test_any_cut_of_the_inputs_gives_whole_sums(number: int, rows: int, depth: int, splits: int) -> None:
    """Of every type; also into steps that reach beyond the end of a row, and more parts than there are steps."""
    torch.manual_seed(1)
    blocks, bias = drawn(number, 19, 3), torch.randn(19)
    x = torch.randn(rows, 3 * BLOCK_TYPES[number].size)
    sizes = {"SPLITS": splits, "BLOCK_M": 1 if rows == 1 else 16, "BLOCK_O": 16, "BLOCK_U": depth}
    fixed = Fixed(Blocks.of(**sizes, **({"WIDTH": 1} if rows == 1 else {})))
    spec = spec_of(number, "linear_gguf_a8" if splits == 1 else "linear_gguf")
    wanted = ReferenceKernels(ReferenceKernels.Config()).make(spec)(x, blocks, bias)
    torch.testing.assert_close(gguf.make_linear_gguf(spec, fixed)(x, blocks, bias), wanted, rtol=1e-5, atol=1e-4)


def test_all_candidates_take_whole_blocks_and_are_told_apart() -> None:
    """One row goes through whole blocks; a warp has a unit of its own, or all warps share one."""
    plain, gguf.INTERPRETED = gguf.INTERPRETED, False
    try:
        for layout in gguf.LAYOUTS.values():
            for outputs, units in ((4096, 64), (576, 9), (128_256, 128)):
                one = gguf._candidates_for_one(layout, outputs, units, 132)
                assert all(blocks["BLOCK_U"] % layout.units == 0 for blocks in one)
                more = [gguf._candidates_for_more(rows, outputs, units, 132, 2) for rows in (4, 16, 64, 256)]
                for found in (one, *more):
                    assert len(set(found)) == len(found) > 1
                for blocks in (blocks for found in more for blocks in found):
                    assert blocks["BLOCK_U"] in (1, blocks.num_warps)
    finally:
        gguf.INTERPRETED = plain


def test_blocks_are_read_where_they_lie_and_copied_only_from_odd_places() -> None:
    wide = torch.zeros(12, 40, dtype=torch.uint8)
    for rows in (wide[3:7], wide[::2, :36], wide[2:5, 4:22]):
        assert gguf._readable(rows) is rows
    for rows in (wide[:, 1:19], wide[:, ::2], torch.zeros(2, 37, dtype=torch.uint8)[:, :36]):
        copy = gguf._readable(rows)
        assert copy.is_contiguous()
        assert torch.equal(copy, rows)


def test_rows_of_an_odd_place_and_distance_are_read_number_by_number() -> None:
    torch.manual_seed(2)
    blocks = drawn(Q4_1, 8, 1)
    spec = spec_of(Q4_1, dtype="bfloat16")
    ours, reference = gguf.make_linear_gguf(spec, Tuner()), ReferenceKernels(ReferenceKernels.Config()).make(spec)
    wide = torch.randn(4, 35).bfloat16()
    for x in (wide[1:2, 1:33], wide[1:2, :32], wide[2, 2:34], wide[::2, 3:]):
        torch.testing.assert_close(ours(x, blocks, None), reference(x, blocks, None), rtol=1.6e-2, atol=5e-2)


@pytest.mark.parametrize("operation", ["linear_gguf", "linear_gguf_a8"])
def test_a_gradient_made_of_some_outputs_at_a_time_is_that_of_all(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    monkeypatch.setattr(gguf, "_GRADIENT_OUTPUTS", 5)
    blocks = drawn(Q6_K, 12, 1)
    found = []
    for make in (lambda spec: gguf.make_linear_gguf(spec, Tuner()), ReferenceKernels(ReferenceKernels.Config()).make):
        torch.manual_seed(4)
        x = torch.randn(2, 3, 256, requires_grad=True)
        (make(spec_of(Q6_K, operation))(x, blocks, None) * torch.linspace(-1, 1, 12)).sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_rows_of_another_length_are_refused() -> None:
    ours = gguf.make_linear_gguf(spec_of(Q4_1), Tuner())
    with pytest.raises(ConfigError, match="rows of Q4_1 have another length"):
        ours(torch.randn(2, 64), drawn(Q4_1, 4, 1), None)


def test_a_model_is_served_from_the_blocks_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reference's greedy tokens, before and after a swap to rounded activations."""
    monkeypatch.setattr(gguf_models, "LAYERS", 1)
    kinds = {"output": KIND.Q6_K, "ffn_down": KIND.Q5_0, "attn_v": KIND.Q8_0}
    path = write_llama(tmp_path / "tiny.gguf", lambda name: next((k for n, k in kinds.items() if n in name), KIND.Q4_K))
    options: dict[str, Any] = {
        "platform": {"name": "cpu", "threads": 1},
        "engine": {"max_model_len": 64},
        "attention": {"name": "sdpa", "block_size": 16},
        "quantizer": "gguf",
    }
    params, tokens = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True), {}
    for kernels in ("reference", "triton"):
        with LLM(path, **options, kernels=kernels) as llm:
            [plain] = llm.generate(["The quick brown fox"], params)
            llm.swap(quantizer={"name": "gguf", "activations": "int8"})
            [rounded] = llm.generate(["x"], params)
        tokens[kernels] = (plain.token_ids, rounded.token_ids)
    assert tokens["triton"] == tokens["reference"]
