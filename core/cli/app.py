"""The command tree, and what happens to an error that leaves a command."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import traceback
from typing import Any

import typer

from drivetrain import __version__
from drivetrain.cli.console import note
from drivetrain.errors import ConfigError, DrivetrainError, RequestError
from drivetrain.registry.differences import DifferencesError

HELP = """Train and serve large models from one set of swappable parts.

Start with: drivetrain demo
"""


_COMMANDS = {
    "explain": "explain:explain",
    "doctor": "explain:doctor",
    "plugins": "plugins:app",
    "pull": "generate:pull",
    "generate": "generate:generate",
    "chat": "generate:chat",
    "serve": "serve:serve",
    "swap": "swap:swap",
    "quantize": "quantize:quantize",
    "eval": "evaluate:app",
    "train": "train:train",
    "plan": "plan:plan",
    "rendezvous": "rendezvous:rendezvous",
    "state": "state:app",
    "plot": "plot:plot",
    "config": "config_import:app",
    "bench": "bench:app",
    "demo": "demo:demo",
}
"""Command -> module in this package and what it defines there, in the order of ``--help``."""

_INTERRUPTED = 130
"""What a shell makes of a process that SIGINT ended."""

_ClickException: type = typer.BadParameter.__mro__[2]
"""The base of usage errors, taken from typer itself: by version it comes from click or from a copy inside typer."""


def build(wanted: str | None = None) -> typer.Typer:
    """The application. Only the ``wanted`` command's module is imported; without one of ours, all of them are."""
    app = typer.Typer(
        name="drivetrain",
        help=HELP,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )

    @app.callback()
    def root(
        version: bool = typer.Option(False, "--version", help="Print the version and exit.", callback=_print_version),
        debug: bool = typer.Option(
            False, "--debug", help="Print a traceback with an error. Works after a command too."
        ),
    ) -> None:
        """Options of every command."""

    for name in [wanted] if wanted in _COMMANDS else list(_COMMANDS):
        module, _, attribute = _COMMANDS[name].partition(":")
        command = getattr(importlib.import_module(f"drivetrain.cli.{module}"), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    if wanted not in _COMMANDS:
        from drivetrain.observers import Observers

        Observers().notify("add_commands", app=app)
    return app


def _print_version(value: bool) -> None:
    if value:
        print(f"drivetrain {__version__}")
        raise typer.Exit


def run(argv: list[str]) -> int:
    """Run one command line and turn every exception into one clear line and an exit status."""
    _let_any_text_through()
    debug, arguments = _take_debug(argv)
    logging.basicConfig(level=logging.INFO if debug else logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        command = typer.main.get_command(build(wanted))
        _keep_examples_whole(command)
        result = command(arguments, prog_name="drivetrain", standalone_mode=False)
        sys.stdout.flush()  # here, where a reader that has gone is understood, and not while the interpreter ends
        if result == _INTERRUPTED:  # some versions of typer turn Ctrl-C into this status themselves
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        note("interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return 1
    except DrivetrainError as error:
        if isinstance(error, DifferencesError):
            note(error.table)
        _show(_with_next_step(error, wanted), error, debug)
        return 1
    except Exception as error:
        if isinstance(error, _ClickException):
            return _show_usage(error, debug)
        if _is_interrupt(error):
            note("interrupted")
            return _INTERRUPTED
        what = f"unexpected {type(error).__name__}: {error}".rstrip(": ")
        _show(f"{what}. This is a fault in Drivetrain or in a plugin: run it again with --debug", error, debug)
        return 1


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: while a class is made, Python 3.11 turns it into a RuntimeError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__
    return error is not None


def _let_any_text_through() -> None:
    """Characters that the terminal can't show become ``?`` and broken ones reach the check that names them; output goes
    nowhere where a stream was closed by whoever started the command."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # for as long as the process lives
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _take_debug(argv: list[str]) -> tuple[bool, list[str]]:
    """Whether --debug is among the options, and the arguments without it; what follows ``--`` is no option."""
    end = argv.index("--") if "--" in argv else len(argv)
    options = [argument for argument in argv[:end] if argument != "--debug"]
    return len(options) < end, options + argv[end:]


def _keep_examples_whole(command: Any) -> None:
    """Leave the example in a command's help as it is written: wrapped, it could not be copied to a shell."""
    if command.help:
        command.help = command.help.replace("\nExample:", "\n\b\nExample:")
    for inner in getattr(command, "commands", {}).values():
        _keep_examples_whole(inner)


def _drop_output() -> None:
    """The reader (head, less) is gone: let what is left go elsewhere, so that the interpreter's last flush is quiet."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _with_next_step(error: DrivetrainError, command: str | None) -> str:
    """The message; where it is about what was typed and names no way on, the command's help is one."""
    is_typed = isinstance(error, ConfigError | RequestError)
    if is_typed and not error.hint and not error.allowed:
        return f"{str(error).rstrip('.')}. Run: drivetrain {command} --help"
    return error.line if isinstance(error, DifferencesError) else str(error)


def _show_usage(error: Any, debug: bool) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "drivetrain"
    if type(error).__name__ == "NoArgsIsHelpError":  # a group without a command; its message is the help
        error.show()
        return 2
    _show(f"{error.format_message().rstrip('.')}. Run: {path} --help", error, debug)
    return 2


def _show(message: str, error: BaseException, debug: bool) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    if debug:
        traceback.print_exception(error)
