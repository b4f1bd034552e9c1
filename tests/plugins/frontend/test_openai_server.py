"""What the frontend makes of an engine's answers, faults and limits, and who may come in."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import httpx
import openai
import pydantic
import pytest

from drivetrain.errors import ConfigError
from drivetrain.plugins.frontend.openai import OpenAIConfig, OpenAIFrontend
from drivetrain.serving.types import GenerationRequest, SamplingParams
from support.fake_engine import FAIL, ByteTokenizer, FakeEngine, FakeHealth
from support.live_server import LiveServer

HELLO = [{"role": "user", "content": "Hello, wörld 🙂!"}]


def ask(server: LiveServer, **options: Any) -> Any:
    settings = {"model": server.model, "messages": HELLO} | options
    return server.client().chat.completions.create(**settings)


def test_text_arrives_unharmed_in_any_script(server: LiveServer) -> None:
    for text in ("Hello, wörld 🙂!", 'quotes " and \\ and\nlines\r\n', "\u2028 \x85 \x00", "日本語 العربية"):
        messages = [{"role": "user", "content": text}]
        assert ask(server, messages=messages).choices[0].message.content == text
        chunks = ask(server, messages=messages, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == text


def test_a_request_reaches_the_engine_with_every_setting(server: LiveServer, engine: FakeEngine) -> None:
    extensions = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [7],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "priority": -3,
        "timeout_seconds": 9.5,
    }
    ask(
        server,
        max_tokens=4,
        n=2,
        temperature=0.5,
        top_p=0.9,
        seed=11,
        stop=["#"],
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias={"65": 1.5},
        logprobs=True,
        top_logprobs=2,
        extra_body=extensions,
    )
    params = SamplingParams(
        max_tokens=4,
        min_tokens=2,
        n=2,
        temperature=0.5,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        frequency_penalty=0.3,
        presence_penalty=0.2,
        logit_bias={65: 1.5},
        seed=11,
        stop=["#"],
        stop_token_ids=[7],
        include_stop=True,
        ignore_eos=True,
        logprobs=2,
        skip_special_tokens=False,
    )
    prompt = "\x1euser: " + str(HELLO[0]["content"])
    expected = GenerationRequest(prompt, params, -3, 9.5, add_special_tokens=False, is_streamed=False)
    assert engine.requests[-1] == expected


def test_what_a_request_leaves_out_comes_from_the_model_and_then_from_openai() -> None:
    engine = FakeEngine(defaults={"temperature": 0.6, "top_k": 40, "unrelated": 1})
    with LiveServer(engine, request_timeout_seconds=77) as server:
        ask(server)
        request = engine.requests[-1]
        assert (request.params.temperature, request.params.top_k, request.params.top_p) == (0.6, 40, 1.0)
        assert request.params.max_tokens is None
        assert request.timeout_seconds == 77
        ask(server, temperature=0.1)
        assert engine.requests[-1].params.temperature == 0.1


def test_a_limit_longer_than_the_servers_is_refused(server: LiveServer) -> None:
    response = server.post("/v1/completions", {"prompt": "x", "timeout_seconds": 601})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "timeout_seconds"


def test_the_prefix_cache_shows_in_the_usage(server: LiveServer) -> None:
    answers = [server.client().completions.create(model=server.model, prompt="seen twice") for _ in range(2)]
    assert [answer.usage.prompt_tokens_details.cached_tokens for answer in answers] == [0, 11]


def test_a_failure_of_the_engine_is_a_500_with_its_words(server: LiveServer) -> None:
    with pytest.raises(openai.InternalServerError, match="as it was asked to") as raised:
        ask(server, messages=[{"role": "user", "content": FAIL}])
    assert raised.value.code == "engine_error"


def test_a_failure_in_a_stream_is_its_last_event(server: LiveServer) -> None:
    body = {"messages": [{"role": "user", "content": FAIL}], "stream": True}
    lines = [line for line in server.post("/v1/chat/completions", body).text.split("\n\n") if line]
    assert '"code":"engine_error"' in lines[-1]
    assert "data: [DONE]" not in lines
    assert len(lines) == 4  # the role, two tokens, the error


def test_one_refused_prompt_of_a_list_cancels_the_others(server: LiveServer, engine: FakeEngine) -> None:
    before = len(engine.cancelled)
    response = server.post("/v1/completions", {"prompt": [[65], [66], [9999]], "max_tokens": 3000, "ignore_eos": True})
    assert response.status_code == 400
    assert len(engine.cancelled) == before + 2
    assert not engine.active


def test_an_expired_request_keeps_the_text_it_has() -> None:
    with LiveServer(FakeEngine(seconds_per_token=0.05)) as server:
        body = {"prompt": "abcdefgh", "max_tokens": 500, "ignore_eos": True, "timeout_seconds": 0.4}
        choice = server.post("/v1/completions", body).json()["choices"][0]
        assert choice["finish_reason"] == "timeout"
        assert choice["text"].startswith("a")


def test_a_full_queue_is_a_429_that_says_when_to_try_again() -> None:
    with LiveServer(FakeEngine(capacity=1, seconds_per_token=0.01)) as server:
        first = ask(server, stream=True, max_tokens=2000, extra_body={"ignore_eos": True})
        next(iter(first))
        response = server.post("/v1/completions", {"prompt": "x"})
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"] | {"message": ""} == {
            "message": "",
            "type": "rate_limit_error",
            "param": None,
            "code": "queue_full",
        }
        first.close()


@pytest.mark.parametrize(
    ("state", "status"), [("idle", 200), ("busy", 200), ("stalled", 503), ("failed", 503), ("draining", 503)]
)
def test_health_means_progress(state: str, status: int) -> None:
    engine = FakeEngine()
    engine.forced_health = FakeHealth(state, running=3, waiting=2, seconds_since_progress=1.5, error="why")
    with LiveServer(engine) as server:
        response = server.get("/health")
    assert response.status_code == status
    assert response.json() == {
        "status": state,
        "model": "fake-echo",
        "running": 3,
        "waiting": 2,
        "seconds_since_progress": 1.5,
        "error": "why",
    }


def test_what_nobody_foresaw_is_a_500_in_the_same_format() -> None:
    class Broken(FakeEngine):
        def stats(self) -> dict[str, Any]:
            raise ZeroDivisionError("the secret of the stack")

    origin = "https://page.example"
    with LiveServer(Broken(), allow_origins=[origin]) as server, httpx.Client(base_url=server.url) as client:
        response = client.get("/debug/stats", headers={"x-request-id": "mine-1", "origin": origin})
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert "secret" not in response.text
        assert response.headers["x-request-id"] == "mine-1"
        assert response.headers["access-control-allow-origin"] == origin
        assert client.get("/health").status_code == 200  # over the same connection


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "x" * 20_000}),
        ("/detokenize", {"tokens": [65] * 20_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}] * 600}),
    ],
)
def test_a_long_text_is_read_aside(path: str, body: dict[str, Any]) -> None:
    """While one client's text is rendered, encoded or decoded, the others are answered."""
    is_answered = threading.Event()

    class Patient(ByteTokenizer):
        def _wait(self) -> None:
            assert is_answered.wait(5)

        def encode(self, text: str, **options: Any) -> list[int]:
            self._wait()
            return super().encode(text, **options)

        def decode(self, ids: Any, **options: Any) -> str:
            self._wait()
            return super().decode(ids, **options)

        def render_chat(self, messages: Any, **options: Any) -> str:
            self._wait()
            return super().render_chat(messages, **options)

    engine = FakeEngine(max_model_len=100_000)
    engine.tokenizer = Patient()
    with LiveServer(engine) as server:
        answers: list[int] = []
        asking = threading.Thread(target=lambda: answers.append(server.post(path, body).status_code))
        asking.start()
        time.sleep(0.1)
        assert server.get("/health").status_code == 200
        is_answered.set()
        asking.join()
    assert answers == [200]


