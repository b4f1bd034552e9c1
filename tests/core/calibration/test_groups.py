"""Layers one at a time are the whole model, and factors that are folded in change nothing that comes out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drivetrain.calibration.groups import fold, input_groups
from drivetrain.calibration.statistics import Collectors
from drivetrain.contracts.attention import AttentionBatch
from drivetrain.errors import CalibrationError
from support.calibration import layered, parts_of
from support.tiny_models import save_tiny, tiny_configs

LENGTHS = (13, 8)
NAMES = sorted(tiny_configs())


def batch() -> AttentionBatch:
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return AttentionBatch(LENGTHS, [0, 0], starts, torch.tensor(LENGTHS, dtype=torch.int32))


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return torch.randint(0, 288, positions.shape, generator=torch.Generator().manual_seed(3)), positions


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_layers_one_at_a_time_are_the_whole_model(tmp_path: Path, name: str) -> None:
    theirs = save_tiny(name, tmp_path)
    parts = parts_of(tmp_path)
    model = layered(parts)
    ids, positions = inputs()
    (x,) = model.embed([ids])
    for layer in range(model.spec.num_layers):
        step = parts.attention.begin(model.spec.attention, batch(), None)
        x = model.run_layer(model.load_layer(layer), layer, x, positions, step)
    for rows, length in zip(x.split(LENGTHS), LENGTHS, strict=True):
        start = 0 if rows is x[: LENGTHS[0]] or length == LENGTHS[0] else LENGTHS[0]
        states = theirs.model(ids[None, start : start + length], output_hidden_states=True)
        torch.testing.assert_close(theirs.model.norm(rows), states.last_hidden_state[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_folded_factors_change_no_output(tmp_path: Path, name: str) -> None:
    """Whatever the architecture has: biases, one product for queries, keys and values, norms with an offset, norms of
    heads, heads that share keys and values, no norm before a layer."""
    save_tiny(name, tmp_path)
    parts = parts_of(tmp_path)
    model = layered(parts)
    ids, positions = inputs()
    (x,) = model.embed([ids])
    generator = torch.Generator().manual_seed(5)
    layer = model.load_layer(1)

    def run() -> torch.Tensor:
        step = parts.attention.begin(model.spec.attention, batch(), None)
        return model.run_layer(layer, 1, x, positions, step)

    before = run()
    groups = input_groups(layer, model.spec.attention.layers[1])
    num_folded = 0
    for group in groups:
        weight = layer.get_parameter(f"{group.linears[0]}.weight")
        if group.source is None:
            continue
        num_folded += 1
        old = weight.clone()
        used = fold(layer, group, torch.rand(weight.shape[1], generator=generator) * 3 + 0.2, model.norm_offset)
        torch.testing.assert_close(weight, old * used)
        assert not torch.allclose(used, torch.ones_like(used), atol=0.05)
    assert num_folded >= 2
    torch.testing.assert_close(run(), before, rtol=2e-4, atol=2e-4)


def test_every_linear_layer_is_in_one_group(tmp_path: Path) -> None:
    for name in ("llama", "phi3"):
        save_tiny(name, tmp_path / name)
        model = layered(parts_of(tmp_path / name))
        layer = model.load_layer(0)
        grouped = [linear for group in input_groups(layer, model.spec.attention.layers[0]) for linear in group.linears]
        linears = {name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        assert sorted(grouped) == sorted(linears)


@torch.no_grad()
def test_statistics_are_those_of_the_inputs(tmp_path: Path) -> None:
    """Over several calls, and the same whatever the calls; the second moments only where they are wanted."""
    save_tiny("llama", tmp_path)
    parts = parts_of(tmp_path)
    model = layered(parts)
    ids, positions = inputs()
    (x,) = model.embed([ids])
    layer = model.load_layer(0)
    groups = input_groups(layer, model.spec.attention.layers[0])
    collectors = Collectors(layer, "model.layers.0", groups, [True, False, False, False])
    with collectors.watching():
        for begin, end in ((0, 13), (13, 21)):
            length = end - begin
            starts, kv = torch.tensor([0, length], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
            step = parts.attention.begin(model.spec.attention, AttentionBatch([length], [0], starts, kv), None)
            model.run_layer(layer, 0, x[begin:end], positions[begin:end], step)
    model.run_layer(layer, 0, x * 100, positions, parts.attention.begin(model.spec.attention, batch(), None))
    first, *others = collectors.statistics()
    normed = layer.get_submodule("input_layernorm")(x)
    assert first.num_tokens == 21
    torch.testing.assert_close(first.mean_abs_I, normed.abs().mean(0))
    torch.testing.assert_close(first.max_abs_I, normed.abs().amax(0))
    torch.testing.assert_close(first.gram_II, normed.T @ normed / 21)
    assert all(other.gram_II is None for other in others)
    factors = torch.rand(48) + 0.5
    divided, again = first.divided(factors), normed / factors
    torch.testing.assert_close(divided.gram_II, again.T @ again / 21)
    torch.testing.assert_close(divided.mean_abs_I, again.abs().mean(0))


@torch.no_grad()
def test_an_input_that_is_no_number_is_told_with_its_layer(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    parts = parts_of(tmp_path)
    model = layered(parts)
    ids, positions = inputs()
    (x,) = model.embed([ids])
    layer = model.load_layer(2)
    layer.get_parameter("post_attention_layernorm.weight")[7] = float("inf")
    groups = input_groups(layer, model.spec.attention.layers[2])
    collectors = Collectors(layer, "model.layers.2", groups, [False] * 4)
    with collectors.watching(), pytest.raises(CalibrationError) as caught:
        model.run_layer(layer, 2, x, positions, parts.attention.begin(model.spec.attention, batch(), None))
    assert caught.value.where == "model.layers.2.mlp.gate_proj"
    assert f"21 of the {21 * 48} numbers that go into the layer" in str(caught.value)
