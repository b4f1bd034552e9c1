"""What the ``openai`` frontend promises over any engine: a subclass gives the fixture ``server``, a running LiveServer.

Nothing here depends on what the model says, only on how it is said.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import openai
import pytest

from support.live_server import LiveServer

QUESTION = [{"role": "user", "content": "Name three colours, please."}]
LONG = {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}
MIB = 1024 * 1024


def chat(server: LiveServer, **options: Any) -> Any:
    settings = {"model": server.model, "messages": QUESTION, "temperature": 0, "max_tokens": 12} | options
    return server.client().chat.completions.create(**settings)


def complete(server: LiveServer, **options: Any) -> Any:
    settings = {"model": server.model, "prompt": "The sky is", "temperature": 0, "max_tokens": 12} | options
    return server.client().completions.create(**settings)


def joined_text(chunks: Iterable[Any]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


class OpenAIContract:
    """The rules. Every method is a test."""

    # --- answers ---------------------------------------------------------------------------------------------------

    def test_a_chat_is_answered_in_the_shape_of_the_api(self, server: LiveServer) -> None:
        answer = chat(server)
        (choice,) = answer.choices
        assert answer.object == "chat.completion"
        assert answer.id.startswith("chatcmpl-")
        assert answer.model == server.model
        assert abs(answer.created - time.time()) < 60
        assert choice.message.role == "assistant"
        assert choice.message.content
        assert choice.finish_reason in ("stop", "length")
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert 1 <= answer.usage.completion_tokens <= 12

    def test_a_streamed_chat_says_what_the_whole_one_says(self, server: LiveServer) -> None:
        chunks = list(chat(server, stream=True))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert len({chunk.id for chunk in chunks}) == 1
        assert joined_text(chunks) == chat(server).choices[0].message.content

    def test_a_streamed_completion_says_what_the_whole_one_says(self, server: LiveServer) -> None:
        pieces = [chunk.choices[0].text for chunk in complete(server, stream=True)]
        assert "".join(pieces) == complete(server).choices[0].text

    def test_usage_ends_a_stream_when_asked_for(self, server: LiveServer) -> None:
        whole = chat(server)
        *chunks, last = chat(server, stream=True, stream_options={"include_usage": True})
        assert all(chunk.usage is None for chunk in chunks)
        assert last.choices == []
        assert last.usage.prompt_tokens == whole.usage.prompt_tokens
        assert last.usage.completion_tokens == whole.usage.completion_tokens
        assert last.usage.prompt_tokens_details.cached_tokens >= 0

    @pytest.mark.parametrize("stream", [False, True])
    def test_n_gives_n_choices_in_order(self, server: LiveServer, stream: bool) -> None:
        answer = chat(server, n=3, temperature=1, seed=1, stream=stream)
        if stream:
            ended = {c.index for chunk in answer for c in chunk.choices if c.finish_reason is not None}
            assert ended == {0, 1, 2}
        else:
            assert [choice.index for choice in answer.choices] == [0, 1, 2]

    def test_every_prompt_of_a_list_gets_n_choices(self, server: LiveServer) -> None:
        prompts = ["One, two,", "Once upon a time"]
        together = complete(server, prompt=prompts, n=2)
        assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
        for position, prompt in enumerate(prompts):
            alone = complete(server, prompt=prompt).choices[0].text
            assert [choice.text for choice in together.choices[2 * position : 2 * position + 2]] == [alone, alone]

    def test_token_ids_are_as_good_as_text(self, server: LiveServer) -> None:
        tokens = server.post("/tokenize", {"prompt": "The sky is"}).json()["tokens"]
        assert (
            server.post("/detokenize", {"tokens": tokens, "skip_special_tokens": True}).json()["prompt"] == "The sky is"
        )
        expected = complete(server).choices[0].text
        assert complete(server, prompt=tokens).choices[0].text == expected
        assert [c.text for c in complete(server, prompt=[tokens, tokens]).choices] == [expected] * 2

    def test_equal_seeds_give_equal_answers(self, server: LiveServer) -> None:
        first, second = (chat(server, temperature=1, seed=7, max_tokens=20) for _ in range(2))
        assert first.choices[0].message.content == second.choices[0].message.content

    def test_a_stop_string_ends_the_answer_before_it(self, server: LiveServer) -> None:
        text = complete(server, extra_body={"ignore_eos": True}).choices[0].text
        stop = text[len(text) // 2]
        choice = complete(server, stop=[stop], extra_body={"ignore_eos": True}).choices[0]
        assert choice.text == text[: text.index(stop)]
        assert choice.finish_reason == "stop"
        kept = complete(server, stop=stop, extra_body={"ignore_eos": True, "include_stop_str_in_output": True})
        assert kept.choices[0].text.endswith(stop)

    def test_max_tokens_is_a_bound_under_both_names(self, server: LiveServer) -> None:
        for name in ("max_tokens", "max_completion_tokens"):
            bound = {"max_tokens": openai.NOT_GIVEN, name: 3}
            answer = chat(server, extra_body={"ignore_eos": True}, **bound)
            assert answer.usage.completion_tokens == 3
            assert answer.choices[0].finish_reason == "length"

    def test_a_completion_has_sixteen_tokens_unless_said(self, server: LiveServer) -> None:
        answer = complete(server, max_tokens=openai.NOT_GIVEN, extra_body={"ignore_eos": True})
        assert answer.usage.completion_tokens == 16

    def test_the_async_client_serves_64_streams_at_once(self, server: LiveServer) -> None:
        async def all_at_once() -> list[str]:
            async with server.async_client() as client:

                async def one(number: int) -> str:
                    stream = await client.chat.completions.create(
                        model=server.model,
                        messages=[{"role": "user", "content": f"Say the number {number}."}],
                        temperature=0,
                        max_tokens=8,
                        stream=True,
                    )
                    pieces = [c.delta.content or "" async for chunk in stream for c in chunk.choices]
                    return "".join(pieces)

                return await asyncio.gather(*(one(number) for number in range(64)))

        answers = asyncio.run(all_at_once())
        assert all(answers)
        assert server.seconds_until_idle() < 2

    # --- log-probabilities -------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("stream", [False, True])
    def test_chat_logprobs_cover_every_token(self, server: LiveServer, stream: bool) -> None:
        options: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream else {}
        answer = chat(server, logprobs=True, top_logprobs=3, stream=stream, **options)
        if stream:
            chunks = list(answer)
            usage, choices = chunks[-1].usage, [choice for chunk in chunks for choice in chunk.choices]
        else:
            usage, choices = answer.usage, answer.choices
        tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
        assert len(tokens) == usage.completion_tokens
        for token in tokens:
            values = [top.logprob for top in token.top_logprobs]
            assert len(values) == 3
            assert values == sorted(values, reverse=True)
            assert token.logprob == pytest.approx(values[0], abs=1e-4)  # greedy takes the likeliest
            assert token.logprob <= 0

    def test_completion_logprobs_with_echo_cover_the_prompt(self, server: LiveServer) -> None:
        answer = complete(server, logprobs=2, echo=True)
        choice = answer.choices[0]
        assert choice.text == "The sky is" + complete(server).choices[0].text
        assert len(choice.logprobs.tokens) == answer.usage.total_tokens
        assert choice.logprobs.token_logprobs[0] is None
        assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
        assert all(2 <= len(top) <= 3 for top in choice.logprobs.top_logprobs[1:])
        assert choice.logprobs.text_offset == sorted(choice.logprobs.text_offset)

    @pytest.mark.parametrize("stream", [False, True])
    def test_offsets_of_tokens_are_places_in_the_text(self, server: LiveServer, stream: bool) -> None:
        """Start tokens that are not in the text have no width, and parts of a character are where it is."""
        prompt = "Grüße 日本 🇩🇪: x"
        answer = complete(server, prompt=prompt, logprobs=0, echo=True, stream=stream)
        choices = [c for chunk in answer for c in chunk.choices] if stream else answer.choices
        text = "".join(choice.text for choice in choices)
        parts = [choice.logprobs for choice in choices if choice.logprobs]
        tokens = [token for part in parts for token in part.tokens]
        offsets = [offset for part in parts for offset in part.text_offset]
        num_prompt_tokens = server.post("/tokenize", {"prompt": prompt}).json()["count"]
        assert offsets[num_prompt_tokens] == len(prompt)
        assert sum(offset < len(prompt) for offset in offsets) == num_prompt_tokens
        whole = [(token, at) for token, at in zip(tokens, offsets, strict=True) if not token.startswith("bytes:")]
        assert all(
            text.startswith(token, at) for token, at in whole[:num_prompt_tokens] if token not in ("<s>", "</s>")
        )

    @pytest.mark.parametrize("stream", [False, True])
    def test_no_tokens_and_echo_only_score_the_prompt(self, server: LiveServer, stream: bool) -> None:
        answer = complete(server, max_tokens=0, echo=True, logprobs=0, stream=stream)
        choices = [c for chunk in answer for c in chunk.choices] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == "The sky is"
        (scores,) = [choice.logprobs.token_logprobs for choice in choices if choice.logprobs]
        assert len(scores) == server.post("/tokenize", {"prompt": "The sky is"}).json()["count"]
        assert choices[-1].finish_reason == "length"

    # --- refusals ----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"temperature": -1}, "temperature"),
            ({"temperature": "0.5"}, "temperature"),
            ({"top_p": 0}, "top_p"),
            ({"top_p": 1.5}, "top_p"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": True}, "max_tokens"),
            ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
            ({"max_completion_tokens": -5, "max_tokens": None}, "max_completion_tokens"),
            ({"n": 0}, "n"),
            ({"n": 10_000}, "n"),
            ({"stop": ""}, "stop"),
            ({"stop": 5}, "stop"),
            ({"seed": 2**80}, "seed"),
            ({"presence_penalty": 3}, "presence_penalty"),
            ({"logit_bias": {"x": 1}}, "logit_bias"),
            ({"logit_bias": {"1": 1000}}, "logit_bias"),
            ({"top_logprobs": 2}, "top_logprobs"),
            ({"logprobs": True, "top_logprobs": 1000}, "top_logprobs"),
            ({"stream_options": {"include_usage": True}}, "stream_options"),
            ({"stream": True, "stream_options": {"include_usag": True}}, "stream_options.include_usag"),
            ({"min_tokens": 50}, "min_tokens"),
            ({"timeout_seconds": -1}, "timeout_seconds"),
            ({"messages": []}, "messages"),
            ({"messages": "hello"}, "messages"),
            ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
            ({"messages": [{"role": "tool", "content": "4", "tool_call_id": "1"}]}, "messages[0].role"),
            ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages[0].tool_calls"),
            ({"messages": [{"role": "user"}]}, "messages[0].content"),
            ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
            ({"messages": [{"role": "user", "content": "x", "contnt": 1}]}, "messages[0].contnt"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
                "messages[0].content[0]",
            ),
            ({"continue_final_message": True}, "continue_final_message"),
            ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
            ({"moderation": {"model": "x"}}, "moderation"),
            ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
            ({"functions": [{"name": "f"}]}, "functions"),
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"modalities": ["text", "audio"]}, "modalities"),
            ({"audio": {"voice": "x"}}, "audio"),
            ({"store": True}, "store"),
            ({"reasoning_effort": "high"}, "reasoning_effort"),
            ({"temprature": 0.5}, "temprature"),
        ],
    )
    def test_a_bad_chat_parameter_is_refused_by_name(
        self, server: LiveServer, changes: dict[str, Any], param: str
    ) -> None:
        body = {"model": server.model, "messages": QUESTION, "max_tokens": 3} | changes
        response = server.post("/v1/chat/completions", body)
        error = response.json()["error"]
        assert response.status_code == 400, error
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"
        assert set(error) == {"message", "type", "param", "code"}

    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"prompt": []}, "prompt"),
            ({"prompt": None}, "prompt"),
            ({"prompt": ["a", 1]}, "prompt"),
            ({"prompt": [-1]}, "prompt"),
            ({"prompt": [2**30]}, "prompt"),
            ({"prompt": ""}, "prompt"),
            ({"suffix": "end"}, "suffix"),
            ({"best_of": 3}, "best_of"),
            ({"logprobs": 1000}, "logprobs"),
            ({"echo": "yes"}, "echo"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"tools": []}, "tools"),
        ],
    )
    def test_a_bad_completion_parameter_is_refused_by_name(
        self, server: LiveServer, changes: dict[str, Any], param: str
    ) -> None:
        response = server.post("/v1/completions", {"prompt": "x", "max_tokens": 3} | changes)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param

    def test_a_misspelt_parameter_is_answered_with_the_nearest(self, server: LiveServer) -> None:
        response = server.post("/v1/chat/completions", {"messages": QUESTION, "temprature": 1})
        assert "'temperature'" in response.json()["error"]["message"]
        response = server.post("/v1/completions", {"promt": "x"})
        assert "'prompt'" in response.json()["error"]["message"]

    def test_what_changes_nothing_is_accepted(self, server: LiveServer) -> None:
        nothing = {
            "user": "me",
            "metadata": {"a": "b"},
            "store": False,
            "service_tier": "auto",
            "tools": [],
            "tool_choice": "none",
            "response_format": {"type": "text"},
            "modalities": ["text"],
            "logit_bias": {},
            "stop": None,
            "seed": None,
            "top_logprobs": None,
            "prompt_cache_retention": "24h",
            "prompt_cache_options": {"mode": "implicit"},
            "chat_template_kwargs": {"self": 1, "template": "x"},
        }
        body = {"model": server.model, "messages": QUESTION, "max_tokens": 3} | nothing
        assert server.post("/v1/chat/completions", body).status_code == 200

    def test_an_answer_may_be_sent_back_as_history(self, server: LiveServer) -> None:
        answer = chat(server)
        history = [*QUESTION, answer.choices[0].message.model_dump(), {"role": "user", "content": "And more?"}]
        assert chat(server, messages=history).choices[0].message.content is not None

    def test_content_may_come_in_parts(self, server: LiveServer) -> None:
        parts = [{"type": "text", "text": "Name three "}, {"type": "text", "text": "colours, please."}]
        whole = chat(server).choices[0].message.content
        assert chat(server, messages=[{"role": "user", "content": parts}]).choices[0].message.content == whole

    def test_an_unknown_model_is_not_found(self, server: LiveServer) -> None:
        with pytest.raises(openai.NotFoundError) as raised:
            chat(server, model="gpt-9")
        assert raised.value.code == "model_not_found"
        assert raised.value.param == "model"
        assert server.get("/v1/models/gpt-9").status_code == 404

    def test_a_prompt_too_long_is_refused(self, server: LiveServer) -> None:
        longest = server.get("/v1/models").json()["data"][0]["max_model_len"]
        with pytest.raises(openai.BadRequestError) as raised:
            complete(server, prompt="word " * (longest + 1))
        assert raised.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as raised:
            chat(server, messages=[{"role": "user", "content": "word " * (longest + 1)}])
        assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "messages")
        for name in ("max_tokens", "max_completion_tokens"):
            with pytest.raises(openai.BadRequestError) as raised:
                chat(server, **{"max_tokens": openai.omit, name: longest})
            assert (raised.value.code, raised.value.param) == ("context_length_exceeded", name)
            assert name in raised.value.message

    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b"{",
            b"[]",
            b'"text"',
            b"null",
            b'{"prompt": "x", "temperature": NaN}',
            b'{"prompt": "x", "temperature": Infinity}',
            b'{"prompt": "x", "temperature": -Infinity}',
            b'{"prompt": "x", "temperature": 1e999}',
            b'{"prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}",
            b'{"prompt": "\xff"}',
            b'{"prompt": "\\ud800"}',
            b"\xef\xbb\xbf{}",
            b"[" * 100_000,
            b'{"prompt": ' * 50_000,
            b'{"prompt": "x"} trailing',
        ],
    )
    def test_malformed_json_is_a_bad_request(self, server: LiveServer, raw: bytes) -> None:
        response = httpx.post(
            f"{server.url}/v1/completions", content=raw, headers={"content-type": "application/json"}, timeout=30
        )
        assert response.status_code == 400, response.text
        assert response.json()["error"]["message"]

    @pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
    def test_a_body_that_is_not_declared_as_json_is_refused(self, server: LiveServer, content_type: str | None) -> None:
        headers = {} if content_type is None else {"content-type": content_type}
        response = httpx.post(f"{server.url}/v1/completions", content=b'{"prompt": "x"}', headers=headers)
        assert response.status_code == 415
        assert response.json()["error"]["code"] == "unsupported_media_type"

    def test_a_compressed_body_is_refused_as_such(self, server: LiveServer) -> None:
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        response = httpx.post(
            f"{server.url}/v1/completions", content=gzip.compress(b'{"prompt": "x"}'), headers=headers
        )
        assert response.status_code == 415
        assert "compressed" in response.json()["error"]["message"]

    @pytest.mark.parametrize("is_declared", [True, False])
    def test_a_body_of_ten_megabytes_is_refused_and_the_answer_arrives(
        self, server: LiveServer, is_declared: bool
    ) -> None:
        body = json.dumps({"prompt": "x" * (10 * MIB)}).encode()

        def parts() -> Iterator[bytes]:
            for start in range(0, len(body), 65_536):
                yield body[start : start + 65_536]

        response = httpx.post(
            f"{server.url}/v1/completions",
            content=body if is_declared else parts(),
            headers={"content-type": "application/json"},
            timeout=30,
        )
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
        assert complete(server).choices

    def test_no_such_route_and_no_such_method_speak_the_same_format(self, server: LiveServer) -> None:
        missing = server.get("/v1/nothing")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
        wrong = server.get("/v1/completions")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
        assert wrong.headers["allow"] == "POST"

    def test_head_is_answered_wherever_get_is(self, server: LiveServer) -> None:
        for path in ("/health", "/v1/models", "/"):
            head = httpx.head(server.url + path)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-type"] == server.get(path).headers["content-type"]
        assert httpx.head(f"{server.url}/v1/completions").status_code == 405

    def test_a_request_out_of_time_is_a_408(self, server: LiveServer) -> None:
        response = server.post("/v1/completions", {"prompt": "x", "timeout_seconds": 1e-6})
        assert response.status_code == 408
        assert response.json()["error"]["code"] == "timeout"

    def test_a_stream_out_of_time_ends_with_an_error(self, server: LiveServer) -> None:
        with pytest.raises(openai.APIError) as raised:
            list(chat(server, stream=True, extra_body={"timeout_seconds": 1e-6}))
        assert raised.value.code == "timeout"

    # --- clients that leave, or dawdle -----------------------------------------------------------------------------

    def test_a_client_that_leaves_a_stream_frees_the_engine(self, server: LiveServer) -> None:
        stream = chat(server, stream=True, **LONG)
        for _, chunk in zip(range(4), stream, strict=False):
            assert chunk.choices
        stream.close()
        assert server.seconds_until_idle() < 1

    def test_a_client_that_leaves_while_it_waits_frees_the_engine(self, server: LiveServer) -> None:
        body = {"messages": QUESTION, "max_tokens": 1500, "ignore_eos": True, "n": 2}

        def impatient() -> None:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.5)

        client = threading.Thread(target=impatient)
        client.start()
        server.wait_until_busy()
        client.join()
        assert server.seconds_until_idle() < 1

    def test_a_body_that_crawls_in_holds_up_nobody(self, server: LiveServer) -> None:
        slow = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(20)]
        try:
            for connection in slow:
                connection.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                    b'content-length: 1000\r\n\r\n{"prompt"'
                )
            assert complete(server).choices
        finally:
            for connection in slow:
                connection.close()

    # --- around generation -----------------------------------------------------------------------------------------

    def test_the_models_are_listed(self, server: LiveServer) -> None:
        models = server.client().models
        assert next(iter(models.list())).id == server.model
        assert models.retrieve(server.model).owned_by == "drivetrain"

    def test_health_metrics_and_selection_answer(self, server: LiveServer) -> None:
        health = server.get("/health")
        assert health.status_code == 200
        assert health.json()["status"] in ("idle", "busy")
        metrics = server.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain")
        assert "# TYPE" in metrics.text
        selections = server.get("/debug/selection").json()["selections"]
        assert {"kind", "chosen", "candidates"} <= selections[0].keys()

    def test_every_response_has_a_request_id(self, server: LiveServer) -> None:
        assert server.get("/health").headers["x-request-id"].startswith("req-")
        assert server.get("/v1/models", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
        assert server.get("/v1/models", headers={"x-request-id": "a b"}).headers["x-request-id"].startswith("req-")
        assert "x-request-id" in server.post("/v1/completions", {}).headers

    def test_the_pages_load_nothing_from_elsewhere(self, server: LiveServer) -> None:
        for path in ("/", "/docs"):
            response = server.get(path)
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/html")
            assert "default-src 'none'" in response.headers["content-security-policy"]
            for load in ('src="http', 'href="http', "src='http", "@import", "url(http", "import("):
                assert load not in response.text

    def test_the_openapi_document_is_whole(self, server: LiveServer) -> None:
        document = server.get("/openapi.json").json()
        assert {"/v1/chat/completions", "/v1/completions", "/health"} <= document["paths"].keys()
        schemas = document["components"]["schemas"]
        for reference in _references(document):
            assert reference.removeprefix("#/components/schemas/") in schemas
        assert "temperature" in schemas["ChatBody"]["properties"]

    def test_numbers_in_answers_are_finite(self, server: LiveServer) -> None:
        text = server.post("/v1/completions", {"prompt": "x", "logprobs": 5, "max_tokens": 4, "echo": True}).text
        numbers: list[float] = []
        json.loads(text, parse_float=lambda literal: numbers.append(float(literal)), parse_constant=pytest.fail)
        assert all(math.isfinite(number) for number in numbers)


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)
