"""Workloads: what a benchmark asks of a model, made from a seed so that every engine gets the same work.

Prompts are random token ids: text would compress differently under each tokenizer, and greedy answers to it would end
at different lengths.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from drivetrain.errors import ConfigError, nearest

_FIRST_PLAIN_TOKEN = 256
"""Low ids are special tokens in most vocabularies; they are left out."""


@dataclass(frozen=True)
class WorkItem:
    """One request: its prompt's token ids and how many tokens it generates."""

    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class Sampling:
    """How a workload's tokens are chosen: greedily, or drawn alike in every run with the same seed.

    temperature: 0 is greedy; the others then mean nothing.
    top_p:       keep the smallest set whose probabilities sum to at least p; 1 keeps all.
    top_k:       keep the k most likely tokens; 0 keeps all.
    seed:        that the seed of each request is made from.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def options(self, number: int) -> dict[str, Any]:
        """The sampling parameters of request ``number`` of a workload; those that change nothing are left out."""
        if self.temperature == 0:
            return {"temperature": 0}
        options = {"temperature": self.temperature, "seed": (self.seed + number) % 2**63}
        if self.top_p != 1:
            options["top_p"] = self.top_p
        if self.top_k != 0:
            options["top_k"] = self.top_k
        return options


GREEDY = Sampling()


def _random_tokens(rng: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    low = min(_FIRST_PLAIN_TOKEN, vocab_size // 2)
    return tuple(rng.randrange(low, vocab_size) for _ in range(count))


def mixed(num_requests: int, vocab_size: int, seed: int) -> list[WorkItem]:
    """Prompts of 32 to 256 tokens and outputs of 32 to 128, both uniform: many users with different needs."""
    rng = random.Random(seed)
    items = []
    for _ in range(num_requests):
        prompt_length, max_tokens = rng.randint(32, 256), rng.randint(32, 128)
        items.append(WorkItem(_random_tokens(rng, prompt_length, vocab_size), max_tokens))
    return items


def shared_prefix(num_requests: int, vocab_size: int, seed: int) -> list[WorkItem]:
    """One prefix of 512 tokens with 16 tokens of their own each, 32 out: many questions over one document."""
    rng = random.Random(seed)
    prefix = _random_tokens(rng, 512, vocab_size)
    return [WorkItem(prefix + _random_tokens(rng, 16, vocab_size), 32) for _ in range(num_requests)]


WORKLOADS: dict[str, tuple[Callable[[int, int, int], list[WorkItem]], int]] = {
    "mixed": (mixed, 64),
    "shared-prefix": (shared_prefix, 32),
}
"""name -> (maker, number of requests by default)."""


def check_fits(items: Sequence[WorkItem], max_model_len: int) -> None:
    """Raise ConfigError when a request is longer than the model takes."""
    longest = max(len(item.prompt) + item.max_tokens for item in items)
    if longest > max_model_len:
        raise ConfigError(
            "the workload's longest request does not fit the model",
            found=f"{longest} tokens",
            allowed=f"1 to {max_model_len}",
            hint="Raise engine.max_model_len, or take another workload.",
        )


def make_workload(name: str, num_requests: int | None, vocab_size: int, seed: int) -> list[WorkItem]:
    """The requests of a workload. Raises ConfigError for a name or number that is not known."""
    if name not in WORKLOADS:
        close = nearest(name, WORKLOADS)
        raise ConfigError(
            f"no workload is named {name!r}", allowed=WORKLOADS, hint=f"Did you mean {close!r}?" if close else None
        )
    maker, default = WORKLOADS[name]
    if num_requests is not None and num_requests < 1:
        raise ConfigError("a workload needs at least one request", where="--requests", found=num_requests)
    return maker(num_requests or default, vocab_size, seed)
