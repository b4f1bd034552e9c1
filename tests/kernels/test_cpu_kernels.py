"""Rules of the C++ kernels: for every architecture and vector width they compute what plain torch computes, from memory
that lies as it happens to lie; what they can't do they refuse, or leave to the layers themselves."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain.binding import KernelBinder
from drivetrain.contracts.attention import OpensPages
from drivetrain.contracts.kernels import KernelSpec
from drivetrain.contracts.model import BuildContext
from drivetrain.contracts.source import silent
from drivetrain.errors import ConfigError
from drivetrain.kernels.cpu import CpuKernels
from drivetrain.kernels.cpu.decoder import CoarseDecoder
from drivetrain.kernels.cpu.library import runnable_variants
from drivetrain.kernels.reference import ReferenceKernels
from drivetrain.plugins.attention.paged_cpu import PagedCpuAttention
from drivetrain.plugins.attention.sdpa import SdpaAttention
from drivetrain.plugins.model.decoder import DecoderModel
from support.paging import Pages, whole_batch
from support.tiny_models import VOCAB_SIZE, FolderCheckpoint, save_tiny, tiny_configs

torch.set_num_threads(1)

CPU = torch.device("cpu")
NAMES = sorted(tiny_configs())
REFERENCE = ReferenceKernels(ReferenceKernels.Config())
HERE = runnable_variants()

STEPS: Sequence[dict[int, int]] = (
    {0: 5, 1: 1, 2: 17},
    {0: 1, 1: 3, 2: 1, 3: 20},
    {0: 1, 1: 1, 2: 1, 3: 1, 4: 33},
    dict.fromkeys(range(5), 1),
    {0: 7, 5: 18},
    dict.fromkeys(range(6), 1),
)
"""Prompts of every size, chunks, decodes and mixtures of all; sequence -> new tokens."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def checkpoints(folders: Path) -> dict[str, FolderCheckpoint]:
    made = {}
    for name in NAMES:
        save_tiny(name, folders / name)
        made[name] = FolderCheckpoint(folders / name)
    return made


def provider(variant: str = "auto") -> CpuKernels:
    return CpuKernels(CpuKernels.Config.model_validate({"instructions": variant}))


def build(checkpoint: FolderCheckpoint, kernels: CpuKernels | None, dtype: torch.dtype = torch.float32) -> Any:
    providers = [("cpu", kernels)] if kernels is not None else []
    bind = KernelBinder([*providers, ("reference", REFERENCE)]).bind
    return DecoderModel(DecoderModel.Config()).build(checkpoint, BuildContext(CPU, dtype, bind, None, silent))


@torch.inference_mode()
def scores(module: Any, backend: type[SdpaAttention], block_size: int = 4) -> torch.Tensor:
    """Scores of every token of STEPS, fed over a paged cache."""
    spec = module.spec.attention
    attention = backend(backend.Config(block_size=block_size))
    pages = Pages(spec, block_size, 80)
    cache = attention.allocate(spec, pages.num_blocks, CPU)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, VOCAB_SIZE, (60,), generator=generator) for _ in range(6)]
    parts = []
    for new_tokens in STEPS:
        done = [pages.lengths.get(s, 0) for s in range(len(ids))]
        batch = pages.batch(new_tokens)
        flat = torch.cat([ids[s][done[s] : done[s] + new] for s, new in new_tokens.items()])
        hidden = module(flat, pages.positions(batch), attention.begin(spec, batch, cache))
        parts.append(module.logits(hidden))
    return torch.cat(parts).float()


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, FolderCheckpoint]) -> dict[str, torch.Tensor]:
    return {name: scores(build(checkpoint, None), SdpaAttention) for name, checkpoint in checkpoints.items()}


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", HERE)
def test_every_architecture_scores_as_the_plain_loop_does(
    checkpoints: dict[str, FolderCheckpoint], expected: dict[str, torch.Tensor], variant: str
) -> None:
    """All layers in one call, in each vector width that this processor runs."""
    for name, checkpoint in checkpoints.items():
        found = scores(build(checkpoint, provider(variant)), PagedCpuAttention)
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("name", NAMES)
def test_each_part_works_without_the_other(
    checkpoints: dict[str, FolderCheckpoint], expected: dict[str, torch.Tensor], name: str
) -> None:
    """The kernels under sdpa's attention, and paged-cpu's attention between the reference's kernels."""
    for kernels, backend in ((provider(), SdpaAttention), (None, PagedCpuAttention)):
        found = scores(build(checkpoints[name], kernels), backend, block_size=16)
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["smollm2", "gemma2", "olmo2", "phi3", "qwen3"])
def test_bfloat16_is_as_near_to_float32_as_the_plain_loop(
    checkpoints: dict[str, FolderCheckpoint], expected: dict[str, torch.Tensor], name: str
) -> None:
    """The residual stream stays in float32, so that errors are smaller than the plain loop's, or as small."""
    plain = scores(build(checkpoints[name], None, torch.bfloat16), SdpaAttention)
    found = scores(build(checkpoints[name], provider(), torch.bfloat16), PagedCpuAttention)
    errors = [(result - expected[name]).square().mean().sqrt().item() for result in (found, plain)]
    assert errors[0] <= errors[1] * 1.05


