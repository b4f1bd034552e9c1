"""What goes wrong is told in one line with a next step, and by the exit status."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain.cli import app
from support.command_line import ONE_THREAD, run_command

Cli = Callable[..., Any]

TINY = ("--model", "{tiny}", *ONE_THREAD)
NEXT_STEP = ("Run: ", "allowed: ", "Did you mean", "Give ", "Choose ", "Set ", "Send ", "Leave ", "Start ", "Raise ")

REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("generate", "hi"), "no model is named"),
    (("generate", "hi", *TINY, "--set", "engine.graphs=on"), "decode steps can't be captured"),
    (("chat", "hi"), "no model is named"),
    (("serve",), "no model is named"),
    (("bench", "throughput"), "no model is named"),
    (("bench", "serve"), "neither a server nor a model is named"),
    (("generate", "hi", "--model", "smollm2-135n"), "Did you mean 'smollm2-135m'?"),
    (("pull", "no-such-model"), "no model is named 'no-such-model'"),
    (("pull", "smollm2-135m", "--source", "hubb"), "Did you mean 'hub'?"),
    (("explain", "--attention", "sdpaa"), "Did you mean 'sdpa'?"),
    (("explain", "--platform", "cuda"), "can't be used here"),
    (("explain", "--scheduler", "acme/fcfs"), "acme"),
    (("explain", "/no/such/file.yaml"), "/no/such/file.yaml: can't read the file"),
    (("explain", "{folder}"), "can't read the file"),
    (("explain", "{broken}"), "broken.yaml:2"),
    (("explain", "{misspelt}"), "Did you mean 'attention'?"),
    (("explain", "{misspelt}", "--config", "{misspelt}"), "two configuration files"),
    (("explain", "--set", "garbage"), "not an assignment"),
    (("explain", "--set", "=1"), "not an assignment"),
    (("explain", "--set", "nothing.like=this"), "unknown setting 'nothing'"),
    (("explain", "--set", "scheduler.max_runing=1"), "max_running"),
    (("explain", "--set", "scheduler.max_running=[1"), "not valid YAML"),
    (("explain", "--set", "engine.max_waiting=none"), "engine.max_waiting"),
    (("explain", "--model", " "), "model must be a name"),
    (("plugins", "list", "--kind", "attentoin"), "Did you mean 'attention'?"),
    (("plugins", "info", "attention"), "KIND/NAME"),
    (("plugins", "info", "attention/"), "KIND/NAME"),
    (("plugins", "info", "nothing/sdpa"), "no kind of plugin is named 'nothing'"),
    (("plugins", "info", "attention/nothing"), "drivetrain plugins list --kind attention"),
    (("generate", "hi", *TINY, "--temperature", "nan"), "temperature"),
    (("generate", "hi", *TINY, "--top-p", "1.5"), "top_p"),
    (("generate", "hi", *TINY, "--n", "0"), "n must be"),
    (("generate", "hi", *TINY, "--max-tokens", "0"), "max_tokens"),
    (("generate", "hi", *TINY, "--max-tokens", "9999"), "Set max_tokens to at most 2046"),
    (("generate", "hi", *TINY, "--set", "engine.max_model_len=99999"), "max_model_len"),
    (("generate", "hi", *TINY, "--set", "engine.kv_memory=1KiB"), "engine.kv_memory"),
    (("generate", "hi", *TINY, "--set", "engine.fuse=maybe"), "engine.fuse: Input should be a valid boolean"),
    (("generate", "", *TINY), "the prompt is empty"),
    (("serve", *TINY, "--port", "70000"), "frontend.port"),
    (("serve", *TINY, "--set", "frontend.api_key=5"), "frontend.api_key: Input should be a valid string or"),
    (("serve", *TINY, "--set", "frontend.api_key=[a, 5]"), "frontend.api_key.1: Input should be"),
    (("bench", "serve", "--url", "http://127.0.0.1:1", "--scheduler", "fcfs"), "has chosen its parts"),
    (("serve", *TINY, "--host", "192.0.2.1"), "no address of this machine"),
    (("serve", *TINY, "--api-key", " "), "a key may not be empty"),
    (("bench", "throughput", *TINY, "--workload", "mixt"), "Did you mean 'mixed'?"),
    (("bench", "throughput", *TINY, "--requests", "0"), "--requests"),
    (("bench", "serve", *TINY, "--workload", "mixt"), "Did you mean 'mixed'?"),
    (("bench", "swap", *TINY, "--to", "engine=3"), "can't exchange its engine"),
    (("swap", "127.0.0.1:8000", "scheduler=fcfs"), "no address of a server"),
    (("swap", "http://127.0.0.1:8000", "scheduler"), "KIND=NAME: not an assignment"),
]


@pytest.fixture
def files(tmp_path: Path, tiny: Path) -> dict[str, str]:
    (tmp_path / "broken.yaml").write_text("model: x\n  attention: [\n")
    (tmp_path / "misspelt.yaml").write_text("attenton: sdpa\n")
    return {
        "tiny": str(tiny),
        "folder": str(tmp_path),
        "broken": str(tmp_path / "broken.yaml"),
        "misspelt": str(tmp_path / "misspelt.yaml"),
    }


@pytest.mark.parametrize(
    ("arguments", "says"), REFUSED, ids=[" ".join(line).replace("{", "")[:60] for line, _ in REFUSED]
)
def test_one_line_and_status_1(cli: Cli, files: dict[str, str], arguments: tuple[str, ...], says: str) -> None:
    outcome = cli(*(argument.format(**files) for argument in arguments))
    assert outcome.status == 1
    assert outcome.out == ""
    assert outcome.error.startswith("error: ")
    assert says in outcome.error
    assert "Traceback" not in outcome.err
    assert [line for line in outcome.err.splitlines() if not line.startswith("loading ")] == [outcome.error]
    assert any(step in outcome.error for step in NEXT_STEP), outcome.error


WRONG_USAGE = [
    ("nonsense",),
    ("generate",),
    ("generate", "one", "two"),
    ("generate", "hi", "--nonsense"),
    ("generate", "hi", "--max-tokens", "many"),
    ("generate", "hi", "--temperature"),
    ("plugins", "nonsense"),
    ("plugins", "info"),
    ("bench", "latency", "--batch", "0"),
    ("bench", "serve", "--rate", "-1"),
    ("explain", "--partitioner", "none"),
]


@pytest.mark.parametrize("arguments", WRONG_USAGE, ids=" ".join)
def test_wrong_usage_is_one_line_and_status_2(cli: Cli, arguments: tuple[str, ...]) -> None:
    outcome = cli(*arguments)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.splitlines() == [outcome.error]
    assert outcome.error.startswith("error: ")
    assert ". Run: drivetrain" in outcome.error
    assert outcome.error.endswith(" --help")


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_adds_the_traceback(cli: Cli, place: str) -> None:
    words = ("--debug", "explain") if place == "before" else ("explain", "--debug")
    outcome = cli(*words, "--attention", "nothing")
    assert outcome.status == 1
    assert outcome.err.startswith("error: ")
    assert "Traceback" in outcome.err
    assert "UnknownPluginError" in outcome.error


def test_debug_behind_two_dashes_is_an_argument_like_any_other(cli: Cli) -> None:
    outcome = cli("plugins", "info", "--", "--debug")
    assert outcome.status == 1
    assert "found '--debug'" in outcome.error
    assert "Traceback" not in outcome.err


def test_what_nobody_foresaw_is_one_line_too(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("drivetrain.cli.plugins.discover", fail)
    outcome = cli("plugins", "list")
    assert outcome.status == 1
    assert outcome.err.splitlines() == [outcome.error]
    assert outcome.error.startswith("error: unexpected ZeroDivisionError: first line second line. ")
    assert "--debug" in outcome.error
    assert "Traceback" in cli("plugins", "list", "--debug").err


def test_ctrl_c_while_a_class_is_made_is_an_interrupt(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11 makes a RuntimeError of what is raised in ``__set_name__``; commands import for half a second."""

    class Interrupted:
        def __set_name__(self, owner: type, name: str) -> None:
            raise KeyboardInterrupt

    def fail(*_: object, **__: object) -> None:
        type("Made", (), {"field": Interrupted()})

    monkeypatch.setattr("drivetrain.cli.plugins.discover", fail)
    outcome = cli("plugins", "list")
    assert (outcome.status, outcome.err.strip()) == (130, "interrupted")


def test_text_that_the_terminal_cannot_show_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    app._let_any_text_through()
    print("ä日\udcff")
    narrow.flush()
    assert narrow.buffer.getvalue() == b"???\n"  # type: ignore[attr-defined]


def test_a_command_without_output_streams_does_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a service manager that closes them: they are None then."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert app.run(["plugins", "list", "--kind", "scheduler"]) == 0
    assert app.run(["plugins", "list", "--kind", "nothing"]) == 1
    sys.stdout.close()
    sys.stderr.close()


def test_a_prompt_that_is_no_text_is_refused(tiny: Path) -> None:
    outcome = run_command("generate", "-", "--model", tiny, *ONE_THREAD, stdin=b"\xff\xfe")
    assert outcome.returncode == 1
    assert outcome.stderr.splitlines()[-1].startswith("error: the text is not valid Unicode")
