"""What a request may say. A field that is left out or null means the model's own default, or else OpenAI's.

Types are strict: ``"0.5"`` is no number and ``true`` no integer. Fields of the OpenAI API that are not implemented are
declared too, with the values that change nothing (:class:`Only`); any other value is refused by name, never ignored.
Ranges are checked by :class:`drivetrain.serving.types.SamplingParams`, for every frontend alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from drivetrain.serving.types import MAX_LOGPROBS

UNSUPPORTED = "unsupported_parameter"
COMPLETION_MAX_TOKENS = 16
_AROUND_A_MESSAGE = 40


class Only:
    """Marks a field that is not implemented: null and ``accepted`` change nothing and pass, all else is refused."""

    def __init__(self, *accepted: object, feature: str) -> None:
        self.accepted = accepted
        self.feature = feature

    @property
    def passes(self) -> str:
        return " or ".join(["leave it out", *(f"send {json.dumps(value)}" for value in self.accepted)])

    def check(self, value: object) -> object:
        if value is None or any(type(value) is type(good) and value == good for good in self.accepted):
            return value
        text = {"feature": self.feature, "passes": self.passes}
        raise PydanticCustomError(UNSUPPORTED, "{feature}: not supported by this server; {passes}", text)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"description": f"Not supported ({self.feature}); {self.passes}."}


class RequestBody(BaseModel):
    """Base of all request bodies: strict, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(RequestBody):
    """How a stream is sent."""

    include_usage: bool | None = Field(None, description="End the stream with one more chunk that carries the usage.")
    include_obfuscation: bool | None = Field(None, description="Accepted; no padding is ever added.")


class GenerationBody(RequestBody):
    """What chat and plain completions share."""

    model: str | None = Field(None, description="A name from /v1/models; left out means the one model served here.")
    stream: bool | None = Field(None, description="Send the answer in pieces, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="For streams only.")
    n: int | None = Field(None, description="Independent answers to one prompt.")
    stop: str | list[str] | None = Field(None, description="Strings that end the answer; they are not part of it.")
    seed: int | None = Field(None, description="Equal seed, prompt and settings give equal output.")
    temperature: float | None = Field(None, description="0 is greedy; 1 samples the model's own distribution.")
    top_p: float | None = Field(None, description="Keep the smallest set of tokens whose probabilities sum to this.")
    presence_penalty: float | None = Field(None, description="-2 to 2; once for each token that is in the output.")
    frequency_penalty: float | None = Field(None, description="-2 to 2; for each time a token is in the output.")
    logit_bias: dict[str, float] | None = Field(None, description="Token id (as a string) to -100..100.")

    top_k: int | None = Field(None, description="Extension. Keep the k most likely tokens; 0 keeps all.")
    min_p: float | None = Field(None, description="Extension. Drop tokens less likely than this times the best one.")
    repetition_penalty: float | None = Field(None, description="Extension. 1 is off.")
    min_tokens: int | None = Field(None, description="Extension. Tokens before which nothing ends the answer.")
    ignore_eos: bool | None = Field(None, description="Extension. Do not end at the model's end tokens.")
    stop_token_ids: list[int] | None = Field(None, description="Extension. More tokens that end the answer.")
    include_stop_str_in_output: bool | None = Field(None, description="Extension. Keep the stop string in the text.")
    return_epochs: bool | None = Field(
        None,
        description="Extension. Tell which sets of parts made the answer: `epochs` of a choice, `epoch` of a chunk.",
    )
    skip_special_tokens: bool | None = Field(
        None, description="Extension. True unless said: leave them out of the text."
    )
    priority: int | None = Field(
        None, ge=-(2**31), lt=2**31, description="Extension. Smaller is more urgent; 0 is normal."
    )
    timeout_seconds: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Extension. From arrival to the last token."
    )

    user: str | None = Field(None, description="Accepted; changes nothing.")
    metadata: dict[str, Any] | None = Field(None, description="Accepted; changes nothing.")
    safety_identifier: str | None = Field(None, description="Accepted; changes nothing.")
    prompt_cache_key: str | None = Field(None, description="Accepted; prefixes are shared by their tokens alone.")
    prompt_cache_options: dict[str, Any] | None = Field(None, description="Accepted; every prefix is cached alike.")
    prompt_cache_retention: str | None = Field(None, description="Accepted; every prefix is cached alike.")
    store: Annotated[Any, Only(False, feature="stored completions")] = None
    service_tier: Annotated[Any, Only("auto", "default", feature="service tiers")] = None


class ContentPart(RequestBody):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


def _is_text_part(part: object) -> object:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError(
            UNSUPPORTED, "content of type {kind}: not supported; this server reads text only", {"kind": repr(kind[:40])}
        )
    return part


