"""What every source has to do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest

from drivetrain.contracts.plugin import ProbeContext
from drivetrain.contracts.source import ListsNames, Source, silent
from drivetrain.errors import SourceError
from drivetrain.testing.suite import Suite

_FOREIGN = ("", " ", "\n", "surely-no-such-scheme-4711:thing", "surely no model has such a name", "surely\x00not")
_AWAY = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.posix_spawn", "os.fork", "os.system")


class _Ears:
    """Hears what this process does beyond itself. An audit hook stays for good, so there is one for all tests."""

    heard: ClassVar[list[str] | None] = None
    _is_hooked: ClassVar[bool] = False

    @classmethod
    def hook(cls) -> None:
        if not cls._is_hooked:
            cls._is_hooked = True
            sys.addaudithook(cls._hear)

    @classmethod
    def _hear(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if cls.heard is not None and event in _AWAY:
            cls.heard.append(f"{event} {arguments}")


@contextmanager
def expect_local_work(what: str) -> Iterator[None]:
    """Fail the test if anything inside opens a connection or starts a process."""
    _Ears.hook()
    heard: list[str] = []
    _Ears.heard = heard
    try:
        yield
    finally:
        _Ears.heard = None
    assert not heard, f"{what} reaches beyond this process: {heard[0]}"


class SourceSuite(Suite):
    """Names that are claimed or not, files that are there or not, and a fetch that can be repeated.

    example:      a name that can be fetched; None leaves out what needs one. See also :meth:`make_example`.
    may_download: whether the example may be downloaded when it is not on this machine.
    foreign:      names of other schemes that the source must not claim.
    malformed:    names that look like this scheme and are not well formed.
    absent:       a well-formed name of a model that is not on this machine.
    """

    kind = "source"
    example: ClassVar[str | None] = None
    may_download: ClassVar[bool] = False
    foreign: ClassVar[tuple[str, ...]] = ()
    malformed: ClassVar[tuple[str, ...]] = ()
    absent: ClassVar[str | None] = None

    @classmethod
    def make_example(cls, folder: Path) -> str | None:
        """The name of a model that can be fetched; may write what it needs into ``folder``."""
        return cls.example

    @pytest.fixture
    def name(self, tmp_path: Path) -> str:
        name = self.make_example(tmp_path)
        if name is None:
            pytest.skip("not claimed: the suite was given no example to fetch")
        return name

    @classmethod
    def source_class(cls) -> type[Source]:
        return cast(type[Source], cls.plugin_class())

    def fetch(self, source: Source, name: str) -> Path:
        if source.locate(name) is None and not self.may_download:
            pytest.skip("not claimed: the example is not on this machine, and may_download is not set")
        return source.fetch(name, silent)

    # --- names -------------------------------------------------------------------------------------------------------

    def test_claims_no_foreign_name(self) -> None:
        """Names of other schemes are left to other sources."""
        taken = [name for name in (*_FOREIGN, *self.foreign) if self.source_class().claims(name)]
        assert not taken, f"claims {taken!r}"

    def test_claims_its_example(self, name: str) -> None:
        """A name that it can fetch is claimed."""
        assert self.source_class().claims(name)

    def test_claiming_is_pure(self, name: str) -> None:
        """Claiming answers the same twice and reaches neither network nor other processes."""
        with expect_local_work("claims"):
            assert self.source_class().claims(name) == self.source_class().claims(name)

    def test_probe_agrees_with_claims(self) -> None:
        """The probe says yes to the names that are claimed, and refuses the others with a reason."""
        names = [*_FOREIGN[3:5], *self.foreign, *([self.example] if self.example else [])]
        for name in names:
            probe = self.source_class().probe(ProbeContext(model_name=name))
            assert probe.ok == self.source_class().claims(name), name
            assert probe.reason

    def test_known_names_are_claimed(self) -> None:
        """A source that lists its names claims every one of them, each once."""
        plugin = self.source_class()
        if not issubclass(plugin, ListsNames):
            pytest.skip("not claimed: a list of names")
        names = plugin.known_names()
        assert len(set(names)) == len(names)
        assert [name for name in names if not plugin.claims(name)] == []

    def test_a_malformed_name_is_an_error(self) -> None:
        """A name that is not well formed raises SourceError that names it, before anything is fetched."""
        if not self.malformed:
            pytest.skip("not claimed: the suite was given no malformed name")
        source = self.make()
        for name in self.malformed:
            with expect_local_work("locate"), pytest.raises(SourceError) as raised:
                source.locate(name)
            assert name in str(raised.value), f"the error does not name {name!r}: {raised.value}"

    # --- files -------------------------------------------------------------------------------------------------------

    def test_locate_never_fetches(self, name: str) -> None:
        """Locating looks on this machine only, and answers with a path that exists, or with None."""
        with expect_local_work("locate"):
            found = self.make().locate(name)
        assert found is None or (isinstance(found, Path) and found.exists())

    def test_an_absent_model_is_not_located(self) -> None:
        """A model that is not on this machine is None or ModelNotFoundError, never a path."""
        if self.absent is None:
            pytest.skip("not claimed: the suite was given no absent name")
        with expect_local_work("locate"):
            try:
                found = self.make().locate(self.absent)
            except SourceError:
                found = None
        assert found is None, f"located {found}"

    def test_a_fetched_model_is_located(self, name: str) -> None:
        """What fetch returns exists, and is what locate finds afterwards."""
        source = self.make()
        path = self.fetch(source, name)
        assert isinstance(path, Path)
        assert path.exists()
        assert source.locate(name) == path

    def test_fetching_again_downloads_nothing(self, name: str) -> None:
        """A second fetch gives the same path and reaches no network."""
        source = self.make()
        path = self.fetch(source, name)
        with expect_local_work("a second fetch"):
            assert self.make().fetch(name, silent) == path

    def test_fetching_twice_at_once_is_safe(self, name: str) -> None:
        """Two fetches at the same time give the same whole model."""
        self.fetch(self.make(), name)
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(lambda _: self.make().fetch(name, silent), range(2))
        assert first == second

    def test_progress_makes_sense(self, name: str) -> None:
        """Progress is told with names, and never beyond its total."""
        told: list[tuple[str, int, int | None]] = []
        source = self.make()
        self.fetch(source, name)
        source.fetch(name, lambda what, done, total, unit="bytes": told.append((what, done, total)))
        for what, done, total in told:
            assert what
            assert done >= 0
            assert total is None or done <= total
