"""What is asked of every engine, how it is timed, and which rates come of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from drivetrain.bench.workloads import WorkItem, make_workload

from .floor import Ceilings, Geometry, Weights, least_decode_seconds, least_seconds

PROMPT, DECODE, OUTPUT, TOTAL = "prompt", "decode", "output", "total"
"""The rates: tokens a second of prompts, of outputs after their first token, of outputs over all the time, and of
prompts and outputs together."""

_WARM_UP_SEED = 1_000_003


class PeerLike(Protocol):
    """What a workload needs of a driver."""

    def ask(self, do: str, **fields: Any) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Sample:
    """One timed run: tokens a second by rate, and the token ids that came out."""

    rates: Mapping[str, float]
    outputs: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Workload:
    """A kind of work, equal for every engine that takes part.

    title:         what the table's heading says.
    rates:         which rates are measured, in the table's order.
    rows:          the weight sizes that are compared unless others are asked for.
    slots:         requests that a server runs at once.
    max_model_len: tokens of the longest request, rounded up.
    prefix_cache:  whether each engine has its own on. Elsewhere it is off, since repeats would find their own prompts.
    is_alone:      one stream at a time, timed by its tokens; else all requests at once, timed as a whole.
    sampling:      how tokens are drawn; empty for the most likely ones, which are compared between engines.
    """

    name: str
    title: str
    rates: tuple[str, ...]
    rows: tuple[str, ...]
    slots: int
    max_model_len: int
    prefix_cache: bool = False
    is_alone: bool = False
    sampling: Mapping[str, float] = field(default_factory=dict)

    def items(self, vocab_size: int, repeat: int) -> list[WorkItem]:
        """The requests of one repeat: the same in each, but for a shared prefix, which must be new to the cache."""
        if OUTPUT in self.rates:
            kind = "shared-prefix" if self.prefix_cache else "mixed"
            return make_workload(kind, None, vocab_size, repeat if self.prefix_cache else 0)
        return [WorkItem(prompt, OUTPUT_TOKENS) for prompt in _prompts(self.slots, vocab_size)]

    def warm_up(self, peer: PeerLike, vocab_size: int) -> None:
        """A short run of other tokens, so that threads and caches are awake."""
        items = make_workload("mixed", 2, vocab_size, _WARM_UP_SEED)
        if self.is_alone:
            peer.ask("one", prompt=items[0].prompt[:32], max_tokens=8)
        else:
            peer.ask("batch", prompts=[item.prompt[:32] for item in items], max_tokens=[8, 8])

    def measure(self, peer: PeerLike, items: Sequence[WorkItem]) -> Sample:
        """One timed run. Raises ValueError when an output has another length than was asked for."""
        if self.is_alone:
            return _measure_alone(peer, items[0])
        if DECODE in self.rates:
            return _measure_phases(peer, items)
        return _measure_whole(peer, items, self.sampling)

    def least_seconds(
        self, rate: str, geometry: Geometry, items: Sequence[WorkItem], weights: Weights, ceilings: Ceilings
    ) -> float | None:
        """The floor of the time that ``rate`` is taken over; None where it is not known."""
        if rate == PROMPT:
            return least_seconds(geometry, [WorkItem(item.prompt, 1) for item in items], weights, ceilings)
        if rate == DECODE:
            return least_decode_seconds(geometry, items, weights, ceilings)
        return least_seconds(geometry, items, weights, ceilings)


PROMPT_TOKENS, OUTPUT_TOKENS = 128, 128

_MIXED = Workload(
    "mixed",
    "64 requests at once, prompts of 32 to 256 tokens, outputs of 32 to 128",
    rates=(OUTPUT, TOTAL),
    rows=("float32",),
    slots=16,
    max_model_len=512,
)
_DRAWN: Mapping[str, float] = {"temperature": 0.8, "top_p": 0.95}

WORKLOADS: Mapping[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload(
            "single",
            f"one stream, prompt of {PROMPT_TOKENS} tokens, output of {OUTPUT_TOKENS}",
            rates=(PROMPT, DECODE),
            rows=("float32", "16-bit", "8-bit", "4-bit"),
            slots=1,
            max_model_len=512,
            is_alone=True,
        ),
        Workload(
            "streams",
            f"16 streams at once, prompts of {PROMPT_TOKENS} tokens, outputs of {OUTPUT_TOKENS}",
            rates=(PROMPT, DECODE),
            rows=("float32", "8-bit"),
            slots=16,
            max_model_len=512,
        ),
        _MIXED,
        replace(
            _MIXED,
            name="drawn",
            title="the requests of mixed, tokens drawn at temperature 0.8 from 0.95 of the probability (top-p)",
            sampling=_DRAWN,
        ),
        replace(
            _MIXED,
            name="penalized",
            title="the requests of mixed, as in drawn, with a repetition penalty of 1.1 on prompt and output",
            sampling={**_DRAWN, "repetition_penalty": 1.1},
        ),
        Workload(
            "shared-prefix",
            "32 requests at once over one prefix of 512 tokens, 16 of their own, outputs of 32",
            rates=(OUTPUT, TOTAL),
            rows=("float32",),
            slots=16,
            max_model_len=640,
            prefix_cache=True,
        ),
    )
}


def tokens_of(rate: str, items: Sequence[WorkItem]) -> int:
    """How many tokens a rate counts."""
    prompts, outputs = sum(len(item.prompt) for item in items), sum(item.max_tokens for item in items)
    return {PROMPT: prompts, DECODE: outputs - len(items), OUTPUT: outputs, TOTAL: prompts + outputs}[rate]


def _prompts(count: int, vocab_size: int) -> list[tuple[int, ...]]:
    prompts = (item.prompt for item in make_workload("mixed", 8 * count, vocab_size, 0))
    return [prompt[:PROMPT_TOKENS] for prompt in prompts if len(prompt) >= PROMPT_TOKENS][:count]


def _measure_alone(peer: PeerLike, item: WorkItem) -> Sample:
    answer = peer.ask("one", prompt=item.prompt, max_tokens=item.max_tokens)
    outputs = _checked([answer["token_ids"]], [item])
    rates = {
        PROMPT: len(item.prompt) / answer["prompt_seconds"],
        DECODE: (item.max_tokens - 1) / answer["decode_seconds"],
    }
    return Sample(rates, outputs)


def _measure_phases(peer: PeerLike, items: Sequence[WorkItem]) -> Sample:
    """Outputs of one token first, then the whole: the difference is the time of all later tokens."""
    prompts = [item.prompt for item in items]
    first = peer.ask("batch", prompts=prompts, max_tokens=[1] * len(items))["seconds"]
    answer = peer.ask("batch", prompts=prompts, max_tokens=[item.max_tokens for item in items])
    outputs = _checked(answer["outputs"], items)
    later = answer["seconds"] - first
    return Sample({PROMPT: tokens_of(PROMPT, items) / first, DECODE: tokens_of(DECODE, items) / later}, outputs)


def _measure_whole(peer: PeerLike, items: Sequence[WorkItem], sampling: Mapping[str, float]) -> Sample:
    prompts, lengths = [item.prompt for item in items], [item.max_tokens for item in items]
    answer = peer.ask("batch", prompts=prompts, max_tokens=lengths, sampling=dict(sampling))
    outputs = _checked(answer["outputs"], items)
    return Sample({rate: tokens_of(rate, items) / answer["seconds"] for rate in (OUTPUT, TOTAL)}, outputs)


def _checked(outputs: Sequence[Sequence[int]], items: Sequence[WorkItem]) -> tuple[tuple[int, ...], ...]:
    """The outputs, when each has the length that was asked for: else the rates would compare unequal work."""
    found, wanted = [len(output) for output in outputs], [item.max_tokens for item in items]
    if found != wanted:
        raise ValueError(f"outputs have {found} tokens, not the {wanted} that were asked for")
    return tuple(tuple(output) for output in outputs)
