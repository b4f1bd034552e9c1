"""``drivetrain serve`` as people run it: a process of its own, the official client, bad input, signals."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drivetrain.native import find_compiler
from drivetrain.plugins.frontend.openai.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from support.command_line import MAX_MODEL_LEN, ServedChild, child, read_until, served_child

MIB = 1024 * 1024
KEY = "a-key-that-stays-here"
HELLO = [{"role": "user", "content": "Hello there"}]
PATHS = {
    "/v1/chat/completions": (ChatBody, {"messages": HELLO, "max_tokens": 4, "timeout_seconds": 0.3}),
    "/v1/completions": (CompletionBody, {"prompt": "The quick", "max_tokens": 4, "timeout_seconds": 0.3}),
    "/tokenize": (TokenizeBody, {"prompt": "The quick"}),
    "/detokenize": (DetokenizeBody, {"tokens": [70, 71]}),
}
METRICS = (
    "drivetrain_waiting",
    "drivetrain_running",
    "drivetrain_prompt_tokens_total",
    "drivetrain_output_tokens_total",
    "drivetrain_time_to_first_token_seconds_bucket",
    "drivetrain_time_per_token_seconds_bucket",
    "drivetrain_queue_seconds_bucket",
    "drivetrain_kv_usage_ratio",
    "drivetrain_prefix_lookup_tokens_total",
    "drivetrain_prefix_hit_tokens_total",
    "drivetrain_preemptions_total",
    "drivetrain_fallbacks_total",
)


@pytest.fixture(scope="module")
def served(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedChild]:
    with served_child(tiny, tmp_path_factory.mktemp("served") / "log") as running:
        yield running
        assert "Traceback" not in running.errors()


@pytest.fixture(scope="module")
def small(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedChild]:
    """A server with a key that runs one sequence at a time and lets one more wait."""
    limits = ("--set", "engine.max_waiting=1", "--set", "scheduler.max_running=1", "--api-key", KEY)
    with served_child(tiny, tmp_path_factory.mktemp("small") / "log", *limits) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: ServedChild) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def name_of(served: ServedChild) -> str:
    return str(served.get("/v1/models").json()["data"][0]["id"])


def wait_until_empty(served: ServedChild, limit: float = 10) -> dict[str, Any]:
    """The engine's counters once it holds nothing."""
    give_up = time.monotonic() + limit
    while True:
        stats, health = served.get("/debug/stats").json(), served.get("/health").json()
        if health["status"] == "idle" and not (stats["kv_usage"] or stats["running"] or stats["waiting"]):
            return dict(stats)
        assert time.monotonic() < give_up, (stats, health)
        time.sleep(0.02)


def metric(served: ServedChild, name: str) -> float:
    line = next(line for line in served.get("/metrics").text.splitlines() if line.startswith(name))
    return float(line.split()[-1])


# --- the official client ---------------------------------------------------------------------------------------------


