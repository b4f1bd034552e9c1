"""Rows of data files, each with the place that it came from: JSONL, parquet, plain text."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, field_validator

from drivetrain.contracts.plugin import PluginConfig
from drivetrain.errors import ConfigError, DataError, MissingDependencyError

Row = Mapping[str, Any]
Faults = Literal["error", "skip"]
_Read = TypeVar("_Read")

_SHOWN = 3


class DataConfig(PluginConfig):
    """Options of every recipe that reads files."""

    data: tuple[str, ...] = Field((), description="files of the data: .jsonl, .parquet or .txt; one name or a list")
    length: int = Field(1024, ge=2, description="most tokens of a row of a micro-batch")
    broken: Faults = Field("error", description="a row that can't be read: error ends the run; skip leaves it out")

    @field_validator("data", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class Reader:
    """Goes through rows, and does with broken ones what the configuration says."""

    def __init__(self, config: DataConfig, note: Callable[[str], None]) -> None:
        self._config = config
        self._note = note
        self._skipped: list[DataError] = []

    def rows(self) -> Iterator[tuple[str, Row]]:
        """(place, row) over all files, in order. Raises DataError, and ConfigError where no file is named."""
        if not self._config.data:
            raise ConfigError("no data is named", where="recipe.data", hint="Give a file, such as data: chats.jsonl.")
        for name in self._config.data:
            path = Path(name).expanduser()
            yield from self._rows_of(path)

    def attempt(self, work: Callable[[], _Read]) -> _Read | None:
        """What ``work`` gives; None for a row that is broken and left out. Raises DataError where it may not be."""
        try:
            return work()
        except DataError as error:
            if self._config.broken == "error":
                error.hint = error.hint or "Mend the line, or set recipe.broken to skip."
                raise
            self.leave_out(error)
            return None

    def leave_out(self, why: DataError) -> None:
        """Count a row that is not trained on."""
        self._skipped.append(why)

    def tell(self, num_read: int) -> None:
        """Say what was left out. Raises DataError when nothing is left."""
        if self._skipped:
            shown = "; ".join(str(error) for error in self._skipped[:_SHOWN])
            more = f" and {len(self._skipped) - _SHOWN} more" if len(self._skipped) > _SHOWN else ""
            self._note(f"{len(self._skipped)} rows of data were left out: {shown}{more}")
        if num_read == 0:
            hint = f"All rows were left out; the first: {self._skipped[0]}" if self._skipped else "Check recipe.data."
            raise DataError("the data holds nothing to train on", where=", ".join(self._config.data), hint=hint)

    def _rows_of(self, path: Path) -> Iterator[tuple[str, Row]]:
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise DataError("not a kind of data file that is known", where=str(path), allowed=sorted(_READERS))
        try:
            for place, read in reader(path):
                row = self.attempt(read)
                if row is not None:
                    yield place, row
        except OSError as error:
            raise DataError(f"the data can't be read: {error.strerror or error}", where=str(path)) from error


def _jsonl(path: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"{path}:{number}"
                yield place, partial(_parsed, line, place)


def _parsed(line: bytes, place: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the line is not valid JSON: {error}", where=place) from error
    if not isinstance(row, dict):
        raise DataError("the line must hold a JSON object", where=place, found=type(row).__name__)
    return row


def _parquet(path: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise MissingDependencyError("pyarrow", needed_by=f"reading {path.name}", extra="parquet")
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", partial(dict, row)
    except pyarrow.ArrowException as error:
        raise DataError(f"the file is no sound parquet: {error}", where=str(path)) from error


def _text(path: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    """A whole file is one document."""
    yield str(path), lambda: {"text": _decoded(path)}


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"the file is not UTF-8 text: {error}", where=str(path)) from error


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Callable[[], Row]]]]] = {
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".txt": _text,
}


def text_of(row: Row, key: str, place: str) -> str:
    """A text in a row. Raises DataError."""
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise DataError(f"{key!r} must be a text that is not empty", where=place, found=value)
    check_unicode(value, place)
    return value


def check_unicode(text: str, place: str) -> None:
    """Raise DataError for half of a surrogate pair, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the text is not valid Unicode: {error.reason}", where=place) from error
