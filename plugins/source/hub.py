"""Models on the Hugging Face hub, fetched and cached by the ``huggingface_hub`` library.

The library's own settings hold: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT.
"""

from __future__ import annotations

import errno
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drivetrain.contracts.source import Progress, Source
from drivetrain.errors import DrivetrainError, MissingDependencyError, ModelNotFoundError, SourceError
from drivetrain.plugins.source.local import is_local

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[^\s@]+?))?(?:/(?P<file>[^\s@]+\.gguf))?")
_SMALL_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_SMALL_SKIPPED = ("README.txt", "LICENSE.txt")


@dataclass(frozen=True)
class HubName:
    """A parsed model name. ``file`` is set when one GGUF file of the repository is meant."""

    repo: str
    revision: str | None
    file: str | None

    @classmethod
    def parse(cls, name: str) -> HubName | None:
        match = _NAME.fullmatch(name)
        return cls(match["repo"], match["revision"], match["file"]) if match else None


class HubSource(Source):
    """``org/name`` on the Hugging Face hub, with ``@revision`` or ``/file.gguf`` behind it if wanted."""

    @classmethod
    def claims(cls, name: str) -> bool:
        return HubName.parse(name) is not None and not is_local(name)

    def locate(self, name: str) -> Path | None:
        """The cached snapshot (or file) when everything a loader needs is there; None otherwise."""
        hub = _parsed(name)
        library = _library()
        if hub.file is not None:
            cached = library.try_to_load_from_cache(hub.repo, hub.file, revision=hub.revision)
            return Path(cached) if isinstance(cached, str) else None
        cached = library.try_to_load_from_cache(hub.repo, "config.json", revision=hub.revision)
        if isinstance(cached, str) and _is_complete(Path(cached).parent):
            return Path(cached).parent
        return self._single_cached_gguf(hub)

    def fetch(self, name: str, progress: Progress) -> Path:
        found = self.locate(name)
        if found is not None:
            return found
        hub = _parsed(name)
        library = _library()
        with _mapped_errors(name, hub):
            bar = _progress_bar(progress)
            info = library.HfApi().model_info(hub.repo, revision=hub.revision)
            files = [sibling.rfilename for sibling in info.siblings or []]
            if hub.file is not None and hub.file not in files:
                raise _no_file_error(name, hub)
            small, weights = _wanted_files(name, files) if hub.file is None else ([], [hub.file])
            if weights[0].endswith(".gguf"):
                return Path(library.hf_hub_download(hub.repo, weights[0], revision=hub.revision, tqdm_class=bar))
            # Weights last: a snapshot that holds all its weights then holds its small files too, so that an
            # interrupted download is never taken for a whole one.
            for wanted in (small, weights):
                folder = library.snapshot_download(
                    hub.repo, revision=hub.revision, allow_patterns=wanted, tqdm_class=bar
                )
        return Path(folder)

    def _single_cached_gguf(self, hub: HubName) -> Path | None:
        """The one GGUF file that an earlier fetch of a repository without safetensors left in the cache."""
        library = _library()
        from huggingface_hub.constants import HF_HUB_CACHE

        repository = Path(HF_HUB_CACHE) / library.file_download.repo_folder_name(repo_id=hub.repo, repo_type="model")
        reference = repository / "refs" / (hub.revision or "main")
        commit = reference.read_text().strip() if reference.is_file() else hub.revision
        snapshot = repository / "snapshots" / commit if commit else None
        if snapshot is None or not snapshot.is_dir() or any(snapshot.glob("*.safetensors")):
            return None
        files = sorted(snapshot.glob("*.gguf"))
        return files[0] if len(files) == 1 else None


def _parsed(name: str) -> HubName:
    hub = HubName.parse(name)
    if hub is None:
        raise SourceError(
            "this is no name of the hub",
            where=name,
            allowed="org/name, org/name@revision, org/name/file.gguf",
        )
    return hub


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError("huggingface-hub", needed_by="a model name of the form org/name") from error
    return huggingface_hub


def _wanted_files(name: str, files: list[str]) -> tuple[list[str], list[str]]:
    """Of a repository's files: the small ones a loader reads, and the weights (safetensors, else one GGUF file)."""
    small = [f for f in files if "/" not in f and f.endswith(_SMALL_SUFFIXES) and f not in _SMALL_SKIPPED]
    weights = [f for f in files if re.fullmatch(r"model[^/]*\.safetensors", f)]
    if weights:
        return small, weights
    ggufs = [f for f in files if f.endswith(".gguf")]
    if len(ggufs) == 1:
        return small, ggufs
    if ggufs:
        raise SourceError(
            f"the repository holds {len(ggufs)} GGUF files",
            where=name,
            hint="Name one: " + ", ".join(f"{name.split('@')[0]}/{file}" for file in ggufs[:6]),
        )
    raise SourceError(
        "the repository holds neither model.safetensors nor a GGUF file",
        where=name,
        found=", ".join(files[:10]),
        hint="Weights in pickle files (.bin, .pt) are not read; look for a safetensors conversion of this model",
    )