def test_the_official_client_chats_streams_and_completes(served: ServedChild, client: openai.OpenAI) -> None:
    model = name_of(served)
    asked: dict[str, Any] = {"model": model, "messages": HELLO, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert whole.choices[0].message.content
    completion = client.completions.create(model=model, prompt="The quick", max_tokens=5, n=2, logprobs=2)
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert len(completion.choices[0].logprobs.token_logprobs) <= 5


def test_sixty_four_streams_at_once_leave_nothing(served: ServedChild) -> None:
    async def all_at_once() -> list[int]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            model = (await client.models.list()).data[0].id

            async def one(number: int) -> int:
                stream = await client.completions.create(
                    model=model,
                    prompt=f"The number {number}",
                    max_tokens=16,
                    temperature=0,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body={"ignore_eos": True},
                )
                return [chunk.usage.completion_tokens async for chunk in stream if chunk.usage][-1]

            return await asyncio.gather(*(one(number) for number in range(64)))

    before = metric(served, "drivetrain_output_tokens_total")
    assert asyncio.run(all_at_once()) == [16] * 64
    assert metric(served, "drivetrain_output_tokens_total") - before == 64 * 16
    wait_until_empty(served)


def test_a_client_that_leaves_a_stream_frees_its_blocks(served: ServedChild, client: openai.OpenAI) -> None:
    options = {"max_tokens": 1900, "extra_body": {"ignore_eos": True}, "stream": True}
    stream = client.chat.completions.create(model=name_of(served), messages=HELLO, **options)
    for _, chunk in zip(range(5), stream, strict=False):
        assert chunk.choices
    busy = served.get("/health").json()
    assert (busy["status"], busy["running"]) == ("busy", 1)
    before = metric(served, "drivetrain_output_tokens_total")
    stream.close()
    wait_until_empty(served)
    assert metric(served, "drivetrain_output_tokens_total") - before < 1000


def test_the_second_asking_finds_the_prefix_and_says_the_same(served: ServedChild, client: openai.OpenAI) -> None:
    prompt = "A long beginning that both have in common. " * 8
    options = {"model": name_of(served), "prompt": prompt, "temperature": 0, "max_tokens": 12}
    first, second = (client.completions.create(**options) for _ in range(2))
    assert first.choices[0].text == second.choices[0].text
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens > 0
    assert served.get("/debug/stats").json()["prefix_hit_rate"] > 0


def test_metrics_say_all_that_is_promised(served: ServedChild) -> None:
    served.post("/v1/completions", {"prompt": "The quick", "max_tokens": 3})
    text = served.get("/metrics").text
    for name in METRICS:
        assert f"\n{name}" in text, name
    wait_until_empty(served)
    assert metric(served, "drivetrain_kv_usage_ratio") == 0
    assert metric(served, "drivetrain_running") == 0


def test_the_selection_is_served(served: ServedChild) -> None:
    selection = served.get("/debug/selection").json()
    best = "paged-cpu" if find_compiler() else "sdpa"
    assert {s["kind"]: s["chosen"]["name"] for s in selection["selections"]}["attention"] == best
    assert len(selection["plan_digest"]) == 64


def test_the_pages_come_whole_and_load_nothing_from_elsewhere(served: ServedChild) -> None:
    for path, wanted in (("/", "/v1/chat/completions"), ("/docs", "/openapi.json")):
        page = served.get(path)
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert wanted in page.text
        for outside in ("//cdn", 'src="http', 'href="http', "@import"):
            assert outside not in page.text


# --- bad input -------------------------------------------------------------------------------------------------------


def check_refusal(response: httpx.Response) -> None:
    """A clear error of the client's, in the API's format."""
    assert response.status_code in (400, 404, 408, 413, 415), (response.status_code, response.text)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) < 2100


def check_answer(response: httpx.Response) -> None:
    """What any body may come to: an answer or a refusal."""
    if response.status_code != 200:
        check_refusal(response)


@pytest.fixture(scope="module")
def raw(served: ServedChild) -> Iterator[httpx.Client]:
    """Sends anything; the server holds as many threads and files after the module as before."""
    with httpx.Client(base_url=served.url, timeout=60) as client:
        client.post("/v1/completions", json={"prompt": "word " * 4000})  # long texts are encoded in a thread of a pool
        yield client
    wait_until_empty(served)


def resources(served: ServedChild) -> tuple[int, int]:
    process = Path("/proc", str(served.process.pid))
    return len(list((process / "task").iterdir())), len(list((process / "fd").iterdir()))


@pytest.fixture
def leaves_nothing(served: ServedChild, raw: httpx.Client) -> Iterator[None]:
    """The test may not cost the server a block, a thread or a file."""
    wait_until_empty(served)
    before = resources(served)
    yield
    wait_until_empty(served)
    give_up = time.monotonic() + 5
    while any(now > then for now, then in zip(resources(served), before, strict=True)):
        assert time.monotonic() < give_up, (before, resources(served))
        time.sleep(0.05)
    assert raw.post("/v1/completions", json={"prompt": "The quick", "max_tokens": 2}).status_code == 200


