"""Runs compilers: several at a time, each with a time limit, and none of them outlives who waits for it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from drivetrain.contracts.source import Progress
from drivetrain.errors import KernelBuildError
from drivetrain.hardware import read_processor
from drivetrain.native.compilers import plain_environment
from drivetrain.native.recipe import Recipe, Step

_ERROR = re.compile(r"\berror ?(#\d+)?:|undefined reference|undefined symbol|cannot find -l", re.IGNORECASE)
_SHOWN_LINES = 3


def run_recipes(work: Sequence[tuple[Recipe, Path]], progress: Progress) -> list[KernelBuildError | None]:
    """Build each recipe in its folder, which then holds ``library.so``; for each, None or why it failed.

    All units of all recipes run at the same time, as many as there are cores. Interrupted, it kills them.
    """
    total = sum(len(recipe.units) + 1 for recipe, _ in work)
    if not total:
        return []
    names = ", ".join(recipe.name for recipe, _ in work)
    with _Compilers(f"compiling {names} with {work[0][0].compiler.name}", total, progress) as compilers:
        units = [[compilers.start(recipe, step, folder) for step in recipe.units] for recipe, folder in work]
        broken = [_first_error(futures) for futures in units]
        links = [
            compilers.start(recipe, recipe.link, folder)
            for (recipe, folder), error in zip(work, broken, strict=True)
            if error is None
        ]
        linked = iter([_first_error([future]) for future in links])
        return [error if error is not None else next(linked) for error in broken]


def _first_error(futures: Sequence[Future[None]]) -> KernelBuildError | None:
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None and not isinstance(error, KernelBuildError):
            raise error
    return next((error for error in errors if isinstance(error, KernelBuildError)), None)


class _Compilers:
    """The compilers of one build, started by threads that wait for them."""

    def __init__(self, what: str, total: int, progress: Progress) -> None:
        self._what, self._total, self._progress = what, total, progress
        self._done = 0
        self._running: set[subprocess.Popen[str]] = set()
        self._guard = threading.Lock()
        self._is_stopped = False
        self._pool = ThreadPoolExecutor(min(total, read_processor().usable_cores), "drivetrain-compile")

    def __enter__(self) -> _Compilers:
        self._progress(self._what, 0, self._total, "files")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            with self._guard:
                self._is_stopped = True
                for process in self._running:
                    _kill(process)
        self._pool.shutdown(cancel_futures=True)

    def start(self, recipe: Recipe, step: Step, folder: Path) -> Future[None]:
        return self._pool.submit(self._run, recipe, step, folder)

    def _run(self, recipe: Recipe, step: Step, folder: Path) -> None:
        """Raises KernelBuildError when the compiler fails or takes too long."""
        with self._guard:
            if self._is_stopped:
                return
            process = _start(recipe, step, folder)
            self._running.add(process)
        try:
            output, _ = process.communicate(timeout=recipe.limit_seconds)
        except subprocess.TimeoutExpired as error:
            _kill(process)
            process.communicate()
            raise KernelBuildError(
                f"the compiler took longer than {recipe.limit_seconds:g} s",
                where=_where(recipe, step),
                hint="Raise limit_seconds of the build, or compile less at once.",
                command=step.command,
            ) from error
        finally:
            with self._guard:
                self._running.discard(process)
        if process.returncode != 0:
            raise _failure(recipe, step, process.returncode, output)
        with self._guard:
            self._done += 1
            self._progress(self._what, self._done, self._total, "files")


def _start(recipe: Recipe, step: Step, folder: Path) -> subprocess.Popen[str]:
    """In a session of its own: nvcc and clang start further programs, and all of them end together."""
    try:
        return subprocess.Popen(
            step.command,
            cwd=folder,
            env=plain_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise KernelBuildError(
            f"the compiler can't be started: {error.strerror or error}",
            where=_where(recipe, step),
            found=step.command[0],
            hint="Name a compiler that works here.",
            command=step.command,
        ) from error


def _kill(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it ended between the question and the signal


def _failure(recipe: Recipe, step: Step, status: int, output: str) -> KernelBuildError:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    told = [line for line in lines if _ERROR.search(line)][:_SHOWN_LINES] or lines[-_SHOWN_LINES:]
    ended = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
    return KernelBuildError(
        f"{'the source does not compile' if step.source else 'the library does not link'} ({ended}): "
        + (" | ".join(told) or "the compiler said nothing"),
        where=_where(recipe, step),
        hint=f"The command was: {shlex.join(step.command)}",
        command=step.command,
        output=output or ended,
    )


def _where(recipe: Recipe, step: Step) -> str:
    return str(step.source) if step.source else f"native library {recipe.name}"
