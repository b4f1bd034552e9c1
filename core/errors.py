"""The tree of errors: every one says what went wrong, where, what was found, what is allowed, and the next move.

Foreign exceptions are mapped to one of these at the edge where they arise, with the original as ``__cause__``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def nearest(found: str, allowed: Iterable[str]) -> str | None:
    """The spelling in ``allowed`` that is closest to ``found``, or None when nothing is close."""
    matches = difflib.get_close_matches(found, list(allowed), n=1, cutoff=0.6)
    return matches[0] if matches else None


def first_fault(faults: Sequence[Mapping[str, Any]], value: Any) -> tuple[Mapping[str, Any], tuple[str, ...], str]:
    """The first of pydantic's ``faults`` with ``value``, its path as it was written, and what is wrong.

    pydantic's own paths have the members of unions in them. Of the members that failed, the one that got deepest into
    the value is the one that was meant; those that failed at the same place are told together.
    """
    paths = [_written_path(fault, value) for fault in faults]
    related = [at for at, path in enumerate(paths) if path[: len(paths[0])] == paths[0]]
    deepest = max(related, key=lambda at: len(paths[at]))
    wanted = [str(faults[at]["msg"]).removeprefix("Value error, ") for at in related if paths[at] == paths[deepest]]
    others = (text.removeprefix("Input should be ") for text in wanted[1:])
    return faults[deepest], paths[deepest], " or ".join(dict.fromkeys((wanted[0], *others)))


def _written_path(fault: Mapping[str, Any], value: Any) -> tuple[str, ...]:
    path: list[str] = []
    for part in fault["loc"]:
        is_key = isinstance(value, Mapping) and part in value
        if is_key or (isinstance(value, list | tuple) and part in range(len(value))):
            path.append(str(part))
            value = value[part]
    if fault["type"] == "missing" and fault["loc"]:
        path.append(str(fault["loc"][-1]))
    return tuple(path)


class DrivetrainError(Exception):
    """Base of all errors a user can meet.

    what:    the sentence that names the problem.
    where:   file, dotted path, plugin or request that it is about.
    found:   the value that was found.
    allowed: what would have been accepted.
    hint:    the next move, as an instruction or a command.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        found: object = None,
        allowed: Iterable[object] | str | None = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.found = found
        self.allowed = allowed if isinstance(allowed, str) or allowed is None else ", ".join(str(a) for a in allowed)
        self.hint = hint
        super().__init__(what)

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process borders; their constructors take keywords that the default way of pickling leaves out.
        return _rebuild, (type(self), self.args, self.__dict__)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.found is not None:
            text += f"; found {self.found!r}"
        if self.allowed:
            text += f"; allowed: {self.allowed}"
        if self.hint:
            text = text.rstrip(".") + f". {self.hint}"
        return text


def _rebuild(cls: type[DrivetrainError], args: tuple[object, ...], state: dict[str, Any]) -> DrivetrainError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


# --- configuration -------------------------------------------------------------------------------------------------


class ConfigError(DrivetrainError):
    """A setting is unknown, has the wrong type, or conflicts with another."""


# --- plugins -------------------------------------------------------------------------------------------------------


class PluginError(DrivetrainError):
    """Something about a plugin: base of the errors below."""


class UnknownPluginError(PluginError):
    """No installed distribution registers this name for this kind."""


class AmbiguousPluginError(PluginError):
    """Two distributions claim the same short name; the qualified form ``dist/name`` decides."""


class PluginLoadError(PluginError):
    """The plugin's module failed to import, or its target is no plugin of the kind it is registered for."""


class ContractError(PluginLoadError):
    """The target was imported, but it does not fulfil its kind's contract: wrong base, version, method or signature."""


class PluginRefusedError(PluginError):
    """A plugin that was asked for by name answered its probe with "no, because"."""


class NoCandidateError(PluginError):
    """``auto`` found no plugin of a kind whose probe says yes."""


class MissingDependencyError(DrivetrainError):
    """A feature needs a package that is not installed; the hint is the install line."""

    def __init__(self, package: str, *, needed_by: str, extra: str | None = None) -> None:
        install = f'pip install "drivetrain[{extra}]"' if extra else f"pip install {package}"
        super().__init__(f"{needed_by} needs the package {package!r}, which is not installed", hint=f"Run: {install}")
        self.package = package


