"""The command as a process: interrupts, closed pipes, terminals."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from support.command_line import ONE_THREAD, child, make_tiny_folder, read_until, run_command

LONG = ("--max-tokens", "60000", "--temperature", "1", "--seed", "1")
"""An answer that a pipe or terminal has no room for while nobody reads it: what writes it can't end by itself."""
PATIENCE_SECONDS = 60.0
"""For what ends soon, on a busy machine too."""


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose text never ends by itself."""
    folder = make_tiny_folder(tmp_path_factory.mktemp("model") / "endless")
    for name, changed in (("config.json", {"max_position_embeddings": 65536}), ("generation_config.json", {})):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | {"eos_token_id": None} | changed))
    return folder


def words(tiny: Path, *more: object) -> tuple[object, ...]:
    return (*more, "--model", tiny, *ONE_THREAD)


def test_ctrl_c_ends_a_text_with_status_130(endless: Path) -> None:
    with child(*words(endless, "generate", "The quick"), *LONG) as process:
        assert os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert errors.decode().splitlines()[-1] == "interrupted"


def test_ctrl_c_ends_a_single_answer(endless: Path) -> None:
    with child(*words(endless, "chat", "Hello"), *LONG) as process:
        assert os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130


def test_ctrl_c_ends_a_benchmark(tiny: Path) -> None:
    with child(*words(tiny, "bench", "throughput", "--requests", 2000)) as process:
        read_until(process.stderr, b"generating: ")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors


def test_ctrl_c_ends_an_answer_but_not_the_conversation(endless: Path) -> None:
    leader, follower = pty.openpty()
    with child(*words(endless, "chat"), *LONG, stdin=follower, stdout=follower, stderr=follower) as process:
        os.close(follower)
        read_until(leader, b"> ")
        os.write(leader, b"Hello\n")
        read_until(leader, b"Hello\r\n")
        assert os.read(leader, 1)
        process.send_signal(signal.SIGINT)
        assert b"(interrupted)" in read_until(leader, b"> ")
        os.write(leader, b"/exit\n")
        assert process.wait(PATIENCE_SECONDS) == 0
    os.close(leader)


@pytest.mark.parametrize("command", ["list", "stream"])
def test_a_reader_that_has_gone_is_met_with_silence(tiny: Path, command: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    arguments = ("plugins", "list") if command == "list" else (*words(tiny, "generate", "x"), "--max-tokens", 50)
    with child(*arguments, stdout=writing) as process:
        os.close(writing)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1
    assert [line for line in errors.decode().splitlines() if not line.startswith("loading")] == []


def test_a_terminal_of_another_encoding_gets_what_it_can_show(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    outcome = run_command(*words(tiny, "generate", "The quick"), "--temperature", 0, "--max-tokens", 30)
    assert outcome.returncode == 0
    assert "?" in outcome.stdout
    assert outcome.stdout.isascii()


def on_a_terminal(arguments: tuple[Any, ...]) -> tuple[int, str]:
    """The status of a command whose three streams are one terminal, and all that it wrote there."""
    leader, follower = pty.openpty()
    with child(*arguments, stdin=follower, stdout=follower, stderr=follower) as process:
        os.close(follower)
        shown = read_until(leader, b"never")
        status = process.wait(PATIENCE_SECONDS)
    os.close(leader)
    return status, shown.decode(errors="replace")


def test_long_work_shows_a_bar_on_a_terminal_and_lines_elsewhere(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    arguments = words(tiny, "demo", "--requests", 3)
    status, shown = on_a_terminal(arguments)
    assert status == 0
    assert re.search(r"loading LlamaForCausalLM\s*.*━", shown)
    assert "\r\x1b[2K3/3 finished" in shown
    answer = shown.partition("two sentences.")[2].partition("3 mixed")[0]
    assert "\x1b" not in answer  # what a model says does not steer the terminal
    elsewhere = run_command(*arguments)
    assert elsewhere.returncode == 0
    assert not re.search("[\r\x1b━]", elsewhere.stderr)
    assert "loading LlamaForCausalLM: 30 of 30 tensors\n" in elsewhere.stderr
    assert "3/3 finished" in elsewhere.stderr


def test_tables_fit_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    status, shown = on_a_terminal(("plugins", "list"))
    assert status == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert max(len(line) for line in lines) <= 60
