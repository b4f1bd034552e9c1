"""What crosses the border of the serving loop: requests in, chunks of output out. No torch in here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from drivetrain.errors import InvalidRequestError

MAX_LOGPROBS = 100
MAX_STOP_STRINGS = 64
MAX_N = 128
_MAX_TOKEN_ID = 2**31 - 1


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    ERROR = "error"


def _check_number(
    name: str, value: object, low: float, high: float, *, integer: bool = False, low_open: bool = False
) -> None:
    """Refuse what is not a finite number inside the range; bool is no number here."""
    allowed = f"{'an integer' if integer else 'a number'} {'>' if low_open else '>='} {low}"
    if high < math.inf:
        allowed += f" and <= {high}"
    if isinstance(value, bool) or not isinstance(value, int if integer else int | float):
        raise InvalidRequestError(f"{name} must be {allowed}", param=name, found=value)
    # Python compares int with float exactly, however large the int; NaN and infinity are floats.
    if (
        (isinstance(value, float) and not math.isfinite(value))
        or not low <= value <= high
        or (low_open and value == low)
    ):
        raise InvalidRequestError(f"{name} must be {allowed}", param=name, found=value)


def _as_tuple(name: str, value: object) -> tuple[object, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise InvalidRequestError(f"{name} must be a list", param=name, found=value)
    return tuple(value)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends. Checked on construction; raises InvalidRequestError.

    ``stop`` may be given as one string, and becomes a tuple; collections are copied.

    max_tokens:          most new tokens; None means as many as the context holds.
    min_tokens:          tokens before which neither an end token nor a stop string ends the sequence.
    n:                   independent sequences for one prompt.
    temperature:         0 is greedy; 1 samples the model's own distribution.
    top_k:               keep the k most likely tokens; 0 or -1 keeps all.
    top_p:               keep the smallest set whose probabilities sum to at least p.
    min_p:               drop tokens less likely than min_p times the most likely one.
    repetition_penalty:  divides positive, multiplies negative scores of tokens already in prompt or output; 1 is off.
                         From 0.01 to 100: beyond, scores leave the range of float32.
    frequency_penalty:   subtracted from a token's score once for each time it is in the output.
    presence_penalty:    subtracted from a token's score once if it is in the output.
    logit_bias:          token id -> number added to its score.
    seed:                equal seed, prompt and settings give equal output whatever else is running; None draws one.
    stop:                strings that end the sequence when they appear in its text.
    stop_token_ids:      tokens that end the sequence, beside the model's own end tokens.
    include_stop:        keep the stop string in the text.
    ignore_eos:          do not end at the model's own end tokens.
    logprobs:            None for none; k >= 0 returns each token's log-probability and those of the k most likely. They
                         are the model's own: before temperature, penalties and bias.
    prompt_logprobs:     the same for each token of the prompt.
    skip_special_tokens: leave special tokens out of the text.
    """

    max_tokens: int | None = 256
    min_tokens: int = 0
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        infinity = math.inf
        if self.max_tokens is not None:
            _check_number("max_tokens", self.max_tokens, 1, infinity, integer=True)
        _check_number("min_tokens", self.min_tokens, 0, infinity, integer=True)
        _check_number("n", self.n, 1, MAX_N, integer=True)
        _check_number("temperature", self.temperature, 0, 100)
        _check_number("top_k", self.top_k, -1, infinity, integer=True)
        _check_number("top_p", self.top_p, 0, 1, low_open=True)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        if self.seed is not None:
            _check_number("seed", self.seed, -(2**63), 2**63 - 1, integer=True)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), 0, MAX_LOGPROBS, integer=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) is greater than max_tokens ({self.max_tokens})", param="min_tokens"
            )
        for name in ("include_stop", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{name} must be true or false", param=name, found=getattr(self, name))
        self._copy_collections()
        self._check_collections()

    def _copy_collections(self) -> None:
        """What is checked here can't be changed by the caller afterwards."""
        stop = (self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids))
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidRequestError("logit_bias must be a table", param="logit_bias", found=self.logit_bias)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    def _check_collections(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(f"at most {MAX_STOP_STRINGS} stop strings", param="stop", found=len(self.stop))
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequestError("each stop must be a string that is not empty", param="stop", found=text)
        for token in self.stop_token_ids:
            _check_number("stop_token_ids", token, 0, _MAX_TOKEN_ID, integer=True)
        for token, bias in self.logit_bias.items():
            _check_number("logit_bias", token, 0, _MAX_TOKEN_ID, integer=True)
            _check_number("logit_bias", bias, -100, 100)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalty(self) -> bool:
        """Whether scores of tokens that were there before are changed."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and how to continue it. Raises InvalidRequestError for a prompt or parameters of another type.

    prompt:          text, or token ids that are used as they are.
    priority:        smaller is more urgent, 0 is normal; only some schedulers look at it.
    timeout_seconds: from arrival to the last token; None waits for ever. An expired request ends with reason
                     ``timeout`` and keeps the tokens it has.
    add_special_tokens: whether encoding text adds the tokenizer's own start token; rendered chats carry theirs already.
    is_streamed:     whether its tokens are told of as they come. Otherwise, and without stop strings, several are put
                     together, which costs less.
    """

    prompt: str | Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    timeout_seconds: float | None = None
    add_special_tokens: bool = True
    is_streamed: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.prompt, bytes | bytearray) or not isinstance(self.prompt, Sequence):
            raise InvalidRequestError(
                "a prompt must be text or a list of token ids",
                param="prompt",
                found=type(self.prompt).__name__,
                hint="An array has a method tolist, bytes have decode.",
            )
        if not isinstance(self.params, SamplingParams):
            raise InvalidRequestError("params must be SamplingParams", param="params", found=type(self.params).__name__)


@dataclass(frozen=True)
class TokenLogprob:
    """One token's log-probability under the model (natural logarithm), and the most likely tokens at its place.

    rank: 1 for the most likely token.
    top:  (token id, log-probability), most likely first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Chunk:
    """What a step added to one sequence, or several steps where nobody reads along.

    index:         which of the n sequences.
    text:          new text; may be empty while half a character or a possible stop string is held back.
    token_ids:     new tokens.
    logprobs:      one entry for each new token, when asked for.
    finish_reason: set in a sequence's last chunk.
    stop_reason:   the stop string or token id that ended it; None for the model's own end token.
    error:         the message, when finish_reason is ``error``.
    epoch:         which set of parts made it: how often the engine's parts had been exchanged by then.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    epoch: int = 0


@dataclass(frozen=True)
class PromptInfo:
    """What is known of the prompt once it is accepted and processed.

    logprobs:      one entry for each prompt token when asked for; the first is None, as nothing comes before it.
    cached_tokens: tokens of it that the prefix cache held already.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...] | None = None
    cached_tokens: int = 0


@dataclass(frozen=True)
class Completion:
    """One finished sequence. ``epochs``: the sets of parts that made it, one unless a swap came in between."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    epochs: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class RequestTiming:
    """Seconds of one request, from its arrival.

    first_token_seconds: until its first token; None when it never had one.
    total_seconds:       until it ended.
    """

    first_token_seconds: float | None
    total_seconds: float


@dataclass(frozen=True)
class GenerationResult:
    """All that came of one prompt."""

    request_id: str
    prompt: PromptInfo
    completions: tuple[Completion, ...]
    timing: RequestTiming

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first completion."""
        return self.completions[0].token_ids
