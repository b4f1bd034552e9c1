"""The pass on plain torch modules: what it finds, what it leaves and why, and that it takes back what goes wrong."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from drivetrain.errors import FusionError
from drivetrain.fusion import PATTERNS, Fused, Fuser, FusionReport, fuse

torch.set_num_threads(1)


class PlainNorm(nn.Module):
    """An RMS norm written out, as models of other libraries have it."""

    def __init__(self, size: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size) * 0.1 + 1.0 - offset)
        self.epsilon, self.offset = 1e-5, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return (normed * (self.weight.float() + self.offset)).to(x.dtype)


class Block(nn.Module):
    """A gated MLP and a mixing layer around a residual stream; its call has named and left-out arguments."""

    def __init__(self, offset: float = 0.0, act: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = PlainNorm(8, offset), PlainNorm(8, offset)
        self.mix = nn.Linear(8, 8)
        self.gate, self.up, self.down = nn.Linear(8, 12, False), nn.Linear(8, 12, False), nn.Linear(12, 8)
        self.act = act or nn.SiLU()

    def forward(self, x: torch.Tensor, scale: float = 1.0, **rest: Any) -> torch.Tensor:
        x = x + self.mix(self.first(x)) * scale
        y = self.second(x)
        return x + self.down(self.act(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self, num_layers: int = 3, offset: float = 0.0, act: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(offset, act) for _ in range(num_layers))
        self.norm = PlainNorm(8, offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, scale=0.5, unused=None)
        return self.norm(x)


def made(**options: Any) -> tuple[Model, Model, torch.Tensor]:
    torch.manual_seed(0)
    plain = Model(**options)
    return plain, copy.deepcopy(plain), torch.randn(5, 8)


def patterns_of(report: FusionReport) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in report.fused:
        found[one.pattern] = found.get(one.pattern, 0) + 1
    return found


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(approximate="tanh")])
def test_every_pattern_is_found_and_changes_nothing(offset: float, act: nn.Module) -> None:
    plain, fused, x = made(offset=offset, act=act)
    report = fuse(fused, example=((x,), {}), reference_too=True)
    assert patterns_of(report) == {"norm": 7, "gated_linear": 3, "add_norm": 6}
    assert report.num_layers == 3
    assert report.bytes_per_token > 0
    with torch.no_grad():
        for rows in (1, 5, 9):
            y = torch.randn(rows, 8)
            torch.testing.assert_close(fused(y), plain(y), rtol=1e-5, atol=1e-5)


def test_what_only_the_reference_has_is_left_with_that_reason() -> None:
    plain, fused, x = made()
    report = fuse(fused, example=((x,), {}))
    assert patterns_of(report) == {"norm": 7, "shared_input": 3}
    reasons = {one.pattern: one.reason for one in report.left}
    assert "only the reference has gated_linear" in reasons["gated_linear"]
    assert "only the reference has add_rms_norm" in reasons["add_norm"]
    assert "no kernel provider has a norm with a product" in reasons["norm_linear"]
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)


def test_the_counts_are_those_of_a_run() -> None:
    """Two products become one in each of three layers, and the report says just that."""
    _, fused, x = made()
    only = tuple(pattern for pattern in PATTERNS if pattern.name == "shared_input")
    report = fuse(fused, example=((x,), {}), patterns=only)
    assert report.operations_before - report.operations_after == 3
    assert report.layer_operations_before - report.layer_operations_after == 1
    assert report.bytes_per_token == 3 * 8 * 4  # one reading less of 8 float32 features in each layer


def test_fusing_again_does_nothing() -> None:
    _, fused, x = made()
    fuse(fused, example=((x,), {}), reference_too=True)
    again = fuse(fused, example=((x,), {}), reference_too=True)
    assert again.fused == ()
    assert again.operations_before == again.operations_after


def test_the_state_dict_stays_as_it_was() -> None:
    plain, fused, x = made()
    fuse(fused, example=((x,), {}))
    torch.testing.assert_close(fused.state_dict(), plain.state_dict(), rtol=0, atol=0)
    other = Model()
    fused.load_state_dict(other.state_dict())
    torch.testing.assert_close(fused(x), other(x), rtol=1e-5, atol=1e-5)


def test_training_gives_the_same_gradients() -> None:
    plain, fused, x = made()
    fuse(fused, example=((x,), {}), reference_too=True)
    for module in (plain, fused):
        module(x).square().sum().backward()
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(fused.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_copy_stands_on_its_own() -> None:
    _, fused, x = made()
    fuse(fused, example=((x,), {}), reference_too=True)
    with torch.no_grad():
        before, twin = fused(x).clone(), copy.deepcopy(fused)
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        assert torch.equal(fused(x), before)
        assert not torch.allclose(twin(x), before)
        fused.load_state_dict(twin.state_dict())
        assert torch.equal(fused(x), twin(x))


def test_a_call_of_another_form_goes_to_the_modules_own_forward() -> None:
    plain, fused, x = made()
    fuse(fused, example=((x,), {}), reference_too=True)
    for arguments in ({"scale": 2.0, "unused": None}, {"scale": 0.5}, {"scale": 0.5, "unused": x}):
        with torch.no_grad():
            torch.testing.assert_close(
                fused.layers[0](x, **arguments), plain.layers[0](x, **arguments), rtol=1e-5, atol=1e-5
            )


class Int8Linear(nn.Module):
    """A stand-in for a quantized layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("packed", linear.weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.packed)