def test_more_prompts_than_may_ever_wait_are_no_matter_of_time(server: LiveServer, engine: FakeEngine) -> None:
    before = len(engine.requests)
    for body in (
        {"prompt": ["x"] * (engine.max_waiting + 1)},
        {"prompt": ["x"] * (engine.max_waiting // 64 + 1), "n": 64},
    ):
        response = server.post("/v1/completions", body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "prompt"
    assert len(engine.requests) == before


# --- who may come in -------------------------------------------------------------------------------------------------


def test_a_key_is_asked_for_where_it_matters() -> None:
    with LiveServer(FakeEngine(), api_key=["first-key", "zweiter-Schlüssel"]) as server:
        for path in ("/v1/models", "/metrics", "/debug/selection", "/debug/stats", "/v1/nothing"):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic first-key"}):
                response = server.get(path, headers=headers)
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
                assert "first-key" not in response.text
        assert server.post("/tokenize", {"prompt": "x"}).status_code == 401
        for path in ("/", "/docs", "/openapi.json", "/health"):
            assert server.get(path).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        assert server.client("first-key").models.list().data
        second = {"authorization": "Bearer zweiter-Schlüssel".encode()}
        assert server.get("/v1/models", headers=second).status_code == 200


def test_a_key_is_never_shown() -> None:
    config = OpenAIConfig(api_key="hush-hush")
    assert config.keys == (b"hush-hush",)
    assert "hush" not in repr(config)
    assert "hush" not in config.model_dump_json()


def test_a_key_among_the_options_is_masked_where_the_selection_is_served() -> None:
    class Told(FakeEngine):
        def selection_dict(self) -> dict[str, Any]:
            return {"selections": [{"kind": "frontend", "options": {"api_key": ["hush-1", "hush-2"], "port": 0}}]}

    with LiveServer(Told(), api_key=["hush-1", "hush-2"]) as server:
        response = server.get("/debug/selection", headers={"authorization": "Bearer hush-2"})
    masked = "*" * 10
    assert response.json()["selections"][0]["options"] == {"api_key": [masked, masked], "port": 0}


@pytest.mark.parametrize("keys", ["", "  ", [], ["good", ""], "good ", ["\tgood"]])
def test_a_key_that_nobody_can_send_is_no_key(keys: Any) -> None:
    with pytest.raises(pydantic.ValidationError):
        OpenAIConfig(api_key=keys)
    if isinstance(keys, str):
        with pytest.raises(pydantic.ValidationError):
            OpenAIConfig(admin_token=keys)


def test_only_named_origins_may_read_answers() -> None:
    with LiveServer(FakeEngine(), allow_origins=["https://good.example"], api_key="k") as server:
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        for origin, is_allowed in (("https://good.example", True), ("https://bad.example", False)):
            preflight = httpx.options(f"{server.url}/v1/models", headers={"origin": origin} | asked)
            assert (preflight.status_code == 200) is is_allowed
            refusal = server.get("/v1/models", headers={"origin": origin})
            assert refusal.status_code == 401
            assert (refusal.headers.get("access-control-allow-origin") == origin) is is_allowed


def test_the_model_answers_to_its_other_names() -> None:
    with LiveServer(FakeEngine(), served_names=["gpt-4o", "org/model"]) as server:
        assert [m.id for m in server.client().models.list()] == ["fake-echo", "gpt-4o", "org/model"]
        assert ask(server, model="gpt-4o").model == "gpt-4o"
        assert server.get("/v1/models/org/model").json()["id"] == "org/model"


def test_one_name_and_one_origin_need_no_list() -> None:
    config = OpenAIFrontend.Config(served_names="gpt-4o", allow_origins="https://a.example")
    assert (config.served_names, config.allow_origins) == (("gpt-4o",), ("https://a.example",))


def test_the_chat_page_can_be_left_out() -> None:
    with LiveServer(FakeEngine(), chat_page=False) as server:
        assert server.get("/").status_code == 404


# --- limits and ends -------------------------------------------------------------------------------------------------


def test_a_body_that_never_ends_is_given_up() -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n"
    with (
        LiveServer(FakeEngine(), body_timeout_seconds=0.2) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection,
    ):
        connection.sendall(head + b"{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_the_size_limit_is_a_setting() -> None:
    with LiveServer(FakeEngine(), max_body_bytes=2000) as server:
        assert server.post("/v1/completions", {"prompt": "x" * 1000}).status_code == 200
        assert server.post("/v1/completions", {"prompt": "x" * 2000}).status_code == 413


def test_a_drain_refuses_new_requests_and_finishes_old_ones() -> None:
    engine = FakeEngine(seconds_per_token=0.02)
    with LiveServer(engine, drain_seconds=10) as server:
        stream = ask(server, stream=True, max_tokens=60, extra_body={"ignore_eos": True})
        next(iter(stream))
        server.frontend.stop()
        give_up = time.monotonic() + 5
        while server.get("/health").status_code != 503:
            assert time.monotonic() < give_up
        refused = server.post("/v1/completions", {"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["retry-after"] == "1"
        assert [c.choices[0].finish_reason for c in stream][-1] == "length"
        server.thread.join(timeout=5)
    assert engine.is_shut_down
    assert not engine.cancelled


def test_a_drain_that_takes_too_long_cuts_off_what_is_left() -> None:
    engine = FakeEngine(seconds_per_token=0.02)
    with LiveServer(engine, drain_seconds=0.2) as server:
        stream = ask(server, stream=True, max_tokens=3000, extra_body={"ignore_eos": True})
        next(iter(stream))
        server.frontend.stop()
        with pytest.raises(openai.APIError) as raised:
            list(stream)
        assert raised.value.code == "stopped"
    assert not engine.active


def test_a_second_stop_does_not_wait() -> None:
    engine = FakeEngine(seconds_per_token=0.02)
    with LiveServer(engine, drain_seconds=60) as server:
        stream = ask(server, stream=True, max_tokens=3000, extra_body={"ignore_eos": True})
        next(iter(stream))
        server.frontend.stop()
        server.frontend.stop()
        server.thread.join(timeout=5)
        assert not server.thread.is_alive()
        stream.close()


def test_a_port_in_use_is_a_clear_error(server: LiveServer) -> None:
    with pytest.raises(ConfigError, match=rf"port {server.port} of 127.0.0.1 is in use.*frontend.port"):
        OpenAIFrontend(OpenAIConfig(port=server.port)).reserve()


def test_two_servers_that_reserve_one_port_do_not_both_serve() -> None:
    """Linux lets both bind as long as neither listens; the one that comes second to listen is told."""
    first = LiveServer(FakeEngine())
    second = OpenAIFrontend(OpenAIConfig(port=first.port))
    second.reserve()
    with first, pytest.raises(ConfigError, match="is in use"):
        second.serve(FakeEngine())


def test_a_host_that_is_no_address_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="no address of this machine"):
        OpenAIFrontend(OpenAIConfig(host="192.0.2.1")).reserve()
    with pytest.raises(ConfigError, match="the host has no address"):
        OpenAIFrontend(OpenAIConfig(host="no-such-host.invalid")).reserve()


def test_the_url_can_be_opened_from_this_machine() -> None:
    frontend = OpenAIFrontend(OpenAIConfig(host="0.0.0.0", port=0))
    url = frontend.reserve()
    assert url == frontend.reserve() == frontend.url
    assert url.startswith("http://127.0.0.1:")
    frontend._release()


def test_a_stopped_server_leaves_no_thread() -> None:
    before = threading.active_count()
    with LiveServer(FakeEngine()) as server:
        server.get("/health")
    assert threading.active_count() == before
