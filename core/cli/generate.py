"""``drivetrain pull``, ``generate`` and ``chat``: a model in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drivetrain.cli.console import note, show_progress
from drivetrain.cli.options import with_settings
from drivetrain.config import Settings, load_settings
from drivetrain.errors import ConfigError, InvalidRequestError, PromptTooLongError

if TYPE_CHECKING:
    from drivetrain.serving.llm import LLM
    from drivetrain.serving.types import Chunk, SamplingParams

DEFAULT_MODEL = "smollm2-135m"

USUAL_TEXT, USUAL_ANSWER = 128, 512
"""Most new tokens of a continued text and of an answer where nobody says, as far as the context has room."""

_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_CONTROLS |= dict.fromkeys(range(128, 160), 0xFFFD)
"""Control characters -> signs that show them: a model's text may not steer the terminal."""


def pull(
    name: Annotated[str, typer.Argument(help="Model name.", show_default=False)],
    source: Annotated[str | None, typer.Option(help="Fetch through this source plugin.", show_default=False)] = None,
) -> None:
    """Download a model's files, verify them, and print where they are.

    Example: drivetrain pull smollm2-135m
    """
    from drivetrain.assembly import resolve_parts
    from drivetrain.contracts.kinds import KINDS

    settings = load_settings(None, {"model": name, "source": source})
    with show_progress() as progress:
        others = [kind for kind in KINDS if kind != "source"]
        parts = resolve_parts(settings, progress=progress, leave_out=others)
    print(parts.path)


def _checked(**given: Any) -> dict[str, Any]:
    """The sampling options that were given; a wrong one is told before the model is loaded."""
    from drivetrain.serving.types import SamplingParams

    options = {name: value for name, value in given.items() if value is not None}
    SamplingParams(**options)
    return options


def _params(llm: LLM, options: dict[str, Any], usual: int, num_prompt_tokens: int) -> SamplingParams:
    """Sampling parameters: the model's recommendation, with what was given on the command line over it.

    Nobody who leaves --max-tokens out should have to know the context: ``usual`` is meant, or what there is room for.
    """
    from drivetrain.serving.types import SamplingParams

    room = llm.max_model_len - num_prompt_tokens
    # Without room, the refusal speaks of the prompt.
    limit = {"max_tokens": min(usual, room) if room > 0 else usual}
    return SamplingParams(**{**llm.sampling_defaults, **limit, **options})


def _chat_params(llm: LLM, options: dict[str, Any], messages: list[dict[str, str]]) -> SamplingParams:
    rendered = llm.tokenizer.render_chat(messages)
    return _params(llm, options, USUAL_ANSWER, len(llm.tokenizer.encode(rendered, add_special_tokens=False)))


def open_llm(settings: Settings, observers: Sequence[object] = ()) -> LLM:
    """Load the model with progress on standard error, and print what the core decided by itself."""
    from drivetrain.serving.llm import LLM

    if settings.model is None:
        raise ConfigError("no model is named", hint=f"Give one with --model NAME, for example --model {DEFAULT_MODEL}.")
    with show_progress() as progress:
        llm = LLM.from_settings(settings, progress=progress, observers=observers)
    for fallback in llm.explain().fallbacks:
        note(f"warning: {fallback}")
    for text in llm.selection_dict()["notes"]:
        note(f"note: {text}")
    return llm


MaxTextTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", help=f"Most new tokens. Default: {USUAL_TEXT}, if there is room.", show_default=False),
]
MaxAnswerTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", help=f"Most new tokens. Default: {USUAL_ANSWER}, if there is room.", show_default=False
    ),
]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy. Default: the model's.", show_default=False)]
TopP = Annotated[float | None, typer.Option(help="Keep the smallest set with this probability.", show_default=False)]
TopK = Annotated[int | None, typer.Option(help="Keep the k most likely tokens.", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="Makes the output repeatable.", show_default=False)]
Stop = Annotated[
    list[str] | None, typer.Option(help="End when this text appears. May be repeated.", show_default=False)
]