def test_all_threads_give_the_same(checkpoints: dict[str, FolderCheckpoint], expected: dict[str, torch.Tensor]) -> None:
    torch.set_num_threads(3)
    try:
        found = scores(build(checkpoints["smollm2"], provider()), PagedCpuAttention)
    finally:
        torch.set_num_threads(1)
        provider().make(KernelSpec("linear", "cpu", "float32"))  # leaves the library's pool at one thread
    torch.testing.assert_close(found, expected["smollm2"], rtol=1e-4, atol=1e-4)


class _CountsCalls:
    """Counts what goes into the library."""

    def __init__(self, coarse: CoarseDecoder) -> None:
        self._library = coarse._library
        self.count = 0
        coarse._library = self  # type: ignore[assignment]

    def dt_decoder_forward(self, *arguments: Any) -> int:
        self.count += 1
        return int(self._library.dt_decoder_forward(*arguments))


def calls_of(module: Any) -> _CountsCalls:
    return _CountsCalls(module.model._run_layers)


def test_a_step_is_one_call(checkpoints: dict[str, FolderCheckpoint]) -> None:
    module = build(checkpoints["smollm2"], provider())
    calls = calls_of(module)
    scores(module, PagedCpuAttention)
    assert calls.count == len(STEPS)
    scores(module, SdpaAttention)  # keeps its pages to itself
    assert calls.count == len(STEPS)


def test_weights_that_move_are_read_where_they_are(checkpoints: dict[str, FolderCheckpoint]) -> None:
    module = build(checkpoints["smollm2"], provider())
    calls = calls_of(module)
    before = scores(module, PagedCpuAttention)
    with torch.no_grad():
        for parameter in module.parameters():
            moved = parameter.detach().clone() * 1.5
            parameter.detach().fill_(float("nan"))
            parameter.data = moved
    after = scores(module, PagedCpuAttention)
    assert calls.count == 2 * len(STEPS)
    assert after.isfinite().all()
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, scores(module, SdpaAttention), rtol=1e-4, atol=1e-4)


def test_threads_that_share_a_model_do_not_disturb_each_other(
    checkpoints: dict[str, FolderCheckpoint], expected: dict[str, torch.Tensor]
) -> None:
    """As a swap does when it warms new parts up beside the engine's own steps: one model, two caches."""
    module = build(checkpoints["smollm2"], provider())
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: [scores(module, PagedCpuAttention) for _ in range(10)], range(4)):
            for result in found:
                torch.testing.assert_close(result, expected["smollm2"], rtol=1e-4, atol=1e-4)


