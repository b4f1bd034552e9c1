"""Rules of the reference kernels: they compute the plain formula, in any dtype, and can be differentiated."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from drivetrain.contracts.kernels import OPERATIONS, KernelSpec
from drivetrain.errors import ConfigError
from drivetrain.kernels.reference import ReferenceKernels

torch.set_num_threads(1)

DTYPES = ("float32", "bfloat16", "float16", "float64")


def bind(operation: str, dtype: str = "float32", **params: float) -> Any:
    kernels = ReferenceKernels(ReferenceKernels.Config())
    return kernels.make(KernelSpec(operation, "cpu", dtype, {}, params))


def check(operation: str, dtype: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == getattr(torch, dtype)
    relative, absolute = OPERATIONS[operation].tolerance.get(dtype, (1e-6, 1e-6))
    torch.testing.assert_close(found.double(), expected.double(), rtol=relative, atol=absolute)


def test_every_operation_is_implemented_for_every_device_and_dtype() -> None:
    kernels = ReferenceKernels(ReferenceKernels.Config())
    assert kernels.operations() == set(OPERATIONS)
    for name in OPERATIONS:
        assert kernels.supports(KernelSpec(name, "xpu", "float16")).ok
        assert callable(kernels.make(KernelSpec(name, "cuda", "bfloat16")))


def test_an_unknown_operation_is_refused_with_the_nearest_name() -> None:
    kernels = ReferenceKernels(ReferenceKernels.Config())
    assert kernels.supports(KernelSpec("rmsnorm", "cpu", "float32")).code == "unknown_operation"
    with pytest.raises(ConfigError, match="rms_norm"):
        kernels.make(KernelSpec("rmsnorm", "cpu", "float32"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(7,), (5, 33), (2, 3, 8)])
def test_rms_norm_is_the_formula(dtype: str, offset: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=getattr(torch, dtype)), torch.randn(shape[-1], dtype=getattr(torch, dtype))
    wide_x, wide_weight = x.double(), weight.double()
    root = torch.sqrt((wide_x**2).mean(-1, keepdim=True) + 1e-5)
    found = bind("rms_norm", dtype, eps=1e-5, weight_offset=offset)(x, weight)
    check("rms_norm", dtype, found, wide_x / root * (wide_weight + offset))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "rotary"), [(2, 2), (8, 8), (10, 4)])
def test_rope_turns_each_pair_by_its_angle_and_passes_the_rest(dtype: str, size: int, rotary: int) -> None:
    torch.manual_seed(1)
    kind = getattr(torch, dtype)
    q, k = torch.randn(5, 3, size, dtype=kind), torch.randn(5, 1, size, dtype=kind)
    angles = torch.rand(5, rotary // 2, dtype=torch.float64) * 6
    cos, sin = (torch.cat((f(angles), f(angles)), -1).to(kind) for f in (torch.cos, torch.sin))
    for found, x in zip(bind("rope", dtype)(q, k, cos, sin), (q, k), strict=True):
        expected = x.double().clone()
        for pair in range(rotary // 2):
            turn = torch.polar(torch.ones_like(angles[:, pair]), angles[:, pair])[:, None]
            turned = torch.complex(x[..., pair].double(), x[..., pair + rotary // 2].double()) * turn
            expected[..., pair], expected[..., pair + rotary // 2] = turned.real, turned.imag
        assert torch.equal(found[..., rotary:], x[..., rotary:])
        torch.testing.assert_close(found.double(), expected, rtol=2e-2 if kind.itemsize == 2 else 1e-5, atol=2e-2)
        assert found.dtype == kind


def test_rope_keeps_the_dtype_of_queries_when_angles_are_wider() -> None:
    q, k, cos, sin = (
        torch.randn(2, 1, 4).bfloat16(),
        torch.randn(2, 1, 4).bfloat16(),
        torch.rand(2, 4),
        torch.rand(2, 4),
    )
    assert {x.dtype for x in bind("rope", "bfloat16")(q, k, cos, sin)} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activations_are_their_formulas(dtype: str) -> None:
    torch.manual_seed(2)
    gate, up = torch.randn(2, 4, 19, dtype=getattr(torch, dtype))
    x, wide_up = gate.double(), up.double()
    check("silu_mul", dtype, bind("silu_mul", dtype)(gate, up), x / (1 + torch.exp(-x)) * wide_up)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    check("gelu_tanh_mul", dtype, bind("gelu_tanh_mul", dtype)(gate, up), 0.5 * x * (1 + torch.tanh(inner)) * wide_up)


@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_is_the_product(has_bias: bool) -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(2, 3, 5), torch.randn(7, 5)
    bias = torch.randn(7) if has_bias else None
    expected = torch.einsum("abi,oi->abo", x.double(), weight.double()) + (0 if bias is None else bias.double())
    check("linear", "float32", bind("linear")(x, weight, bias), expected)


@pytest.mark.parametrize("operation", sorted(OPERATIONS))
def test_gradients_are_right(operation: str) -> None:
    torch.manual_seed(4)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    inputs = {
        "rms_norm": (leaf(3, 6), leaf(6)),
        "rope": (leaf(3, 2, 6), leaf(3, 1, 6), leaf(3, 4), leaf(3, 4)),
        "silu_mul": (leaf(3, 5), leaf(3, 5)),
        "gelu_tanh_mul": (leaf(3, 5), leaf(3, 5)),
        "linear": (leaf(3, 5), leaf(4, 5), leaf(4)),
    }[operation]
    assert torch.autograd.gradcheck(bind(operation, "float64", eps=1e-5), inputs)
    if operation == "rms_norm":
        assert torch.autograd.gradcheck(bind(operation, "float64", eps=1e-5, weight_offset=1.0), inputs)
