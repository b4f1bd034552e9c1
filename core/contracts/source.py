"""Contract of a source: it turns a model name into files on this machine."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Protocol, runtime_checkable

from drivetrain.contracts.plugin import Plugin, Probe, ProbeContext


class Progress(Protocol):
    """Receives the advance of long work; the command line draws it, other callers pass :func:`silent`."""

    def __call__(self, what: str, done: int, total: int | None, unit: str = "bytes") -> None:
        """``what`` has reached ``done`` of ``total`` (None: unknown) ``unit``."""


def silent(what: str, done: int, total: int | None, unit: str = "bytes") -> None:
    """A progress receiver that shows nothing."""


@runtime_checkable
class ListsNames(Protocol):
    """Ability ``names``: the source knows all the names it answers to, so that a misspelt one can be corrected."""

    @classmethod
    def known_names(cls) -> tuple[str, ...]:
        """Every name this source answers to."""


class Source(Plugin):
    """Finds and fetches models of one naming scheme."""

    kind = "source"

    @classmethod
    @abstractmethod
    def claims(cls, name: str) -> bool:
        """True when ``name`` is of this source's scheme. Reads at most the local file system; no network."""

    @abstractmethod
    def locate(self, name: str) -> Path | None:
        """The folder or file of a model that is already on this machine and complete; None when it is not. No network.

        Raises SourceError when ``name`` is malformed.
        """

    @abstractmethod
    def fetch(self, name: str, progress: Progress) -> Path:
        """The folder or file of the model, downloaded and verified if it was not here yet.

        Safe to interrupt and to run twice at once: a partial download is never taken for a whole one. Raises
        ModelNotFoundError, IntegrityError or another SourceError.
        """

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        if context.model_name is None:
            return Probe.yes("no model named yet")
        if cls.claims(context.model_name):
            return Probe.yes(f"the name {context.model_name!r} is of this scheme")
        return Probe.no("not_this_scheme", f"the name {context.model_name!r} is not of this source's scheme")
