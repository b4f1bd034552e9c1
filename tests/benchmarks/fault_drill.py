"""The fault drill in its long form: a run whose ranks are killed and stopped at random moments, beside a quiet one.

    python tests/benchmarks/fault_drill.py --kills 20 --ranks 2

Says how long each recovery took, and whether losses and samples are those of the quiet run to the last bit.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.drill import Launched, curve, steps_of, wait_for
from support.training import make_model, run_settings, train_in_processes, write_chats

_QUIET_SECONDS = 1800.0


def settings_of(model: Path, chats: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    shape = {"steps": arguments.steps, "micro_batch": 1, "timeout_seconds": arguments.stuck_seconds}
    settings = run_settings(model, chats, folder, export=False, **shape)
    settings["store"] |= {"every": 5, "background": True, "keep": 2}
    return settings


def drill(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    model, chats = make_model(root / "tiny"), write_chats(root / "chats.jsonl")
    quiet, folder = root / "quiet", root / "drill"
    done = train_in_processes(
        settings_of(model, chats, quiet, arguments), quiet, arguments.ranks, timeout=_QUIET_SECONDS
    )
    assert done.returncode == 0, done.stderr
    generator = random.Random(arguments.seed)
    options = ["--nproc-per-node", str(arguments.ranks), "--max-restarts", str(4 * arguments.kills)]
    run = Launched.start(settings_of(model, chats, folder, arguments), folder, "agent", *options)
    recoveries: list[float] = []
    hits = 0
    try:
        for number in range(arguments.kills):
            # Any moment: while ranks start, read, train, or save.
            time.sleep(generator.uniform(0, arguments.pause_seconds))
            if run.process.poll() is not None or steps_of(folder) >= arguments.steps:
                break
            how = (
                signal.SIGSTOP
                if arguments.stops and number % arguments.stops == arguments.stops - 1
                else signal.SIGKILL
            )
            made, rank = steps_of(folder), generator.randrange(arguments.ranks)
            hit = run.hit(rank, how)
            hits += 1
            started = time.monotonic()
            wait_for("a rank anew", lambda hit=hit, rank=rank: run.ranks().get(rank, hit) != hit)
            if generator.random() < arguments.settle:  # now and then the next one comes before the run has recovered
                wait_for(f"a step after {made}", lambda made=made: steps_of(folder) > made or run.process.poll() == 0)
                recoveries.append(time.monotonic() - started)
            print(f"{how.name} to rank {rank} after step {made}: step {steps_of(folder)} now", file=sys.stderr)
        status = run.finish(_QUIET_SECONDS)
    finally:
        run.end()
    return {
        "status": status,
        "hits": hits,
        "starts anew": run.told.count("starting anew"),
        "recovery seconds, median": round(statistics.median(recoveries), 1) if recoveries else None,
        "recovery seconds, longest": round(max(recoveries), 1) if recoveries else None,
        "steps": steps_of(folder),
        "equal to the last bit": curve(folder) == curve(quiet),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=7, help="every so many hits is a SIGSTOP; 0: none")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settle", type=float, default=0.7, help="share of hits after which the run may make a step")
    parser.add_argument("--pause-seconds", type=float, default=3.0, help="at most, from one hit to the next")
    parser.add_argument("--stuck-seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="drivetrain-drill-") as folder:
        result = drill(arguments, Path(folder))
    print(json.dumps(result, indent=2))
    if result["hits"] < arguments.kills:
        print(f"error: the run ended before its {arguments.kills} hits; give it more --steps", file=sys.stderr)
        return 1
    return 0 if result["status"] == 0 and result["equal to the last bit"] else 1


if __name__ == "__main__":
    sys.exit(main())
