"""What keys and values as int8 and fp8 cost the real model on real text: the topics of Python's own help."""

from __future__ import annotations

import math
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from drivetrain import LLM, SamplingParams

NUM_TOKENS = 2048
CONTEXT = 1024
MOST_WORSE = {"int8": 1.005, "fp8": 1.02}
"""Perplexity over that of full keys. Measured over 8,184 tokens: int8 1.0008, fp8 1.0101."""


def perplexity(model: Path, kv: str) -> tuple[float, int]:
    """Of the first tokens of the text, in pieces of ``CONTEXT``; and the number of blocks in 64 MiB."""
    text = "\n".join(topics.values())
    engine = {"max_model_len": CONTEXT + 8, "kv_memory": "64MiB"}
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    with LLM(model, quantizer={"name": "none", "kv": kv}, engine=engine) as llm:
        ids = llm._stack.tokenizer.encode(text[: NUM_TOKENS * 6])[:NUM_TOKENS]
        pieces = [ids[start : start + CONTEXT] for start in range(0, NUM_TOKENS, CONTEXT)]
        found = [result.prompt.logprobs for result in llm.generate(pieces, params)]
        blocks = llm._loop.engine.kv.pools[0].total
    scores = [entry.logprob for logprobs in found if logprobs is not None for entry in logprobs if entry is not None]
    assert len(scores) == NUM_TOKENS - len(pieces)
    return math.exp(-sum(scores) / len(scores)), blocks


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_scaled_keys_hardly_cost_quality_and_hold_more_tokens(smollm2: Path) -> None:
    full, blocks = perplexity(smollm2, "auto")
    for kv, most in MOST_WORSE.items():
        found, more_blocks = perplexity(smollm2, kv)
        assert found / full <= most, f"{kv}: perplexity {found:.3f} against {full:.3f}"
        assert found != full, f"{kv}: nothing was rounded"
        assert more_blocks >= 3.7 * blocks