@with_settings()
def generate(
    settings: Settings,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads standard input.", show_default=False)],
    max_tokens: MaxTextTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    n: Annotated[int, typer.Option(help="Independent continuations.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with tokens and timing.")] = False,
) -> None:
    """Continue a text.

    Example: drivetrain generate --model smollm2-135m "The capital of France is" --max-tokens 16 --temperature 0
    """
    from drivetrain.cli.console import print_json

    options = _checked(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop, n=n
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    with open_llm(settings) as llm:
        params = _params(llm, options, USUAL_TEXT, len(llm.tokenizer.encode(text)))
        if as_json:
            print_json(_as_dict(llm.generate(text, params)[0]))
        elif n == 1:
            for _ in _printed(llm.stream(text, params)):
                pass
        else:
            for completion in llm.generate(text, params)[0].completions:
                print(f"[{completion.index}] {_shown(completion.text)}")


def _as_dict(result: Any) -> dict[str, Any]:
    return {
        "prompt_tokens": len(result.prompt.token_ids),
        "cached_tokens": result.prompt.cached_tokens,
        "completions": [
            {
                "index": completion.index,
                "text": completion.text,
                "token_ids": list(completion.token_ids),
                "finish_reason": completion.finish_reason.value,
                "stop_reason": completion.stop_reason,
            }
            for completion in result.completions
        ],
        "first_token_seconds": result.timing.first_token_seconds,
        "total_seconds": result.timing.total_seconds,
    }


@with_settings()
def chat(
    settings: Settings,
    message: Annotated[
        str | None, typer.Argument(help="One message; without it, a conversation.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.", show_default=False)] = None,
    max_tokens: MaxAnswerTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
) -> None:
    """Talk to a model. In a conversation, /reset starts anew and /exit (or Ctrl-D) ends.

    Example: drivetrain chat --model smollm2-135m "Why is the sky blue?"
    """
    options = _checked(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    history: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    with open_llm(settings) as llm:
        if message is not None:
            messages = [*history, {"role": "user", "content": message}]
            answer(llm, messages, _chat_params(llm, options, messages))
            return
        note("Type a message. /reset starts anew, /exit ends.")
        _converse(llm, history, options)


def _converse(llm: LLM, history: list[dict[str, str]], options: dict[str, Any]) -> None:
    start = list(history)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/reset":
            history = list(start)
            note("started anew")
        elif line:
            history = _exchange(llm, [*history, {"role": "user", "content": line}], options)


def _exchange(llm: LLM, messages: list[dict[str, str]], options: dict[str, Any]) -> list[dict[str, str]]:
    """One answer of a conversation; returns what the conversation holds after it.

    Ctrl-C ends the answer and keeps what was said of it. A message that is refused, because the conversation has grown
    too long for the model, say, is told and left out.
    """
    text = ""
    try:
        for chunk in _printed(llm.stream_chat(messages, _chat_params(llm, options, messages))):
            text += chunk.text
    except KeyboardInterrupt:
        note("\n(interrupted)")
    except (InvalidRequestError, PromptTooLongError) as error:
        note(f"error: {error} Or start anew with /reset.")
        return messages[:-1]
    return [*messages, {"role": "assistant", "content": text}]


def answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> None:
    """Stream one answer to standard output."""
    for _ in _printed(llm.stream_chat(messages, params)):
        pass


def _shown(text: str) -> str:
    """``text`` as it may go to standard output."""
    return text.translate(_CONTROLS) if sys.stdout.isatty() else text


def _printed(stream: Iterable[Chunk]) -> Iterator[Chunk]:
    """The chunks of one sequence, each printed as it passes; the line is ended after the last."""
    from drivetrain.serving.types import FinishReason

    for chunk in stream:
        print(_shown(chunk.text), end="", flush=True)
        if chunk.finish_reason is not None:
            print(flush=True)
        if chunk.finish_reason is FinishReason.TIMEOUT:
            note("note: the time limit (engine.timeout_seconds) ended this before it was done")
        yield chunk