def _is_complete(folder: Path) -> bool:
    """Whether a snapshot holds configuration, tokenizer and every weight file that its index names."""
    if not (folder / "config.json").is_file() or not (folder / "tokenizer.json").is_file():
        return False
    if (folder / "model.safetensors").is_file():
        return True
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return False
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        return False
    return bool(shards) and all((folder / shard).is_file() for shard in shards)


def _progress_bar(progress: Progress) -> Any:
    """A tqdm class that reports to ``progress`` and draws nothing itself."""
    from huggingface_hub.utils import tqdm

    class ReportingBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Off a terminal the library disables its bars; this one draws nothing but must count.
            kwargs |= {"file": io.StringIO(), "disable": False}
            super().__init__(*args, **kwargs)

        def display(self, *args: Any, **kwargs: Any) -> None:
            return None

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if self.disable:
                return shown
            unit = "bytes" if self.unit == "B" else "files"
            progress(
                (self.desc or "downloading").rstrip(": "), int(self.n), int(self.total) if self.total else None, unit
            )
            return shown

    return ReportingBar


@contextmanager
def _mapped_errors(name: str, hub: HubName) -> Iterator[None]:
    """Turn the library's exceptions into ours, each with a next step."""
    from huggingface_hub import errors

    # The base of the errors of whichever HTTP client the library is built on; that client changed over its versions.
    client_error: type[BaseException] = errors.HfHubHTTPError.__mro__[1]
    try:
        yield
    except DrivetrainError:
        raise
    except errors.GatedRepoError as error:
        raise SourceError(
            "this model is gated: its licence must be accepted before it can be downloaded",
            where=name,
            hint=f"Accept it at https://huggingface.co/{hub.repo}, then set HF_TOKEN or run: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(
            f"the repository has no revision {hub.revision!r}",
            where=name,
            hint=f"See https://huggingface.co/{hub.repo}/tree/main for its branches and tags",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            "the hub has no such model, or it is private",
            where=name,
            hint="Check the spelling; for a private model set HF_TOKEN; a local folder is written ./folder",
        ) from error
    except errors.HfHubHTTPError as error:
        raise _http_error(name, hub, error) from error
    except errors.OfflineModeIsEnabled as error:
        raise _offline_error(name) from error
    except errors.LocalEntryNotFoundError as error:
        raise (_offline_error(name) if _is_offline() else _network_error(name, error)) from error
    except errors.EntryNotFoundError as error:
        raise _no_file_error(name, hub) from error
    except errors.HFValidationError as error:
        raise SourceError(str(error), where=name, allowed="org/name") from error
    except client_error as error:
        raise _network_error(name, error) from error
    except OSError as error:
        if error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise SourceError(
                f"the download can't be written: {error.strerror or error}",
                where=str(error.filename or name),
                hint="Free space or permissions there, or point HF_HOME at another folder",
            ) from error
        raise _network_error(name, error) from error


def _http_error(name: str, hub: HubName, error: Any) -> SourceError:
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return SourceError(
            f"the hub refuses access (HTTP {status})",
            where=name,
            hint=f"Set HF_TOKEN to a token that may read https://huggingface.co/{hub.repo}",
        )
    if status == 404:
        return _no_file_error(name, hub)
    return SourceError(f"the hub answered with HTTP {status}", where=name, hint="Try again in a while")


def _no_file_error(name: str, hub: HubName) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"the repository has no file {hub.file!r}" if hub.file else "the repository lacks a file that it lists",
        where=name,
        hint=f"See https://huggingface.co/{hub.repo}/tree/main; a local file is written ./{hub.file or 'folder'}",
    )


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _offline_error(name: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        "this model is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it",
        where=name,
        hint=f"Unset HF_HUB_OFFLINE, or run `drivetrain pull {name}` where there is a network",
    )


def _network_error(name: str, error: BaseException) -> SourceError:
    return SourceError(
        f"the hub can't be reached: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(
            ": "
        ),
        where=name,
        hint="Check the network and proxy settings; HF_ENDPOINT selects a mirror",
    )
