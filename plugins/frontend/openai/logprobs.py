"""Log-probabilities in the two shapes of the API."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    """Builds the ``logprobs`` of one choice of a completion, piece by piece; keeps the offset in its text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.offset = 0

    def prompt(self, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        """Of the prompt, with null where nothing came before."""
        return self._render(zip(token_ids, entries, strict=True))

    def output(self, entries: Iterable[TokenLogprob]) -> dict[str, Any]:
        """Of new tokens."""
        return self._render((entry.token_id, entry) for entry in entries)

    def _render(self, pairs: Iterable[tuple[int, TokenLogprob | None]]) -> dict[str, Any]:
        rendered: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, entry in pairs:
            label = self._label(token_id)
            rendered["tokens"].append(label)
            rendered["text_offset"].append(self.offset)
            rendered["token_logprobs"].append(None if entry is None else max(entry.logprob, LOWEST_LOGPROB))
            rendered["top_logprobs"].append(None if entry is None else self._top(entry))
            self.offset += len(self.tokenizer.token_text(token_id))
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


def joined(*parts: dict[str, Any]) -> dict[str, Any]:
    """One ``logprobs`` object of several that follow each other."""
    return {key: [item for part in parts for item in part[key]] for key in parts[0]}
