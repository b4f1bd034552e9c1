"""Perplexity, divergence and agreement are what the model library's own scores give, whatever the windows."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import nn
from torch.nn import functional

from drivetrain.config import load_settings
from drivetrain.contracts.loader import TokenizerData
from drivetrain.errors import ConfigError
from drivetrain.evaluation import Comparison, TextWindows, compare_quantizers, read_tokens
from drivetrain.evaluation.scoring import Scorer
from drivetrain.evaluation.text import opening_of
from drivetrain.registry.selection import PartRequest
from drivetrain.serving.tokenizer import Tokenizer
from drivetrain.testing.measure import Allocations
from support.tiny_models import save_tiny, tiny_tokenizer

TEXT = "There is more than one way to say that the quick brown fox sleeps; x = f(1, 22) is another. " * 8
TOKENS, CONTEXT = 301, 90

NONE, INT8 = PartRequest("quantizer", "none"), PartRequest("quantizer", "int8")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def compare(folder: Path, text: Path, *quantizers: PartRequest, **options: Any) -> Comparison:
    options = {"num_tokens": TOKENS, "context": CONTEXT} | options
    settings = load_settings(None, {"model": str(folder), "platform": {"name": "cpu", "threads": 1}})
    return compare_quantizers(settings, quantizers, text, **options)


def plain_perplexity(model: Any, ids: list[int], context: int) -> tuple[float, torch.Tensor]:
    """By one call of the library for each window; also the scores of all scored positions."""
    scores = []
    total = 0.0
    for start in range(0, len(ids), context):
        window = torch.tensor([ids[start : start + context]])
        with torch.inference_mode():
            logits = model(window).logits[0, :-1].double()
        total += float(functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
        scores.append(logits.log_softmax(-1))
    every = torch.cat(scores)
    return math.exp(total / len(every)), every


@pytest.mark.parametrize("name", ["llama", "smollm2", "mistral", "gemma2"])
def test_perplexity_is_that_of_the_library(tmp_path: Path, text: Path, name: str) -> None:
    """With full attention and with windows, in several steps a window, and a last window that is shorter."""
    theirs = save_tiny(name, tmp_path / "model")
    ids = Tokenizer(TokenizerData(tiny_tokenizer(), None, {})).encode(TEXT)[:TOKENS]
    found = compare(tmp_path / "model", text)
    wanted, scores = plain_perplexity(theirs, ids, CONTEXT)
    assert found.num_tokens == len(scores) == TOKENS - math.ceil(TOKENS / CONTEXT)
    assert found.reference.perplexity == pytest.approx(wanted, rel=1e-5)


def test_steps_of_a_window_change_nothing(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window goes through the cache in pieces when it is longer than a step."""
    save_tiny("mistral", tmp_path / "model")
    whole = compare(tmp_path / "model", text, context=256)
    monkeypatch.setattr("drivetrain.evaluation.scoring.TOKENS_PER_STEP", 32)
    pieces = compare(tmp_path / "model", text, context=256)
    assert pieces.reference.perplexity == pytest.approx(whole.reference.perplexity, rel=1e-5)


def test_divergence_and_agreement_are_those_of_the_scores(tmp_path: Path, text: Path) -> None:
    """Of int8, beside the library's model with the weights that int8 stands for."""
    from drivetrain.packed import decode
    from drivetrain.plugins.quantizer.int8 import pack_int8

    theirs = save_tiny("llama", tmp_path / "model")
    ids = Tokenizer(TokenizerData(tiny_tokenizer(), None, {})).encode(TEXT)[:TOKENS]
    _, wanted = plain_perplexity(theirs, ids, CONTEXT)
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(decode(pack_int8(module.weight)))
    perplexity, scores = plain_perplexity(theirs, ids, CONTEXT)
    (row,) = compare(tmp_path / "model", text, INT8).rows
    assert row.perplexity == pytest.approx(perplexity, rel=1e-4)
    divergence = float((wanted.exp() * (wanted - scores)).sum(-1).mean())
    assert divergence > 1e-6
    assert row.kl_divergence == pytest.approx(divergence, rel=0.05)
    agreement = float((scores.argmax(-1) == wanted.argmax(-1)).double().mean())
    assert row.top1_agreement == pytest.approx(agreement, abs=1.5 / len(scores))
    assert row.tokens_per_second > 0


