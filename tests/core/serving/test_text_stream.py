"""Rules of text on its way out: all of it, cut at the first stop string, and never a piece of one too early."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.serving.text import TextStream


class Pieces:
    """A decoder whose tokens are indexes into a list of texts; ``rest`` comes with the flush."""

    def __init__(self, pieces: Sequence[str], rest: str = "") -> None:
        self.pieces = pieces
        self.rest = rest

    def push(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[index] for index in ids)

    def flush(self) -> str:
        return self.rest


def first_stop(text: str, stops: Sequence[str], start: int = 0) -> tuple[int, int, str] | None:
    """(end, begin, stop) of the stop string that is complete first behind ``start``; of those, the longest."""
    ends = [(at + len(stop), at, stop) for stop in stops for at in range(len(text)) if text.startswith(stop, at)]
    return min((hit for hit in ends if hit[0] > start), default=None)


def could_begin_a_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest tail that is the beginning, and not the whole, of a stop string."""
    tails = (length for length in range(len(text), 0, -1) if any(s[:-1].startswith(text[-length:]) for s in stops))
    return next(tails, 0)


letters = st.text(alphabet="ab\u00e9", max_size=4)


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(letters, max_size=12),
    stops=st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=5), max_size=3),
    include_stop=st.booleans(),
    num_exempt=st.integers(0, 4),
    rest=letters,
)
def test_the_text_is_whole_or_cut_at_the_first_stop(
    pieces: list[str], stops: list[str], include_stop: bool, num_exempt: int, rest: str
) -> None:
    stream = TextStream(Pieces(pieces, rest), stops, include_stop)
    num_exempt = min(num_exempt, len(pieces))
    exempt_length = len("".join(pieces[:num_exempt]))
    out, known = "", ""
    for index, piece in enumerate(pieces):
        known += piece
        out += stream.push([index], may_stop=index >= num_exempt)
        hit = first_stop(known, stops, exempt_length)
        if hit is not None:
            break
        # Nothing is given out that may yet be the beginning of a stop string, and nothing else is held back.
        assert known.startswith(out)
        assert len(known) - len(out) == could_begin_a_stop(known, stops)
    else:
        known += rest
        out += stream.flush()
        hit = first_stop(known, stops, exempt_length)
    if hit is None:
        assert (out, stream.stopped_by) == (known, None)
    else:
        end, begin, stop = hit
        assert stream.stopped_by == stop
        assert out == (known[:end] if include_stop else known[:begin])
        assert stream.flush() == ""


def test_the_stop_that_is_complete_first_wins_even_if_another_begins_earlier() -> None:
    stream = TextStream(Pieces(["xabcd"]), ["abcd", "bc"], include_stop=False)
    assert stream.push([0]) == "xa"
    assert stream.stopped_by == "bc"


def test_of_stops_complete_at_once_the_longest_counts() -> None:
    stream = TextStream(Pieces(["xabc"]), ["c", "abc"], include_stop=False)
    assert (stream.push([0]), stream.stopped_by) == ("x", "abc")


def test_a_stop_over_several_tokens_is_held_back_and_then_cut_or_released() -> None:
    stream = TextStream(Pieces(["<", "/", "s", "b", ">"]), ["</s>"], include_stop=False)
    assert [stream.push([i]) for i in range(3)] == ["", "", ""]
    assert stream.push([3]) == "</sb"
    assert [stream.push([i]) for i in (0, 1, 2, 4)] == ["", "", "", ""]
    assert stream.stopped_by == "</s>"


def test_a_stop_complete_before_min_tokens_passes_and_one_that_ends_after_counts() -> None:
    stream = TextStream(Pieces(["END", "EN", "D"]), ["END"], include_stop=False)
    assert stream.push([0], may_stop=False) == "END"
    assert stream.push([1], may_stop=False) == ""
    assert stream.push([2]) == ""
    assert stream.stopped_by == "END"


def test_without_stop_strings_nothing_is_held() -> None:
    stream = TextStream(Pieces(["", "a", "bc"], "d"), (), include_stop=False)
    assert [stream.push([i]) for i in range(3)] == ["", "a", "bc"]
    assert stream.flush() == "d"


@pytest.mark.parametrize("include_stop", [True, False])
def test_several_tokens_at_once_are_cut_as_one_by_one(include_stop: bool) -> None:
    pieces = ["he", "llo wo", "rld", " again"]
    at_once = TextStream(Pieces(pieces), ["wor"], include_stop)
    one_by_one = TextStream(Pieces(pieces), ["wor"], include_stop)
    assert at_once.push([0, 1, 2, 3]) == "".join(one_by_one.push([i]) for i in range(3))
