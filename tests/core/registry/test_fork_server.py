"""A fork server examines each plugin in a process of its own, and outlives whatever happens there."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivetrain.registry.fork_server import ForkServer

PROGRAM = """
import atexit, os, signal, subprocess, sys, threading, time

def prepare():
    {prepare}

def run(request, write):
    write({{"stage": "work"}})
    exec(request["do"])
    write({{"done": request["do"]}})
"""
LIMIT_SECONDS = 30.0


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Make a server of a program; ``prepare`` is what it does before it forks."""
    monkeypatch.syspath_prepend(str(tmp_path))
    servers: list[ForkServer] = []

    def make_server(prepare: str = "pass") -> ForkServer:
        name = f"program_{len(servers)}"
        (tmp_path / f"{name}.py").write_text(PROGRAM.format(prepare=prepare), encoding="utf-8")
        servers.append(ForkServer(name, is_warm=True))
        return servers[-1]

    yield make_server
    for server in servers:
        server.close()


def test_each_call_has_a_process_of_its_own_that_ends_as_processes_do(make) -> None:
    server = make("sys.prepared = os.getpid()")
    first = server.call({"do": "sys.mine = 1; print('out'); print(sys.prepared, file=sys.stderr)"}, LIMIT_SECONDS)
    assert (first.status, first.stage, first.has_orphans) == (0, "work", False)
    assert first.answer("done") is not None
    assert first.output == "out\n"
    again = "assert not hasattr(sys, 'mine'); print(sys.prepared, file=sys.stderr); assert sys.stdin.read() == ''"
    again += (
        "; atexit.register(print, 'bye'); threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()"
    )
    second = server.call({"do": again}, LIMIT_SECONDS)
    assert (second.status, second.output) == (0, "late\nbye\n")
    assert second.errors == first.errors, "one server prepared both"


@pytest.mark.parametrize(
    ("do", "status", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", -11, ""),
        ("os._exit(7)", 7, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("sys.exit(3)", 1, "SystemExit: 3"),
    ],
)
def test_the_server_outlives_how_a_call_ends(make, do: str, status: int, said: str) -> None:
    server = make()
    ended = server.call({"do": do}, LIMIT_SECONDS)
    assert (ended.status, ended.stage, ended.answer("done")) == (status, "work", None)
    assert said in ended.errors
    assert server.call({"do": "pass"}, LIMIT_SECONDS).status == 0


def test_a_call_is_killed_at_its_limit_with_all_it_started(make) -> None:
    server = make()
    ended = server.call({"do": "print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"}, 1.0)
    assert (ended.status, ended.has_orphans) == (None, False)
    expect_gone(int(ended.output))
    left = server.call({"do": "print(subprocess.Popen(['sleep', '600']).pid, flush=True)"}, LIMIT_SECONDS)
    assert (left.status, left.has_orphans) == (0, True)
    expect_gone(int(left.output))


def expect_gone(pid: int) -> None:
    status = Path("/proc", str(pid), "status")
    deadline = time.monotonic() + LIMIT_SECONDS
    while status.exists() and "zombie" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("prepare", ["raise ImportError('no torch here')", "os._exit(5)"])
def test_what_can_not_be_prepared_is_left_to_the_calls(make, prepare: str) -> None:
    assert make(prepare).call({"do": "pass"}, LIMIT_SECONDS).status == 0


def test_a_server_that_is_gone_is_started_anew_and_sees_the_path_of_its_caller(
    make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make("sys.prepared = os.getpid()")
    first = server.call({"do": "print(os.getppid())"}, LIMIT_SECONDS)
    os.kill(int(first.output), 9)
    while Path("/proc", first.output.strip(), "cwd").exists():
        time.sleep(0.01)
    added = tmp_path / "added"
    added.mkdir()
    (added / "lately_installed.py").write_text("NAME = 'found'\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(added)])
    second = server.call({"do": "import lately_installed; print(lately_installed.NAME)"}, LIMIT_SECONDS)
    assert (second.status, second.output) == (0, "found\n")


def output_in_fork(server: ForkServer, request: dict[str, str], file: Path) -> str:
    """What a call prints that a fork of this process makes."""
    child = os.fork()
    if child == 0:
        try:
            file.write_text(server.call(request, LIMIT_SECONDS).output)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return file.read_text()


def test_forks_of_the_process_that_has_called_share_the_server(make, tmp_path: Path) -> None:
    server = make("sys.prepared = os.getpid()")
    asked = {"do": "print(sys.prepared)"}
    prepared = server.call(asked, LIMIT_SECONDS).output
    assert output_in_fork(server, asked, tmp_path / "1") == output_in_fork(server, asked, tmp_path / "2") == prepared
    assert server.call(asked, LIMIT_SECONDS).output == prepared
    os.kill(int(prepared), signal.SIGKILL)
    time.sleep(0.1)
    assert int(output_in_fork(server, asked, tmp_path / "3")) != int(prepared), "one that is gone is not asked"
