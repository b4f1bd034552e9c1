"""Supervised fine-tuning: conversations, or texts, whose answers are learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from drivetrain.contracts.recipe import Recipe, RecipeContext, Samples
from drivetrain.errors import ConfigError, DataError, InvalidRequestError
from drivetrain.plugins.recipe.reading import DataConfig, Reader, Row, check_unicode, text_of

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
        maker = _DocumentMaker(self.config, context, reader.leave_out)
        documents = list(self._documents(reader, maker))
        reader.tell(len(documents))
        if maker.num_cut:
            context.note(f"{maker.num_cut} documents were cut to {self.config.length} tokens (recipe.length)")
        rows = pack(documents, self.config.length) if self.config.pack else [[document] for document in documents]
        return PackedSamples(rows)

    def _documents(self, reader: Reader, maker: _DocumentMaker) -> Iterator[Document]:
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
    """Turns rows into documents.

    leave_out: told of documents that are too long, where these are left out.
    num_cut:   documents that were cut.
    """

    def __init__(
        self, config: SftRecipe.Config, context: RecipeContext, leave_out: Callable[[DataError], None]
    ) -> None:
        from drivetrain.serving.tokenizer import Tokenizer

        self.num_cut = 0
        self._config, self._leave_out = config, leave_out
        self._eos = context.eos_token_id
        self._backend = context.tokenizer.backend
        self._tokenizer = Tokenizer(context.tokenizer)

    def make(self, row: Row, place: str) -> Document | None:
        """The document of a row; None for one that is too long and left out. Raises DataError."""
        from drivetrain.plugins.recipe.packing import Document

        # A table has all its columns in every row, empty ones too.
        form = next((form for form in _FORMS if row.get(form) is not None), None)
        form = form or next((form for form in _FORMS if form in row), None)
        if form is None:
            raise DataError("the row has none of the known fields", where=place, found=list(row), allowed=_FORMS)
        ids, counts = getattr(self, f"_of_{form}")(row, place)
        is_long = len(ids) > self._config.length
        if is_long and self._config.too_long != "cut":
            error = DataError(
                "the document is longer than a row",
                where=place,
                found=f"{len(ids)} tokens",
                allowed=f"recipe.length: {self._config.length}",
            )
            if self._config.too_long == "skip":
                self._leave_out(error)
                return None
            error.hint = "Raise recipe.length, or set recipe.too_long to cut or skip."
            raise error
        document = Document.of(ids[: self._config.length], counts[: self._config.length])
        if document.num_targets == 0:
            why = f"within {self._config.length} tokens (recipe.length)" if is_long else "no answer, or a single token"
            raise DataError(f"the document holds nothing to learn: {why}", where=place)
        self.num_cut += is_long
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
        for message in messages:
            if isinstance(message, dict) and message.get("content") is None and not message.get("tool_calls"):
                raise DataError("a message has no content", where=place, found=message)
        try:
            text = self._tokenizer.render_chat(messages, add_generation_prompt=False)
            answers = self._answers(messages, text, place) if self._config.train_on == "answers" else [(0, len(text))]
        except InvalidRequestError as error:
            raise DataError(f"the conversation can't be rendered: {error.what}", where=place) from error
        check_unicode(text, place)
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
            told = self._tokenizer.render_chat(messages[: index + 1], add_generation_prompt=False)
            asked = self._asked(messages[:index], told)
            if asked is None or not text.startswith(told.rstrip()):
                raise DataError(
                    "the chat template renders this answer differently from how it is asked for, so that it can't be "
                    "told which tokens are the answer",
                    where=place,
                    hint="Set recipe.train_on to all.",
                )
            spans.append((len(asked), len(told.rstrip())))
        return spans

    def _asked(self, before: Sequence[Mapping[str, Any]], told: str) -> str | None:
        """The part of ``told`` that makes the model give its last message; None where it has no such part."""
        if before:
            asked = self._tokenizer.render_chat(before, add_generation_prompt=True)
            return asked if told.startswith(asked) else None
        # Templates put words of their own in front of a conversation, and render none that is empty.
        asks = self._words_that_ask
        return told[: told.index(asks) + len(asks)] if asks and asks in told else None

    @cached_property
    def _words_that_ask(self) -> str:
        """What a template adds to a conversation to make the model answer; empty where it adds nothing."""
        question = [{"role": "user", "content": "?"}]
        plain = self._tokenizer.render_chat(question, add_generation_prompt=False)
        asking = self._tokenizer.render_chat(question, add_generation_prompt=True)
        return asking[len(plain) :] if asking.startswith(plain) else ""

    def _encode(self, text: str, *, special: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=special)

    @property
    def _end(self) -> list[int]:
        return [] if self._eos is None else [self._eos]