BAD: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/completions", {"prompt": "x", "model": "gpt-9"}, 404),
    ("/v1/chat/completions", {"messages": HELLO, "model": ""}, 404),
    ("/v1/completions", {"prompt": [288]}, 400),
    ("/v1/completions", {"prompt": [-1]}, 400),
    ("/v1/completions", {"prompt": [2**31 - 1]}, 400),
    ("/v1/completions", {"prompt": [2**70]}, 400),
    ("/v1/completions", {"prompt": ""}, 400),
    ("/v1/completions", {"prompt": []}, 400),
    ("/v1/completions", {"prompt": [[]]}, 400),
    ("/v1/completions", {"prompt": ["fine", ""]}, 400),
    ("/v1/completions", {"prompt": [65] * MAX_MODEL_LEN}, 400),
    ("/v1/completions", {"prompt": "word " * 200_000}, 400),
    ("/v1/completions", {"prompt": "x", "max_tokens": MAX_MODEL_LEN}, 400),
    ("/v1/completions", {"prompt": "x", "max_tokens": 10**30}, 400),
    ("/v1/completions", {"prompt": "x", "stop_token_ids": [288]}, 400),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"288": 1}}, 400),
    ("/v1/completions", {"prompt": "x", "stop": ["a"] * 1000}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 500_000}]}, 400),
    ("/detokenize", {"tokens": [288]}, 400),
    ("/detokenize", {"tokens": [-1]}, 400),
    ("/detokenize", {"tokens": [2**70]}, 400),
    ("/tokenize", {}, 400),
]


@pytest.mark.usefixtures("leaves_nothing")
def test_bad_input_gets_its_status(raw: httpx.Client) -> None:
    for path, body, status in BAD:
        response = raw.post(path, json=body)
        assert response.status_code == status, (path, str(body)[:80], response.text)
        check_refusal(response)


@pytest.mark.usefixtures("leaves_nothing")
@pytest.mark.parametrize("path", PATHS)
def test_broken_bodies_get_a_refusal(raw: httpx.Client, path: str) -> None:
    bodies: list[tuple[bytes, int]] = [
        (b"", 400),
        (b"{", 400),
        (b"null", 400),
        (b"\x00\xff\xfe", 400),
        (b'{"prompt": "x", "temperature": NaN}', 400),
        (b'{"prompt": "x", "top_p": Infinity}', 400),
        (b'{"prompt": "x", "top_p": 1e999}', 400),
        (b'{"a": ' * 100_000, 400),
        (json.dumps({"prompt": "x" * (10 * MIB)}).encode(), 413),
    ]
    for body, status in bodies:
        response = raw.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == status, (body[:40], response.text)
        check_refusal(response)


@pytest.mark.usefixtures("leaves_nothing")
@pytest.mark.parametrize("path", PATHS)
def test_a_wrong_type_in_any_field_is_an_answer_or_a_refusal(raw: httpx.Client, path: str) -> None:
    schema, good = PATHS[path]
    wrong = (None, True, "x", -1, 0, 1.5, 1e300, 2**70, [], {}, [[]], [None], {"a": {"b": []}}, "\x00")
    for name in schema.model_fields:
        for value in wrong:
            check_answer(raw.post(path, json=good | {name: value}))


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.usefixtures("leaves_nothing")
@pytest.mark.parametrize("path", PATHS)
def test_any_json_is_an_answer_or_a_refusal(raw: httpx.Client, path: str) -> None:
    schema, good = PATHS[path]
    fields = st.sampled_from(sorted(schema.model_fields)) | st.text(max_size=8)

    @given(changes=st.dictionaries(fields, ANY_JSON, max_size=3), is_whole=st.booleans())
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def check(changes: dict[str, Any], is_whole: bool) -> None:
        content = json.dumps((good | changes) if is_whole else changes)
        check_answer(raw.post(path, content=content, headers={"content-type": "application/json"}))

    check()


