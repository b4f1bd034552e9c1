"""Time Drivetrain and other engines on this machine, in turn, and print one table a workload."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .contestants import CONTESTANTS, OURS, PEERS, ROWS, Adapters, Contestant, missing_quantizers, takes_part
from .floor import read_geometry
from .install import Installer
from .machine import Machine
from .models import Models
from .report import Report
from .run import Bench, Group
from .workloads import WORKLOADS, Workload

PROGRAM = "tests/benchmarks/against_peers.py"
ROOT = Path(__file__).parents[3]


def names(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    """A comma-separated list of known names."""
    known = tuple(allowed)

    def parse(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",")]
        unknown = [name for name in found if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return found

    return parse


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    engines = (OURS, *PEERS)
    parser.add_argument("--peers", type=names(engines), default=list(engines), help=", ".join(engines))
    parser.add_argument("--workloads", type=names(WORKLOADS), default=list(WORKLOADS), help=", ".join(WORKLOADS))
    parser.add_argument("--rows", type=names(ROWS), help=f"{', '.join(ROWS)}; by default each workload's own")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default 5)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="by default one a core")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="a setting of drivetrain's own")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--docs", type=Path, metavar="FOLDER", help="write cpu.md and cpu.json there")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "peers", help="where peers are installed")
    found = parser.parse_args(arguments)
    if found.repeats < 1 or found.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    return found


def chosen(arguments: argparse.Namespace, workload: Workload, row: str) -> list[Contestant]:
    """Who takes part in one row of a workload."""
    absent = missing_quantizers()
    asked = [c for c in CONTESTANTS if c.row == row and c.peer in arguments.peers and c.quantizer not in absent]
    return [contestant for contestant in (takes_part(workload, c) for c in asked) if contestant is not None]


def run_all(arguments: argparse.Namespace, bench: Bench) -> list[Group]:
    groups = []
    for name in arguments.workloads:
        workload = WORKLOADS[name]
        for row in arguments.rows or workload.rows:
            contestants = chosen(arguments, workload, row)
            if contestants:
                groups.append(bench.run(workload, row, contestants))
    return groups


def left_out(arguments: argparse.Namespace) -> list[str]:
    """What a reader might miss in the tables."""
    lines = []
    absent = missing_quantizers()
    if OURS in arguments.peers and absent:
        lines.append(f"drivetrain with these quantizers, which are not installed: {', '.join(sorted(absent))}")
    if "transformers" in arguments.peers and {"streams", "shared-prefix"} & set(arguments.workloads):
        lines.append("transformers in streams and shared-prefix: its generate shares nothing between requests")
    return lines


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(words: Sequence[str]) -> int:
    arguments = parse_arguments(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that every engine is ended
    installer = Installer(arguments.build.resolve(), say)
    models = Models(installer)
    adapters = Adapters(installer, models, arguments.threads, Path(sys.executable), arguments.set)
    geometry = read_geometry(models.source())
    bench = Bench(adapters, geometry, arguments.repeats, installer.root / "logs", say)
    before = bench.ceilings(arguments.threads)
    groups = run_all(arguments, bench)
    report = Report(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        command=shlex.join(["python", PROGRAM, *words]),
        machine=Machine.of_this_process(),
        threads=arguments.threads,
        repeats=arguments.repeats,
        geometry=geometry,
        ceilings=before.best_of(bench.ceilings(arguments.threads)),
        groups=groups,
        others=bench.others,
        notes=left_out(arguments),
    )
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report.table())
    if arguments.docs is not None:
        (arguments.docs / "cpu.md").write_text(report.page(), encoding="utf-8")
        (arguments.docs / "cpu.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    for line in report.disagreements():
        say(f"disagreement: {line}")
    has_failed = any(entry.failure is not None for group in groups for entry in group.entries)
    return 1 if has_failed or report.disagreements() else 0
