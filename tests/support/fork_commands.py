"""Run by file: commands of this interpreter's environment, each in a fork of a process that has torch already.

Every line of standard input asks for one: a JSON object with what `_run` takes. Two lines answer it: the process, when
it has been started, and its exit status, when it has ended.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from functools import cache
from typing import NoReturn


def main() -> None:
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401

    import drivetrain.cli.app
    import drivetrain.cli.options
    import drivetrain.serving.llm  # noqa: F401

    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        if request["command"] == "pytest":
            _prepare_for_tests()
        child = os.fork()
        if child == 0:
            _run(**request)
        _say(child)
        _say(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@cache
def _prepare_for_tests() -> None:
    """Import what tests of compiled code and of optimizers need, and start the process that the conformance kit
    examines plugins in, which forks for each of them as well: the first examination does, and every fork of this
    process then finds it."""
    import torch._dynamo  # noqa: F401

    from drivetrain.registry import discover
    from drivetrain.testing.manners import examine_manners

    examine_manners(next(ref for ref in discover() if ref.distribution == "drivetrain"), {}, 60.0)


def _run(command: str, words: Sequence[str], folder: str, output: str, errors: str) -> NoReturn:
    """What a fork does. command: drivetrain, whose warnings are errors, or pytest."""
    from drivetrain.ending import end_process

    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        for file, standard in ((output, 1), (errors, 2)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), standard)
        if command == "pytest":
            import pytest

            status = int(pytest.main([*words]))
        else:
            from drivetrain.cli import program

            warnings.simplefilter("error")
            sys.argv = [command, *words]
            status = program()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        end_process(status)


def _say(what: int) -> None:
    os.write(1, f"{what}\n".encode())


if __name__ == "__main__":
    main()
