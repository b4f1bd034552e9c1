"""Rules of the Python API: results in order; nothing left running behind an error, an interrupt or a closed stream."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drivetrain.errors import (
    DrainingError,
    InvalidRequestError,
    PromptTooLongError,
    RequestFailedError,
    RequestTimeoutError,
)
from drivetrain.serving.llm import LLM
from drivetrain.serving.types import FinishReason, SamplingParams
from support.command_line import make_tiny_folder
from support.fake_model import expected_tokens, fake_lm, greedy, prompts
from support.fake_stack import assert_nothing_is_held, held_model, make_stack, text_of, wait_until

torch.set_num_threads(1)

PROMPT = [5, 9, 12, 3, 3, 44]


@pytest.fixture(autouse=True)
def _no_log_of_injected_faults(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1, "drivetrain")


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM.from_stack(make_stack(num_blocks=24, defaults={"temperature": 0.0, "max_tokens": 8})) as made:
        yield made


def assert_freed(llm: LLM) -> None:
    wait_until(lambda: llm._loop.is_empty, "empty")
    assert_nothing_is_held(llm._stack)


# --- generate --------------------------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    several = list(prompts(20, 8))
    params = [greedy(1 + number % 7, logprobs=1) for number in range(20)]
    advance: list[tuple[int, int | None]] = []
    results = llm.generate(several, params, progress=lambda what, done, total, unit="": advance.append((done, total)))
    for prompt, own, result in zip(several, params, results, strict=True):
        assert own.max_tokens is not None
        expected = expected_tokens(prompt, own.max_tokens)
        assert result.token_ids == tuple(expected)
        assert result.text == text_of(expected)
        assert result.prompt.token_ids == tuple(prompt)
        completion = result.completions[0]
        assert completion.finish_reason is FinishReason.LENGTH
        assert completion.logprobs is not None
        assert [entry.token_id for entry in completion.logprobs] == expected
        assert result.timing.first_token_seconds is not None
        assert 0 < result.timing.first_token_seconds <= result.timing.total_seconds
    assert advance == [(done, 20) for done in range(1, 21)]
    assert_freed(llm)


def test_one_prompt_several_texts_and_none(llm: LLM) -> None:
    one, same = llm.generate("hello", greedy(4)), llm.generate(["hello", "world"], greedy(4))
    assert one[0].token_ids == same[0].token_ids == tuple(expected_tokens(llm.tokenizer.encode("hello"), 4))
    assert one[0].completions[0].logprobs is None
    assert llm.generate([]) == []
    assert llm.generate(PROMPT)[0].token_ids  # the model's own recommendation


def test_n_sequences_come_in_order(llm: LLM) -> None:
    result = llm.generate(PROMPT, SamplingParams(n=3, temperature=1.5, seed=4, max_tokens=9))[0]
    assert [completion.index for completion in result.completions] == [0, 1, 2]
    again = llm.generate(PROMPT, SamplingParams(n=3, temperature=1.5, seed=4, max_tokens=9))[0]
    assert [c.token_ids for c in again.completions] == [c.token_ids for c in result.completions]


def test_a_chat_is_rendered_and_answered(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi there"}]
    expected = expected_tokens(llm.tokenizer.encode("hi there."), 5)
    assert llm.chat(messages, greedy(5)).token_ids == tuple(expected)
    assert [t for chunk in llm.stream_chat(messages, greedy(5)) for t in chunk.token_ids] == expected


def test_an_error_in_the_second_prompt_leaves_nothing_running(llm: LLM) -> None:
    with held_model(llm._stack), pytest.raises(PromptTooLongError):
        llm.generate([PROMPT, [1] * 64, PROMPT], greedy(40))
    assert_freed(llm)
    assert llm.stats()["output_tokens"] <= 1
    with pytest.raises(InvalidRequestError, match="one for each"):
        llm.generate([PROMPT, PROMPT], [greedy(1)])


@pytest.mark.parametrize(
    ("prompts", "params", "param"),
    [
        (None, None, "prompts"),
        (7, greedy(1), "prompts"),
        (np.array(PROMPT), greedy(1), "prompts"),
        (b"bytes", greedy(1), "prompt"),
        ([None], None, "prompt"),
        ([np.array(PROMPT)], greedy(1), "prompt"),
        (["text", 5], greedy(1), "prompt"),
        ("text", {"max_tokens": 3}, "params"),
        (["text"], [None], "params"),
    ],
)
def test_what_is_no_prompt_or_no_parameters_is_told(llm: LLM, prompts: Any, params: Any, param: str) -> None:
    """Not as a TypeError from somewhere inside, and bytes not as token ids."""
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate(prompts, params)
    assert caught.value.param == param
    if not isinstance(prompts, list):
        with pytest.raises(InvalidRequestError):
            llm.stream(prompts, params)


@pytest.mark.parametrize("messages", [None, "hello", {"role": "user", "content": "x"}])
def test_what_is_no_list_of_messages_is_told(llm: LLM, messages: Any) -> None:
    with pytest.raises(InvalidRequestError, match="list of messages"):
        llm.chat(messages)


def test_more_prompts_than_may_wait_are_no_error() -> None:
    with LLM.from_stack(make_stack(settings={"max_waiting": 1})) as llm:
        assert len(llm.generate(list(prompts(10)), greedy(2))) == 10


def test_a_failed_step_is_raised_and_leaves_nothing_running(llm: LLM) -> None:
    fake_lm(llm._stack.engine).faults.error = RuntimeError("injected")
    with pytest.raises(RequestFailedError, match="RuntimeError: injected"):
        llm.generate([*prompts(20)], greedy(40))
    assert_freed(llm)
    assert llm.generate(PROMPT, greedy(2))[0].token_ids == tuple(expected_tokens(PROMPT, 2))


def test_time_that_runs_out_before_the_first_token_is_an_error(llm: LLM) -> None:
    with held_model(llm._stack) as model:
        threading.Timer(0.2, lambda: model.faults.gate.set() if model.faults.gate else None).start()
        stream = llm.stream(PROMPT, greedy(None))
        assert model.faults.entered.wait(10)
        with pytest.raises(RequestTimeoutError):
            llm.generate(PROMPT, greedy(4), timeout_seconds=0.05)
        stream.close()
    assert_freed(llm)


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_gives_what_generate_gives(llm: LLM) -> None:
    with llm.stream(PROMPT, greedy(12, n=2)) as stream:
        chunks = list(stream)
    for index in range(2):
        assert [t for c in chunks if c.index == index for t in c.token_ids] == expected_tokens(PROMPT, 12)
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [FinishReason.LENGTH] * 2
    assert list(stream) == []


@pytest.mark.parametrize("how", ["close", "drop", "with"])
@pytest.mark.parametrize("num_read", [0, 1])
def test_leaving_a_stream_cancels_its_request(llm: LLM, how: str, num_read: int) -> None:
    before = llm.stats()["output_tokens"]
    with held_model(llm._stack) as model:
        stream = llm.stream(PROMPT, greedy(None, n=2))
        assert model.faults.entered.wait(10)
        if num_read:
            assert model.faults.gate is not None
            model.faults.gate.set()
            next(stream)
        if how == "close":
            stream.close()
            assert list(stream) == []
        elif how == "with":
            with stream:
                pass
        else:
            del stream
    assert_freed(llm)
    if not num_read:
        assert llm.stats()["output_tokens"] - before <= 2  # two sequences of 58 tokens were asked for


def test_a_stream_that_can_not_be_served_is_refused_at_once(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        llm.stream([])


def test_a_stream_raises_what_the_engine_met(llm: LLM) -> None:
    fake_lm(llm._stack.engine).faults.error = RuntimeError("injected")
    stream = llm.stream(PROMPT, greedy(5))
    with pytest.raises(RequestFailedError, match="injected"):
        list(stream)
    assert list(stream) == []
    assert_freed(llm)


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_ctrl_c_cancels_what_was_asked_for(llm: LLM, call: str) -> None:
    answer_all = {
        "generate": lambda llm: llm.generate([PROMPT, PROMPT], greedy(40)),
        "stream": lambda llm: list(llm.stream(PROMPT, greedy(40))),
    }
    with held_model(llm._stack) as model:

        def interrupt() -> None:
            assert model.faults.entered.wait(10)
            assert model.faults.gate is not None
            os.kill(os.getpid(), signal.SIGINT)
            # A signal that comes right before the main thread falls asleep is noticed when it wakes again.
            time.sleep(0.2)
            model.faults.gate.set()

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            answer_all[call](llm)
        thread.join()
    assert_freed(llm)
    assert llm.stats()["output_tokens"] < 40


# --- life ------------------------------------------------------------------------------------------------------------


def test_closing_ends_what_is_under_way_and_refuses_the_rest() -> None:
    llm = LLM.from_stack(make_stack())
    found: list[Any] = []
    with held_model(llm._stack) as model:
        waiting = threading.Thread(target=lambda: found.extend(llm.generate(PROMPT, greedy(None))))
        waiting.start()
        assert model.faults.entered.wait(10)
        closing = threading.Thread(target=llm.close)
        closing.start()
        wait_until(lambda: llm._loop.health().state == "draining", "draining")
    closing.join(10)
    waiting.join(10)
    assert [result.completions[0].finish_reason for result in found] == [FinishReason.CANCELLED]
    llm.close()
    with pytest.raises(DrainingError):
        llm.generate(PROMPT)


LEAVES = """
import sys
from drivetrain import LLM, SamplingParams

