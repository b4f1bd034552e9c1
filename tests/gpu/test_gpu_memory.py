"""Rule: the cache that ``kv_memory: auto`` makes on a GPU leaves room for the largest steps."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import LLM, SamplingParams
from drivetrain.backends.accelerator import AcceleratorPlatform
from drivetrain.contracts.platform import MemoryInfo
from drivetrain.errors import MemoryBudgetError, RequestFailedError

LONGEST = 8192
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 8192,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 2 * LONGEST,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
}
"""0.25 GiB of weights in bfloat16, half a GiB for a step of 8,192 tokens, 8 KiB of keys and values a token."""


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Bytes that this process may still take of the device, by torch's own limit: others may use it meanwhile."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    limit = torch.cuda.memory_reserved() + 3 * 2**29
    monkeypatch.setattr(
        AcceleratorPlatform, "memory", lambda self: MemoryInfo(limit, limit - torch.cuda.memory_allocated())
    )
    torch.cuda.set_per_process_memory_fraction(limit / total)
    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def served(folder: Path, max_batched_tokens: int = LONGEST, **engine: Any) -> LLM:
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return LLM(
        folder,
        platform="cuda",
        precision="bf16",
        loader={"name": "random", "seed": 0, "device": "cuda"},
        kernels={"name": "triton", "tune": False},
        attention={"name": "paged-triton", "tune": False},
        scheduler={"name": "fcfs", "max_batched_tokens": max_batched_tokens, "max_running": 64},
        engine=engine,
    )


PROMPT = [number % 32000 for number in range(LONGEST)]
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
DRAWN = SamplingParams(top_p=0.9, frequency_penalty=0.5, logprobs=2, max_tokens=4, ignore_eos=True)


@pytest.mark.usefixtures("memory")
def test_the_largest_steps_run_beside_the_cache(tmp_path: Path) -> None:
    """The longest prompt that is computed at once, twice, and as many requests as may run at a time."""
    with served(tmp_path, prefix_cache=False) as llm:
        notes = llm.selection_dict()["notes"]
        assert any("a step of 8192 tokens of up to 64 requests takes" in note for note in notes), notes
        assert not any("are left beside cache" in note for note in notes), notes
        for _ in range(2):
            assert len(llm.generate([PROMPT], GREEDY)[0].token_ids) == 4
        results = llm.generate([PROMPT[number : number + 128] for number in range(64)], DRAWN)
        assert [len(result.token_ids) for result in results] == [4] * 64
        assert llm.stats()["fallbacks"] == 0


@pytest.mark.usefixtures("memory")
def test_a_cache_of_nine_tenths_would_have_left_too_little(tmp_path: Path) -> None:
    """So the test above can fail."""
    with served(tmp_path, kv_memory="1100MiB", graphs="off") as llm, pytest.raises(RequestFailedError, match="memory"):
        llm.generate([PROMPT], GREEDY)


@pytest.mark.usefixtures("memory")
def test_a_step_that_has_no_room_is_told_before_the_server_starts(tmp_path: Path) -> None:
    with pytest.raises(MemoryBudgetError, match=r"a step of 65536 tokens .* Lower scheduler\.max_batched_tokens"):
        served(tmp_path, max_batched_tokens=65536)


@pytest.mark.usefixtures("memory")
def test_a_cache_of_other_blocks_takes_the_place_of_one_that_left_no_room(tmp_path: Path) -> None:
    """There and back, while requests run. What is compiled for other blocks is compiled beforehand: else requests would
    be done by then."""
    length = 2000
    with served(tmp_path, graphs="off") as llm:
        swaps = [{"name": "paged-triton", "tune": False, "block_size": block_size} for block_size in (32, 16)]
        for options in swaps:
            llm.swap(attention=options)
            llm.generate([PROMPT[:200]], GREEDY)
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        streams = [llm.stream(PROMPT[number : number + 200], params) for number in range(16)]
        counts = [len(next(stream).token_ids) for stream in streams]
        for options in swaps:
            report = llm.swap(attention=options, probation_steps=2)
            assert (report.outcome.value, report.cache.value) == ("finalized", "recompute")
            assert report.requests_recomputed > 0
            assert report.extra_memory_bytes < 2**20
        counts = [count + sum(len(chunk.token_ids) for chunk in s) for count, s in zip(counts, streams, strict=True)]
        assert counts == [length] * 16
