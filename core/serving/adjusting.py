"""What a request's settings change of the model's scores before a token is chosen: penalties, bias, forbidden tokens.

Of a vocabulary few scores change, those of tokens that a sequence has or that its settings name; only these are read
and written. Shapes: S sequences; V vocabulary; M scores that change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from drivetrain.serving.request import Request
from drivetrain.serving.transfer import on_device

Integers = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float32]]


def is_adjusted(request: Request) -> bool:
    """Whether the request's settings change scores of its next token."""
    params = request.params
    return params.has_penalty or bool(params.logit_bias) or request.num_output_tokens < params.min_tokens


@dataclass(frozen=True)
class _Change:
    """Scores of one row: divided by ``factor`` where positive, else multiplied by it, and then less by ``minus``."""

    row: int
    token_M: Integers
    factor: float
    minus: Floats | float


@dataclass(frozen=True)
class _Edit:
    """Changes of several rows on the device. places: rows and tokens, int64 [M] each."""

    places: tuple[torch.Tensor, torch.Tensor]
    factor_M: torch.Tensor
    minus_M: torch.Tensor


class ScoreAdjuster:
    """Changes scores as their requests want. Keeps, for sequences with penalties, how often they have which tokens."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: dict[str, _SeenTokens] = {}

    def forget(self, request: Request) -> None:
        """Drop what is kept of a finished sequence."""
        self._seen.pop(request.name, None)

    @property
    def num_tracked(self) -> int:
        return len(self._seen)

    @contextmanager
    def adjusted(self, scores_SV: torch.Tensor, requests: Sequence[Request]) -> Iterator[None]:
        """``scores_SV``, float32, are changed inside, and afterwards what they were."""
        edits = [self._edit(changes) for changes in self._rounds(requests, scores_SV.shape[-1]) if changes]
        # A token may have a penalty and a bias: all are read before the first is changed.
        kept = [scores_SV[edit.places] for edit in edits]
        for edit in edits:
            value_M = scores_SV[edit.places]
            value_M = torch.where(value_M > 0, value_M / edit.factor_M, value_M * edit.factor_M) - edit.minus_M
            scores_SV.index_put_(edit.places, value_M)
        try:
            yield
        finally:
            for edit, value_M in zip(edits, kept, strict=True):
                scores_SV.index_put_(edit.places, value_M)

    def _edit(self, changes: Sequence[_Change]) -> _Edit:
        lengths = [len(change.token_M) for change in changes]
        row_M = np.repeat([change.row for change in changes], lengths)
        token_M = np.concatenate([change.token_M for change in changes])
        factor_M = np.repeat(np.array([change.factor for change in changes], dtype=np.float32), lengths)
        minus_M = np.concatenate([np.broadcast_to(np.float32(c.minus), c.token_M.shape) for c in changes])
        rows, tokens = on_device(np.stack((row_M, token_M)), self._device).unbind()
        return _Edit((rows, tokens), *on_device(np.stack((factor_M, minus_M)), self._device).unbind())

    def _rounds(self, requests: Sequence[Request], vocab_size: int) -> tuple[list[_Change], ...]:
        """Penalties, then bias, then what is forbidden; in each no score twice."""
        penalties: list[_Change] = []
        biases: list[_Change] = []
        forbidden: list[_Change] = []
        for row, request in enumerate(requests):
            params = request.params
            if params.has_penalty:
                penalties.append(self._penalties(row, request))
            if params.logit_bias:
                tokens, amounts = list(params.logit_bias), list(params.logit_bias.values())
                minus_M = -np.array(amounts, dtype=np.float32)
                biases.append(_Change(row, np.array(tokens, dtype=np.int64), 1.0, minus_M))
            if request.num_output_tokens < params.min_tokens:
                ends = () if params.ignore_eos else request.end_tokens
                # Configurations name end tokens that the model has no scores for.
                tokens = [token for token in {*ends, *params.stop_token_ids} if token < vocab_size]
                forbidden.append(_Change(row, np.array(tokens, dtype=np.int64), 1.0, math.inf))
        return penalties, biases, forbidden

    def _penalties(self, row: int, request: Request) -> _Change:
        params = request.params
        seen = self._seen.get(request.name)
        if seen is None:
            seen = self._seen[request.name] = _SeenTokens(has_prompt=params.repetition_penalty != 1)
        seen.catch_up(request)
        times_M = seen.times_in_output
        minus_M = params.frequency_penalty * times_M + params.presence_penalty * (times_M > 0)
        return _Change(row, seen.tokens, params.repetition_penalty, minus_M.astype(np.float32))


class _SeenTokens:
    """Which tokens a sequence has, each once, and how often each is in its output. Grows with the sequence.

    has_prompt: whether the prompt's tokens are among them.
    """

    def __init__(self, has_prompt: bool) -> None:
        self._has_prompt = has_prompt
        self._num_counted: int | None = None
        self._place_of: dict[int, int] = {}
        self._tokens = np.empty(0, dtype=np.int64)
        self._times = np.empty(0, dtype=np.int32)

    @property
    def tokens(self) -> Integers:
        return self._tokens[: len(self._place_of)]

    @property
    def times_in_output(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        return self._times[: len(self._place_of)]

    def catch_up(self, request: Request) -> None:
        """Count the tokens that have come since the last time."""
        if self._num_counted is None:
            self._num_counted = request.num_prompt_tokens
            for token in request.tokens[: request.num_prompt_tokens] if self._has_prompt else ():
                self._place(token)
        for token in request.tokens[self._num_counted :]:
            place = self._place(token)
            self._times[place] += 1
        self._num_counted = len(request.tokens)

    def _place(self, token: int) -> int:
        place = self._place_of.setdefault(token, len(self._place_of))
        if place == len(self._tokens):
            room = max(64, 2 * place)
            self._tokens, self._times = (
                np.concatenate((known, np.zeros(room - place, dtype=known.dtype)))
                for known in (self._tokens, self._times)
            )
        self._tokens[place] = token
        return place
