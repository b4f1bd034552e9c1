"""From logits to tokens, for all sequences of a step at once, each with its own settings.

The random draw of a sequence depends on its seed and on how many tokens it has, and on nothing else: equal seeds give
equal output whatever runs beside it, and a preempted sequence goes on as if it had not been.

Shapes: S sequences; V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from drivetrain.serving.adjusting import ScoreAdjuster, is_adjusted
from drivetrain.serving.request import Request
from drivetrain.serving.transfer import HostCopy, on_device
from drivetrain.serving.types import SamplingParams, TokenLogprob

_MASK64 = (1 << 64) - 1
_TOP_P_FIRST_TRY = 256
_WIDTHS = (64, 256, 1024)
"""Best tokens that a row with top-k is drawn from: sorting out 64 first takes a tenth of filtering a vocabulary."""
_PARTS = 64
"""Parts of a vocabulary that a GPU looks for the best token in, or as many as divide it."""
_SCORED_BYTES = 64 * 2**20
"""Bytes of float32 scores that are turned into log-probabilities at a time."""
_LEAST_TEMPERATURE = 1e-30
"""Anything less is no normal float32, and draws the most likely token just the same."""


@dataclass(frozen=True)
class Sampled:
    """One step's tokens, in the order of the requests.

    logprobs: None for sequences that did not ask.
    is_sound: False where the model gave no number at all (NaN), so that no token could be chosen.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]
    is_sound: list[bool]


@dataclass(frozen=True)
class SamplingPlan:
    """What is known of a step's sampling before its scores are.

    drawn:          rows that are drawn at random; the others take the most likely token.
    draws:          one uniform number for each of them.
    is_adjusted:    whether penalties, bias or forbidden tokens change some scores.
    wants_logprobs: whether somebody asked for log-probabilities.
    """

    requests: list[Request]
    drawn: list[int]
    draws: list[float]
    is_adjusted: bool
    wants_logprobs: bool

    @classmethod
    def empty(cls) -> SamplingPlan:
        """The plan of a step that gives no token."""
        return cls.plain([])

    @classmethod
    def plain(cls, requests: list[Request]) -> SamplingPlan:
        """The most likely token for each, and nothing else."""
        return cls(requests, [], [], is_adjusted=False, wants_logprobs=False)

    @property
    def is_on_device(self) -> bool:
        """Whether tokens can be chosen, and the next step computed from them, without the host's seeing them."""
        return not self.is_adjusted and not self.wants_logprobs

    @property
    def wants_best_only(self) -> bool:
        """Whether of all scores the best one of each row is enough."""
        return bool(self.requests) and not self.drawn and self.is_on_device


@dataclass(frozen=True)
class MostLikely:
    """Each row's best score and its token, int64, found without the other scores (``FindsMostLikely``)."""

    best_S: torch.Tensor
    token_S: torch.Tensor


@dataclass(frozen=True)
class Choice:
    """Tokens that are chosen, on the device and on their way to the host.

    scores_SV: the model's own scores, float32 where anything but the best one is wanted of them; None where only that
               one was computed.
    best:      each row's best score; not finite where the model gave no number.
    """

    scores_SV: torch.Tensor | None
    token_S: torch.Tensor
    tokens: HostCopy
    best: HostCopy


def uniform(seed: int, index: int) -> float:
    """The ``index``-th number in [0, 1) of the stream named ``seed`` (SplitMix64, Steele et al. 2014, 53 bits)."""
    state = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return ((state ^ (state >> 31)) >> 11) / (1 << 53)


def sequence_seed(seed: int, index: int) -> int:
    """Seed of the ``index``-th of n sequences, so that they differ and the first does not depend on n."""
    return (seed + index * 0xD1342543DE82EF95) & _MASK64