def test_a_quantizer_that_changes_nothing_is_no_distance_away(tmp_path: Path, text: Path) -> None:
    save_tiny("smollm2", tmp_path / "model")
    found = compare(tmp_path / "model", text, NONE, INT8)
    none, int8 = found.rows
    assert (none.perplexity, none.num_bytes) == (found.reference.perplexity, found.reference.num_bytes)
    assert (none.kl_divergence, none.top1_agreement) == (0.0, 1.0)
    assert (found.reference.kl_divergence, found.reference.top1_agreement) == (0.0, 1.0)
    assert found.reference.bits_per_weight == pytest.approx(32, abs=0.5)  # and the frequencies of the rotation
    assert int8.num_bytes < none.num_bytes
    assert found.change(none) == 0.0
    assert [row["name"] for row in found.to_dict()["rows"]] == ["none", "int8"]


def test_scores_over_the_vocabulary_are_held_a_few_rows_at_a_time(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path / "model")
    monkeypatch.setattr("drivetrain.evaluation.perplexity.ROWS_OF_LOGITS", 4)
    vocabulary = 8 * 10**4  # more than any other tensor of the model has, however the table is enlarged
    monkeypatch.setattr(
        "drivetrain.evaluation.scoring.Scorer.logits", lambda self, hidden: hidden.new_zeros(len(hidden), vocabulary)
    )
    with Allocations() as seen:
        compare(tmp_path / "model", text)
    assert 4 * 4 * vocabulary <= seen.largest_bytes <= 8 * 4 * vocabulary  # float32, or float64


# --- text ------------------------------------------------------------------------------------------------------------


def test_what_a_tokenizer_puts_before_a_text_is_before_every_window_and_unscored() -> None:
    backend = tiny_tokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert opening_of(Tokenizer(TokenizerData(backend, None, {}))) == (0,)
    assert opening_of(Tokenizer(TokenizerData(tiny_tokenizer(), None, {}))) == ()
    text = TextWindows((0,), (5, 6, 7, 8, 9), context=3)
    assert text.windows == [[0, 5, 6], [0, 7, 8], [0, 9]]
    assert text.num_scored == 5
    rows = [(window, *piece) for window in text.windows for piece in text.scored_rows(window, 1)]
    assert [targets for _, _, targets in rows] == [[5], [6], [7], [8], [9]]
    assert rows[1] == ([0, 5, 6], slice(1, 2), [6])


def test_a_window_with_nothing_to_predict_is_left_out() -> None:
    text = TextWindows((), (5, 6, 7, 8, 9), context=2)
    assert text.windows == [[5, 6], [7, 8]]
    assert text.num_scored == 2


def test_text_that_can_not_be_used_is_refused_with_numbers(tmp_path: Path) -> None:
    tokenizer = Tokenizer(TokenizerData(tiny_tokenizer(), None, {}))

    def read(content: bytes, num_tokens: int | None = None) -> list[int]:
        (tmp_path / "text").write_bytes(content)
        return read_tokens(tmp_path / "text", tokenizer, num_tokens, default=8, option="--tokens")

    assert len(read(TEXT.encode())) == 8
    assert len(read(b"Words.")) < 8
    assert read("\ufeffab".encode(), 2) == tokenizer.encode("ab")
    for content, message in (
        (b"", "empty; found '0 tokens'"),
        (b" \n ", "empty; found '0 tokens'"),
        (b"a", "nothing to predict; found '1 tokens'; allowed: 2 tokens or more; 8 are wanted"),
        (b"\xff\xfe\x00", "not UTF-8 text; found 'byte 0xff'"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(content)
    with pytest.raises(ConfigError, match=r"too short; found '2 tokens'; allowed: 100 tokens or more.*--tokens 2"):
        read(b"ab", 100)
    with pytest.raises(ConfigError, match="can't read the text: No such file"):
        read_tokens(tmp_path / "absent", tokenizer, None, default=8, option="--tokens")


def test_what_an_allocation_is_rounded_up_by_is_no_part_of_the_model() -> None:
    """Weights in pages of 2 MiB lie in storages that are larger than they are; tied ones count once."""
    table = nn.Parameter(torch.zeros(4096)[:96].view(8, 12))
    model = nn.ModuleDict({"table": nn.Embedding(8, 12), "head": nn.Linear(12, 8, bias=False)})
    for layer in model.values():
        layer.weight = table
    stack: Any = SimpleNamespace(engine=SimpleNamespace(runner=SimpleNamespace(model=model)))
    assert Scorer(stack).weight_bytes == 96 * 4
