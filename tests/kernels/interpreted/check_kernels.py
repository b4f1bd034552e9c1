"""Run by ``tests/kernels/test_triton_kernels.py`` in a process with Triton's interpreter on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import LLM, SamplingParams
from drivetrain.contracts.kernels import OPERATIONS, KernelSpec
from drivetrain.errors import ConfigError
from drivetrain.kernels.reference import ReferenceKernels
from drivetrain.kernels.triton import TritonKernels, cross_entropy, product_tiles, products, rounded_products
from drivetrain.kernels.triton.tuning import Blocks, Tuner
from support.tiny_models import save_tiny

torch.set_num_threads(1)


def both(operation: str, dtype: str = "float32", **params: float) -> tuple[Any, Any]:
    """Ours and the reference's."""
    spec = KernelSpec(operation, "cpu", dtype, {}, params)
    return tuple(kind(kind.Config()).make(spec) for kind in (TritonKernels, ReferenceKernels))  # type: ignore[return-value]


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_chunks_of_logits_give_what_all_of_them_give(cap: float) -> None:
    torch.manual_seed(0)
    spec = KernelSpec("linear_cross_entropy", "cpu", "float32", {}, {"soft_cap": cap})
    x, weight, targets = torch.randn(7, 12), torch.randn(300, 12), torch.randint(0, 300, (7,))
    targets[4] = -100
    found = []
    for chunk_bytes in (1 << 20, 3 * 300 * 4, 1):  # all rows, three, one
        own = [value.clone().requires_grad_() for value in (x, weight)]
        losses = cross_entropy.make_linear_cross_entropy(spec, chunk_bytes)(*own, targets)
        (losses * torch.linspace(0.5, 2, 7)).sum().backward()
        found.append((losses.detach(), *(value.grad for value in own)))
    for other in found[1:]:
        for one, all_ in zip(other, found[0], strict=True):
            torch.testing.assert_close(one, all_)
    _, reference = both("linear_cross_entropy", soft_cap=cap)
    torch.testing.assert_close(found[0][0], reference(x, weight, targets))


