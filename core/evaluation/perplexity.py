"""What quantizers cost: each one's predictions of a text beside those of the float32 model.

Shapes: T tokens of a window; E hidden size; N rows; V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drivetrain.assembly import ServingStack, resolve_parts
from drivetrain.config import Settings
from drivetrain.contracts.source import Progress, silent
from drivetrain.errors import ConfigError
from drivetrain.evaluation.scoring import ROWS_OF_LOGITS, Scorer, open_stack
from drivetrain.evaluation.text import TextWindows, opening_of, read_tokens
from drivetrain.registry.selection import PartRequest
from drivetrain.serving.master_copy import Weights

DEFAULT_TOKENS = 8192

_SAMPLE = "The quick brown fox; 1, 22 and 333."


@dataclass(frozen=True)
class Quality:
    """How one form of a model predicts the text.

    name:              the quantizer, as it was asked for.
    bits_per_weight:   over all of the model's weights, whether quantized or not, scales and all included.
    num_bytes:         of everything that the model keeps.
    perplexity:        exp of the mean negative log-probability of the text's tokens.
    kl_divergence:     mean over positions of KL(float32 model || this one), in nats.
    top1_agreement:    share of positions where the likeliest token is the float32 model's.
    tokens_per_second: tokens that went through the model in a second, whole windows at a time.
    """

    name: str
    bits_per_weight: float
    num_bytes: int
    perplexity: float
    kl_divergence: float
    top1_agreement: float
    tokens_per_second: float


@dataclass(frozen=True)
class Comparison:
    """The float32 model and its quantized forms on one text.

    stored_bits: bits of one weight in the files, where they are quantized there: then the float32 model is that of the
                 dequantized weights, and no better than they are. None where the files hold them in full.
    """

    model: str
    num_tokens: int
    context: int
    stored_bits: float | None
    reference: Quality
    rows: tuple[Quality, ...]

    def change(self, row: Quality) -> float:
        """How much higher a row's perplexity is than the float32 model's, as a share of that."""
        return row.perplexity / self.reference.perplexity - 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [dataclasses.asdict(row) | {"perplexity_change": self.change(row)} for row in self.rows]
        return dataclasses.asdict(self) | {"rows": rows}


@dataclass
class _Sums:
    """What is added up over positions."""

    num_scored: int = 0
    negative_log_probability: float = 0.0
    divergence: float = 0.0
    agreeing: int = 0

    def add(self, logits_NV: torch.Tensor, wanted_NV: torch.Tensor, targets_N: torch.Tensor) -> None:
        """Rows of one model's scores, the float32 model's for the same positions, and the tokens that came."""
        scores_NV, wanted_NV = logits_NV.float().log_softmax(-1), wanted_NV.float().log_softmax(-1)
        self.num_scored += targets_N.numel()
        own_N = scores_NV.gather(1, targets_N[:, None])
        self.negative_log_probability -= float(own_N.double().sum())
        pointwise_N = (wanted_NV.exp() * (wanted_NV - scores_NV)).sum(-1)
        self.divergence += float(pointwise_N.double().sum())
        self.agreeing += int((scores_NV.argmax(-1) == wanted_NV.argmax(-1)).sum())


class _Reference:
    """The float32 model: its hidden states of the whole text are kept, and scored anew beside each other model, since
    its scores themselves (V numbers a token) would not fit."""

    def __init__(self, scorer: Scorer, text: TextWindows, progress: Progress) -> None:
        self.scorer = scorer
        self.hidden = [scorer.hidden(window) for window in _counted(text, "float32", progress)]


def _counted(text: TextWindows, what: str, progress: Progress) -> Iterator[list[int]]:
    """The windows, telling how far the text is read."""
    windows = text.windows
    done, total = 0, text.num_tokens
    progress(f"reading with {what}", 0, total, "tokens")
    for window in windows:
        yield window
        done += len(window)
        progress(f"reading with {what}", done, total, "tokens")


def compare_quantizers(
    settings: Settings,
    quantizers: Sequence[PartRequest],
    data: Path,
    *,
    packed: Sequence[str] = (),
    num_tokens: int | None = None,
    context: int | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Read a text with the model in float32, and with each quantizer in the precision of ``settings``.

    Every model goes the way of serving: tokens packed flat, the chosen attention backend and its cache, the chosen
    kernels. The float32 model and one other are held at a time; scores over the vocabulary a few rows at a time.

    data:       a text file in UTF-8.
    packed:     folders that ``drivetrain quantize`` made of the model; each is read with the quantizer of its files.
    num_tokens: of the text, from its beginning; None takes 8192, or what there is.
    context:    tokens of the windows that the text is cut into, each read from its own beginning; None takes 1024, or
                what the model sees.
    Raises ConfigError for a text that is too short.
    """
    wide = {"quantizer": PartRequest("quantizer", "none"), "precision": PartRequest("precision", "fp32")}
    with torch.inference_mode():
        stack = open_stack(_with_parts(settings, wide), context, progress)
        text = _windows(stack, data, num_tokens)
        others = list(_others(settings, quantizers, packed))
        for _, own_settings in others:  # what can't be had is told before the text is read
            resolve_parts(own_settings, leave_out=("frontend",))
        reference = _Reference(Scorer(stack), text, progress)
        own = _measure("float32", reference.scorer, reference, text, silent)
        rows = []
        for name, own_settings in others:
            other = open_stack(own_settings, text.context, progress)
            _check_same_tokens(stack, other, name)
            rows.append(_measure(name, Scorer(other), reference, text, progress))
            del other  # before the next is built
    assert stack.parts.checkpoint is not None
    stored = Weights.of(stack.parts.checkpoint).dequantized_from_bits
    return Comparison(settings.model or "", text.num_scored, text.context, stored, own, tuple(rows))


