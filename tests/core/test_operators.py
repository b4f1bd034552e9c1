"""An operator is defined once, is what autograd and torch.compile see, and stays off the path without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drivetrain.errors import ConfigError, ContractError
from drivetrain.operators import Operator, define, once_differentiable, visible

SCHEMA = "(Tensor x, float factor) -> Tensor"


def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


def shape(x: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.empty_like(x)


def keep(ctx: Any, inputs: tuple[torch.Tensor, float], output: torch.Tensor) -> None:
    ctx.factor = inputs[1]


def back(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    return gradient * ctx.factor, None


def scaling(name: str = "scale") -> torch._ops.OpOverload:
    return define(f"drivetrain_tests::{name}", SCHEMA, scale, fake=shape, save=keep, backward=back)


def test_defining_it_again_gives_the_same_operator() -> None:
    assert scaling() is scaling()


def test_a_name_that_means_something_else_is_an_error() -> None:
    scaling()
    with pytest.raises(ContractError, match=r"drivetrain_tests::scale is defined already.*allowed: \(Tensor x, float"):
        define("drivetrain_tests::scale", "(Tensor x) -> Tensor", scale, fake=shape)
    with pytest.raises(ContractError, match="a namespace that only this provider has"):
        define("drivetrain_tests::scale", SCHEMA, shape, fake=shape)


def test_it_keeps_torch_s_rules_and_has_the_right_gradient() -> None:
    overload = scaling()
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(overload, (x, 3.0))
    assert torch.autograd.gradcheck(Operator(overload, (3.0,)), (x,))


def test_the_plain_callable_serves_and_the_operator_is_what_autograd_and_the_compiler_see() -> None:
    calls = []

    def plain(x: torch.Tensor) -> torch.Tensor:
        calls.append("plain")
        return x * 2.0

    kernel = visible(plain, Operator(scaling(), (2.0,)))
    x = torch.ones(3, requires_grad=True)
    with torch.inference_mode():
        assert kernel(x).tolist() == [2, 2, 2]
    assert calls == ["plain"]
    kernel(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 2]
    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(module.code)
        return module

    with torch.no_grad():
        assert torch.compile(kernel, fullgraph=True, backend=backend)(x).tolist() == [2, 2, 2]
    assert "drivetrain_tests.scale" in graphs[0]
    assert calls == ["plain"]


def test_what_an_operator_keeps_for_its_backward_is_no_result() -> None:
    def root(x: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return x * factor, x + factor, torch.exp(x)

    overload = define(
        "drivetrain_tests::root",
        "(Tensor x, float factor) -> (Tensor, Tensor, Tensor)",
        root,
        fake=lambda x, factor: tuple(torch.empty_like(x) for _ in range(3)),
    )
    x = torch.zeros(2)
    assert len(Operator(overload, (3.0,))(x)) == 3
    first, second = Operator(overload, (3.0,), results=2)(x)
    assert (first.tolist(), second.tolist()) == ([0, 0], [3, 3])
    assert Operator(overload, (3.0,), results=1)(x).tolist() == [0, 0]


def test_without_a_backward_there_is_no_gradient() -> None:
    overload = define("drivetrain_tests::unscaled", SCHEMA, scale, fake=shape)
    x = torch.ones(2, requires_grad=True)
    assert not overload(x, 2.0).requires_grad
    compiled = torch.compile(lambda x: overload(x, 2.0) * x, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2]


def test_second_derivatives_are_refused_where_a_backward_is_an_operator() -> None:
    def cube(x: torch.Tensor) -> torch.Tensor:
        return x**3

    def cube_slope(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return grad * 3 * x**2

    slope = define(
        "drivetrain_tests::cube_slope",
        "(Tensor grad, Tensor x) -> Tensor",
        cube_slope,
        fake=lambda grad, x: torch.empty_like(x),
        backward=once_differentiable,
    )
    overload = define(
        "drivetrain_tests::cube",
        "(Tensor x) -> Tensor",
        cube,
        fake=torch.empty_like,
        save=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        backward=lambda ctx, grad: slope(grad, *ctx.saved_tensors),
    )
    x = torch.full((2,), 2.0, requires_grad=True)
    torch.library.opcheck(overload, (x,))
    (gradient,) = torch.autograd.grad(overload(x).sum(), x, create_graph=True)
    assert gradient.tolist() == [12, 12]
    with pytest.raises(ConfigError, match="no second derivatives"):
        gradient.sum().backward()


def test_an_operator_that_writes_says_so() -> None:
    def fill(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        out.copy_(x)
        return x.sum()

    overload = define(
        "drivetrain_tests::fill",
        "(Tensor x, Tensor(a!) out) -> Tensor",
        fill,
        fake=lambda x, out: x.new_empty(()),
    )
    torch.library.opcheck(overload, (torch.ones(3), torch.zeros(3)))
    out = torch.zeros(3)
    compiled = torch.compile(lambda x, out: overload(x, out) + out[0], fullgraph=True, backend="aot_eager")
    assert compiled(torch.ones(3), out).item() == 4
    assert out.tolist() == [1, 1, 1]
