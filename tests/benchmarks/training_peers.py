"""Training steps of Drivetrain's partitioners beside DeepSpeed, torch DDP and FSDP2 on this machine, in one run.

    python tests/benchmarks/training_peers.py [--repeats 3] [--steps 8] [--rows 4] [--length 128] [--only zero3,ddp]
                                              [--json FILE] [--docs docs/benchmarks/training.md]

Two ranks of one thread each over Gloo, float32, one model. Contestants take turns ``repeats`` times; figures are
medians, and ratios compare turns of one round. The first run installs DeepSpeed under build/peers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.child import PeerError
from peers.install import Installer

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).parent / "training" / "worker.py"
RANKS = 2


@dataclass(frozen=True)
class Contestant:
    """One line of the table. peer: whose environment it runs in; None for ours."""

    name: str
    kind: str
    stage: str = ""
    peer: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


CONTESTANTS = (
    Contestant("drivetrain none", "ours", "none"),
    Contestant("drivetrain zero1", "ours", "zero1"),
    Contestant("drivetrain zero2", "ours", "zero2"),
    Contestant("drivetrain zero3", "ours", "zero3"),
    Contestant("drivetrain zero3, collectives", "ours", "zero3", options={"transport": "collective"}),
    Contestant("DeepSpeed 1", "deepspeed", "1", "deepspeed"),
    Contestant("DeepSpeed 2", "deepspeed", "2", "deepspeed"),
    Contestant("DeepSpeed 3", "deepspeed", "3", "deepspeed"),
    Contestant("torch DDP", "ddp", peer="deepspeed"),
    Contestant("torch FSDP2", "fsdp2", peer="deepspeed"),
)

RATIOS = (
    ("drivetrain zero1", "DeepSpeed 1", 1.15),
    ("drivetrain zero2", "DeepSpeed 2", 1.15),
    ("drivetrain zero3", "DeepSpeed 3", 1.2),
    ("drivetrain none", "torch DDP", None),
    ("drivetrain zero3", "torch FSDP2", None),
)
"""Ours, theirs, and the ratio of tokens per second that is asked for."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_once(contestant: Contestant, python: Path, shape: dict[str, int]) -> dict[str, Any]:
    """Raises PeerError with the end of what a rank has printed."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        job = {
            "contestant": contestant.kind,
            "stage": contestant.stage,
            "options": contestant.options,
            "result": str(result),
            **shape,
        }
        shared = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "DS_ACCELERATOR": "cpu",
            "ROWS": str(shape["rows"]),
        }
        logs = [Path(folder, f"rank{rank}.log") for rank in range(RANKS)]
        children = []
        for rank, log in enumerate(logs):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("wb") as file:
                command = [str(python), str(WORKER), json.dumps(job)]
                children.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=folder))
        statuses = [child.wait() for child in children]
        if any(statuses) or not result.exists():
            text = "\n".join(log.read_text(errors="replace")[-1500:] for log in logs)
            raise PeerError(f"{contestant.name} ended with {statuses}\n{text}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


def measure(contestants: list[Contestant], shape: dict[str, int], repeats: int) -> dict[str, list[dict[str, Any]]]:
    installer = Installer(ROOT / "build" / "peers", lambda text: print(text, file=sys.stderr))
    for peer in {contestant.peer for contestant in contestants} - {None}:
        installer.install(str(peer))
    runs: dict[str, list[dict[str, Any]]] = {contestant.name: [] for contestant in contestants}
    for turn in range(repeats):
        for contestant in contestants:
            python = Path(sys.executable) if contestant.peer is None else installer.python(contestant.peer)
            found = run_once(contestant, python, shape)
            runs[contestant.name].append(found)
            speed, peak = found["tokens_per_second"], found["peak_bytes"] / 2**20
            print(f"{turn + 1} {contestant.name:30} {speed:7.0f} tok/s {peak:6.0f} MiB", file=sys.stderr, flush=True)
    return runs


def ratio(runs: dict[str, list[dict[str, Any]]], ours: str, theirs: str) -> float:
    pairs = zip(runs[ours], runs[theirs], strict=True)
    return statistics.median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs)


def page(runs: dict[str, list[dict[str, Any]]], shape: dict[str, int], repeats: int) -> str:
    lines = ["| contestant | tokens/s | peak memory of a rank, MiB | first loss | last loss |", "|---|---|---|---|---|"]
    for name, found in runs.items():
        speed = statistics.median(run["tokens_per_second"] for run in found)
        peak = max(run["peak_bytes"] for run in found) / 2**20
        losses = found[0]["losses"]
        lines.append(f"| {name} | {speed:,.0f} | {peak:,.0f} | {losses[0]:.4f} | {losses[-1]:.4f} |")
    lines += ["", "| ratio of tokens/s | measured | asked for |", "|---|---|---|"]
    for ours, theirs, wanted in RATIOS:
        if ours in runs and theirs in runs:
            asked = "" if wanted is None else f"at least {wanted}"
            lines.append(f"| {ours} to {theirs} | {ratio(runs, ours, theirs):.2f} | {asked} |")
    versions = sorted({run["torch"] for found in runs.values() for run in found})
    told = ", ".join(f"{value} {name}" for name, value in shape.items())
    told = f"{repeats} turns, each of {told}; torch {', '.join(versions)}, DeepSpeed 0.19.8, {os.cpu_count()} cores."
    lines += ["", f"{datetime.date.today()}, {told}"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--only", default="", help="parts of names, by comma")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", type=Path, help="page whose part below <!-- figures --> is written anew")
    asked = parser.parse_args()
    shape = {name: getattr(asked, name) for name in ("steps", "warmup", "rows", "length")}
    wanted = [part for part in asked.only.split(",") if part]
    chosen = [c for c in CONTESTANTS if not wanted or any(part in c.name for part in wanted)]
    runs = measure(chosen, shape, asked.repeats)
    text = page(runs, shape, asked.repeats)
    print(text)
    if asked.json:
        asked.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    if asked.docs:
        before = asked.docs.read_text(encoding="utf-8").split("<!-- figures -->")[0]
        asked.docs.write_text(f"{before}<!-- figures -->\n\n{text}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
