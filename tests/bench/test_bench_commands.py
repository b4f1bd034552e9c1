"""``drivetrain bench``: the figures are whole, and they add up."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import LLM, AsyncEngine
from drivetrain.bench.http_load import Goal, find_model, run_load
from drivetrain.bench.workloads import make_workload
from drivetrain.config import load_settings
from drivetrain.errors import ConfigError
from support.command_line import ONE_THREAD
from support.live_server import LiveServer

Cli = Callable[..., Any]

TIMES = ("time_to_first_token_seconds", "time_per_token_seconds", "request_seconds")


@pytest.fixture
def on(tiny: Path) -> tuple[object, ...]:
    return ("--model", tiny, *ONE_THREAD, "--json")


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[LiveServer]:
    torch.set_num_threads(1)
    settings = load_settings(None, {"model": str(tiny), "platform": {"name": "cpu", "threads": 1}})
    engine = AsyncEngine.from_settings(settings)
    engine.start()
    with LiveServer(engine) as running:
        yield running


def check_times(result: dict[str, Any]) -> None:
    for name in TIMES:
        spread = result[name]
        assert set(spread) == {"mean", "p50", "p90", "p99"}
        assert 0 < spread["p50"] <= spread["p90"] <= spread["p99"]
    assert result["time_to_first_token_seconds"]["p99"] <= result["request_seconds"]["p99"]


# --- throughput ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", ["mixed", "shared-prefix"])
def test_throughput_adds_up(cli: Cli, on: tuple[object, ...], workload: str) -> None:
    outcome = cli("bench", "throughput", *on, "--workload", workload, "--requests", 6, "--seed", 3)
    assert outcome.status == 0
    result = json.loads(outcome.out)
    items = make_workload(workload, 6, 288, 3)
    assert result["requests"] == 6
    assert result["prompt_tokens"] == sum(len(item.prompt) for item in items)
    assert result["output_tokens"] == sum(item.max_tokens for item in items)
    total = result["prompt_tokens"] + result["output_tokens"]
    assert result["output_tokens_per_second"] * result["seconds"] == pytest.approx(result["output_tokens"])
    assert result["total_tokens_per_second"] * result["seconds"] == pytest.approx(total)
    assert result["requests_per_second"] * result["seconds"] == pytest.approx(6)
    check_times(result)
    assert result["request_seconds"]["p99"] <= result["seconds"]
    assert result["peak_memory_bytes"] > 10 * 2**20
    assert 0 < result["peak_kv_usage"] <= 1
    assert result["preemptions"] == 0
    assert result["steps"] >= max(item.max_tokens for item in items)
    assert {"workload", "seed", "model", "drivetrain", "torch", "threads", "machine", "plan_digest"} <= result.keys()
    assert result["threads"] == 1
    assert {"platform", "attention", "scheduler", "quantizer"} <= result["parts"].keys()
    assert (result["prefix_hit_rate"] > 0.5) == (workload == "shared-prefix")


def check_phases(result: dict[str, Any]) -> None:
    phases = result["step_phase_seconds"]
    assert set(phases) == {"schedule", "prepare", "model", "sample", "output"}
    assert all(seconds > 0 for seconds in phases.values())
    outside = sum(phases.values()) - phases["model"]
    assert result["outside_the_model_share"] == pytest.approx(outside / sum(phases.values()))


@pytest.mark.parametrize("command", ["throughput", "latency"])
def test_a_profile_shows_each_step_with_its_phases_inside(
    cli: Cli, on: tuple[object, ...], tmp_path: Path, command: str
) -> None:
    sizes = ("--requests", 2) if command == "throughput" else ("--prompt-length", 8, "--output-length", 4)
    file = tmp_path / "trace.json"
    outcome = cli("bench", command, *on, *sizes, "--profile", file)
    assert f"The profile is in {file}" in outcome.err
    result = json.loads(outcome.out)
    check_phases(result)
    events = json.loads(file.read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    slices = [event for event in events if event["ph"] == "X" and event["tid"] == 1]
    steps = [event for event in slices if event["name"].startswith("step ")]
    phases = [event for event in slices if not event["name"].startswith("step ")]
    assert len(steps) >= result["steps"]
    assert {event["name"] for event in phases} == set(result["step_phase_seconds"])
    assert min(event["ts"] for event in steps) == 0
    spans = [(step["ts"] - 0.01, step["ts"] + step["dur"] + 0.01) for step in steps]
    for event in phases:
        assert any(begin <= event["ts"] and event["ts"] + event["dur"] <= end for begin, end in spans)
    counters = {event["name"]: event["args"] for event in events if event["ph"] == "C"}
    assert set(counters["requests"]) == {"running", "waiting"}
    assert "kv use" in counters
    assert {event["args"]["name"] for event in events if event["name"] == "thread_name"} == {
        "engine: steps and their phases",
        "model: as it computes",
    }


def test_a_profile_that_cannot_be_written_is_told_before_anything_is_loaded(cli: Cli, on: tuple[object, ...]) -> None:
    outcome = cli("bench", "throughput", *on, "--profile", "/no/such/folder/trace.json")
    assert outcome.status == 1
    assert "the profile can't be written" in outcome.error


def test_without_the_prefix_cache_there_are_no_hits(cli: Cli, on: tuple[object, ...]) -> None:
    words = ("--workload", "shared-prefix", "--requests", 3, "--set", "engine.prefix_cache=false")
    assert json.loads(cli("bench", "throughput", *on, *words).out)["prefix_hit_rate"] == 0


def test_for_people_there_is_a_table(cli: Cli, on: tuple[object, ...]) -> None:
    outcome = cli("bench", "throughput", *on[:-1], "--requests", 2)
    assert outcome.out.startswith("figure")
    assert "output tokens per second" in outcome.out
    assert "MiB" in outcome.out
    assert "generating: 2 of 2 requests" in outcome.err


def test_drawn_tokens_are_told_and_are_the_same_in_each_run(
    cli: Cli, on: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[tuple[int, ...]]] = []
    generate = LLM.generate

    def noted(self: LLM, prompts: Any, params: Any, **others: Any) -> Any:
        results = generate(self, prompts, params, **others)
        drawn.append([tuple(result.token_ids) for result in results])
        return results

    monkeypatch.setattr(LLM, "generate", noted)
    words, draw = ("bench", "throughput", *on, "--requests", 3), ("--temperature", 1, "--top-p", 0.9)
    greedy, first, second = (json.loads(cli(*words, *more).out) for more in ((), draw, draw))
    assert greedy["sampling"] == {"temperature": 0}
    assert first["sampling"] == second["sampling"] == {"temperature": 1, "seed": 0, "top_p": 0.9}
    assert drawn[1] == drawn[2] != drawn[0]
    assert greedy["output_tokens"] == first["output_tokens"]


@pytest.mark.parametrize("command", ["throughput", "latency", "serve"])
def test_a_choice_of_tokens_that_cannot_be_is_told_before_anything_is_loaded(cli: Cli, command: str) -> None:
    words = ("bench", command, "--model", "no-such-model")
    outcome = cli(*words, "--top-k", 5)
    assert outcome.status == 1
    assert outcome.error.startswith("error: --top-k: greedy tokens are not drawn")
    assert "found 5. Give --temperature too" in outcome.error
    assert "top_p" in cli(*words, "--temperature", 1, "--top-p", 1.5).error


@pytest.mark.parametrize("words", [("throughput",), ("latency", "--prompt-length", "100")])
def test_work_that_does_not_fit_the_model_is_refused(cli: Cli, on: tuple[object, ...], words: tuple[str, ...]) -> None:
    outcome = cli("bench", *words, *on, "--set", "engine.max_model_len=200")
    assert outcome.status == 1
    assert "does not fit the model" in outcome.error
    assert "allowed: 1 to 200" in outcome.error


# --- latency ---------------------------------------------------------------------------------------------------------


def test_latency_tells_prompt_and_decode_apart(cli: Cli, on: tuple[object, ...]) -> None:
    words = ("--prompt-length", 24, "--output-length", 8, "--batch", 2, "--iterations", 3)
    result = json.loads(cli("bench", "latency", *on, *words).out)
    assert (result["batch"], result["prompt_length"], result["output_length"], result["iterations"]) == (2, 24, 8, 3)
    check_times(result)
    first, token = result["time_to_first_token_seconds"]["p50"], result["time_per_token_seconds"]["p50"]
    assert result["prompt_tokens_per_second"] == pytest.approx(2 * 24 / first, rel=0.01)
    assert result["decode_tokens_per_second"] == pytest.approx(2 / token, rel=0.01)
    assert {"seed", "model", "threads", "parts", "peak_memory_bytes"} <= result.keys()


# --- serve -----------------------------------------------------------------------------------------------------------


def check_load(result: dict[str, Any], num_requests: int, seed: int) -> None:
    items = make_workload("mixed", num_requests, 288, seed)
    assert (result["requests"], result["failed"], result["errors"]) == (num_requests, 0, {})
    assert result["output_tokens"] == sum(item.max_tokens for item in items)
    assert result["output_tokens_per_second"] * result["seconds"] == pytest.approx(result["output_tokens"])
    assert result["requests_per_second"] * result["seconds"] == pytest.approx(num_requests)
    check_times(result)
    assert 0 <= result["goal_met_share"] <= 1
    assert result["goodput_requests_per_second"] <= result["requests_per_second"]


def test_a_server_is_started_measured_and_stopped(cli: Cli, on: tuple[object, ...]) -> None:
    words = ("--requests", 5, "--rate", 50, "--seed", 4, "--goal-first-token", 60, "--goal-token", 60)
    outcome = cli("bench", "serve", *on, *words, "--set", "frontend.host=localhost")
    assert outcome.status == 0, outcome.err
    result = json.loads(outcome.out)
    check_load(result, 5, seed=4)
    assert result["goal_met_share"] == 1
    assert result["goodput_requests_per_second"] == result["requests_per_second"]
    refused = cli("bench", "serve", "--url", result["url"])
    assert "no server answers" in refused.error


def test_a_running_server_is_measured(cli: Cli, server: LiveServer) -> None:
    words = ("--url", f"{server.url}/", "--requests", 4, "--rate", 100, "--json")
    result = json.loads(cli("bench", "serve", *words, "--goal-first-token", 0).out)
    check_load(result, 4, seed=0)
    assert (result["goal_met_share"], result["goodput_requests_per_second"]) == (0, 0)
    assert (result["url"], result["model"]) == (server.url, server.model)
    assert server.seconds_until_idle() < 1
    other = cli("bench", "serve", *words, "--model", "another")
    assert other.status == 1
    assert "does not serve this model; found 'another'" in other.error
    assert json.loads(cli("bench", "serve", *words, "--model", server.model).out)["model"] == server.model


def test_a_server_is_asked_to_draw(cli: Cli, server: LiveServer) -> None:
    words = ("--url", server.url, "--requests", 2, "--rate", 100, "--json")
    result = json.loads(cli("bench", "serve", *words, "--temperature", 0.7, "--top-k", 5, "--seed", 2).out)
    assert result["failed"] == 0
    assert result["sampling"] == {"temperature": 0.7, "seed": 2, "top_k": 5}


def test_arrivals_are_as_frequent_as_asked(cli: Cli, server: LiveServer) -> None:
    result = json.loads(cli("bench", "serve", "--url", server.url, "--requests", 12, "--rate", 12, "--json").out)
    assert result["rate_offered"] == 12
    assert 0.3 < result["seconds"] < 5


def test_work_that_does_not_fit_a_running_server_is_not_sent(server: LiveServer) -> None:
    model = dataclasses.replace(find_model(server.url), max_model_len=100)
    load = run_load(model, make_workload("mixed", 2, 288, 0), rate=1, goal=Goal(1, 1), seed=0)
    with pytest.raises(ConfigError, match="does not fit the model"):
        asyncio.run(load)


def test_what_a_server_refuses_is_counted_or_told(cli: Cli, server: LiveServer) -> None:
    words = ("--url", server.url, "--requests", 2, "--rate", 100)
    outcome = cli("bench", "serve", *words, "--vocab-size", 100_000)
    assert outcome.status == 1
    assert "no request was answered" in outcome.error
    assert "outside the vocabulary" in outcome.error


def test_a_server_that_does_not_start_says_why(cli: Cli, tiny: Path) -> None:
    outcome = cli("bench", "serve", "--model", tiny, "--attention", "sdpaa")
    assert outcome.status == 1
    assert "ended with status 1" in outcome.error
    assert "Did you mean 'sdpa'?" in outcome.error
    assert "serve.yaml" not in outcome.error


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://[", "http://no-such-host.invalid"])
def test_a_server_that_is_not_there_is_one_line(cli: Cli, url: str) -> None:
    outcome = cli("bench", "serve", "--url", url)
    assert outcome.status == 1
    assert outcome.err.splitlines() == [outcome.error]
    assert "no server answers" in outcome.error


def test_a_key_is_sent_and_missed(cli: Cli, server: LiveServer) -> None:
    with LiveServer(server.engine, api_key="a-key") as closed:
        words = ("--url", closed.url, "--requests", 2, "--rate", 100, "--json")
        refused = cli("bench", "serve", *words)
        assert "Give one with --api-key" in refused.error
        assert json.loads(cli("bench", "serve", *words, "--api-key", "a-key").out)["failed"] == 0


@pytest.fixture
def stranger() -> Iterator[str]:
    """The address of an HTTP server that speaks another language."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": []}' if self.path == "/empty/v1/models" else b"<html>")

        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.mark.parametrize("path", ["", "/empty"])
def test_another_sort_of_server_is_told_apart(cli: Cli, stranger: str, path: str) -> None:
    outcome = cli("bench", "serve", "--url", stranger + path)
    assert outcome.status == 1
    assert "lists no models" in outcome.error
