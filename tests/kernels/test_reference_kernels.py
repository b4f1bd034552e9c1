"""Rules of the reference kernels: they compute the plain formula, in any dtype, and can be differentiated."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from drivetrain.contracts.kernels import OPERATIONS, KernelSpec
from drivetrain.errors import ConfigError
from drivetrain.kernels.reference import ReferenceKernels
from drivetrain.serving.sampler import distributions
from drivetrain.serving.types import SamplingParams

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


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_is_the_sum_and_its_norm(dtype: str) -> None:
    torch.manual_seed(5)
    x, residual = torch.randn(2, 4, 12, dtype=getattr(torch, dtype))
    weight = torch.randn(12, dtype=getattr(torch, dtype))
    normed, summed = bind("add_rms_norm", dtype, eps=1e-5, weight_offset=1.0)(x, residual, weight)
    assert torch.equal(summed, x + residual)
    assert torch.equal(normed, bind("rms_norm", dtype, eps=1e-5, weight_offset=1.0)(x + residual, weight))


def test_rope_write_leaves_every_other_slot_alone() -> None:
    torch.manual_seed(6)
    q, k, v, cos, sin = torch.randn(3, 4, 8), *torch.randn(2, 3, 2, 8), *torch.randn(2, 3, 8)
    keys, values = torch.randn(2, 5, 4, 2, 8)
    slots = torch.tensor([19, 0, 6])
    before = keys.clone(), values.clone()
    turned_q, turned_k = bind("rope")(q, k, cos, sin)
    assert torch.equal(bind("rope_write")(q, k, v, cos, sin, keys, values, slots), turned_q)
    for cache, old, new in ((keys, before[0], turned_k), (values, before[1], v)):
        assert torch.equal(cache.flatten(0, 1)[slots], new)
        others = [slot for slot in range(20) if slot not in slots.tolist()]
        assert torch.equal(cache.flatten(0, 1)[others], old.flatten(0, 1)[others])


@pytest.mark.parametrize(("activation", "name"), [(0.0, "silu_mul"), (1.0, "gelu_tanh_mul")])
def test_gated_linear_is_two_products_and_the_activation(activation: float, name: str) -> None:
    torch.manual_seed(7)
    x, gate, up = torch.randn(2, 3, 5), *torch.randn(2, 7, 5)
    found = bind("gated_linear", activation=activation)(x, gate, up)
    assert torch.equal(found, bind(name)(x @ gate.T, x @ up.T))


def test_gated_linear_with_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gated_linear.*2\.0"):
        bind("gated_linear", activation=2.0)


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_the_cross_entropy_of_a_masked_target_is_nothing(cap: float) -> None:
    torch.manual_seed(8)
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    targets = torch.tensor([3, -100, 8, 0])
    losses = bind("linear_cross_entropy", soft_cap=cap)(x, weight, targets)
    logits = x @ weight.T
    logits = cap * torch.tanh(logits / cap) if cap else logits
    expected = -logits.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets >= 0)
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()
    assert x.grad is not None
    assert x.grad[1].count_nonzero() == 0
    assert x.grad[0].count_nonzero() == 6


def test_the_losses_of_bfloat16_are_float32() -> None:
    x, weight = torch.randn(2, 4).bfloat16(), torch.randn(5, 4).bfloat16()
    assert bind("linear_cross_entropy", "bfloat16")(x, weight, torch.tensor([0, 1])).dtype == torch.float32


def test_quantized_weights_get_no_gradient_and_inputs_do() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    weight = torch.randint(-128, 128, (3, 8), dtype=torch.int8)
    scales = torch.rand(3, requires_grad=True)
    bind("linear_int8")(x, weight, scales, None).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (weight * scales[:, None]).sum(0).detach().expand(2, 8))
    assert scales.grad is None


def settings(rows: int, vocab: int) -> list[SamplingParams]:
    """All filters in all combinations, in a fixed order."""
    torch.manual_seed(9)
    chosen = torch.rand(rows, 4)
    return [
        SamplingParams(
            temperature=0.0 if row % 7 == 3 else 0.2 + float(chosen[row, 0]),
            top_k=int(chosen[row, 1] * vocab) if row % 2 else 0,
            top_p=float(chosen[row, 2]) if row % 3 else 1.0,
            min_p=float(chosen[row, 3]) * 0.2 if row % 5 else 0.0,
        )
        for row in range(rows)
    ]


@pytest.mark.parametrize("vocab", [5, 400])
def test_sample_draws_what_the_servers_sampler_draws(vocab: int) -> None:
    rows = 200
    params, logits = settings(rows, vocab), torch.randn(rows, vocab) * 2
    draws = torch.rand(rows, dtype=torch.float64)
    cumulative = distributions(logits, params).double().cumsum(dim=-1)
    wanted = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)[:, 0]
    wanted = torch.where(torch.tensor([p.is_greedy for p in params]), logits.argmax(-1), wanted)
    columns = [[p.temperature for p in params], [p.top_k for p in params]]
    columns += [[p.top_p for p in params], [p.min_p for p in params]]
    found = bind("sample")(logits, *(torch.tensor(column) for column in columns), draws)
    assert found.dtype == torch.int64
    assert torch.equal(found, wanted)


def test_a_row_without_a_number_still_gives_a_token_of_the_vocabulary() -> None:
    logits = torch.full((4, 6), math.nan)
    logits[1:3] = -math.inf
    one = torch.ones(4)
    top_k = torch.tensor([0, 2, 0, 2])
    found = bind("sample")(logits, torch.tensor([1.0, 1.0, 0.0, 0.0]), top_k, one * 0.9, one * 0.1, one.double() / 2)
    assert ((found >= 0) & (found < 6)).all()


SMOOTH = sorted(
    name for name, it in OPERATIONS.items() if it.differentiable and not it.takes_modules and not it.rounds_inputs
)


@pytest.mark.parametrize("operation", SMOOTH)
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
        "add_rms_norm": (leaf(3, 6), leaf(3, 6), leaf(6)),
        "gated_linear": (leaf(3, 5), leaf(4, 5), leaf(4, 5)),
        "linear_cross_entropy": (leaf(3, 5), leaf(4, 5), torch.tensor([2, -100, 0])),
        "linear_int8": (leaf(3, 5), torch.randint(-128, 128, (4, 5), dtype=torch.int8), torch.rand(4), None),
        "linear_int4": (leaf(3, 8), torch.randint(0, 256, (4, 4), dtype=torch.uint8), *torch.rand(2, 4, 2), None),
        "linear_fp8": (leaf(3, 5), torch.randn(4, 5).to(torch.float8_e4m3fn), torch.rand(4), torch.rand(4)),
        "linear_int3": (
            leaf(3, 8),
            torch.randint(0, 256, (4, 2), dtype=torch.uint8),
            torch.randint(0, 256, (4, 1), dtype=torch.uint8),
            *torch.rand(2, 4, 2),
            None,
        ),
        "linear_gguf": (leaf(3, 32), torch.zeros(4, 34, dtype=torch.uint8), torch.rand(4)),
    }[operation]
    assert torch.autograd.gradcheck(bind(operation, "float64", eps=1e-5, type=8.0), inputs)
    if operation == "rms_norm":
        assert torch.autograd.gradcheck(bind(operation, "float64", eps=1e-5, weight_offset=1.0), inputs)


# --- activations that are rounded ------------------------------------------------------------------------------------

IDENTITY = torch.eye(4, dtype=torch.int8)


def test_activations_are_rounded_to_the_even_one_of_two_as_near() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0], [254.0, 1.0, -1.0, 3.0]])
    found = bind("linear_w8a8")(x, IDENTITY, torch.ones(4), None)
    assert found.tolist() == [[127.0, 0.0, 2.0, -2.0], [0.0] * 4, [254.0, 0.0, -0.0, 4.0]]


def test_activations_in_float8_are_cut_at_a_given_scale_and_fit_with_their_own() -> None:
    weight = IDENTITY.float().to(torch.float8_e4m3fn)
    x = torch.tensor([[1000.0, 17.0, -1000.0, 0.0]])
    linear = bind("linear_fp8a8")
    assert linear(x, weight, torch.ones(4), torch.tensor(1.0)).tolist() == [[448.0, 16.0, -448.0, 0.0]]
    own = linear(x, weight, torch.ones(4), torch.tensor(0.0))
    torch.testing.assert_close(own, x, rtol=0.07, atol=0)


def test_a_block_of_activations_has_a_scale_of_its_own() -> None:
    """A large number spoils nobody but the 32 beside it."""
    blocks = torch.zeros(1, 68, dtype=torch.uint8)
    for block in range(2):
        blocks[0, 34 * block : 34 * block + 2] = torch.tensor([1.0], dtype=torch.float16).view(torch.uint8)
    blocks[0, 34 + 2 + 1] = 1  # the second input of the second block
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 32], x[0, 33] = 1e6, 127.0, 3.0
    assert bind("linear_gguf_a8", type=8.0)(x, blocks, None).tolist() == [[3.0]]


@pytest.mark.parametrize("operation", ["linear_w8a8", "linear_fp8a8"])
def test_activations_that_are_no_numbers_are_seen_in_their_row_alone(operation: str) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = math.nan
    weight = IDENTITY if operation == "linear_w8a8" else IDENTITY.float().to(torch.float8_e4m3fn)
    more = (torch.tensor(0.0),) if operation == "linear_fp8a8" else ()
    found = bind(operation)(x, weight, torch.ones(4), *more, None)
    assert found[1].isnan().all()
    assert torch.equal(found[::2], torch.ones(2, 4))