llm = LLM(
    sys.argv[1],
    platform={{"name": "cpu", "threads": 1}},
    kernels="reference",
    engine={{"overlap": "{overlap}"}},
)
streams = [llm.stream([5, 6, number], SamplingParams(max_tokens=1900, ignore_eos=True)) for number in range(4)]
for stream in streams:
    next(stream)
print("leaves")
"""


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_a_program_may_end_while_steps_run(tmp_path: Path, overlap: str) -> None:
    """Nothing was closed: threads that still compute must not meet an interpreter that comes apart."""
    program = [sys.executable, "-W", "error", "-c", LEAVES.format(overlap=overlap), str(make_tiny_folder(tmp_path))]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaves\n", "")


def test_what_can_be_looked_at(llm: LLM) -> None:
    llm.generate(PROMPT, greedy(3))
    assert llm.max_model_len == 64
    assert llm.default_params.temperature == 0
    assert llm.stats()["output_tokens"] == 3
    assert llm.explain().selections == ()
    assert llm.selection_dict()["model"] == "fake"


def test_the_default_length_fits_what_the_context_has_left(llm: LLM) -> None:
    """Nobody who names no length is told that 256 tokens do not fit."""
    prompt = [1] * (llm.max_model_len - 3)
    assert len(llm.generate(prompt)[0].token_ids) <= 3
    assert sum(len(chunk.token_ids) for chunk in llm.stream(prompt)) <= 3