def _others(
    settings: Settings, quantizers: Sequence[PartRequest], packed: Sequence[str]
) -> Iterator[tuple[str, Settings]]:
    """Names of the rows, and the settings of their models."""
    for request in quantizers:
        yield describe(request), _with_parts(settings, {"quantizer": request})
    theirs = {kind: part for kind, part in settings.parts.items() if kind not in ("quantizer", "loader", "source")}
    for model in packed:
        yield Path(model).name, dataclasses.replace(settings, model=model, parts=theirs)


def _check_same_tokens(stack: ServingStack, other: ServingStack, name: str) -> None:
    """Raise ConfigError for a model whose token ids mean something else."""
    ours, theirs = (
        (one.tokenizer.vocab_size, one.engine.runner.model.spec.vocab_size, one.tokenizer.encode(_SAMPLE))
        for one in (stack, other)
    )
    if ours != theirs:
        raise ConfigError(
            "the model has other tokens than the one that it is compared with",
            where=name,
            found=f"{theirs[1]} tokens",
            allowed=f"the same {ours[1]} tokens",
        )


def _with_parts(settings: Settings, parts: Mapping[str, PartRequest]) -> Settings:
    return dataclasses.replace(settings, parts={**settings.parts, **parts})


def _windows(stack: ServingStack, data: Path, num_tokens: int | None) -> TextWindows:
    ids = read_tokens(data, stack.tokenizer, num_tokens, default=DEFAULT_TOKENS, option="--tokens")
    opening = opening_of(stack.tokenizer)
    if stack.max_model_len < len(opening) + 2:
        raise ConfigError(
            "a window holds nothing to predict",
            where="--context",
            found=stack.max_model_len,
            allowed=f"{len(opening) + 2} or more",
        )
    return TextWindows(opening, tuple(ids), stack.max_model_len)


def _measure(name: str, scorer: Scorer, reference: _Reference, text: TextWindows, progress: Progress) -> Quality:
    """Run the whole text through one model, unless it is the reference itself, and compare."""
    sums, is_reference = _Sums(), scorer is reference.scorer
    for number, window in enumerate(_counted(text, name, progress)):
        wanted_TE = reference.hidden[number]
        hidden_TE = wanted_TE if is_reference else scorer.hidden(window)
        for rows, targets_N in text.scored_rows(window, ROWS_OF_LOGITS):
            logits_NV = scorer.logits(hidden_TE[rows])
            wanted_NV = logits_NV if is_reference else reference.scorer.logits(wanted_TE[rows])
            sums.add(logits_NV, wanted_NV, torch.tensor(targets_N, device=logits_NV.device))
    num_bytes = scorer.weight_bytes
    return Quality(
        name=name,
        bits_per_weight=8 * num_bytes / scorer.num_parameters,
        num_bytes=num_bytes,
        perplexity=math.exp(sums.negative_log_probability / sums.num_scored),
        kl_divergence=sums.divergence / sums.num_scored,
        top1_agreement=sums.agreeing / sums.num_scored,
        tokens_per_second=text.num_tokens / scorer.seconds,
    )


def describe(request: PartRequest) -> str:
    """A quantizer as it is asked for on the command line: ``int4:group=32,rules.lm_head=none``."""
    told: list[str] = []
    for name, value in request.options.items():
        if isinstance(value, Mapping):
            told += [f"{name}.{key}={own}" for key, own in value.items()]
        elif name != "allow_lossy":
            told.append(f"{name}={value}")
    return f"{request.name}:{','.join(told)}" if told else request.name
