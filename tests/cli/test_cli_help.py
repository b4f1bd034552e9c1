"""Every command explains itself, with an example that can be typed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer

from drivetrain import __version__
from drivetrain.cli.app import build
from drivetrain.contracts.kinds import KINDS

Cli = Callable[..., Any]

_ROOT: Any = typer.main.get_command(build())


def commands(group: Any = _ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command that does something."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


def parse(words: list[str]) -> None:
    """Take ``words`` as the command line would, down to the last option; runs nothing."""
    command, context = _ROOT, _ROOT.make_context("drivetrain", list(words), resilient_parsing=False)
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        command = command.commands[rest[0]]
        context = command.make_context(rest[0], rest[1:], parent=context)


ALL = list(commands())


def test_every_command_of_the_project_is_there() -> None:
    wanted = "plugins list|plugins info|explain|doctor|pull|generate|chat|serve|demo"
    wanted += "|bench throughput|bench latency|bench serve"
    assert {" ".join(path) for path in ALL} >= set(wanted.split("|"))


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_shows_an_example_that_parses(cli: Cli, path: tuple[str, ...]) -> None:
    for flag in ("--help", "-h"):
        shown = cli(*path, flag)
        assert (shown.status, shown.err) == (0, "")
    (example,) = re.findall(r"^\s*Example: (drivetrain .*)$", shown.out, re.MULTILINE)
    words = shlex.split(example)[1:]
    assert tuple(words[: len(path)]) == path
    parse(words)


@pytest.mark.parametrize("path", [(), ("plugins",), ("bench",)])
def test_a_group_lists_its_commands(cli: Cli, path: tuple[str, ...]) -> None:
    shown = cli(*path, "--help")
    assert shown.status == 0
    for inner in ALL:
        if inner[: len(path)] == path:
            assert re.search(rf"^  {inner[len(path)]}\b", shown.out, re.MULTILINE)
    bare = cli(*path)
    assert bare.status == 2
    assert bare.out + bare.err == shown.out
    assert "error: " not in bare.err


def test_options_are_the_configurations_own_names(cli: Cli) -> None:
    for path in (["generate"], ["chat"], ["serve"], ["explain"], ["demo"], ["bench", "throughput"]):
        shown = cli(*path, "--help").out
        for name in ("model", "config", "set", "attention", "quantizer", "scheduler", "platform", "precision"):
            assert f"--{name} " in shown, (path, name)
    shown = cli("serve", "--help").out
    for kind in KINDS.values():
        assert (f"--{kind.key} " in shown) == ("serve" in kind.purposes)


def test_the_version_is_told(cli: Cli) -> None:
    assert cli("--version").out == f"drivetrain {__version__}\n"
