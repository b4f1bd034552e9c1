"""A process that has loaded torch ends right after its command: with its status, all output, and no interpreter that
takes itself apart, which takes a second, or beneath threads that still run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import atexit, concurrent.futures, sys, threading, time, types
import drivetrain.cli

class Left:
    def __del__(self):
        print("taken apart")

def main():
    sys.stdout.write("told")
    return 3

left = Left()
atexit.register(print, "done at the end")
threading.Thread(target=lambda: (time.sleep(0.2), print("a thread's last words"))).start()
pool = concurrent.futures.ThreadPoolExecutor(1)
pool.submit(print, "a pool's last words")
drivetrain.cli.main = main
if {has_torch}:
    sys.modules["torch"] = types.ModuleType("torch")
sys.exit(drivetrain.cli.program())
"""


@pytest.mark.parametrize("has_torch", [True, False])
def test_what_is_registered_is_done_and_nothing_is_taken_apart(has_torch: bool) -> None:
    """Threads are waited for, and pools of threads that nobody has closed end."""
    program = PROGRAM.format(has_torch=has_torch)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3, done.stderr
    for words in ("told", "a thread's last words", "a pool's last words", "done at the end"):
        assert words in done.stdout
    assert ("taken apart" in done.stdout) is not has_torch


def test_the_command_and_the_module_are_this_program() -> None:
    for command in ([Path(sys.executable).with_name("drivetrain")], [sys.executable, "-m", "drivetrain"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
