"""Text as token ids, cut into windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from drivetrain.serving.tokenizer import Tokenizer

_CHARACTERS_PER_TOKEN = 32
"""More than a token of running text ever has on average: what is read of a file for a wanted number of tokens."""

_LEAST_CHARACTERS = 2**16


@dataclass(frozen=True)
class TextWindows:
    """Pieces of a text that a model sees one by one, each from its own beginning.

    opening: what the tokenizer puts before a text, such as a start token; it stands before every window, unscored.
    ids:     the text's tokens.
    context: tokens of a window, its opening included; the last window may be shorter.
    """

    opening: tuple[int, ...]
    ids: tuple[int, ...]
    context: int

    @property
    def windows(self) -> list[list[int]]:
        """Token ids of each window, opening included. A last window without anything to predict is left out."""
        size = self.context - len(self.opening)
        cut = [self.ids[start : start + size] for start in range(0, len(self.ids), size)]
        return [[*self.opening, *ids] for ids in cut if len(self.opening) + len(ids) > 1]

    @property
    def num_tokens(self) -> int:
        """Tokens that a model reads."""
        return sum(len(window) for window in self.windows)

    def scored_rows(self, window: Sequence[int], most: int) -> Iterator[tuple[slice, list[int]]]:
        """Rows of a window whose next token is to be predicted, ``most`` at a time, and those tokens."""
        last = len(window) - 1
        for start in range(max(1, len(self.opening)) - 1, last, most):
            rows = slice(start, min(start + most, last))
            yield rows, list(window[rows.start + 1 : rows.stop + 1])

    @property
    def num_scored(self) -> int:
        """Tokens that are predicted from those before them in their window."""
        first = max(1, len(self.opening))
        return sum(len(window) - first for window in self.windows)


def opening_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the tokenizer puts before a text."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    framed = tokenizer.encode("a")
    starts = (start for start in range(len(framed)) if framed[start : start + len(plain)] == plain)
    return tuple(framed[: next(starts, 0)])


def read_tokens(
    path: Path, tokenizer: Tokenizer, num_tokens: int | None, *, default: int, option: str, most: int | None = None
) -> list[int]:
    """The first tokens of a text file, without what the tokenizer puts around a text.

    num_tokens: how many there must be; None takes ``default``, or all that there are if they are fewer.
    option:     what the number is called where it can be set.
    most:       more tokens to give, where there are as many.
    Raises ConfigError for a file that can't be read, is empty or too short.
    """
    wanted = num_tokens or default
    text = _read_text(path, max(_LEAST_CHARACTERS, (most or wanted) * _CHARACTERS_PER_TOKEN))
    ids = tokenizer.encode(text, add_special_tokens=False) if text.strip() else []
    if len(ids) < 2:
        raise ConfigError(
            "the text is empty" if not ids else "the text is too short: there is nothing to predict",
            where=str(path),
            found=f"{len(ids)} tokens",
            allowed=f"2 tokens or more; {wanted} are wanted",
        )
    if num_tokens is not None and len(ids) < num_tokens:
        raise ConfigError(
            "the text is too short",
            where=str(path),
            found=f"{len(ids)} tokens",
            allowed=f"{num_tokens} tokens or more",
            hint=f"Give a longer text, or {option} {len(ids)}.",
        )
    return ids[: most or wanted]


def _read_text(path: Path, num_characters: int) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(num_characters)
    except OSError as error:
        raise ConfigError(f"can't read the text: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            "the file is not UTF-8 text", where=str(path), found=f"byte {error.object[error.start]:#04x}"
        ) from error