def test_what_asks_for_no_gradient_gets_none() -> None:
    """As when most of a model is frozen."""
    torch.manual_seed(6)
    x, weight, up = torch.randn(3, 8, requires_grad=True), torch.randn(40, 8), torch.randn(40, 8, requires_grad=True)
    found = []
    for loss, gated in zip(both("linear_cross_entropy"), both("gated_linear", activation=0), strict=True):
        x.grad = up.grad = None
        (loss(x, weight, torch.tensor([1, 39, 0])).sum() + gated(x, weight, up).sum()).backward()
        assert x.grad is not None
        assert up.grad is not None
        found.append((x.grad, up.grad))
    assert weight.grad is None
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_no_more_logits_than_a_chunk_are_ever_held() -> None:
    chunks = cross_entropy.chunks(12, 1000, 5 * 1000)
    assert [(rows.start, rows.stop) for rows in chunks] == [(0, 5), (5, 10), (10, 12)]


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("operation", ["linear_int8", "linear_int4", "linear_int3", "linear_w8a8", "linear_int4_a8"])
def test_split_sums_are_whole(operation: str, splits: int) -> None:
    """However the inputs are split, also into more parts than there are blocks of them."""
    torch.manual_seed(1)

    class Fixed(Tuner):
        name = f"splits_{splits}"

        def choose(self, key: str, candidates: Any, launch: Any, worth_it: bool = True, output: Any = None) -> Blocks:
            return Blocks.of(SPLITS=splits, BLOCK_M=16, BLOCK_O=16, BLOCK_I=64 if "int4_a8" in operation else 32)

    spec = KernelSpec(operation, "cpu", "float32", {}, {"group": 32})
    x, bias = torch.randn(3, 96), torch.randn(20)
    if operation in ("linear_int8", "linear_w8a8"):
        weights: tuple[torch.Tensor, ...] = (torch.randint(-128, 128, (20, 96), dtype=torch.int8), torch.rand(20))
    else:
        counts = (4, 8) if operation == "linear_int3" else (2,)
        values = [torch.randint(0, 256, (20, 96 // count), dtype=torch.uint8) for count in counts]
        weights = (*values, torch.rand(20, 3), torch.rand(20, 3))
    make = {
        "linear_int8": products.make_linear_by_row,
        "linear_int4": products.make_linear_by_group,
        "linear_int3": products.make_linear_by_group,
    }.get(operation, rounded_products.make_rounded)
    _, reference = both(operation, group=32)
    found = make(spec, Fixed())(x, *weights, bias)
    torch.testing.assert_close(found, reference(x, *weights, bias), rtol=1e-5, atol=1e-3)


def test_every_float8_number_is_read_exactly() -> None:
    weight = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(256, 1)
    ours, _ = both("linear_fp8")
    found = ours(torch.ones(1, 1), weight, torch.ones(256), None)[0]
    assert torch.equal(found.isnan(), weight.float()[:, 0].isnan())
    assert torch.equal(found.nan_to_num(), weight.float()[:, 0].nan_to_num())


ROUNDED: dict[str, tuple[torch.Tensor, ...]] = {
    "linear_w8a8": (torch.eye(32, dtype=torch.int8), torch.ones(32)),
    "linear_fp8a8": (torch.eye(32).to(torch.float8_e4m3fn), torch.ones(32), torch.tensor(0.0)),
    "linear_int4_a8": (
        torch.eye(32, dtype=torch.uint8)[:, ::2] + 16 * torch.eye(32, dtype=torch.uint8)[:, 1::2],
        torch.ones(32, 1),
        torch.zeros(32, 1, dtype=torch.uint8),
    ),
}
"""Weights that give the rounded activations themselves."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter cuts bfloat16
@pytest.mark.parametrize("operation", ROUNDED)
def test_activations_are_rounded_bit_by_bit_as_the_reference_does(operation: str, dtype: torch.dtype) -> None:
    """Ties, rows of zeros, and what is no number, which its own row alone shows."""
    torch.manual_seed(8)
    x = torch.randn(6, 32).to(dtype)
    x[1] = torch.arange(32) - 15.5
    x[1, 0] = 127.0
    x[2], x[3, 5], x[4, 6] = 0.0, float("nan"), float("inf")
    ours, reference = (kernel(x, *ROUNDED[operation], None) for kernel in both(operation, group=32))
    assert ours.isnan().any(1).tolist() == [False, False, False, True, True, False]
    assert torch.equal(ours.isnan(), reference.isnan())
    assert torch.equal(ours.nan_to_num(), reference.nan_to_num())


def test_float8_is_cut_at_a_given_scale() -> None:
    x = torch.tensor([[1000.0, 17.0, -1000.0, 0.0] * 8])
    weight, scales, _ = ROUNDED["linear_fp8a8"]
    ours, _ = both("linear_fp8a8")
    assert ours(x, weight, scales, torch.tensor(1.0)).tolist() == [[448.0, 16.0, -448.0, 0.0] * 8]


def test_a_large_vocabulary_is_drawn_from_as_the_reference_does() -> None:
    """Several blocks of the vocabulary, ties across their borders, and draws at both ends."""
    torch.manual_seed(2)
    rows, vocab = 12, 1100
    logits = (torch.randn(rows, vocab) * 8).round() / 4  # many ties
    heat = torch.full((rows,), 0.8)
    top_k = torch.tensor([0, 1, 40, 1099] * 3)
    top_p = torch.tensor([1.0, 0.95, 0.4] * 4)
    min_p = torch.tensor([0.0, 0.02] * 6)
    draws = torch.rand(rows, dtype=torch.float64)
    draws[:3], draws[3:6] = 0.0, 1 - 1e-12
    ours, reference = both("sample")
    settings = (heat, top_k, top_p, min_p, draws)
    assert torch.equal(ours(logits, *settings), reference(logits, *settings))


def test_rows_without_a_number_give_a_token_of_the_vocabulary() -> None:
    logits = torch.full((4, 600), float("nan"))
    logits[1:3] = -float("inf")
    logits[3, 7] = 1.0
    one = torch.ones(4)
    ours, _ = both("sample")
    found = ours(logits, one, torch.tensor([0, 2, 0, 2]), one * 0.9, one * 0.1, one.double() / 2)
    assert ((found >= 0) & (found < 600)).all()
    assert found[3] == 7


def test_activations_of_a_chunked_tensor_need_no_copy() -> None:
    torch.manual_seed(3)
    both_halves = torch.randn(5, 2, 40)
    ours, reference = both("silu_mul")
    halves = both_halves.view(5, 80).chunk(2, dim=-1)
    torch.testing.assert_close(ours(*halves), reference(*halves))


def test_gradients_of_views_reach_what_they_are_views_of() -> None:
    torch.manual_seed(4)
    found = []
    for norm, activation in zip(both("rms_norm", eps=1e-5), both("silu_mul"), strict=True):
        torch.manual_seed(5)
        x, weight = torch.randn(4, 24, requires_grad=True), torch.randn(24, requires_grad=True)
        activation(*norm(x.T.contiguous().T, weight).chunk(2, dim=-1)).sum().backward()
        found.append((x.grad, weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("is_normed_used", [True, False])
def test_one_of_two_results_may_be_unused(is_normed_used: bool) -> None:
    torch.manual_seed(9)
    inputs = torch.randn(3, 16), torch.randn(3, 16), torch.randn(16)
    found = []
    for kernel in both("add_rms_norm", eps=1e-5):
        own = [value.clone().requires_grad_() for value in inputs]
        results = kernel(*own)
        results[0 if is_normed_used else 1].square().sum().backward()
        found.append([torch.zeros_like(value) if value.grad is None else value.grad for value in own])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "inputs", "outputs", "has_bias"), [(2, 200, 20, True), (17, 64, 33, False)])
def test_few_rows_in_half_precision_equal_the_reference(
    rows: int, inputs: int, outputs: int, has_bias: bool, dtype: torch.dtype
) -> None:
    """Inputs in one part and in two; weights that are a part of wider ones, and rows of several dims."""
    torch.manual_seed(13)
    x, bias = torch.randn(1, rows, inputs).to(dtype), torch.randn(outputs).to(dtype) if has_bias else None
    weight = (torch.randn(outputs, inputs + 3) / inputs**0.5).to(dtype)[:, :inputs]
    launched: list[int] = []
    multiply = products.multiply_by_row

    def noting(*arguments: Any, **options: Any) -> torch.Tensor:
        launched.append(arguments[1])
        return multiply(*arguments, **options)

    ours, theirs = both("linear", str(dtype).removeprefix("torch."))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "multiply_by_row", noting)
        out = ours(x, weight, bias)
    assert launched == [products.PLAIN]
    torch.testing.assert_close(out, theirs(x, weight, bias), rtol=2e-2, atol=2e-2)


class _ByLibrary(Tuner):
    def choose(self, key: str, candidates: Any, launch: Any, worth_it: bool = True, output: Any = None) -> Blocks:
        return product_tiles.LIBRARY


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_library_may_be_what_is_chosen_for_few_rows(has_bias: bool) -> None:
    torch.manual_seed(14)
    x, weight = torch.randn(3, 40).bfloat16(), torch.randn(9, 40).bfloat16()
    bias = torch.randn(9).bfloat16() if has_bias else None
    ours = products.make_linear(KernelSpec("linear", "cpu", "bfloat16", {}, {}), _ByLibrary())
    assert torch.equal(ours(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


def test_what_few_rows_do_not_cover_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows, float32, weights in columns, mixed dtypes, and rows that gradients are asked for."""
    monkeypatch.setattr(products, "multiply_by_row", None)
    ours, _ = both("linear", "bfloat16")
    weight = torch.randn(4, 8).bfloat16()
    for x, w in (
        (torch.randn(65, 8).bfloat16(), weight),
        (torch.randn(3, 8), weight.float()),
        (torch.randn(3, 4).bfloat16(), weight.T),
        (torch.randn(3, 8).bfloat16().requires_grad_(), weight),
        (torch.randn(0, 8).bfloat16(), weight),
    ):
        assert torch.equal(ours(x, w), torch.nn.functional.linear(x, w))


def test_one_row_is_an_operator_where_no_gradient_is_asked_for() -> None:
    """More rows, and gradients, are torch's own, which are operators too."""
    torch.manual_seed(10)
    x, weight, bias = torch.randn(1, 1, 24), torch.randn(10, 24), torch.randn(10)
    ours, _ = both("linear")
    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(module.code)
        return module

    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    with torch.inference_mode():
        plain = ours(x, weight, bias)
    assert torch.equal(compiled(x, weight, bias), plain)
    assert torch.equal(ours(x, weight, bias), plain)
    assert compiled(x.expand(1, 3, 24), weight, bias).shape == (1, 3, 10)
    assert compiled(x.clone().requires_grad_(), weight, bias).requires_grad
    assert ["linear_float32_row" in graph for graph in graphs] == [True, False, False]
    torch.library.opcheck(torch.ops.drivetrain_triton_untuned.linear_float32_row.default, (x, weight, bias))


def test_a_cache_that_is_written_under_autograd_stays_out_of_it() -> None:
    torch.manual_seed(11)
    q, k, v = (torch.randn(3, heads, 8).requires_grad_() for heads in (2, 1, 1))
    cos, sin = torch.randn(2, 3, 8)
    found = []
    for kernel in both("rope_write"):
        caches = torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 1, 8)
        out = kernel(q, k, v, cos, sin, *caches, torch.tensor([5, 0, 2]))
        assert not any(tensor.requires_grad for tensor in (out, *caches))
        found.append((out, *caches))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("operation", ["rms_norm", "silu_mul", "rope"])
def test_second_derivatives_are_refused_and_not_left_out(operation: str) -> None:
    x = torch.randn(2, 1, 8, requires_grad=True)
    others = {"rms_norm": (torch.ones(8),), "silu_mul": (torch.ones(2, 1, 8),), "rope": (x, *torch.randn(2, 2, 8))}
    ours, _ = both(operation)
    result = ours(x, *others[operation])
    (gradient,) = torch.autograd.grad((result if operation != "rope" else result[0]).exp().sum(), x, create_graph=True)
    with pytest.raises(ConfigError, match="no second derivatives"):
        gradient.sum().backward()


def test_every_operation_has_its_name_in_the_contract() -> None:
    assert TritonKernels(TritonKernels.Config()).operations() == OPERATIONS.keys() - {"decoder_layers"}


def test_a_model_served_by_these_parts_gives_the_references_tokens(tmp_path: Path) -> None:
    """And a swap to sdpa in between keeps the cache and the tokens."""
    save_tiny("llama", tmp_path / "model")
    options: dict[str, Any] = {"platform": {"name": "cpu", "threads": 1}, "engine": {"max_model_len": 64}}
    prompts = ["The quick brown fox", "There is more", "x"]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with LLM(tmp_path / "model", **options, attention="sdpa", kernels="reference") as llm:
        wanted = [result.token_ids for result in llm.generate(prompts, params)]
    attention = {"name": "paged-triton", "block_size": 16}
    with LLM(tmp_path / "model", **options, attention=attention, kernels="triton") as llm:
        assert [result.token_ids for result in llm.generate(prompts, params)] == wanted
        llm.swap(attention={"name": "sdpa", "block_size": 16})
        assert [result.token_ids for result in llm.generate(prompts, params)] == wanted
