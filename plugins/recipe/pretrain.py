"""Training on plain text: one stream of tokens, cut into rows."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field

from drivetrain.contracts.recipe import Recipe, RecipeContext, Samples
from drivetrain.plugins.recipe.reading import DataConfig, Reader, text_of
from drivetrain.plugins.recipe.sft import check_length

if TYPE_CHECKING:
    from drivetrain.plugins.recipe.packing import Document


class PretrainRecipe(Recipe):
    """Next-token training on texts, as one stream of tokens that is cut into rows; every token is learnt."""

    class Config(DataConfig):
        boundaries: bool = Field(
            True, description="let tokens attend to their own document alone; off, to all of the row before them"
        )
        text: str = Field("text", description="field of a JSONL or parquet row that holds the text")

    config: Config

    def open(self, context: RecipeContext) -> Samples:
        from drivetrain.plugins.recipe.packing import PackedSamples

        check_length(self.config.length, context)
        reader = Reader(self.config, context.note)
        rows = list(self._rows(reader, context))
        reader.tell(len(rows))
        return PackedSamples(rows)

    def _rows(self, reader: Reader, context: RecipeContext) -> Iterator[list[Document]]:
        """Rows of ``length`` tokens, the last one shorter; a token is the target of the one before it once."""
        stream, ends = self._stream(reader, context)
        for start in range(0, len(stream) - 1, self.config.length):
            # One more than a row, for the last target.
            piece = stream[start : start + self.config.length + 1]
            first_end, behind = bisect_right(ends, start), bisect_left(ends, start + len(piece) - 1)
            inner = [end - start for end in ends[first_end:behind]] if self.config.boundaries else []
            row = [
                document
                for first, last in zip([0, *inner], [*inner, len(piece) - 1], strict=True)
                if (document := _cut(piece, first, last, joins=last not in inner)).ids.size
            ]
            if any(document.num_targets for document in row):
                yield row

    def _stream(self, reader: Reader, context: RecipeContext) -> tuple[array[int], list[int]]:
        """All tokens, and where documents end."""
        from drivetrain.serving.tokenizer import Tokenizer

        tokenizer = Tokenizer(context.tokenizer)
        stream = array("i")  # a list would take nine times the memory
        ends: list[int] = []
        for place, row in reader.rows():
            text = reader.attempt(partial(text_of, row, self.config.text, place))
            if text is not None:
                stream.extend(tokenizer.encode(text))
                stream.extend([] if context.eos_token_id is None else [context.eos_token_id])
                ends.append(len(stream))
        return stream, ends


def _cut(piece: array[int], first: int, last: int, *, joins: bool) -> Document:
    """Tokens first .. last - 1; the last has the token behind it as its target where that belongs to it."""
    import numpy as np

    from drivetrain.contracts.recipe import IGNORED
    from drivetrain.plugins.recipe.packing import Document

    ids = np.asarray(piece[first:last], dtype=np.int32)
    targets = np.asarray(piece[first + 1 : last + 1], dtype=np.int32)
    if not joins and targets.size:
        targets[-1] = IGNORED
    return Document(ids, targets)
