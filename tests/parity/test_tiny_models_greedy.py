"""Greedy tokens of every architecture equal transformers', however the work is cut into steps and shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import LLM, SamplingParams
from support.tiny_models import VOCAB_SIZE, other_tiny_configs, save_tiny, tiny_configs

NEW_TOKENS = 12
PROMPT_LENGTHS = (1, 3, 9, 17, 26, 17)

NAMES = [*tiny_configs(), *other_tiny_configs()]


def prompts() -> list[list[int]]:
    """Ragged prompts; the last two share a prefix of 12 tokens."""
    generator = torch.Generator().manual_seed(7)
    made = [torch.randint(2, VOCAB_SIZE, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    made[-1][:12] = made[-2][:12]
    return made


@torch.inference_mode()
def reference(model: Any, prompt: list[int]) -> list[int]:
    """Greedy continuation by whole forward passes of transformers' own model, without any cache."""
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / request.param
    theirs = save_tiny(request.param, folder)
    return folder, [reference(theirs, prompt) for prompt in prompts()]


def generate(folder: Path, batch: list[list[int]], **options: Any) -> tuple[list[list[int]], dict[str, Any]]:
    scheduler = options.pop("scheduler", {"name": "fcfs", "max_batched_tokens": 64, "max_running": 8})
    engine = {"max_model_len": 64, **options.pop("engine", {})}
    options = {"attention": {"name": "sdpa", "block_size": 4}, "platform": {"name": "cpu", "threads": 1}, **options}
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with LLM(folder, scheduler=scheduler, engine=engine, **options) as llm:
        results = llm.generate(batch, params)
        return [list(result.token_ids) for result in results], llm.stats()


def test_one_by_one(model: tuple[Path, list[Any]]) -> None:
    folder, expected = model
    with LLM(folder, engine={"max_model_len": 64}, platform={"name": "cpu", "threads": 1}) as llm:
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        assert [list(llm.generate(prompt, params)[0].token_ids) for prompt in prompts()] == expected


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_batched(model: tuple[Path, list[Any]], prefix_cache: bool) -> None:
    folder, expected = model
    found, _ = generate(folder, prompts(), engine={"prefix_cache": prefix_cache})
    assert found == expected


def test_a_cached_prefix_changes_nothing(model: tuple[Path, list[Any]]) -> None:
    folder, expected = model
    twice = [prompts()[4], prompts()[4], prompts()[5]]
    scheduler = {"name": "fcfs", "max_batched_tokens": 64, "max_running": 1}
    found, stats = generate(folder, twice, scheduler=scheduler)
    assert found == [expected[4], expected[4], expected[5]]
    assert stats["prefix_hit_tokens"] >= 16 + 12


def test_preemption_changes_nothing(model: tuple[Path, list[Any]]) -> None:
    folder, expected = model
    scheduler = {"name": "fcfs", "max_batched_tokens": 8, "max_running": 8}
    engine = {"kv_memory": _tight_memory(folder, chunk=8), "max_model_len": 40}
    found, stats = generate(folder, prompts(), scheduler=scheduler, engine=engine)
    assert found == expected
    assert stats["preemptions"] > 0, "the cache was not tight enough to force a preemption"


@pytest.mark.parametrize("chunk", [1, 5, 8])
def test_chunks_of_a_prefill_change_nothing(model: tuple[Path, list[Any]], chunk: int) -> None:
    folder, expected = model
    scheduler = {"name": "fcfs", "max_batched_tokens": chunk, "max_running": 4}
    found, _ = generate(folder, prompts(), scheduler=scheduler)
    assert found == expected


def _tight_memory(folder: Path, chunk: int) -> str:
    """Room for no more than the longest request alone, so that requests push each other out."""
    from drivetrain.assembly import resolve_parts
    from drivetrain.config import load_settings
    from drivetrain.contracts.scheduler import Limits
    from drivetrain.serving.cache_size import BlockSizes

    settings = load_settings(None, {"model": str(folder), "attention": {"name": "sdpa", "block_size": 4}})
    parts = resolve_parts(settings, leave_out=("frontend",))
    assert parts.spec is not None
    sizes = BlockSizes.of(parts.attention, parts.spec.attention, Limits(chunk, 1))
    return f"{sizes.bytes_of_one(40)}B"
