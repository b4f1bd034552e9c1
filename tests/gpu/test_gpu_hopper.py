"""Attention without a cache on a Hopper GPU: its own kernels against torch's attention in float32, forward and back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from drivetrain.contracts.attention import AttentionSpec, LayerAttention
from drivetrain.plugins.attention.paged_triton import PagedTritonAttention
from drivetrain.testing.attention_oracle import whole_batch

HEADS = ((32, 8, 128), (3, 3, 128), (9, 3, 64), (8, 1, 64))
LENGTHS = ([1], [64, 65], [127, 128, 129], [1030, 1, 257], [2048])


@pytest.fixture(autouse=True)
def hopper(gpu: torch.device) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this GPU is no Hopper")


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_inputs(heads: tuple[int, int, int], tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(tokens, count, heads[2], device="cuda", dtype=dtype) for count in (heads[0], *[heads[1]] * 2)]


def attended(
    inputs: list[torch.Tensor], heads: tuple[int, int, int], lengths: list[int], grad: torch.Tensor, **options: bool
) -> list[torch.Tensor]:
    """Output and gradients of the backend."""
    dtype = str(inputs[0].dtype).removeprefix("torch.")
    spec = AttentionSpec((LayerAttention(*heads, heads[2] ** -0.5),), dtype)
    own = [x.detach().requires_grad_() for x in inputs]
    backend = PagedTritonAttention(PagedTritonAttention.Config.model_validate(options))
    out = backend.begin(spec, whole_batch(lengths, torch.device("cuda")), None).attend(0, *own)
    return [out.detach(), *torch.autograd.grad(out, own, grad)]


def wanted(inputs: list[torch.Tensor], lengths: list[int], grad: torch.Tensor) -> list[torch.Tensor]:
    """The same of torch in float32."""
    wide = [x.detach().float().requires_grad_() for x in inputs]
    parts = [
        functional.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in part), is_causal=True, enable_gqa=True
        )
        for part in zip(*(x.split(lengths) for x in wide), strict=True)
    ]
    out = torch.cat([part[0].transpose(0, 1) for part in parts])
    return [out.detach(), *torch.autograd.grad(out, wide, grad.float())]


def assert_near(found: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    """Half precision rounds probabilities, their gradients and the results: under 1% of the whole together. Gradients
    of a query that sees one key alone are 0, but for the order of sums."""
    for one, other in zip(found, right, strict=True):
        assert torch.isfinite(one).all()
        error = (one.float() - other).norm() / other.norm().clamp_min(1e-2)
        assert error < 0.01, float(error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "x".join(map(str, heads)))
def test_equals_torch(heads: tuple[int, int, int], lengths: list[int], dtype: torch.dtype) -> None:
    inputs = random_inputs(heads, sum(lengths), dtype)
    grad = torch.randn_like(inputs[0])
    assert_near(attended(inputs, heads, lengths, grad), wanted(inputs, lengths, grad))


def test_scores_that_are_far_apart() -> None:
    """Large scores: of most rows one key takes all, and the running maximum moves in almost every block."""
    heads, lengths = (8, 2, 128), [777, 300]
    inputs = random_inputs(heads, sum(lengths), torch.bfloat16)
    inputs[0] *= 12
    grad = torch.randn_like(inputs[0])
    assert_near(attended(inputs, heads, lengths, grad), wanted(inputs, lengths, grad))


def test_parts_of_a_wider_tensor_are_read_in_place() -> None:
    heads, lengths = (8, 2, 128), [300, 77]
    fused = torch.randn(377, 12, 128, device="cuda", dtype=torch.bfloat16)
    inputs = list(fused.split([8, 2, 2], dim=1))
    grad = torch.randn(377, 8, 128, device="cuda", dtype=torch.bfloat16)
    assert_near(attended(inputs, heads, lengths, grad), wanted(inputs, lengths, grad))


@pytest.mark.parametrize("size", [64, 128])
def test_a_sequence_does_not_feel_what_is_no_number_in_its_neighbours(size: int) -> None:
    heads, lengths = (8, 2, size), [200, 300, 130]
    inputs = random_inputs(heads, sum(lengths), torch.bfloat16)
    grad = torch.randn_like(inputs[0])
    right = wanted(inputs, lengths, grad)
    for x in (*inputs, grad):
        x[200:500] = float("nan")
    found = attended(inputs, heads, lengths, grad)
    for part in (slice(0, 200), slice(500, 630)):
        assert_near([x[part] for x in found], [x[part] for x in right])


@pytest.mark.usefixtures("deterministic")
def test_gradients_have_the_same_bits_where_torch_is_told_so() -> None:
    heads, lengths = (8, 2, 128), [1500, 600]
    inputs = random_inputs(heads, sum(lengths), torch.bfloat16)
    grad = torch.randn_like(inputs[0])
    first, second = (attended(inputs, heads, lengths, grad) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_the_kernels_for_all_gpus_agree() -> None:
    heads, lengths = (8, 2, 128), [1500, 600]
    inputs = random_inputs(heads, sum(lengths), torch.bfloat16)
    grad = torch.randn_like(inputs[0])
    own, portable = (attended(inputs, heads, lengths, grad, hopper_kernels=own) for own in (True, False))
    assert_near(own, [x.float() for x in portable])
