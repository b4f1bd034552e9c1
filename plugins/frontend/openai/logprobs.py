"""Log-probabilities in the two shapes of the API."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from drivetrain.serving.types import TokenLogprob

if TYPE_CHECKING:
    from drivetrain.serving.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON can't hold; the value that OpenAI's API uses."""

_UNREADABLE = "\N{REPLACEMENT CHARACTER}"


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprob]) -> dict[str, Any]:
    """The ``logprobs`` of a chat choice."""
    content = []
    for entry in entries:
        rendered = _chat_token(tokenizer, entry.token_id, entry.logprob)
        rendered["top_logprobs"] = [_chat_token(tokenizer, token, logprob) for token, logprob in entry.top]
        content.append(rendered)
    return {"content": content, "refusal": None}


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": max(logprob, LOWEST_LOGPROB),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


class CompletionLogprobs:
    """Builds the ``logprobs`` of one choice of a completion, piece by piece; keeps the offset in its text.

    The offset of a token that is only a part of a character is that of the character. A token that the text leaves out
    (the start token that encoding adds, a special token) has no width.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self.tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def prompt(self, text: str, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        """Of the prompt, which the choice repeats as ``text``; with null where nothing came before."""
        rendered = self._render(zip(token_ids, entries, strict=True), self._offsets_in(text, token_ids))
        self._offset = len(text)
        return rendered

    def output(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Of new tokens."""
        return self._render(((entry.token_id, entry) for entry in entries), self._offsets_of(entries))

    def _offsets_in(self, text: str, token_ids: Iterable[int]) -> Iterator[int]:
        # Text that was sent is not what its tokens spell: some are added, and a first space may be.
        raw, at, num_begun = text.encode(), 0, 0
        for token_id in token_ids:
            yield num_begun - _is_inside_character(raw, at)
            spelled = self.tokenizer.token_bytes(token_id)
            if at == 0 and not raw.startswith(spelled):
                spelled = spelled.removeprefix(b" ")
            if raw.startswith(spelled, at):
                num_begun += sum(not _is_inside_character(raw, place) for place in range(at, at + len(spelled)))
                at += len(spelled)

    def _offsets_of(self, entries: Iterable[TokenLogprob]) -> Iterator[int]:
        for entry in entries:
            yield self._offset
            if not (self._skips and self.tokenizer.is_special(entry.token_id)):
                self._offset += len(self._decoder.decode(self.tokenizer.token_bytes(entry.token_id)))

    def _render(self, pairs: Iterable[tuple[int, TokenLogprob | None]], offsets: Iterable[int]) -> dict[str, Any]:
        rendered: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for (token_id, entry), offset in zip(pairs, offsets, strict=True):
            rendered["tokens"].append(self._label(token_id))
            rendered["text_offset"].append(offset)
            rendered["token_logprobs"].append(None if entry is None else max(entry.logprob, LOWEST_LOGPROB))
            rendered["top_logprobs"].append(None if entry is None else self._top(entry))
        return rendered

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        # The chosen token is always among them. Of tokens that read alike the likeliest stays.
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            top.setdefault(self._label(token_id), max(logprob, LOWEST_LOGPROB))
        return top

    def _label(self, token_id: int) -> str:
        """The token's text; its bytes when it is only a part of a character."""
        text = self.tokenizer.token_text(token_id)
        if _UNREADABLE not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.tokenizer.token_bytes(token_id))


def _is_inside_character(raw: bytes, place: int) -> bool:
    """Whether a character of this UTF-8 begins before ``place`` and ends behind it."""
    return place < len(raw) and raw[place] & 0xC0 == 0x80


def joined(*parts: dict[str, Any]) -> dict[str, Any]:
    """One ``logprobs`` object of several that follow each other."""
    return {key: [item for part in parts for item in part[key]] for key in parts[0]}
