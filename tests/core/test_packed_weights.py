"""Packed weights stand for what their layouts say: GGUF blocks for the numbers of the gguf package, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from drivetrain.contracts.kernels import OPERATIONS
from drivetrain.contracts.packed import PackedWeight
from drivetrain.errors import ConfigError
from drivetrain.packed import DECODERS, PackedEmbedding, PackedLinear, decode
from drivetrain.packed.gguf import BLOCK_TYPES
from drivetrain.packed.layers import PackedModule
from drivetrain.testing.kernel_oracle import cases

KINDS = pytest.mark.parametrize("number", BLOCK_TYPES)


def random_blocks(number: int, rows: int, blocks: int) -> torch.Tensor:
    """Any bytes, but for float16 that are finite."""
    kind = BLOCK_TYPES[number]
    generator = torch.Generator().manual_seed(number)
    drawn = torch.randint(0, 256, (rows * blocks, kind.num_bytes), generator=generator, dtype=torch.uint8)
    for at in kind.halves:
        halves = torch.randn((rows * blocks, 1), generator=generator).to(torch.float16)
        drawn[:, at : at + 2] = halves.view(torch.uint8)
    return drawn.view(rows, -1)


@KINDS
def test_blocks_are_those_of_ggml(number: int) -> None:
    kind, theirs = BLOCK_TYPES[number], gguf.GGMLQuantizationType(number)
    assert theirs.name == kind.name
    assert gguf.GGML_QUANT_SIZES[theirs] == (kind.size, kind.num_bytes)


@KINDS
def test_blocks_decode_to_the_bits_of_the_gguf_package(number: int) -> None:
    """Wherever they lie: a file's tensors need not be aligned."""
    blocks = random_blocks(number, 5, 3)
    wanted = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(number))
    roomy = torch.zeros(blocks.numel() + 1, dtype=torch.uint8)
    moved = roomy[1:].view(blocks.shape).copy_(blocks)
    for mine in (blocks, moved):
        packed = PackedWeight("linear_gguf", {"blocks": mine}, 5, wanted.shape[1], {"type": number})
        assert np.array_equal(decode(packed).numpy().view(np.uint32), wanted.view(np.uint32))


@KINDS
def test_rows_that_are_no_whole_blocks_are_refused_with_the_numbers(number: int) -> None:
    kind = BLOCK_TYPES[number]
    blocks = torch.zeros(2, kind.num_bytes - 1, dtype=torch.uint8)
    packed = PackedWeight("linear_gguf", {"blocks": blocks}, 2, kind.size, {"type": number})
    with pytest.raises(ConfigError, match=str(kind.num_bytes - 1)):
        decode(packed)
    with pytest.raises(ConfigError, match=str(kind.size + 1)):
        kind.row_bytes(kind.size + 1)


@pytest.mark.parametrize("params", [{}, {"type": 1.0}, {"type": 2.5}])
def test_another_type_of_blocks_is_refused(params: dict[str, float]) -> None:
    packed = PackedWeight("linear_gguf", {"blocks": torch.zeros(2, 18, dtype=torch.uint8)}, 2, 32, params)
    with pytest.raises(ConfigError, match="Q4_0"):
        decode(packed)


def test_three_bits_count_up_from_the_lowest() -> None:
    """0, 1, ... 7: the lower two bits in order, then the third."""
    low = torch.tensor([[0b11_10_01_00, 0b11_10_01_00]], dtype=torch.uint8)
    high = torch.tensor([[0b1111_0000]], dtype=torch.uint8)
    tensors = {"low": low, "high": high, "scales": torch.tensor([[2.0]]), "mins": torch.tensor([[-3.0]])}
    packed = PackedWeight("linear_int3", tensors, 1, 8, {"group": 8})
    assert decode(packed).tolist() == [[2.0 * value - 3.0 for value in range(8)]]


@pytest.mark.parametrize("operation", sorted(DECODERS))
def test_a_slice_and_a_choice_of_outputs_decode_to_those_rows(operation: str) -> None:
    """Whatever the layout, the first dim of each tensor is the outputs', but for a tensor that holds for all."""
    case = max(cases(operation), key=lambda case: (case.sizes["O"], case.sizes["I"]))
    names = list(OPERATIONS[operation].arguments)[1:-1]
    inputs = case.inputs(torch.float32, "cpu")
    tensors = {name: value for name, value in zip(names, inputs[1:-1], strict=True) if value is not None}
    packed = PackedWeight(operation, tensors, case.sizes["O"], case.sizes["I"], case.params)
    weight_OI = decode(packed)
    assert weight_OI.shape == (packed.out_features, packed.in_features)
    assert torch.equal(decode(packed.rows(3, 4)), weight_OI[3:7])
    ids = torch.tensor([5, 0, 5])
    assert torch.equal(decode(packed.at(ids)), weight_OI[ids])
    table = PackedEmbedding(packed, torch.float32)
    assert torch.equal(table(ids), weight_OI[ids])
    assert torch.equal(table(ids.view(1, 3)), weight_OI[ids].unsqueeze(0))
    if packed.in_features % 2 == 0:
        turned = replace(packed, order=torch.arange(packed.in_features).flip(0))
        assert torch.equal(PackedEmbedding(turned, torch.float32)(ids), weight_OI[ids].flip(1))


def test_a_packed_layer_that_gets_another_tensor_is_told_by_a_number() -> None:
    """Whichever way, and not by a call: kernels that have described its tensors look at nothing else."""
    tensors = {"weight": torch.randint(-8, 8, (4, 16)).to(torch.int8), "scales": torch.rand(4)}
    layer = PackedLinear(PackedWeight("linear_int8", tensors, 4, 16), torch.zeros(4))

    def number_after(change: Callable[[], object]) -> int:
        change()
        return PackedModule.replacements

    now = PackedModule.replacements
    assert number_after(lambda: layer(torch.ones(1, 16))) == now
    assert number_after(lambda: layer.bind(lambda x, *packed: x)) == now
    assert number_after(lambda: layer.load_state_dict(layer.state_dict())) == now, "it writes where they lie"
    for change in (
        lambda: setattr(layer, "scales", torch.rand(4)),
        lambda: setattr(layer, "bias", None),
        lambda: layer.register_buffer("scales", torch.rand(4)),
        lambda: layer.to(torch.float64),
        lambda: layer.load_state_dict(layer.state_dict(), assign=True),
        lambda: delattr(layer, "scales"),
    ):
        before, now = now, number_after(change)
        assert now > before
