"""Layers that read one input are one product, and to everybody who looks they are still the layers they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from drivetrain.fusion import fuse
from drivetrain.fusion.joint import Joint, Part

torch.set_num_threads(1)


class Projections(nn.Module):
    """Three layers that read the same input, called one by one."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 6, bias), nn.Linear(8, 4, bias), nn.Linear(8, 4, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.q(x), self.k(x), self.v(x)), dim=-1)


def made(bias: bool = True) -> tuple[Projections, Projections, torch.Tensor]:
    """A module, its fused copy, and an input."""
    torch.manual_seed(0)
    plain, x = Projections(bias), torch.randn(5, 8)
    fused = copy.deepcopy(plain)
    assert [one.what for one in fuse(fused, example=((x,), {})).fused] == ["q + k + v"]
    return plain, fused, x


@pytest.mark.parametrize("bias", [True, False])
def test_results_and_gradients_are_those_of_the_layers(bias: bool) -> None:
    plain, fused, x = made(bias)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for module, own in zip((plain, fused), inputs, strict=True):
        module(own).square().sum().backward()
    torch.testing.assert_close(fused(x), plain(x))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    joint = fused.q.joint
    wanted = torch.cat([layer.weight.grad for layer in (plain.q, plain.k, plain.v)])
    torch.testing.assert_close(joint.weight.grad, wanted)
    if bias:
        torch.testing.assert_close(
            joint.bias.grad, torch.cat([layer.bias.grad for layer in (plain.q, plain.k, plain.v)])
        )


def test_an_optimizer_step_changes_the_same_weights() -> None:
    plain, fused, x = made()
    for module in (plain, fused):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(fused.state_dict(), plain.state_dict())


def test_the_state_dict_keeps_its_names_and_loads_in_both_directions() -> None:
    plain, fused, x = made()
    assert list(fused.state_dict()) == list(plain.state_dict())
    other = Projections()
    fused.load_state_dict(other.state_dict())
    torch.testing.assert_close(fused(x), other(x))
    plain.load_state_dict(fused.state_dict())
    torch.testing.assert_close(plain(x), other(x))


def test_a_state_that_does_not_fit_is_told_by_the_layers_names() -> None:
    _, fused, _ = made()
    state = fused.state_dict()
    del state["k.weight"]
    state["v.weight"] = torch.zeros(3, 3)
    state["q.extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r'(?s)v\.weight: shape \(3, 3\).*|Missing.*"k\.weight"') as caught:
        fused.load_state_dict(state)
    assert '"k.weight"' in str(caught.value)
    assert '"q.extra"' in str(caught.value)


def test_no_weight_is_held_twice() -> None:
    _, fused, _ = made()
    storages = {part.weight.untyped_storage().data_ptr() for part in (fused.q, fused.k, fused.v)}
    assert storages == {fused.q.joint.weight.untyped_storage().data_ptr()}
    assert sum(parameter.numel() for parameter in fused.parameters()) == 14 * 8 + 14


def test_a_copy_stands_on_its_own() -> None:
    _, fused, x = made()
    before, twin = fused(x).clone(), copy.deepcopy(fused)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(fused(x), before)
    assert torch.equal(twin(x), torch.zeros(5, 14))


def test_parts_called_alone_or_with_other_inputs_are_right_and_nothing_is_kept() -> None:
    plain, fused, x = made()
    y = torch.randn(3, 8)
    torch.testing.assert_close(fused.k(y), plain.k(y))
    torch.testing.assert_close(fused.q(x), plain.q(x))
    torch.testing.assert_close(fused.k(y), plain.k(y))
    torch.testing.assert_close(fused.v(x), plain.v(x))
    assert fused.q.joint.held is None


def test_one_product_is_computed_for_all() -> None:
    calls = []

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(weight.shape)
        return functional.linear(x, weight, bias)

    linears = [nn.Linear(4, 2), nn.Linear(4, 3)]
    joint, x = Joint(linears, product), torch.randn(2, 4)
    wanted = [linear(x) for linear in linears]
    parts = [Part(linear, joint, index) for index, linear in enumerate(linears)]
    torch.testing.assert_close([part(x) for part in parts], wanted)
    assert calls == [(5, 4)]
