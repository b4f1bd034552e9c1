"""From bytes to a checked request: whatever comes in, the outcome is a request or a refusal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.errors import InvalidRequestError, RequestError
from drivetrain.plugins.frontend.openai import OpenAIConfig
from drivetrain.plugins.frontend.openai.body import parse_json, parse_request
from drivetrain.plugins.frontend.openai.chat import to_request
from drivetrain.plugins.frontend.openai.errors import envelope
from drivetrain.plugins.frontend.openai.logprobs import LOWEST_LOGPROB, CompletionLogprobs, chat_logprobs
from drivetrain.plugins.frontend.openai.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from drivetrain.plugins.frontend.openai.service import Service
from drivetrain.serving.types import GenerationRequest, TokenLogprob
from support.fake_engine import BOS, EOS, ByteTokenizer, FakeEngine

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SCHEMAS = (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody)
FIELDS = sorted({name for schema in SCHEMAS for name in schema.model_fields})


def outcome(make: Callable[[], Any]) -> Any:
    """What ``make`` returns, or the refusal that it raises."""
    try:
        return make()
    except RequestError as refusal:
        return refusal


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode) | ANY_JSON.map(json.dumps).map(str.encode))
@settings(deadline=None)
def test_any_bytes_are_an_object_or_a_bad_request(raw: bytes) -> None:
    found = outcome(lambda: parse_json(raw))
    assert isinstance(found, dict | InvalidRequestError)


@pytest.mark.parametrize("schema", SCHEMAS)
@given(body=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), ANY_JSON, max_size=4))
@settings(deadline=None, max_examples=60)
def test_any_object_is_a_request_or_a_refusal_that_can_be_told(schema: Any, body: dict[str, Any]) -> None:
    found = outcome(lambda: parse_request(schema, body))
    if isinstance(found, RequestError):
        assert found.status == 400
        json.dumps(envelope(found), allow_nan=False)
    else:
        assert isinstance(found, schema)


@given(options=st.dictionaries(st.sampled_from(sorted(ChatBody.model_fields)), ANY_JSON, max_size=3))
@settings(deadline=None, max_examples=150)
def test_any_chat_is_a_request_for_the_engine_or_a_refusal(options: dict[str, Any]) -> None:
    service = Service(FakeEngine(), OpenAIConfig())  # type: ignore[arg-type]
    body = {"messages": [{"role": "user", "content": "x"}]} | options
    found = outcome(lambda: to_request(parse_request(ChatBody, body), service))
    assert isinstance(found, GenerationRequest) or found.status == 400


def test_a_long_value_is_not_sent_back_whole() -> None:
    with pytest.raises(InvalidRequestError) as raised:
        parse_request(ChatBody, {"messages": "x" * 100_000})
    assert len(envelope(raised.value)["error"]["message"]) < 300


def test_the_deepest_member_of_a_union_names_the_fault() -> None:
    for messages, param in (
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": [3]}], "messages[1].content[0]"),
    ):
        with pytest.raises(InvalidRequestError) as raised:
            parse_request(ChatBody, {"messages": messages})
        assert raised.value.param == param


def test_the_developers_words_are_the_systems_and_names_are_kept() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "Ada"}]
    body = parse_request(ChatBody, {"messages": messages})
    assert [message.for_template() for message in body.messages] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi", "name": "Ada"},
    ]


def test_minus_infinity_becomes_a_number_that_json_holds() -> None:
    entry = TokenLogprob(65, -math.inf, 9, ((66, -0.1), (65, -math.inf)))
    tokenizer: Any = ByteTokenizer()
    assert chat_logprobs(tokenizer, [entry])["content"][0]["logprob"] == LOWEST_LOGPROB
    rendered = CompletionLogprobs(tokenizer).output([entry])
    assert rendered["top_logprobs"] == [{"B": -0.1, "A": LOWEST_LOGPROB}]
    json.dumps(rendered, allow_nan=False)


def test_parts_of_a_character_are_told_apart_by_their_bytes() -> None:
    first, second = "ü".encode()
    entries = [TokenLogprob(first, -0.1, 1), TokenLogprob(second, -0.2, 1), TokenLogprob(65, -0.3, 1)]
    tokenizer: Any = ByteTokenizer()
    rendered = CompletionLogprobs(tokenizer).output(entries)
    assert rendered["tokens"] == [r"bytes:\xc3", r"bytes:\xbc", "A"]
    assert rendered["text_offset"] == [0, 0, 1]
    assert chat_logprobs(tokenizer, entries)["content"][0]["bytes"] == [first]


def test_what_the_text_leaves_out_has_no_width() -> None:
    """The start token before a text, and special tokens of the output unless they are to be seen."""
    tokenizer: Any = ByteTokenizer()
    entries = [TokenLogprob(EOS, -0.1, 1), TokenLogprob(65, -0.1, 1)]
    for skips, after in ((True, [2, 2]), (False, [2, 2 + len("</s>")])):
        builder = CompletionLogprobs(tokenizer, skips)
        assert builder.prompt("Hi", [BOS, *b"Hi"], [None] * 3)["text_offset"] == [0, 0, 1]
        assert builder.output(entries)["text_offset"] == after
