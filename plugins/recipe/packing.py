"""Documents side by side in rows, and the rows as samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from drivetrain.contracts.recipe import IGNORED, Sample

_OPEN_ROWS = 32
"""Rows that are still looked at for a document that fits: more waste less of a row and take longer to search."""


@dataclass(frozen=True, eq=False)
class Document:
    """Token ids, and for each the token that should follow; IGNORED where nothing is to be learnt."""

    ids: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, ids: Sequence[int], counts: Sequence[bool]) -> Document:
        """counts: for each token, whether predicting it is to be learnt."""
        array = np.asarray(ids, dtype=np.int32)
        targets = np.full(len(ids), IGNORED, dtype=np.int32)
        targets[:-1] = np.where(np.asarray(counts[1:], dtype=bool), array[1:], IGNORED)
        return cls(array, targets)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        return int(np.count_nonzero(self.targets != IGNORED))


class PackedSamples:
    """Rows of documents, in two flat arrays."""

    def __init__(self, rows: Iterable[Sequence[Document]]) -> None:
        rows = list(rows)
        documents = [document for row in rows for document in row]
        self._ids = np.concatenate([document.ids for document in documents])
        self._targets = np.concatenate([document.targets for document in documents])
        self._lengths = [tuple(len(document) for document in row) for row in rows]
        self._starts = np.cumsum([0, *(sum(lengths) for lengths in self._lengths)])
        digest = hashlib.sha256(repr(self._lengths).encode())
        digest.update(self._ids.tobytes())
        digest.update(self._targets.tobytes())
        self._digest = digest.hexdigest()

    @property
    def digest(self) -> str:
        return self._digest

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> Sample:
        where = slice(self._starts[index], self._starts[index + 1])
        return Sample(self._ids[where], self._targets[where], self._lengths[index])  # type: ignore[arg-type]


def pack(documents: Iterable[Document], length: int) -> list[list[Document]]:
    """Each document into the first row with room for it, of the last few; none is cut. Each has at most ``length``."""
    rows: list[list[Document]] = []
    open_rows: list[tuple[list[Document], int]] = []
    for document in documents:
        place = next((i for i, (_, room) in enumerate(open_rows) if room >= len(document)), None)
        if place is None:
            rows.append([document])
            open_rows.append((rows[-1], length - len(document)))
            if len(open_rows) > _OPEN_ROWS:
                # The fullest is the least likely to take another.
                del open_rows[min(range(len(open_rows)), key=lambda index: open_rows[index][1])]
        else:
            row, room = open_rows[place]
            row.append(document)
            open_rows[place] = (row, room - len(document))
    return rows
