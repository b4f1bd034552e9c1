"""Supervised fine-tuning: conversations, or texts, whose answers are learnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from drivetrain.contracts.recipe import Recipe, RecipeContext, Samples
from drivetrain.errors import ConfigError, DataError, InvalidRequestError
from drivetrain.plugins.recipe.reading import DataConfig, Reader, Row, text_of

if TYPE_CHECKING:
    from drivetrain.plugins.recipe.packing import Document

_FORMS = ("messages", "prompt", "text")


class SftRecipe(Recipe):
    """Fine-tuning on conversations or texts: the model's chat template, loss on answers, documents packed into rows."""

    class Config(DataConfig):
        train_on: Literal["answers", "all"] = Field(
            "answers", description="what is learnt of a conversation: the assistant's messages, or everything"
        )
        too_long: Literal["error", "skip", "cut"] = Field(
            "error", description="a document of more than length tokens: error ends the run; skip leaves it out; cut"
        )
        pack: bool = Field(True, description="put several documents into a row; each still attends to itself alone")

    config: Config

    def open(self, context: RecipeContext) -> Samples:
        from drivetrain.plugins.recipe.packing import PackedSamples, pack

        check_length(self.config.length, context)
        reader = Reader(self.config, context.note)
        documents = list(self._documents(reader, context))
        reader.tell(len(documents))
        rows = pack(documents, self.config.length) if self.config.pack else [[document] for document in documents]
        return PackedSamples(rows)

    def _documents(self, reader: Reader, context: RecipeContext) -> Iterator[Document]:
        maker = _DocumentMaker(self.config, context)
        for place, row in reader.rows():
            document = reader.attempt(partial(maker.make, row, place))
            if document is not None:
                yield document


def check_length(length: int, context: RecipeContext) -> None:
    """Raises ConfigError for rows that are longer than the model's context."""
    if length > context.max_position:
        raise ConfigError(
            "rows are longer than the context that the model was made for",
            where="recipe.length",
            found=length,
            allowed=f"at most {context.max_position}",
        )


class _DocumentMaker:
    """Turns rows into documents."""

    def __init__(self, config: SftRecipe.Config, context: RecipeContext) -> None:
        from drivetrain.serving.tokenizer import Tokenizer

        self._config = config
        self._eos = context.eos_token_id
        self._backend = context.tokenizer.backend
        self._tokenizer = Tokenizer(context.tokenizer)

    def make(self, row: Row, place: str) -> Document | None:
        """The document of a row; None for one that is too long and left out. Raises DataError."""
        from drivetrain.plugins.recipe.packing import Document

        form = next((form for form in _FORMS if form in row), None)
        if form is None:
            raise DataError("the row has none of the known fields", where=place, found=list(row), allowed=_FORMS)
        ids, counts = getattr(self, f"_of_{form}")(row, place)
        if len(ids) > self._config.length:
            if self._config.too_long == "skip":
                return None
            if self._config.too_long == "error":
                raise DataError(
                    "the document is longer than a row",
                    where=place,
                    found=f"{len(ids)} tokens",
                    allowed=f"recipe.length: {self._config.length}",
                    hint="Raise recipe.length, or set recipe.too_long to cut or skip.",
                )
            ids, counts = ids[: self._config.length], counts[: self._config.length]
        document = Document.of(ids, counts)
        if document.num_targets == 0:
            raise DataError("the document holds nothing to learn: no answer, or a single token", where=place)
        return document

    def _of_text(self, row: Row, place: str) -> tuple[list[int], list[bool]]:
        ids = self._encode(text_of(row, "text", place), special=True) + self._end
        return ids, [True] * len(ids)

    def _of_prompt(self, row: Row, place: str) -> tuple[list[int], list[bool]]:
        prompt = self._encode(text_of(row, "prompt", place), special=True)
        answer = self._encode(text_of(row, "completion", place), special=False) + self._end
        return prompt + answer, [self._config.train_on == "all"] * len(prompt) + [True] * len(answer)

    def _of_messages(self, row: Row, place: str) -> tuple[list[int], list[bool]]:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            raise DataError("'messages' must be a list of messages", where=place, found=messages)
        try:
            text = self._tokenizer.render_chat(messages, add_generation_prompt=False)
            answers = self._answers(messages, text, place) if self._config.train_on == "answers" else [(0, len(text))]
        except InvalidRequestError as error:
            raise DataError(f"the conversation can't be rendered: {error.what}", where=place) from error
        encoding = self._backend.encode(text, add_special_tokens=False)
        # A token is of the answer that its first character is in.
        counts = [any(first <= start < end for first, end in answers) for start, _ in encoding.offsets]
        return list(encoding.ids), counts

    def _answers(self, messages: Sequence[Mapping[str, Any]], text: str, place: str) -> list[tuple[int, int]]:
        """Where the assistant's messages lie in the rendered text: from behind the words that make the model answer to
        the end of its turn, as it is to be generated."""
        spans = []
        for index, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            asked = self._tokenizer.render_chat(messages[:index], add_generation_prompt=True) if index else ""
            told = self._tokenizer.render_chat(messages[: index + 1], add_generation_prompt=False)
            if not (text.startswith(told.rstrip()) and told.startswith(asked)):
                raise DataError(
                    "the chat template renders this answer differently from how it is asked for, so that it can't be "
                    "told which tokens are the answer",
                    where=place,
                    hint="Set recipe.train_on to all.",
                )
            spans.append((len(asked), len(told.rstrip())))
        return spans

    def _encode(self, text: str, *, special: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=special)

    @property
    def _end(self) -> list[int]:
        return [] if self._eos is None else [self._eos]