@pytest.mark.usefixtures("leaves_nothing")
def test_what_is_not_even_http_is_dropped(served: ServedChild) -> None:
    port = int(served.url.rsplit(":", 1)[1])
    garbage = (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{",
        b"",
    )
    for data in garbage:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            try:
                while connection.recv(65536):
                    pass
            except ConnectionResetError:
                continue  # a refusal too


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_key_is_asked_for(small: ServedChild) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}):
        refused = small.post("/v1/completions", {"prompt": "x"}, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    right = {"authorization": f"Bearer {KEY}"}
    assert small.post("/v1/completions", {"prompt": "x", "max_tokens": 2}, headers=right).status_code == 200
    shown = httpx.get(f"{small.url}/debug/selection", headers=right).text
    assert KEY not in shown + small.errors()


def test_more_than_may_wait_is_turned_away(small: ServedChild) -> None:
    body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True}
    headers = {"authorization": f"Bearer {KEY}"}

    def one(_: int) -> httpx.Response:
        return small.post("/v1/completions", body, headers=headers)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(8)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(refused) in range(1, 8)
    for answer in refused:
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert answer.headers["retry-after"] == "1"
    assert one(0).status_code == 200


def test_time_runs_out_in_the_queue_and_while_it_runs(small: ServedChild) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    long = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True}
    first = threading.Thread(target=lambda: small.post("/v1/completions", long, headers=headers))
    first.start()
    while not small.get("/health").json()["running"]:
        time.sleep(0.01)
    late = small.post("/v1/completions", long | {"timeout_seconds": 0.1}, headers=headers)
    assert (late.status_code, late.json()["error"]["code"]) == (408, "timeout")
    first.join()
    cut = small.post("/v1/completions", long | {"timeout_seconds": 0.2}, headers=headers).json()["choices"][0]
    assert cut["finish_reason"] == "timeout"
    assert cut["text"]


# --- beginning and end -----------------------------------------------------------------------------------------------


def lines_of(url: str, max_tokens: int, heard: Callable[[], None]) -> list[str]:
    """The lines of one stream; ``heard`` is called after the fifth."""
    body = {"prompt": "abcd", "stream": True, "max_tokens": max_tokens, "ignore_eos": True}
    seen = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
        assert response.status_code == 200
        try:
            for line in response.iter_lines():
                if line:
                    seen.append(line)
                    if len(seen) == 5:
                        heard()
        except httpx.RemoteProtocolError:
            seen.append("cut off")
    return seen


def test_a_signal_lets_streams_finish_and_ends_well(tiny: Path, tmp_path: Path) -> None:
    with served_child(tiny, tmp_path / "log") as served:
        refused: list[httpx.Response] = []

        def ask_to_stop() -> None:
            served.process.send_signal(signal.SIGTERM)
            give_up = time.monotonic() + 5
            while served.get("/health").status_code != 503:
                assert time.monotonic() < give_up
            refused.append(served.post("/v1/completions", {"prompt": "x"}))

        lines = lines_of(served.url, 1500, ask_to_stop)
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert (refused[0].status_code, refused[0].json()["error"]["code"]) == (503, "draining")
        assert served.process.wait(10) == 0
        assert "Traceback" not in served.errors()


def test_a_second_signal_does_not_wait(tiny: Path, tmp_path: Path) -> None:
    with served_child(tiny, tmp_path / "log") as served:

        def stop_twice() -> None:
            served.process.send_signal(signal.SIGINT)
            while served.get("/health").status_code != 503:
                pass
            served.process.send_signal(signal.SIGTERM)

        lines = lines_of(served.url, 2000, stop_twice)
        assert "data: [DONE]" not in lines
        assert served.process.wait(3) == 0
        assert "Traceback" not in served.errors()


def test_a_port_in_use_is_told_before_the_model_is_loaded(served: ServedChild, tiny: Path) -> None:
    port = served.url.rsplit(":", 1)[1]
    with child("serve", "--model", tiny, "--port", port) as second:
        assert second.wait(30) == 1
        errors = read_until(second.stderr, b"never").decode()
    assert errors.splitlines()[-1].startswith("error: ")
    assert f"port {port} of 127.0.0.1 is in use" in errors
    assert "loading" not in errors
    assert len(errors.splitlines()) == 1
