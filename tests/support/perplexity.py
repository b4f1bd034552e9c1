"""How well a model predicts English text that every Python has: the topics of ``pydoc_data``."""

from __future__ import annotations

import math
from pydoc_data import topics

from drivetrain import LLM, SamplingParams

_SCORED = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)


def text_of_topics() -> str:
    """All topics in the order of their names."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def perplexity(llm: LLM, num_tokens: int, window: int = 256) -> float:
    """Of the text's first ``num_tokens`` tokens, in windows that know nothing of each other."""
    ids = llm.tokenizer.encode(text_of_topics()[: 8 * num_tokens])[:num_tokens]
    assert len(ids) == num_tokens
    windows = [list(ids[first : first + window]) for first in range(0, num_tokens, window)]
    losses = [
        -entry.logprob
        for result in llm.generate(windows, _SCORED)
        for entry in result.prompt.logprobs or ()
        if entry is not None
    ]
    return math.exp(sum(losses) / len(losses))