def _is_spoken(role: object) -> object:
    if role in ("tool", "function"):
        raise PydanticCustomError(UNSUPPORTED, "messages of role {role}: tool calls are not supported", {"role": role})
    return role


class Message(RequestBody):
    """One turn of a chat. ``developer`` is read as ``system``, which is the word that chat templates know."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_is_spoken)]
    content: str | list[Annotated[ContentPart, BeforeValidator(_is_text_part)]]
    name: str | None = None

    # An answer of the API that is sent back as history carries these, empty.
    refusal: Annotated[Any, Only(feature="refusals")] = None
    annotations: Annotated[Any, Only([], feature="annotations")] = None
    audio: Annotated[Any, Only(feature="audio")] = None
    tool_calls: Annotated[Any, Only([], feature="tool calls")] = None
    tool_call_id: Annotated[Any, Only(feature="tool calls")] = None
    function_call: Annotated[Any, Only(feature="function calls")] = None

    @property
    def num_characters(self) -> int:
        """How much text there is to render, with as much beside the content as templates write around it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return len(content) + _AROUND_A_MESSAGE

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        message["content"] = self.content if isinstance(self.content, str) else [p.model_dump() for p in self.content]
        if self.name is not None:
            message["name"] = self.name
        return message


class ChatBody(GenerationBody):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, description="The conversation so far.")
    max_tokens: int | None = Field(None, description="Most new tokens; left out, as many as the context holds.")
    max_completion_tokens: int | None = Field(None, description="The newer name of max_tokens; send one of them.")
    logprobs: bool | None = Field(None, description="Return the log-probability of each token.")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="And of the most likely ones beside it.")
    add_generation_prompt: bool | None = Field(
        None, description="Extension. Open the assistant's turn; true unless said."
    )
    continue_final_message: bool | None = Field(None, description="Extension. Go on with the last assistant message.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Extension. Variables for the chat template.")

    tools: Annotated[Any, Only([], feature="tool calls")] = None
    tool_choice: Annotated[Any, Only("none", "auto", feature="tool calls")] = None
    parallel_tool_calls: Annotated[Any, Only(True, False, feature="tool calls")] = None
    functions: Annotated[Any, Only([], feature="function calls")] = None
    function_call: Annotated[Any, Only("none", "auto", feature="function calls")] = None
    response_format: Annotated[Any, Only({"type": "text"}, feature="structured output")] = None
    modalities: Annotated[Any, Only(["text"], feature="output other than text")] = None
    audio: Annotated[Any, Only(feature="audio")] = None
    prediction: Annotated[Any, Only(feature="predicted output")] = None
    reasoning_effort: Annotated[Any, Only(feature="reasoning effort")] = None
    verbosity: Annotated[Any, Only("medium", feature="verbosity")] = None
    web_search_options: Annotated[Any, Only(feature="web search")] = None
    moderation: Annotated[Any, Only(feature="moderation")] = None


Prompt = str | list[int]


def _prompts(value: object) -> list[Prompt]:
    """One prompt or many, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if _is_ids(value):
            return [value]
        if all(isinstance(item, list) and _is_ids(item) for item in value):
            return value
    raise PydanticCustomError(
        "prompt", "must be a string, a list of strings, a list of token ids or a list of such lists, and not empty"
    )


def _is_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(item) is int and 0 <= item < 2**31 for item in value)


_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ],
    "title": "Prompt",
}


class CompletionBody(GenerationBody):
    """Body of POST /v1/completions."""

    prompt: Annotated[list[Prompt], PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)] = Field(
        description="Text or token ids, or a list of either; each gets n answers."
    )
    max_tokens: int | None = Field(
        None, description=f"Most new tokens; {COMPLETION_MAX_TOKENS} unless said. 0 with echo only scores the prompt."
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Log-probabilities of each token and of this many most likely ones."
    )
    echo: bool | None = Field(None, description="Begin the text (and the log-probabilities) with the prompt.")
    best_of: int | None = Field(None, description="Only the value of n is supported.")
    suffix: Annotated[Any, Only("", feature="text after the completion")] = None


class TokenizeBody(RequestBody):
    """Body of POST /tokenize: a text or a chat."""

    model: str | None = None
    prompt: str | None = Field(None, description="Text to encode; send this or messages.")
    messages: list[Message] | None = Field(None, min_length=1, description="Chat to render and encode.")
    add_special_tokens: bool = Field(True, description="Add the tokenizer's own start token to a text.")
    add_generation_prompt: bool = Field(True, description="Open the assistant's turn after a chat.")


class DetokenizeBody(RequestBody):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]
    skip_special_tokens: bool = Field(False, description="Leave special tokens out of the text.")


NESTED: Mapping[str, type[RequestBody]] = {"messages": Message, "stream_options": StreamOptions}
"""Bodies inside a body, by the field they are in."""
