"""The command tree, and what happens to an error that leaves a command."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback

import typer

from drivetrain import __version__
from drivetrain.cli.console import note
from drivetrain.errors import DrivetrainError

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
    "bench": "bench:app",
    "demo": "demo:demo",
}
"""Command -> module in this package and what it defines there, in the order of ``--help``."""

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
    """Run one command line and turn every exception into one clear message and an exit status."""
    debug = "--debug" in argv
    arguments = [argument for argument in argv if argument != "--debug"]
    logging.basicConfig(level=logging.INFO if debug else logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    try:
        result = build(next((a for a in arguments if not a.startswith("-")), None))(arguments, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        note("interrupted")
        return 130
    except BrokenPipeError:
        # The reader (head, less) is gone; point stdout elsewhere so that the interpreter's last flush is quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except DrivetrainError as error:
        _show(error, debug)
        return 1
    except Exception as error:
        if isinstance(error, _ClickException):
            error.show()  # type: ignore[attr-defined]
            return 2
        print(f"error: unexpected {type(error).__name__}: {error}", file=sys.stderr)
        if debug:
            traceback.print_exception(error)
        else:
            print(
                "This is a fault in Drivetrain or in a plugin. Run it again with --debug for the traceback.",
                file=sys.stderr,
            )
        return 1


def _show(error: DrivetrainError, debug: bool) -> None:
    print(f"error: {error}", file=sys.stderr)
    if debug:
        traceback.print_exception(error)
