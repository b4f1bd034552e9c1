"""Sources with one fault each, and the test of the kit that must catch it."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

from drivetrain.contracts.plugin import Plugin, Probe, ProbeContext
from drivetrain.contracts.source import Progress, Source
from drivetrain.errors import ModelNotFoundError, SourceError
from drivetrain.testing.suites.source import SourceSuite

SCHEME = "shelf:"


class Shelf(Source):
    """Models in one folder of this machine, named ``shelf:PATH``. Without fault."""

    @classmethod
    def claims(cls, name: str) -> bool:
        return name.startswith(SCHEME)

    def locate(self, name: str) -> Path | None:
        path = Path(name.removeprefix(SCHEME))
        if not path.is_absolute():
            raise SourceError("a shelf's path must be absolute", where=name)
        return path if path.exists() else None

    def fetch(self, name: str, progress: Progress) -> Path:
        path = self.locate(name)
        if path is None:
            raise ModelNotFoundError("nothing lies there", where=name)
        progress(name, 1, 1)
        return path


class ZooSourceSuite(SourceSuite):
    """The suite as the author of these sources would set it up."""

    malformed = ("shelf:not/absolute",)
    absent = "shelf:/surely/no/such/model"

    @classmethod
    def make_example(cls, folder: Path) -> str:
        (folder / "model.gguf").write_bytes(b"GGUF")
        return f"{SCHEME}{folder / 'model.gguf'}"


SUITE = "zoo.zoo_source:ZooSourceSuite"
"""What these are put through in place of the kind's own suite."""


class ClaimsEverything(Shelf):
    """Takes names of other schemes for its own."""

    @classmethod
    def claims(cls, name: str) -> bool:
        return ":" in name


class AsksTheNetworkToLocate(Shelf):
    """Looks a host up whenever it is asked what is on this machine."""

    def locate(self, name: str) -> Path | None:
        try:
            socket.getaddrinfo("127.0.0.1", 9)
        except OSError as error:
            raise SourceError(f"no network: {error}", where=name) from error
        return super().locate(name)


class LocatesWhatIsNotThere(Shelf):
    """Answers with where a model would be, whether it is there or not."""

    def locate(self, name: str) -> Path | None:
        super().locate(name)
        return Path(name.removeprefix(SCHEME))


class RaisesForeignErrors(Shelf):
    """Lets the errors of what it is built on through."""

    def locate(self, name: str) -> Path | None:
        if not Path(name.removeprefix(SCHEME)).is_absolute():
            raise ValueError(f"{name} is not absolute")
        return super().locate(name)


class FetchesAnew(Shelf):
    """Makes a new copy on every fetch."""

    def fetch(self, name: str, progress: Progress) -> Path:
        return Path(tempfile.mkdtemp())


class SetsTheEnvironment(Shelf):
    """Configures another library through the environment when it is probed."""

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        os.environ["SHELF_HOME"] = "/shelf"
        return super().probe(context)


ZOO: dict[type[Plugin], str] = {
    ClaimsEverything: "test_claims_no_foreign_name",
    AsksTheNetworkToLocate: "test_locate_never_fetches",
    LocatesWhatIsNotThere: "test_an_absent_model_is_not_located",
    RaisesForeignErrors: "test_a_malformed_name_is_an_error",
    FetchesAnew: "test_fetching_again_downloads_nothing",
    SetsTheEnvironment: "test_import_and_probe_leave_the_environment",
}
"""Faulty source -> the test that must fail for it."""
