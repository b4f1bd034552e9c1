"""From tokens to text as a stream: whole characters only, and nothing that may yet turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class IncrementalDecoder(Protocol):
    """Turns tokens into text piece by piece; see ``drivetrain.serving.tokenizer.Detokenizer``."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that ``ids`` complete."""

    def flush(self) -> str:
        """Whatever whole characters are left."""


class NoText:
    """A decoder for sequences whose text nobody reads."""

    def push(self, ids: Sequence[int]) -> str:
        return ""

    def flush(self) -> str:
        return ""


class TextStream:
    """A sequence's text on its way out.

    After :meth:`push` or :meth:`flush`, ``stopped_by`` names the stop string that appeared, if one did; the text given
    out so far and by that call ends right before it (after it with ``include_stop``). Of several, the one that is
    complete first counts, and of those the longest.
    """

    def __init__(self, decoder: IncrementalDecoder, stop: Sequence[str], include_stop: bool) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""
        self._num_exempt = 0
        self._longest = max((len(text) for text in self._stop), default=0)
        self.stopped_by: str | None = None

    def push(self, ids: Sequence[int], *, may_stop: bool = True) -> str:
        """Text that is certain now. Stop strings that are complete while ``may_stop`` is false (min_tokens) pass as
        plain text; one that only begins there still counts."""
        if not self._stop:
            return self._decoder.push(ids)
        self._held += self._decoder.push(ids)
        if not may_stop:
            self._num_exempt = len(self._held)
        return self._certain(len(self._held) - self._length_in_doubt())

    def flush(self) -> str:
        """The rest, once no more tokens come."""
        if self.stopped_by is not None:
            return ""
        self._held += self._decoder.flush()
        return self._certain(len(self._held))

    def _certain(self, length: int) -> str:
        """What ends at a stop string if there is one, and the first ``length`` characters otherwise."""
        hit = self._first_stop()
        if hit is not None:
            at, self.stopped_by = hit
            length = at + len(self.stopped_by) if self._include_stop else at
        out = self._held[:length]
        self._held = "" if hit is not None else self._held[length:]
        self._num_exempt = max(0, self._num_exempt - length)
        return out

    def _first_stop(self) -> tuple[int, str] | None:
        """Where the stop string that is complete first begins, and which it is."""
        hits = [(self._held.find(text, max(0, self._num_exempt - len(text) + 1)), text) for text in self._stop]
        return min(
            ((at, text) for at, text in hits if at >= 0), key=lambda hit: (hit[0] + len(hit[1]), hit[0]), default=None
        )

    def _length_in_doubt(self) -> int:
        """Length of the longest tail that is the beginning of some stop string, but not all of it."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(len(tail) < len(text) and text.startswith(tail) for text in self._stop):
                return length
        return 0