def test_quantized_layers_are_left_with_a_reason() -> None:
    _, fused, x = made()
    for layer in fused.layers:
        layer.up = Int8Linear(layer.up)
    report = fuse(fused, example=((x,), {}))
    assert "shared_input" not in patterns_of(report)
    assert any(one.reason == "up is a Int8Linear, which is no plain product" for one in report.left)


class ScaledLinear(nn.Linear):
    """A linear layer with something of its own, such as an adapter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.5


def test_a_linear_layer_that_does_more_is_no_plain_product() -> None:
    _, fused, x = made()
    torch.manual_seed(1)
    fused.layers[0].up = ScaledLinear(8, 12, False)
    report = fuse(fused, example=((x,), {}))
    assert patterns_of(report)["shared_input"] == 2
    assert any("ScaledLinear" in one.reason for one in report.left)


class ReadsValues(Block):
    """Its way depends on the values of a tensor."""

    def forward(self, x: torch.Tensor, scale: float = 1.0, **rest: Any) -> torch.Tensor:
        return super().forward(x, scale if x.sum() > 0 else 2 * scale)


def test_a_module_that_cannot_be_traced_is_left_with_the_reason_and_its_parts_are_fused() -> None:
    torch.manual_seed(0)
    fused, x = ReadsValues(), torch.randn(5, 8)
    wanted = fused(x)
    report = fuse(fused, example=((x,), {}), reference_too=True)
    assert patterns_of(report) == {"norm": 2, "shared_input": 1}
    assert any("can't be traced: TraceError" in one.reason for one in report.left)
    torch.testing.assert_close(fused(x), wanted, rtol=1e-5, atol=1e-5)


class Wrong:
    """A pattern that breaks the model, after another one has done its work."""

    name = "wrong"

    def apply(self, fuser: Fuser) -> None:
        norm = fuser.module.get_submodule("norm")
        fuser.set_forward(norm, lambda x: x * 3)


def test_a_fusion_that_changes_the_outputs_is_taken_back() -> None:
    plain, fused, x = made()
    with pytest.raises(FusionError, match="differ from its own by"):
        fuse(fused, example=((x,), {}), patterns=(*PATTERNS, Wrong()))
    torch.testing.assert_close(fused(x), plain(x), rtol=0, atol=0)
    assert [type(part) for part in fused.modules()] == [type(part) for part in plain.modules()]
    assert dict(fused.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    assert not any("forward" in vars(part) for part in fused.modules())


class CountedDrop:
    """A third party's pattern: a dropout that does nothing in eval mode is passed over."""

    name = "no_dropout"

    def apply(self, fuser: Fuser) -> None:
        for module, where in fuser.names.items():
            if isinstance(module, nn.Dropout) and not module.training and "forward" not in vars(module):
                fuser.set_forward(module, lambda x: x)
                fuser.fused.append(Fused(self.name, where, "Dropout", "none", "none", 0))


def test_a_pattern_of_somebody_else_takes_part() -> None:
    module, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).eval(), torch.randn(2, 4)
    report = fuse(module, example=((x,), {}), patterns=(*PATTERNS, CountedDrop()))
    assert patterns_of(report) == {"no_dropout": 1}
    assert report.lines()[1] == "1 x no_dropout at *: Dropout -> none (none)"


def test_tied_and_unlike_layers_are_left_with_a_reason() -> None:
    class Pair(nn.Module):
        def __init__(self, one: nn.Linear, other: nn.Linear) -> None:
            super().__init__()
            self.one, self.other = one, other

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x) + self.other(x)

    tied = Pair(nn.Linear(4, 4), nn.Linear(4, 4))
    tied.other.weight = tied.one.weight
    frozen = Pair(nn.Linear(4, 4), nn.Linear(4, 4))
    frozen.other.requires_grad_(False)
    uneven = Pair(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    x = torch.randn(2, 4)
    for pair, reason in ((tied, "tied"), (frozen, "frozen"), (uneven, "some have a bias")):
        report = fuse(pair, example=((x,), {}))
        assert report.fused == ()
        assert reason in report.left[0].reason


def test_layers_that_read_a_changed_tensor_are_not_joined() -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.clone()
            out = self.one(y)
            return out + self.other(y.add_(1))

    assert fuse(Changes(), example=((torch.randn(2, 4),), {})).fused == ()


def test_a_module_without_an_example_is_an_error() -> None:
    with pytest.raises(FusionError, match="needs an example"):
        fuse(nn.Linear(4, 4))


def test_modules_of_other_threads_go_on_while_one_is_traced() -> None:
    """A swap fuses the new model beside an engine's steps, and fx wraps the calls of every module in the process."""
    busy = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    wanted = busy(x).detach()
    is_over = threading.Event()
    faults: list[BaseException] = []
    calls: list[int] = []

    def work() -> None:
        try:
            while not is_over.is_set():
                torch.testing.assert_close(busy(x).detach(), wanted)
                calls.append(1)
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(30):
            fuse(Model(), example=((torch.randn(2, 8),), {}))
    finally:
        is_over.set()
        thread.join()
    assert not faults
    assert calls
