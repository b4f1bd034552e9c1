"""A rank's process ends right after its command: with its status, all output, and no interpreter that takes itself
apart beneath threads that still run."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys, threading, time
from drivetrain.cli import ending

class Left:
    def __del__(self):
        print("taken apart")

left = Left()
atexit.register(print, "done at the end")
threading.Thread(target=lambda: (time.sleep(0.2), print("a thread's last words"))).start()
if {asks}:
    ending.end_at_once()
sys.stdout.write("told")
ending.leave(3)
sys.exit(4)
"""


@pytest.mark.parametrize("asks", [True, False])
def test_what_is_registered_is_done_and_nothing_is_taken_apart(asks: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(asks=asks)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == (3 if asks else 4), done.stderr
    assert done.stdout.startswith("told")
    assert "a thread's last words" in done.stdout
    assert "done at the end" in done.stdout
    assert ("taken apart" in done.stdout) is not asks
