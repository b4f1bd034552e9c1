"""The frontend in a process of its own: signals, exit codes, output, and what it imports."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

TESTS = Path(__file__).parents[2]
KEY = "a-key-that-stays-here"

SERVE = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from support.fake_engine import FakeEngine
from drivetrain.plugins.frontend.openai import OpenAIFrontend
frontend = OpenAIFrontend(OpenAIFrontend.Config(port=0, api_key={KEY!r}, drain_seconds=20))
frontend.reserve()
frontend.serve(FakeEngine(seconds_per_token=0.02))
print("stopped", flush=True)
"""


@contextmanager
def served() -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(SERVE)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Serving fake-echo at http://127.0.0.1:"), line
        yield process, line.split()[3]
    finally:
        process.kill()
        process.communicate()


def wait_until_up(url: str) -> None:
    give_up = time.monotonic() + 20
    while True:
        try:
            assert httpx.get(f"{url}/health").status_code == 200
            return
        except httpx.ConnectError:
            assert time.monotonic() < give_up
            time.sleep(0.02)


def stream_of(url: str, max_tokens: int) -> Iterator[str]:
    body = {"prompt": "abcd", "stream": True, "max_tokens": max_tokens, "ignore_eos": True}
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=30) as response:
        assert response.status_code == 200
        yield from (line for line in response.iter_lines() if line)


def until_cut_off(lines: Iterator[str]) -> list[str]:
    seen = []
    try:
        for line in lines:
            seen.append(line)
    except httpx.RemoteProtocolError:
        seen.append("cut off")
    return seen


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_the_process_ends_well(number: signal.Signals) -> None:
    with served() as (process, url):
        wait_until_up(url)
        lines = stream_of(url, max_tokens=40)
        next(lines)
        process.send_signal(number)
        rest = list(lines)
        assert rest[-1] == "data: [DONE]"
        assert len(rest) == 40
        output, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
        assert "stopped" in output
        assert "Traceback" not in errors
        assert KEY not in output + errors


def test_a_second_signal_stops_at_once() -> None:
    with served() as (process, url):
        wait_until_up(url)
        lines = stream_of(url, max_tokens=3000)
        next(lines)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=5)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        assert "data: [DONE]" not in until_cut_off(lines)


def test_describing_the_plugin_imports_neither_torch_nor_a_web_framework() -> None:
    code = """
        import sys
        from drivetrain.plugins.frontend.openai import OpenAIFrontend
        from drivetrain.contracts import ProbeContext
        assert OpenAIFrontend.probe(ProbeContext()).ok
        OpenAIFrontend.Config.model_json_schema()
        heavy = {"torch", "fastapi", "starlette", "uvicorn"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)
