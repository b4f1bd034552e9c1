"""``drivetrain train``: trains a model as a configuration says, in one process or many."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drivetrain.cli.console import note, show_progress
from drivetrain.cli.options import TRAINING_KINDS, with_settings
from drivetrain.config import Settings
from drivetrain.errors import ConfigError, DrivetrainError, RankLostError

if TYPE_CHECKING:
    from drivetrain.training.pulse import Pulse
    from drivetrain.training.run import StepResult

_LINE_SECONDS = 5.0
_LOST_SECONDS = 1.0
"""What a rank that has lost the others lets pass before it ends: the agent shall see the culprit first."""


@with_settings(kinds=TRAINING_KINDS)
def train(
    settings: Settings,
    config_file: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="YAML file with the run's settings.", show_default=False)
    ] = None,
    nproc_per_node: Annotated[int, typer.Option(min=1, help="Processes on this machine, one for each device.")] = 1,
    nnodes: Annotated[str, typer.Option(help="Machines that take part: N, or MIN:MAX to go on when some leave.")] = "1",
    rdzv_endpoint: Annotated[
        str | None, typer.Option(help="HOST:PORT where the machines meet.", show_default=False)
    ] = None,
    rdzv_id: Annotated[
        str | None, typer.Option(help="Name of the run, the same on every machine.", show_default=False)
    ] = None,
    rdzv_wait: Annotated[
        int, typer.Option(min=1, help="Seconds to wait for more machines, once the fewest are there.")
    ] = 30,
    max_restarts: Annotated[
        int | None,
        typer.Option(
            min=0, help="Times to start anew after a process has died; 3 where there are several.", show_default=False
        ),
    ] = None,
    pulses: Annotated[Path | None, typer.Option(hidden=True, help="Given by the agent to its processes.")] = None,
    deepspeed: Annotated[
        Path | None,
        typer.Option(help="DeepSpeed configuration (JSON) to take settings from; see: drivetrain config import."),
    ] = None,
) -> int:
    """Train a model, and write it as a folder that can be served. A run that was interrupted goes on.

    Example: drivetrain train docs/examples/sft-smollm2.yaml --set trainer.steps=20
    """
    from drivetrain.training.launch import Launch
    from drivetrain.training.ranks import started_by_agent

    if settings.model is None:
        raise ConfigError("no model is named", hint="Give one with model: NAME in the file, or --model NAME.")
    launch = Launch.of(
        nproc_per_node,
        nnodes,
        rdzv_endpoint,
        rdzv_id,
        max_restarts,
        wait_seconds=rdzv_wait,
        timeout_seconds=settings.trainer.timeout_seconds,
    )
    if pulses is not None:
        return _train_below_agent(settings, pulses)
    if not started_by_agent() and launch.needs_agent:
        unshared = launch.unshared(settings.trainer.batch, settings.trainer.micro_batch)
        if unshared is not None:
            note(f"note: {unshared}")
        return launch.run(sys.argv[1:], lambda text: note(f"note: {text}"))
    return _train_here(settings)


def _train_below_agent(settings: Settings, pulses: Path) -> int:
    """Train in a process that our agent has started, and that ends with it. Says by its exit status whether starting
    anew may help."""
    from drivetrain.training.agent import LOST
    from drivetrain.training.orphan import end_with_parent
    from drivetrain.training.pulse import Pulse, agent_of
    from drivetrain.training.ranks import is_known_to_all, local_rank

    end_with_parent(agent_of(pulses))
    try:
        return _train_here(settings, Pulse(pulses, local_rank()))
    except RankLostError as error:
        if "--debug" in sys.argv:
            traceback.print_exception(error)
        time.sleep(_LOST_SECONDS)
        return LOST
    except Exception as error:
        if isinstance(error, DrivetrainError) or is_known_to_all(error):
            raise
        traceback.print_exception(error)
        return LOST


def _train_here(settings: Settings, pulse: Pulse | None = None) -> int:
    """Train in this process, which may be one of several. Rank 0 tells what all of them know."""
    from drivetrain.training.ranks import agent_rank, is_known_to_all
    from drivetrain.training.trainer import Trainer

    rank = agent_rank()
    try:
        if rank > 0:
            Trainer.from_settings(settings, pulse=pulse).run()
            return 0
        with show_progress() as progress:
            trainer = Trainer.from_settings(
                settings, progress=progress, note=lambda text: note(f"note: {text}"), pulse=pulse
            )
            with trainer.assembled() as work:
                for selection in work.parts.report.selections:
                    note(f"{selection.kind:<11} {selection.chosen.name:<12} {selection.reason}")
                for text in (*work.parts.report.fallbacks, *work.parts.notes):
                    note(f"note: {text}")
                with _shown_steps(work.run.step_number) as on_step:
                    result = work.train(on_step, pulse)
    except DrivetrainError as error:
        if rank > 0 and is_known_to_all(error):
            return 1
        raise
    if result.folder is not None:
        print(result.folder)
    return 0


@contextmanager
def _shown_steps(first_step: int) -> Iterator[Callable[[StepResult, int], None]]:
    """What shows each step: a bar on a terminal, a line every few seconds elsewhere."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task: Any = None

    def show(result: StepResult, steps: int) -> None:
        nonlocal task
        if task is None:
            task = bar.add_task("training", total=steps, completed=first_step, figures="")
        bar.update(task, completed=result.step, figures=figures_text(result))

    with bar:
        yield show


def figures_text(result: StepResult) -> str:
    """Loss, speed and memory of a step, for people."""
    figures = result.figures
    scale = f"  scale {figures['loss_scale']:g}" if "loss_scale" in figures else ""
    return (
        f"loss {figures['loss']:.4f}  {figures['tokens_per_second']:.0f} tok/s  "
        f"{figures['memory_bytes'] / 2**20:.0f} MiB{scale}"
    )


class _Lines:
    """The first step, one every few seconds, and the last."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._printed = -1e9

    def __call__(self, result: StepResult, steps: int) -> None:
        now = time.monotonic()
        first_step, started = self._first = self._first or (result.step, now)
        if now - self._printed < _LINE_SECONDS and result.step != steps:
            return
        self._printed = now
        made = result.step - first_step
        left = f"  {(now - started) / made * (steps - result.step):.0f} s left" if made and result.step < steps else ""
        note(f"step {result.step}/{steps}  {figures_text(result)}{left}")
