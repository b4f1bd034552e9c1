"""Rules of the decoder: for every architecture, however a prompt is cut and batched, the scores and gradients are those
of the transformers library."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain.contracts.model import BuildContext
from drivetrain.contracts.source import silent
from drivetrain.kernels.reference import ReferenceKernels
from drivetrain.plugins.attention.sdpa import SdpaAttention
from drivetrain.plugins.model.decoder import DecoderModel
from support.paging import Pages, whole_batch
from support.tiny_models import VOCAB_SIZE, FolderCheckpoint, save_tiny, tiny_configs

torch.set_num_threads(1)

CPU = torch.device("cpu")
NAMES = sorted(tiny_configs())
LENGTH = 20
ATOL = 1e-4


def build(checkpoint: FolderCheckpoint, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    bind = ReferenceKernels(ReferenceKernels.Config()).make
    plugin = DecoderModel(DecoderModel.Config(**settings))
    return plugin.build(checkpoint, BuildContext(CPU, dtype, bind, None, silent))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, folders: Path) -> tuple[Any, Any]:
    """The library's model and ours, of the same weights."""
    folder = folders / request.param
    reference = save_tiny(request.param, folder)
    return reference, build(FolderCheckpoint(folder))


def some_ids(length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


def full_scores(module: Any, lengths: Sequence[int], ids: torch.Tensor) -> torch.Tensor:
    """Scores of packed sequences without a cache."""
    attention = SdpaAttention(SdpaAttention.Config())
    step = attention.begin(module.spec.attention, whole_batch(lengths), None)
    positions = torch.cat([torch.arange(length) for length in lengths])
    scores: torch.Tensor = module.logits(module(ids, positions, step))
    return scores


def reference_scores(reference: Any, ids: torch.Tensor) -> torch.Tensor:
    scores: torch.Tensor = reference(ids[None], use_cache=False).logits[0]
    return scores


@torch.inference_mode()
def paged_scores(module: Any, ids: Sequence[torch.Tensor], steps: Sequence[dict[int, int]]) -> list[torch.Tensor]:
    """Scores of each sequence, fed in steps (sequence -> new tokens) over a paged cache."""
    attention, spec = SdpaAttention(SdpaAttention.Config(block_size=4)), module.spec.attention
    pages = Pages(spec, 4, 40)
    cache = attention.allocate(spec, pages.num_blocks, CPU)
    parts: list[list[torch.Tensor]] = [[] for _ in ids]
    for new_tokens in steps:
        done = [pages.lengths.get(s, 0) for s in range(len(ids))]
        batch = pages.batch(new_tokens)
        flat = torch.cat([ids[s][done[s] : done[s] + new] for s, new in new_tokens.items()])
        scores = module.logits(module(flat, pages.positions(batch), attention.begin(spec, batch, cache)))
        for s, part in zip(new_tokens, scores.split(list(new_tokens.values())), strict=True):
            parts[s].append(part)
    return [torch.cat(part) for part in parts]


@torch.inference_mode()
def test_scores_without_a_cache_equal_the_librarys(pair: tuple[Any, Any]) -> None:
    reference, module = pair
    ids, other = some_ids(LENGTH, 1), some_ids(7, 2)
    found = full_scores(module, [LENGTH, 7], torch.cat((ids, other)))
    expected = torch.cat((reference_scores(reference, ids), reference_scores(reference, other)))
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@torch.inference_mode()
def test_any_split_of_a_prompt_gives_the_same_scores(pair: tuple[Any, Any]) -> None:
    reference, module = pair
    ids = some_ids(LENGTH, 3)
    expected = reference_scores(reference, ids)
    # After the first token, before the last, around the edge of a block of four, and far from any.
    firsts = (1, 3, 4, 5, 10, LENGTH - 1)
    splits = [[first, LENGTH - first] for first in firsts] + [[1] * LENGTH, [3, 7, 1, 1, 6, 2]]
    for split in splits:
        (found,) = paged_scores(module, [ids], [{0: new} for new in split])
        torch.testing.assert_close(found, expected, rtol=0, atol=ATOL, msg=lambda text: f"{split}: {text}")  # noqa: B023


@torch.inference_mode()
def test_ragged_batches_give_the_same_scores(pair: tuple[Any, Any]) -> None:
    reference, module = pair
    lengths = [LENGTH, 9, 14]
    ids = [some_ids(length, seed) for seed, length in enumerate(lengths)]
    order, left, steps = random.Random(0), list(lengths), []
    while any(left):
        step = {s: order.randint(1, min(5, left[s])) for s in range(3) if left[s] and order.random() < 0.8}
        for s, new in step.items():
            left[s] -= new
        steps += [step] if step else []
    for found, own in zip(paged_scores(module, ids, steps), ids, strict=True):
        torch.testing.assert_close(found, reference_scores(reference, own), rtol=0, atol=ATOL)


def test_gradients_reach_every_parameter_and_equal_the_librarys(pair: tuple[Any, Any]) -> None:
    reference, module = pair
    ids = some_ids(12, 5)
    for own in (reference, module):
        own.zero_grad()
    loss = torch.nn.functional.cross_entropy
    loss(reference_scores(reference, ids)[:-1], ids[1:]).backward()
    loss(full_scores(module, [12], ids)[:-1], ids[1:]).backward()
    expected = dict(reference.named_parameters())
    found = dict(module.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_described_shape_is_the_built_one(pair: tuple[Any, Any]) -> None:
    reference, module = pair
    spec = module.spec
    assert spec.architecture == type(reference).__name__
    assert spec.num_parameters == sum(parameter.numel() for parameter in reference.parameters())
    assert (spec.vocab_size, spec.num_layers) == (VOCAB_SIZE, len(reference.model.layers))
    assert not module.training
    assert all(parameter.requires_grad for parameter in module.parameters())


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "olmo2", "granite"])
def test_bfloat16_follows_the_librarys_bfloat16(name: str, folders: Path) -> None:
    reference = save_tiny(name, folders / f"{name}-16").bfloat16()
    module = build(FolderCheckpoint(folders / f"{name}-16"), torch.bfloat16)
    ids = some_ids(LENGTH, 6)
    found, expected = full_scores(module, [LENGTH], ids), reference_scores(reference, ids)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected.float()).norm() / expected.float().norm() < 0.03


@torch.inference_mode()
def test_long_context_uses_the_long_factors_of_longrope(folders: Path) -> None:
    reference = save_tiny("phi3", folders / "phi3-long")
    checkpoint = FolderCheckpoint(folders / "phi3-long")
    short, long = build(checkpoint), build(checkpoint, long_context=True)
    assert (short.spec.max_position, long.spec.max_position) == (64, 256)
    ids = some_ids(90, 7)  # beyond the original length of 64 the library changes to the long factors for all positions
    expected = reference_scores(reference, ids)
    torch.testing.assert_close(full_scores(long, [90], ids), expected, rtol=0, atol=ATOL)
    assert (full_scores(short, [90], ids) - expected).abs().max() > 0.01
