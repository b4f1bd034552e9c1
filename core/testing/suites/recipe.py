"""What every recipe has to do: the same samples at every call, targets that fit their tokens, a loss over them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional

from drivetrain.contracts.loader import TokenizerData
from drivetrain.contracts.recipe import IGNORED, Recipe, RecipeContext, Samples, TokenBatch
from drivetrain.errors import DrivetrainError
from drivetrain.testing.suite import Suite

_TEXTS = ("The first line is short.", "And the second one has a few more words than the first.", "A third.") * 3
MAX_POSITION = 4096


def byte_tokenizer() -> TokenizerData:
    """A token for each byte, two special ones, and a chat template that names the speakers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: index + 2 for index, letter in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    template = (
        "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    return TokenizerData(backend, template, {"bos_token": "<s>", "eos_token": "</s>"})


class Scores:
    """Stands for a model: the same scores for every place, and every document on its own."""

    def __init__(self, vocab_size: int) -> None:
        self.weight = torch.zeros(vocab_size, requires_grad=True)

    def hidden(self, batch: TokenBatch) -> torch.Tensor:
        return torch.ones(len(batch.ids_T), 1)

    def token_losses(self, hidden_TE: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        logits_TV = hidden_TE * self.weight
        return functional.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED, reduction="none")


class RecipeSuite(Suite):
    """A small data set is opened, and every sample looked at."""

    kind = "recipe"

    @classmethod
    def make_data(cls, folder: Path) -> Mapping[str, Any]:
        """Write a small data set, and return the options that name it. This one is of JSONL and text lines."""
        path = folder / "data.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in _TEXTS), encoding="utf-8")
        return {"data": str(path)}

    @classmethod
    def make_empty(cls, folder: Path) -> Mapping[str, Any]:
        """Write a data set without a sample, and return the options that name it."""
        path = folder / "empty.jsonl"
        path.write_text("", encoding="utf-8")
        return {"data": str(path)}

    @staticmethod
    def context() -> RecipeContext:
        tokenizer = byte_tokenizer()
        return RecipeContext(tokenizer, tokenizer.backend.get_vocab_size(), MAX_POSITION, 1, lambda text: None)

    @classmethod
    def recipe(cls, options: Mapping[str, Any]) -> Recipe:
        return cast(Recipe, cls.make(**options))

    @classmethod
    def samples(cls, folder: Path) -> Samples:
        return cls.recipe(cls.make_data(folder)).open(cls.context())

    def test_every_sample_is_whole(self, tmp_path: Path) -> None:
        """Lengths sum to the tokens, targets are as many, and all are in the vocabulary."""
        samples = self.samples(tmp_path)
        assert len(samples) > 0
        for index in range(len(samples)):
            sample = samples[index]
            assert sum(sample.lengths) == len(sample.ids) == len(sample.targets)
            assert min(sample.lengths) > 0
            size = self.context().vocab_size
            assert all(0 <= token < size for token in sample.ids)
            assert all(target == IGNORED or 0 <= target < size for target in sample.targets)

    def test_there_is_something_to_learn_in_every_sample(self, tmp_path: Path) -> None:
        """A sample without a target would be work for nothing."""
        samples = self.samples(tmp_path)
        for index in range(len(samples)):
            assert any(target != IGNORED for target in samples[index].targets), index

    def test_reading_is_repeatable(self, tmp_path: Path) -> None:
        """A sample is the same at every call, and the same data gives the same digest."""
        samples, again = self.samples(tmp_path), self.samples(tmp_path)
        assert len(samples) == len(again)
        for index in (0, len(samples) - 1, 0):
            assert list(samples[index].ids) == list(again[index].ids) == list(samples[index].ids)
        assert samples.digest == again.digest

    def test_other_data_has_another_digest(self, tmp_path: Path) -> None:
        """A run is not to go on with other data than it began with."""
        options = self.make_data(tmp_path)
        before = self.recipe(options).open(self.context()).digest
        changed = 0
        for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
            text = path.read_bytes()
            path.write_bytes(text.replace(b"first", b"other"))
            changed += text != path.read_bytes()
        if not changed:
            pytest.skip("not claimed: data that a test can change")
        assert self.recipe(options).open(self.context()).digest != before

    def test_data_without_a_sample_is_an_error(self, tmp_path: Path) -> None:
        """There is nothing to train on, and it is said where."""
        with pytest.raises(DrivetrainError) as caught:
            self.recipe(self.make_empty(tmp_path)).open(self.context())
        assert caught.value.where, "the error names no place"

    def test_data_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        """A name that leads nowhere is told in one clear error."""
        options = {**self.make_empty(tmp_path)}
        for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
            path.unlink()
        with pytest.raises(DrivetrainError):
            self.recipe(options).open(self.context())

    def test_a_micro_batch_is_packed_flat(self, tmp_path: Path) -> None:
        """Samples lie one after the other, and positions count from 0 in each document."""
        recipe, samples = self.recipe(self.make_data(tmp_path)), self.samples(tmp_path)
        chosen = [samples[index] for index in {0, len(samples) - 1}]
        batch = recipe.collate(chosen, torch.device("cpu"))
        assert batch.ids_T.tolist() == [token for sample in chosen for token in sample.ids]
        assert batch.lengths == tuple(length for sample in chosen for length in sample.lengths)
        assert batch.positions_T.tolist() == [place for length in batch.lengths for place in range(length)]
        assert batch.num_targets == int((batch.targets_T != IGNORED).sum())
        assert batch.ids_T.dtype == batch.targets_T.dtype == batch.positions_T.dtype == torch.int64

    def test_the_loss_is_a_sum_over_targets(self, tmp_path: Path) -> None:
        """It is a float32 scalar that gradients flow through, and twice the samples have the sum of both losses."""
        recipe, samples = self.recipe(self.make_data(tmp_path)), self.samples(tmp_path)
        scores = Scores(self.context().vocab_size)
        first, last = samples[0], samples[len(samples) - 1]
        losses = [
            recipe.loss(scores, recipe.collate(chosen, torch.device("cpu")))
            for chosen in ([first], [last], [first, last])
        ]
        assert losses[0].shape == ()
        assert losses[0].dtype == torch.float32
        torch.testing.assert_close(losses[0] + losses[1], losses[2])
        losses[2].backward()
        assert scores.weight.grad is not None
        assert bool(torch.isfinite(scores.weight.grad).all())
        assert bool(scores.weight.grad.any())