class Sampler:
    """Chooses tokens.

    kernel: the logical operation ``sample`` of a kernel provider; None draws with torch's operations.
    """

    def __init__(
        self, vocab_size: int, device: torch.device, kernel: Callable[..., torch.Tensor] | None = None
    ) -> None:
        self.kernel = kernel
        self._vocab_size = vocab_size
        self._device = device
        self._adjuster = ScoreAdjuster(device)
        self._settings_of: tuple[list[Request], tuple[torch.Tensor, ...]] | None = None

    def forget(self, request: Request) -> None:
        """Drop what is kept of a finished sequence."""
        self._adjuster.forget(request)

    @property
    def num_tracked(self) -> int:
        return self._adjuster.num_tracked

    def plan(self, requests: Sequence[Request]) -> SamplingPlan:
        """What the host knows before the scores are there. Changes nothing."""
        if all(request.wants_most_likely for request in requests):
            return SamplingPlan.plain(list(requests))
        drawn = [row for row, request in enumerate(requests) if not request.params.is_greedy]
        return SamplingPlan(
            list(requests),
            drawn,
            [
                uniform(requests[row].seed, requests[row].num_output_tokens + requests[row].num_expected)
                for row in drawn
            ],
            is_adjusted=any(is_adjusted(request) for request in requests),
            wants_logprobs=any(request.params.logprobs is not None for request in requests),
        )

    def choose(self, logits_SV: torch.Tensor | MostLikely, plan: SamplingPlan) -> Choice:
        """One token a request, on the device. ``logits_SV`` are the model's own scores and are not changed; the best
        ones alone do where the plan ``wants_best_only``."""
        if isinstance(logits_SV, MostLikely):
            return Choice(None, logits_SV.token_S, HostCopy(logits_SV.token_S), HostCopy(logits_SV.best_S))
        is_best_enough = not plan.drawn and plan.is_on_device and self._device.type != "cpu"
        scores_SV = logits_SV if is_best_enough else logits_SV.float()
        best_S, token_S = most_likely(scores_SV)
        if plan.is_adjusted:
            with self._adjuster.adjusted(scores_SV, plan.requests):
                if len(plan.drawn) < len(plan.requests):
                    token_S = most_likely(scores_SV)[1]
                token_S = self._drawn(scores_SV, token_S, plan)
        else:
            token_S = self._drawn(scores_SV, token_S, plan)
        return Choice(scores_SV, token_S, HostCopy(token_S), HostCopy(best_S))

    def read(self, choice: Choice, plan: SamplingPlan) -> Sampled:
        """The tokens on the host; waits for the device."""
        tokens: list[int] = choice.tokens.read()
        sound = [math.isfinite(best) for best in choice.best.read()]
        return Sampled(tokens, self._logprobs(choice.scores_SV, tokens, plan), sound)

    def sample(self, logits_SV: torch.Tensor, requests: Sequence[Request]) -> Sampled:
        """:meth:`plan`, :meth:`choose` and :meth:`read` in one."""
        if not requests:
            return Sampled([], [], [])
        plan = self.plan(requests)
        return self.read(self.choose(logits_SV, plan), plan)

    # --- draws -----------------------------------------------------------------------------------------------------

    def _drawn(self, scores_SV: torch.Tensor, token_S: torch.Tensor, plan: SamplingPlan) -> torch.Tensor:
        """``token_S`` with the tokens of rows that are drawn in place of theirs."""
        if not plan.drawn:
            return token_S
        requests = [plan.requests[row] for row in plan.drawn]
        if len(requests) == len(plan.requests):
            return self._draw(scores_SV, requests, plan.draws)
        rows = self._integers(plan.drawn)
        return token_S.index_copy(0, rows, self._draw(scores_SV[rows], requests, plan.draws))

    def _draw(self, scores_SV: torch.Tensor, requests: Sequence[Request], draws: Sequence[float]) -> torch.Tensor:
        """Draw from each row's distribution, rows with a small top-k from their best tokens only."""
        if self.kernel is not None:
            return self.kernel(scores_SV, *self._settings(list(requests)), self._doubles(draws))
        widths = [_width(request.params, scores_SV.shape[-1]) for request in requests]
        groups = {width: [row for row, own in enumerate(widths) if own == width] for width in dict.fromkeys(widths)}
        if len(groups) == 1:
            return self._draw_from_best(scores_SV, widths[0], [request.params for request in requests], draws)
        token_S = torch.empty(len(requests), dtype=torch.int64, device=self._device)
        for width, rows in groups.items():
            index = self._integers(rows)
            params = [requests[row].params for row in rows]
            tokens = self._draw_from_best(scores_SV[index], width, params, [draws[row] for row in rows])
            token_S.index_copy_(0, index, tokens)
        return token_S

    def _settings(self, requests: list[Request]) -> tuple[torch.Tensor, ...]:
        """Temperature, top-k, top-p and min-p of each row, as the operation ``sample`` takes them.

        They stay on the device for as long as the same requests are drawn for.
        """
        if self._settings_of is not None and self._settings_of[0] == requests:
            return self._settings_of[1]
        params = [request.params for request in requests]
        # A temperature of 0 with draws wanted means 1, as in distributions().
        floats = [
            [max(p.temperature or 1.0, _LEAST_TEMPERATURE) for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
        ]
        temperature_S, top_p_S, min_p_S = on_device(np.array(floats, dtype=np.float32), self._device).unbind()
        top_k_S = self._integers([min(max(p.top_k, 0), self._vocab_size) for p in params])
        self._settings_of = requests, (temperature_S, top_k_S, top_p_S, min_p_S)
        return self._settings_of[1]

    def _integers(self, values: Sequence[int]) -> torch.Tensor:
        return on_device(np.array(values, dtype=np.int64), self._device)

    def _doubles(self, values: Sequence[float]) -> torch.Tensor:
        return on_device(np.array(values, dtype=np.float64), self._device)

    def _draw_from_best(
        self, scores_SV: torch.Tensor, width: int, params: Sequence[SamplingParams], draws: Sequence[float]
    ) -> torch.Tensor:
        """Invert the cumulative sum of each row's distribution at one uniform number, over its ``width`` best tokens.

        They are laid in the order of their ids, so that a row is drawn as it would be among all tokens.
        """
        if width == scores_SV.shape[-1]:
            return self._invert(distributions(scores_SV, params), draws)
        token_SK = scores_SV.topk(width, dim=-1, sorted=False).indices.sort(dim=-1).values
        chosen_S = self._invert(distributions(scores_SV.gather(1, token_SK), params), draws)
        return token_SK.gather(1, chosen_S.unsqueeze(1)).squeeze(1)

    def _invert(self, probs_SK: torch.Tensor, draws: Sequence[float]) -> torch.Tensor:
        cumulative_SK = probs_SK.double().cumsum(dim=-1)
        points_S1 = self._doubles(draws).unsqueeze(1) * cumulative_SK[:, -1:]
        return torch.searchsorted(cumulative_SK, points_S1, right=True).squeeze(1).clamp_(max=probs_SK.shape[-1] - 1)

    # --- log-probabilities -----------------------------------------------------------------------------------------

    def _logprobs(
        self, scores_SV: torch.Tensor | None, tokens: Sequence[int], plan: SamplingPlan
    ) -> list[TokenLogprob | None]:
        result: list[TokenLogprob | None] = [None] * len(tokens)
        if plan.wants_logprobs:
            assert scores_SV is not None
            wanted = [row for row, request in enumerate(plan.requests) if request.params.logprobs is not None]
            counts = [plan.requests[row].params.logprobs or 0 for row in wanted]
            wanted_SV = scores_SV if len(wanted) == len(tokens) else scores_SV[wanted]
            found = token_logprobs(wanted_SV, [tokens[row] for row in wanted], max(counts))
            for row, count, entry in zip(wanted, counts, found, strict=True):
                result[row] = TokenLogprob(entry.token_id, entry.logprob, entry.rank, entry.top[:count])
        return result


def most_likely(scores_SV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's best score and its token. NaN counts as the best, so that it shows."""
    if scores_SV.device.type != "cpu":
        return _most_likely_in_parts(scores_SV)
    # numpy's is 3.6 times as fast as torch's: 0.09 ms against 0.34 for 16 rows of 49,152 on one thread.
    token_S = torch.from_numpy(scores_SV.numpy().argmax(axis=-1))
    return scores_SV.gather(1, token_S.unsqueeze(1)).squeeze(1), token_S


def _most_likely_in_parts(scores_SV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a vocabulary in parts, each of them reduced at the same time: torch gives a row to one group of a
    GPU's threads, which leaves most of it idle."""
    vocab_size = scores_SV.shape[-1]
    parts = math.gcd(vocab_size, _PARTS)
    if parts == 1:
        best_S, token_S = scores_SV.max(dim=-1)
        return best_S, token_S
    best_SP, token_SP = scores_SV.unflatten(-1, (parts, vocab_size // parts)).max(dim=-1)
    best_S, part_S = best_SP.max(dim=-1)
    return best_S, token_SP.gather(1, part_S.unsqueeze(1)).squeeze(1) + part_S * (vocab_size // parts)


def _width(params: SamplingParams, vocab_size: int) -> int:
    """How many of a row's best tokens are looked at. It depends on the row alone, so that a draw does not change with
    what else is drawn; beyond top-k there is room for tokens that equal the last one kept."""
    if params.top_k > 0:
        for width in _WIDTHS:
            if params.top_k < width < vocab_size:
                return width
    return vocab_size


def distributions(scores_SV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The distribution each row is drawn from, float32 [S, V]: temperature, then top-k, top-p and min-p.

    Each filter works on the distribution that the one before left, as in transformers' logits warpers.
    """
    device = scores_SV.device
    temperatures = [max(p.temperature or 1.0, _LEAST_TEMPERATURE) for p in params]
    # Distances from the best score have the same distribution, and no temperature turns them into infinity - infinity.
    best_S1 = scores_SV.amax(dim=-1, keepdim=True)
    scores_SV = (scores_SV - best_S1) / torch.tensor(temperatures, device=device).unsqueeze(1)
    if any(p.top_k > 0 for p in params):
        scores_SV = _keep_top_k(scores_SV, [p.top_k for p in params])
    probs_SV = scores_SV.softmax(dim=-1)
    if any(p.top_p < 1 for p in params):
        probs_SV = _keep_top_p(probs_SV, torch.tensor([p.top_p for p in params], device=device))
    if any(p.min_p > 0 for p in params):
        min_p_S1 = torch.tensor([p.min_p for p in params], device=device).unsqueeze(1)
        floor_S1 = probs_SV.amax(dim=-1, keepdim=True) * min_p_S1
        probs_SV = _renormalized(probs_SV.masked_fill(probs_SV < floor_S1, 0))
    return probs_SV


def _renormalized(probs_SV: torch.Tensor) -> torch.Tensor:
    return probs_SV / probs_SV.sum(dim=-1, keepdim=True)


def _keep_top_k(scores_SV: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    vocab_size = scores_SV.shape[-1]
    kept = [min(count, vocab_size) if count > 0 else vocab_size for count in counts]
    most = max(count for count in kept if count < vocab_size) if min(kept) < vocab_size else 0
    if most == 0:
        return scores_SV
    best_SK = scores_SV.topk(most, dim=-1).values
    last_S1 = torch.tensor([min(count, most) - 1 for count in kept], device=scores_SV.device).unsqueeze(1)
    floor_S1 = best_SK.gather(1, last_S1)
    unlimited_S1 = torch.tensor([count == vocab_size for count in kept], device=scores_SV.device).unsqueeze(1)
    return scores_SV.masked_fill((scores_SV < floor_S1) & ~unlimited_S1, -math.inf)


def _keep_top_p(probs_SV: torch.Tensor, top_p_S: torch.Tensor) -> torch.Tensor:
    """Keep the most likely tokens up to and including the one that brings their sum to p.

    Sorting a whole vocabulary is slow, and the mass nearly always lies in a few tokens: take those first, and more only
    when they do not reach p.
    """
    vocab_size = probs_SV.shape[-1]
    limited_S = top_p_S < 1
    count = min(_TOP_P_FIRST_TRY, vocab_size)
    while True:
        best_SK, token_SK = probs_SV.topk(count, dim=-1)
        before_SK = best_SK.cumsum(dim=-1) - best_SK
        reached = (before_SK[:, -1] >= top_p_S) | ~limited_S
        if count == vocab_size or bool(reached.all()):
            break
        count = min(count * 8, vocab_size)
    # The most likely token stays whatever p is.
    keep_SK = before_SK < top_p_S.unsqueeze(1)
    keep_SK[:, 0] = True
    kept_SV = torch.zeros_like(probs_SV).scatter(1, token_SK, best_SK * keep_SK)
    return torch.where(limited_S.unsqueeze(1), _renormalized(kept_SV), probs_SV)


def token_logprobs(scores_NV: torch.Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
    """Log-probability and rank of one token a row, and the ``count`` most likely tokens there.

    Some rows at a time: the tokens of a whole prompt may be asked for, and a row of float32 is large.
    """
    num_rows = max(1, _SCORED_BYTES // (4 * scores_NV.shape[-1]))
    return [
        entry
        for first in range(0, len(tokens), num_rows)
        for entry in _rows_logprobs(scores_NV[first : first + num_rows], tokens[first : first + num_rows], count)
    ]


def _rows_logprobs(scores_NV: torch.Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
    logprobs_NV = scores_NV.float().log_softmax(dim=-1)
    token_N1 = torch.tensor(list(tokens), device=scores_NV.device).unsqueeze(1)
    chosen_N1 = logprobs_NV.gather(1, token_N1)
    rank_N = (logprobs_NV > chosen_N1).sum(dim=-1) + 1
    if count > 0:
        best = logprobs_NV.topk(min(count, logprobs_NV.shape[-1]), dim=-1)
        values, ids = best.values.tolist(), best.indices.tolist()
    else:
        values = ids = [[] for _ in tokens]
    return [
        TokenLogprob(token, logprob, rank, tuple(zip(row_ids, row_values, strict=True)))
        for token, logprob, rank, row_ids, row_values in zip(
            tokens, chosen_N1.squeeze(1).tolist(), rank_N.tolist(), ids, values, strict=True
        )
    ]