# --- platforms ------------------------------------------------------------------------------------------------------


class PlatformError(DrivetrainError):
    """A device can't be described or opened: its driver is missing or does not answer."""


# --- kernels -------------------------------------------------------------------------------------------------------


class KernelBuildError(DrivetrainError):
    """An implementation of an operation could not be made: no compiler, a source that does not compile, no place.

    command: the compiler's command line, when one was run.
    output:  all that it said.
    """

    def __init__(self, what: str, *, command: Iterable[str] = (), output: str = "", **parts: Any) -> None:
        super().__init__(what, **parts)
        self.command = tuple(command)
        self.output = output


class FusionError(DrivetrainError):
    """A module could not be fused, or what it computes was no longer the same; the module is as it was before."""


# --- models, sources and loaders -----------------------------------------------------------------------------------


class SourceError(DrivetrainError):
    """A model name could not be turned into files on this machine."""


class ModelNotFoundError(SourceError):
    """Nothing answers to this model name."""


class IntegrityError(SourceError):
    """Downloaded bytes differ from what their index promised (hash or size)."""


class LoaderError(DrivetrainError):
    """Weight files are unreadable, cut short or contradict their own index."""


class MissingTensorError(LoaderError):
    """The model needs a tensor that the files do not hold."""


class UnknownArchitectureError(DrivetrainError):
    """No model plugin knows the architecture named by the files."""


class CalibrationError(DrivetrainError):
    """A model can't be calibrated: what goes through it is no number, or a run does not go on from where it was."""


# --- training ------------------------------------------------------------------------------------------------------


class TrainingError(DrivetrainError):
    """A training run can't begin or go on."""


class DataError(TrainingError):
    """Data can't be read, or is not what the recipe trains on; the message names file and line."""


class NonFiniteError(TrainingError):
    """A loss or gradient is not finite; the message names the first module that it came from."""


class RankLostError(TrainingError):
    """Another rank is gone, or has kept this one waiting for too long. Going on from a saved state may help."""


class TrackerError(TrainingError):
    """The figures of a run can't be written."""


# --- saved training state ------------------------------------------------------------------------------------------


class StoreError(DrivetrainError):
    """Training state can't be saved, found or loaded."""


class StateNotFoundError(StoreError):
    """There is no complete state of this step."""


class DamagedStateError(StoreError):
    """What is on the disk is not what was saved; the message names the file."""


# --- requests ------------------------------------------------------------------------------------------------------


class RequestError(DrivetrainError):
    """A request can't be served; ``status`` is the HTTP status a frontend answers with."""

    status = 400
    type = "invalid_request_error"
    code: str | None = None

    def __init__(self, what: str, *, param: str | None = None, **parts: object) -> None:
        super().__init__(what, **parts)  # type: ignore[arg-type]
        self.param = param


class InvalidRequestError(RequestError):
    """A parameter or the prompt is malformed."""


class PromptTooLongError(RequestError):
    """Prompt plus wanted output exceed what the model or the KV cache can hold."""

    code = "context_length_exceeded"


class UnknownModelError(RequestError):
    """The request names a model that this server does not serve."""

    status = 404
    code = "model_not_found"


class QueueFullError(RequestError):
    """The waiting queue is at its bound; the client may try again."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class DrainingError(RequestError):
    """The server finishes what it has and takes nothing new."""

    status = 503
    type = "server_error"
    code = "draining"


class RequestTimeoutError(RequestError):
    """The request did not finish inside its time limit; what it held was freed."""

    status = 408
    type = "timeout_error"
    code = "timeout"


class RequestFailedError(RequestError):
    """The engine hit an error while it worked on this request."""

    status = 500
    type = "server_error"
    code = "engine_error"


# --- engine --------------------------------------------------------------------------------------------------------


class EngineError(DrivetrainError):
    """The serving loop can't go on."""


class GraphCaptureError(EngineError):
    """A decode step could not be recorded for replay."""


class IllegalTransitionError(EngineError):
    """A request was moved between two states that no edge joins. Always a bug."""


class BlockAccountingError(EngineError):
    """free + used == total does not hold, or a block was freed twice. Always a bug."""


class SwapError(EngineError):
    """Parts of a running engine could not be exchanged; nothing has changed."""


class MemoryBudgetError(EngineError):
    """The memory left after the weights does not hold what a step takes and the smallest useful KV cache."""
