"""Recipes with one fault each, and the test of the kit that must catch it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import torch

from drivetrain.contracts.plugin import Plugin
from drivetrain.contracts.recipe import Forward, RecipeContext, Sample, Samples, TokenBatch
from drivetrain.plugins.recipe.sft import SftRecipe


class _Changed:
    """Samples with one thing different."""

    def __init__(self, inner: Samples) -> None:
        self.inner = inner

    @property
    def digest(self) -> str:
        return self.inner.digest

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Sample:
        return self.inner[index]


class MeanLoss(SftRecipe):
    """Gives the mean over a micro-batch, so that small ones count as much as large ones."""

    def loss(self, forward: Forward, batch: TokenBatch) -> torch.Tensor:
        return super().loss(forward, batch) / batch.num_targets


class OtherSamplesEachTime(SftRecipe):
    """Draws a sample instead of reading the one that was asked for."""

    class Config(SftRecipe.Config):
        pack: bool = False

    def open(self, context: RecipeContext) -> Samples:
        class Drawn(_Changed):
            def __getitem__(self, index: int) -> Sample:
                return self.inner[random.randrange(len(self.inner))]

        return Drawn(super().open(context))


class SameDigest(SftRecipe):
    """Tells all data apart by nothing."""

    def open(self, context: RecipeContext) -> Samples:
        class Alike(_Changed):
            digest = "alike"

        return Alike(super().open(context))


class RunsPositionsOn(SftRecipe):
    """Lets positions run on from one document to the next."""

    def collate(self, samples: Sequence[Sample], device: torch.device) -> TokenBatch:
        batch = super().collate(samples, device)
        return dataclasses.replace(batch, positions_T=torch.arange(len(batch.ids_T)))


class LosesTheLastToken(SftRecipe):
    """Tells of documents that are shorter than they are."""

    def open(self, context: RecipeContext) -> Samples:
        class Short(_Changed):
            def __getitem__(self, index: int) -> Sample:
                sample = self.inner[index]
                return dataclasses.replace(sample, lengths=(*sample.lengths[:-1], sample.lengths[-1] - 1))

        return Short(super().open(context))


ZOO: dict[type[Plugin], str] = {
    MeanLoss: "test_the_loss_is_a_sum_over_targets",
    OtherSamplesEachTime: "test_reading_is_repeatable",
    SameDigest: "test_other_data_has_another_digest",
    RunsPositionsOn: "test_a_micro_batch_is_packed_flat",
    LosesTheLastToken: "test_every_sample_is_whole",
}
"""Faulty recipe -> the test that must fail for it."""