class _Doubled(torch.nn.Module):
    """Stands for a layer that a quantizer has put in a linear layer's place."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.inner = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x) * 2
        return out


def test_a_layer_that_is_no_plain_linear_is_called(checkpoints: dict[str, FolderCheckpoint]) -> None:
    module = build(checkpoints["smollm2"], provider())
    module.model.layers[1].mlp.up_proj = _Doubled(module.model.layers[1].mlp.up_proj)
    calls = calls_of(module)
    found = scores(module, PagedCpuAttention)
    assert calls.count == 0
    torch.testing.assert_close(found, scores(module, SdpaAttention), rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_the_layers(checkpoints: dict[str, FolderCheckpoint]) -> None:
    """Where they are asked for, the layers are called one by one, and their kernels are differentiable."""
    gradients = []
    for kernels, backend in ((None, SdpaAttention), (provider(), PagedCpuAttention)):
        module = build(checkpoints["qwen3"], kernels)
        attention = backend(backend.Config())
        step = attention.begin(module.spec.attention, whole_batch([9, 4]), None)
        ids = torch.arange(13)
        module.logits(module(ids, torch.cat([torch.arange(9), torch.arange(4)]), step)).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in module.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=lambda t, n=name: n + t)


def test_long_contexts_are_cut_and_joined() -> None:
    """One query over many keys is shared by all threads; a window and a soft cap hold there too."""
    from drivetrain.contracts.attention import AttentionSpec, LayerAttention

    torch.set_num_threads(4)
    try:
        for window, soft_cap in ((None, None), (1500, None), (None, 5.0)):
            layer = LayerAttention(6, 2, 20, 20**-0.5, window, soft_cap)
            spec = AttentionSpec((layer,), "float32")
            results = []
            for backend in (SdpaAttention, PagedCpuAttention):
                attention, pages = backend(backend.Config()), Pages(spec, 16, 400)
                cache = attention.allocate(spec, pages.num_blocks, CPU)
                generator = torch.Generator().manual_seed(3)
                for new_tokens in ({0: 3000, 1: 40}, {0: 1, 1: 1}):
                    batch = pages.batch(new_tokens)
                    total = sum(new_tokens.values())
                    q, k, v = (torch.randn(total, heads, 20, generator=generator) for heads in (6, 2, 2))
                    step = attention.begin(spec, batch, cache)
                    results.append(step.attend(0, q, k, v))
            for plain, native in zip(results[:2], results[2:], strict=True):
                torch.testing.assert_close(native, plain, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(1)
        provider().make(KernelSpec("linear", "cpu", "float32"))  # leaves the library's pool at one thread


# --- single operations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", HERE)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 16, 17, 31, 32, 33, 70])
def test_products_of_every_number_of_rows(variant: str, rows: int) -> None:
    """Few rows and many, with outputs that fill no tile, and inputs that fill no vector."""
    generator = torch.Generator().manual_seed(rows)
    for inner, outer in ((64, 96), (65, 101), (7, 3), (33, 48), (200, 49)):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1.6e-2)):
            spec = KernelSpec("linear", "cpu", str(dtype).removeprefix("torch."), {"I": inner, "O": outer})
            x, weight, bias = (
                torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, inner), (outer, inner), (outer,))
            )
            wanted = (x.double() @ weight.double().T + bias.double()).to(dtype)
            found = provider(variant).make(spec)(x, weight, bias)
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * 10)


def test_tensors_that_start_anywhere_in_memory() -> None:
    """Rows that begin at odd addresses, columns with gaps: the right answer, not a fault."""
    linear = provider().make(KernelSpec("linear", "cpu", "float32", {"I": 30, "O": 20}))
    buffer = torch.randn(5000)
    for offset in (1, 2, 3, 5, 7):
        x = buffer[offset : offset + 6 * 30].view(6, 30)
        weight = buffer[offset + 300 : offset + 300 + 20 * 30].view(20, 30)
        torch.testing.assert_close(linear(x, weight, None), x @ weight.T)
        gaps = buffer[: 6 * 60].view(6, 60)[:, ::2]
        torch.testing.assert_close(linear(gaps, weight, None), gaps @ weight.T)
        torch.testing.assert_close(linear(x, weight.T.contiguous().T, None), x @ weight.T)


def test_not_a_number_stays_one() -> None:
    """Nothing hides a fault of the weights or of the input."""
    linear = provider().make(KernelSpec("linear", "cpu", "float32", {"I": 40, "O": 8}))
    gated = provider().make(KernelSpec("silu_mul", "cpu", "float32", {"E": 40}))
    for rows in (1, 6):
        for bad in (float("nan"), float("inf")):
            x = torch.ones(rows, 40)
            x[-1, 33] = bad
            assert not linear(x, torch.ones(8, 40), None)[-1].isfinite().any()
            assert not gated(x, torch.ones(rows, 40))[-1].isfinite().all()


def test_what_it_has_no_kernel_for_is_refused() -> None:
    for spec in (
        KernelSpec("linear", "cpu", "float16", {"I": 8, "O": 8}),
        KernelSpec("linear", "cuda", "float32", {"I": 8, "O": 8}),
        KernelSpec("no_such_operation", "cpu", "float32"),
    ):
        probe = provider().supports(spec)
        assert not probe.ok
        assert probe.reason
        with pytest.raises(ConfigError, match=spec.operation):
            provider().make(spec)


def test_the_step_opens_its_pages_and_sdpa_does_not() -> None:
    """Attention that was asked for by name is not replaced by a kernel's own."""
    from drivetrain.contracts.attention import AttentionSpec, LayerAttention

    spec = AttentionSpec((LayerAttention(2, 1, 8, 0.3),), "float32")
    pages = Pages(spec, 4, 10)
    for backend, opens in ((SdpaAttention, False), (PagedCpuAttention, True)):
        attention = backend(backend.Config(block_size=4))
        step = attention.begin(spec, pages.batch({0: 2}), attention.allocate(spec, pages.num_blocks, CPU))
        assert isinstance(step, OpensPages) is opens
