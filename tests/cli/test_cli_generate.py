"""``pull``, ``generate``, ``chat`` and ``demo``: what is printed, and what is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain import LLM, SamplingParams
from drivetrain.plugins.source.catalogue import CatalogueSource
from support.command_line import ONE_THREAD

Cli = Callable[..., Any]
GREEDY = ("--temperature", "0")
PROMPT = "The quick brown fox"


@pytest.fixture
def on(tiny: Path) -> tuple[object, ...]:
    return ("--model", tiny, *ONE_THREAD)


# --- pull ------------------------------------------------------------------------------------------------------------


def test_pulling_what_is_here_prints_where(cli: Cli, tiny: Path) -> None:
    outcome = cli("pull", tiny)
    assert (outcome.status, outcome.out) == (0, f"{tiny}\n")
    assert cli("pull", tiny, "--source", "local").out == f"{tiny}\n"


def test_a_source_that_is_not_this_models_is_refused(cli: Cli, tiny: Path) -> None:
    outcome = cli("pull", tiny, "--source", "hub")
    assert outcome.status == 1
    assert "source 'hub'" in outcome.error


def test_a_folder_without_a_model_is_refused(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("generate", "x", "--model", tmp_path)
    assert outcome.status == 1
    assert str(tmp_path) in outcome.error


# --- generate --------------------------------------------------------------------------------------------------------


def test_greedy_text_is_what_the_python_api_says(cli: Cli, on: tuple[object, ...], tiny: Path) -> None:
    with LLM(tiny, platform={"name": "cpu", "threads": 1}) as llm:
        expected = llm.generate(PROMPT, SamplingParams(max_tokens=12, temperature=0))[0].text
    first, second = (cli("generate", PROMPT, *on, *GREEDY, "--max-tokens", 12) for _ in range(2))
    assert first.status == 0
    assert first.out == second.out == expected + "\n"


def test_standard_output_holds_the_text_alone(cli: Cli, on: tuple[object, ...]) -> None:
    outcome = cli("generate", PROMPT, *on, *GREEDY, "--max-tokens", 12)
    assert outcome.err.splitlines() == [
        "loading LlamaForCausalLM: 1 of 30 tensors",
        "loading LlamaForCausalLM: 30 of 30 tensors",
    ]


def test_a_seed_makes_the_output_repeatable(cli: Cli, on: tuple[object, ...]) -> None:
    texts = [cli("generate", PROMPT, *on, "--seed", seed, "--max-tokens", 20).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_n_continuations_are_numbered(cli: Cli, on: tuple[object, ...]) -> None:
    out = cli("generate", PROMPT, *on, "--n", 3, "--seed", 1, "--max-tokens", 4).out
    assert out.startswith("[0] ")
    assert "\n[1] " in out
    assert "\n[2] " in out


def test_a_stop_string_ends_the_text_before_it(cli: Cli, on: tuple[object, ...]) -> None:
    whole = cli("generate", PROMPT, *on, *GREEDY, "--max-tokens", 30).out.rstrip("\n")
    stop = next(c for c in whole[len(whole) // 2 :] if c.isascii() and c.isprintable())
    assert cli("generate", PROMPT, *on, *GREEDY, "--max-tokens", 30, "--stop", stop).out == whole.split(stop)[0] + "\n"


def test_a_dash_reads_standard_input(cli: Cli, on: tuple[object, ...]) -> None:
    words = (*on, *GREEDY, "--max-tokens", 8)
    assert cli("generate", "-", *words, stdin=PROMPT).out == cli("generate", PROMPT, *words).out


def test_json_has_tokens_and_times(cli: Cli, on: tuple[object, ...]) -> None:
    outcome = cli("generate", PROMPT, *on, "--n", 2, "--seed", 3, "--max-tokens", 6, "--json")
    result = json.loads(outcome.out)
    assert set(result) == {"prompt_tokens", "cached_tokens", "completions", "first_token_seconds", "total_seconds"}
    assert result["prompt_tokens"] > 0
    assert 0 < result["first_token_seconds"] <= result["total_seconds"]
    for index, completion in enumerate(result["completions"]):
        assert completion["index"] == index
        assert completion["finish_reason"] in ("length", "stop")
        assert 1 <= len(completion["token_ids"]) <= 6


def test_a_configuration_file_is_a_second_way_to_say_it_all(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {tiny}\nplatform: {{name: cpu, threads: 1}}\nattention: {{name: sdpa, block_size: 4}}\n")
    expected = cli("generate", PROMPT, "--model", tiny, *ONE_THREAD, *GREEDY, "--max-tokens", 8).out
    assert cli("generate", PROMPT, "--config", file, *GREEDY, "--max-tokens", 8).out == expected
    refused = cli("generate", PROMPT, "--config", file, "--set", "attention.block_size=0")
    assert "attention.block_size" in refused.error


def test_a_time_limit_that_cuts_the_text_is_told(cli: Cli, on: tuple[object, ...]) -> None:
    words = ("--set", "engine.timeout_seconds=0.2", "--max-tokens", 2000, "--seed", 1)
    outcome = cli("generate", PROMPT, *on, *words, "--set", "engine.max_model_len=2048")
    if "time limit" not in outcome.err:  # a machine that is done with 2000 tokens in a fifth of a second
        pytest.skip("the text was done before the limit")
    assert outcome.status == 0
    assert outcome.out.endswith("\n")


# --- chat ------------------------------------------------------------------------------------------------------------


def test_one_message_gets_one_answer(cli: Cli, on: tuple[object, ...], tiny: Path) -> None:
    with LLM(tiny, platform={"name": "cpu", "threads": 1}) as llm:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        expected = llm.chat(messages, SamplingParams(max_tokens=10, temperature=0)).text
    outcome = cli("chat", "Hello", *on, *GREEDY, "--max-tokens", 10, "--system", "Be brief.")
    assert (outcome.status, outcome.out) == (0, expected + "\n")


def test_a_conversation_remembers_until_it_is_reset(cli: Cli, on: tuple[object, ...], tiny: Path) -> None:
    params = SamplingParams(max_tokens=10, temperature=0)
    with LLM(tiny, platform={"name": "cpu", "threads": 1}) as llm:
        first = llm.chat([{"role": "user", "content": "Hello"}], params).text
        history = [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "Hello"},
        ]
        second = llm.chat(history, params).text
    assert first != second
    said = cli("chat", *on, *GREEDY, "--max-tokens", 10, stdin="Hello\n\nHello\n/reset\nHello\n/exit\nHello\n")
    assert (said.status, said.out) == (0, f"{first}\n{second}\n{first}\n")
    assert "/reset" in said.err


def test_the_end_of_the_input_ends_a_conversation(cli: Cli, on: tuple[object, ...]) -> None:
    for stdin, answers in (("", 0), ("Hello", 1), ("Hello\n", 1)):
        outcome = cli("chat", *on, *GREEDY, "--max-tokens", 3, "--seed", 1, stdin=stdin)
        assert outcome.status == 0
        assert (outcome.out != "") == bool(answers)


def test_a_message_that_is_too_long_does_not_end_the_conversation(cli: Cli, on: tuple[object, ...]) -> None:
    words = ("chat", *on, *GREEDY, "--max-tokens", 10)
    outcome = cli(*words, stdin=f"Hello {'x' * 4000}\nHello\n")
    assert outcome.status == 0
    assert "error: the prompt has" in outcome.err
    assert outcome.out == cli(*words, stdin="Hello\n").out


def test_without_a_limit_an_answer_is_as_long_as_there_is_room(cli: Cli, on: tuple[object, ...]) -> None:
    """A short context is no error of whoever named no limit."""
    short = (*on, *GREEDY, "--set", "engine.max_model_len=40")
    result = json.loads(cli("generate", "The quick", *short, "--json").out)
    assert result["prompt_tokens"] + len(result["completions"][0]["token_ids"]) <= 40
    assert cli("chat", "Hi", *short).status == 0
    refused = cli("generate", "The quick " * 40, *short)
    assert "Shorten the prompt" in refused.error


# --- demo ------------------------------------------------------------------------------------------------------------


def test_the_demo_shows_choices_an_answer_and_figures(cli: Cli, on: tuple[object, ...]) -> None:
    outcome = cli("demo", *on, "--requests", 4)
    assert outcome.status == 0
    for part in ("1. What was chosen, and why", "2. ", "3. 4 mixed requests", "not chosen", "prefix cache hits"):
        assert part in outcome.out
    figures = dict(line.split("  ", 1) for line in outcome.out.rpartition("figure")[2].splitlines()[1:])
    assert float(figures["output tokens per second"]) > 0
    assert "4/4 finished" in outcome.err
    assert "\r" not in outcome.err


@pytest.mark.model
def test_the_real_model_knows_a_capital(cli: Cli) -> None:
    if CatalogueSource(CatalogueSource.Config()).locate("smollm2-135m") is None:
        pytest.skip("smollm2-135m is not on this machine; drivetrain pull smollm2-135m fetches it")
    words = ("--model", "smollm2-135m", *ONE_THREAD, "--set", "engine.max_model_len=256", *GREEDY)
    outcome = cli("generate", "The capital of France is", *words, "--max-tokens", 4)
    assert "Paris" in outcome.out
