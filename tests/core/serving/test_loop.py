"""Rules of the engine's thread: whoever submits gets an end, whatever happens, and what was held is freed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from drivetrain.contracts.scheduler import StepPlan, View
from drivetrain.errors import (
    BlockAccountingError,
    DrainingError,
    InvalidRequestError,
    PromptTooLongError,
    QueueFullError,
    RequestError,
    RequestFailedError,
)
from drivetrain.plugins.scheduler.fcfs import FcfsScheduler
from drivetrain.serving.loop import EngineLoop, Ticket
from drivetrain.serving.types import Chunk, FinishReason, GenerationRequest, SamplingParams
from support.fake_model import expected_tokens, fake_lm, greedy, make_scheduler, prompts
from support.fake_stack import Client, assert_nothing_is_held, held_model, make_stack, wait_until

torch.set_num_threads(1)

PROMPT = [5, 9, 12, 3, 3, 44]
ENDED = [FinishReason.LENGTH]


@pytest.fixture(autouse=True)
def _no_log_of_injected_faults(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1, "drivetrain")


@pytest.fixture
def loops() -> Iterator[list[EngineLoop]]:
    """Loops to shut down at the end."""
    made: list[EngineLoop] = []
    yield made
    for loop in made:
        loop.shutdown()


@pytest.fixture
def make(loops: list[EngineLoop]) -> Any:
    def make_loop(*, start: bool = True, **options: Any) -> tuple[EngineLoop, Client]:
        loop = EngineLoop(make_stack(**options))
        loops.append(loop)
        if start:
            loop.start()
        return loop, Client(loop)

    return make_loop


# --- requests from many threads --------------------------------------------------------------------------------------


def test_requests_of_many_threads_each_get_their_own_answer(make: Any) -> None:
    loop, client = make(num_blocks=24)
    tickets: dict[str, tuple[Ticket, list[int]]] = {}

    def work(number: int) -> None:
        for prompt in prompts(10, 5 + number):
            ticket = client.submit(prompt, greedy(6))
            tickets[ticket.request_id] = ticket, prompt

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tickets) == 80
    for ticket, prompt in tickets.values():
        assert client.reasons(ticket) == ENDED
        assert client.run.tokens[ticket.request_id, 0] == expected_tokens(prompt, 6)
        assert ticket.prompt_info is not None
        assert ticket.prompt_info.token_ids == tuple(prompt)
    wait_until(lambda: loop.is_empty, "empty")
    assert loop._num_unread == 0
    assert_nothing_is_held(loop.stack)


def test_text_is_encoded_and_prompt_logprobs_are_known_at_the_first_chunk(make: Any) -> None:
    loop, client = make(max_batched_tokens=4)
    infos = []

    def receive(ticket: Ticket, chunks: list[Chunk]) -> None:
        infos.append(ticket.prompt_info)

    ticket = loop.submit(GenerationRequest("hello world", greedy(3, prompt_logprobs=1)), receive)
    wait_until(lambda: loop.is_empty, "empty")
    assert ticket.prompt == (8, 5, 12, 12, 15, 0, 23, 15, 18, 12, 4)
    assert len(infos) == 3
    assert len(infos[0].logprobs) == 11
    assert client.reasons(client.submit("hello world", greedy(1))) == ENDED


@pytest.mark.parametrize(
    ("prompt", "params", "rest", "error", "param"),
    [
        ([], {}, {}, InvalidRequestError, "prompt"),
        ("", {}, {}, InvalidRequestError, "prompt"),
        ([99], {}, {}, InvalidRequestError, "prompt"),
        ([1] * 64, {}, {}, PromptTooLongError, "prompt"),
        ([1], {"max_tokens": 64}, {}, PromptTooLongError, "max_tokens"),
        ([1], {}, {"timeout_seconds": 0}, InvalidRequestError, "timeout_seconds"),
        ([1], {}, {"timeout_seconds": float("nan")}, InvalidRequestError, "timeout_seconds"),
        ([1], {}, {"timeout_seconds": True}, InvalidRequestError, "timeout_seconds"),
        ([1], {}, {"timeout_seconds": 10**400}, InvalidRequestError, "timeout_seconds"),
        ([1], {}, {"priority": 1.5}, InvalidRequestError, "priority"),
    ],
)
def test_what_can_not_be_served_is_refused_by_the_caller_s_own_call(
    make: Any, prompt: Any, params: dict[str, Any], rest: dict[str, Any], error: type[RequestError], param: str
) -> None:
    loop, client = make()
    with pytest.raises(error) as caught:
        client.submit(prompt, SamplingParams(**{"max_tokens": 1, **params}), **rest)
    assert caught.value.param == param
    assert loop.is_empty
    assert client.reasons(client.submit(PROMPT, greedy(1))) == ENDED


# --- cancelling ------------------------------------------------------------------------------------------------------


def test_a_request_can_be_cancelled_in_every_phase(make: Any) -> None:
    loop, client = make(start=False, max_running=1)
    unread = client.submit(PROMPT, greedy(50, n=2))
    loop.cancel(unread)
    loop.cancel(unread)
    loop.start()
    assert client.reasons(unread) == [FinishReason.CANCELLED] * 2
    with held_model(loop.stack) as model:
        running, waiting = client.submit(PROMPT, greedy(50)), client.submit(PROMPT, greedy(50, n=2))
        assert model.faults.entered.wait(10)
        loop.cancel(waiting)
        loop.cancel(running)
    assert client.reasons(waiting) == [FinishReason.CANCELLED] * 2
    assert client.reasons(running) == [FinishReason.CANCELLED]
    ended = client.submit(PROMPT, greedy(1))
    assert client.reasons(ended) == ENDED
    loop.cancel(ended)
    wait_until(lambda: loop.is_empty, "empty")
    assert_nothing_is_held(loop.stack)


def test_cancelling_from_many_threads_while_everything_runs_frees_everything(make: Any) -> None:
    loop, client = make(num_blocks=20, max_running=6)
    tickets = [client.submit(prompt, greedy(40, n=2)) for prompt in prompts(40, 12)]
    threads = [threading.Thread(target=lambda own=tickets[i::4]: [loop.cancel(t) for t in own]) for i in range(4)]
    client.first_token(tickets[0])
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ticket, prompt in zip(tickets, prompts(40, 12), strict=True):
        client.reasons(ticket)
        for index in range(2):
            tokens = client.run.tokens[ticket.request_id, index]
            assert tokens == expected_tokens(prompt, len(tokens))
    wait_until(lambda: loop.is_empty, "empty")
    assert_nothing_is_held(loop.stack)


# --- the bound on waiting, draining, the end -------------------------------------------------------------------------


def test_one_request_more_than_may_wait_is_refused_with_429(make: Any) -> None:
    loop, client = make(start=False, settings={"max_waiting": 3})
    tickets = [client.submit(PROMPT, greedy(2)) for _ in range(3)]
    with pytest.raises(QueueFullError, match="3 requests wait already") as caught:
        client.submit(PROMPT, greedy(2))
    assert caught.value.status == 429
    tickets.append(client.submit(PROMPT, greedy(2), is_bounded=False))
    loop.start()
    assert [client.reasons(ticket) for ticket in tickets] == [ENDED] * 4
    assert client.reasons(client.submit(PROMPT, greedy(2))) == ENDED


def test_while_draining_nothing_new_is_taken_and_the_rest_finishes(make: Any) -> None:
    loop, client = make()
    with held_model(loop.stack):
        ticket = client.submit(PROMPT, greedy(5))
        loop.refuse_new()
        with pytest.raises(DrainingError) as caught:
            client.submit(PROMPT, greedy(5))
        assert caught.value.status == 503
        assert (loop.health().state, loop.health().ok, loop.is_empty) == ("draining", False, False)
    assert client.reasons(ticket) == ENDED
    wait_until(lambda: loop.is_empty, "empty")


def test_shutdown_ends_what_runs_waits_and_is_unread(make: Any) -> None:
    loop, client = make(max_running=1)
    with held_model(loop.stack) as model:
        tickets = [client.submit(PROMPT, greedy(50, n=2)) for _ in range(3)]
        assert model.faults.entered.wait(10)
        tickets.append(client.submit(PROMPT, greedy(50)))
        stopping = threading.Thread(target=loop.shutdown)
        stopping.start()
        wait_until(lambda: loop.health().state == "draining", "draining")
    stopping.join(10)
    assert not stopping.is_alive()
    for ticket in tickets:
        assert set(client.reasons(ticket)) == {FinishReason.CANCELLED}
    assert_nothing_is_held(loop.stack)
    loop.shutdown()
    with pytest.raises(DrainingError, match="was closed"):
        client.submit(PROMPT, greedy(5))


def test_shutdown_of_a_loop_that_never_started_ends_its_requests(make: Any) -> None:
    loop, client = make(start=False)
    ticket = client.submit(PROMPT, greedy(5))
    loop.shutdown()
    assert client.reasons(ticket) == [FinishReason.CANCELLED]


def test_a_request_that_was_accepted_while_the_loop_stops_still_ends(make: Any) -> None:
    loop, client = make()
    accepted: list[Ticket] = []

    def work() -> None:
        try:
            while True:
                accepted.append(client.submit(PROMPT, greedy(3), is_bounded=False))
        except DrainingError:
            return

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(accepted) > 50, "requests")
    loop.shutdown()
    for thread in threads:
        thread.join(10)
    for ticket in accepted:
        assert client.reasons(ticket)[0] in (FinishReason.LENGTH, FinishReason.CANCELLED)


def test_a_request_on_its_way_when_the_doors_close_is_refused(make: Any) -> None:
    loop, client = make()
    refused: list[DrainingError] = []

    def work() -> None:
        try:
            client.submit(PROMPT, greedy(3))
        except DrainingError as error:
            refused.append(error)

    with loop._wake:
        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.1)  # it has looked whether the loop is open, and waits to hand its request over
        loop.refuse_new()
    thread.join(10)
    assert len(refused) == 1
    assert loop.is_empty


# --- failures --------------------------------------------------------------------------------------------------------


class Breaking(FcfsScheduler):
    """Works until it is told to break."""

    is_broken = False

    def plan(self, view: View) -> StepPlan:
        return StepPlan([]) if self.is_broken else super().plan(view)


def breaking() -> Breaking:
    made = make_scheduler("fcfs", 16, 2)
    assert isinstance(made, FcfsScheduler)
    return Breaking(made.config)


def test_when_the_engine_fails_every_request_ends_with_the_error_and_health_says_so(make: Any) -> None:
    scheduler = breaking()
    loop, client = make(scheduler=scheduler, max_running=2)
    with held_model(loop.stack) as model:
        tickets = [client.submit(PROMPT, greedy(50, n=2)) for _ in range(3)]
        assert model.faults.entered.wait(10)
        scheduler.is_broken = True
        tickets.append(client.submit(PROMPT, greedy(50)))
    for ticket in tickets:
        assert set(client.reasons(ticket)) == {FinishReason.ERROR}
    assert all("impossible plan" in (chunk.error or "") for chunk in client.run.last.values())
    wait_until(lambda: loop.health().state == "failed", "failed")
    health = loop.health()
    assert not health.ok
    assert "EngineError: scheduler Breaking made an impossible plan" in (health.error or "")
    with pytest.raises(RequestFailedError, match="the engine has failed"):
        client.submit(PROMPT, greedy(5))
    assert_nothing_is_held(loop.stack)
    assert loop.is_empty


def test_even_with_broken_books_every_request_ends(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, client = make()

    def broken(sequence: object) -> None:
        raise BlockAccountingError("a block was freed twice", found=3)

    with held_model(loop.stack) as model:
        tickets = [client.submit(PROMPT, greedy(5, n=2)) for _ in range(3)]
        assert model.faults.entered.wait(10)
        monkeypatch.setattr(loop.engine.kv, "close", broken)
    for ticket in tickets:
        assert set(client.reasons(ticket)) == {FinishReason.ERROR}
    assert loop.health().state == "failed"


def test_a_step_that_raises_does_not_end_the_loop(make: Any) -> None:
    loop, client = make()
    fake_lm(loop.engine).faults.error = ValueError("injected")
    failed = client.submit(PROMPT, greedy(5))
    assert client.reasons(failed) == [FinishReason.ERROR]
    assert client.reasons(client.submit(PROMPT, greedy(5))) == ENDED
    assert loop.health().ok


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_exit_inside_a_step_ends_the_loop_and_every_request(make: Any) -> None:
    loop, client = make()
    fake_lm(loop.engine).faults.error = SystemExit(3)
    ticket = client.submit(PROMPT, greedy(5))
    assert client.reasons(ticket) == [FinishReason.ERROR]
    wait_until(lambda: loop.health().state == "failed", "failed")


def test_a_request_that_can_not_be_taken_ends_alone(make: Any) -> None:
    def make_decoder(prompt: Any, skip: bool) -> Any:
        raise LookupError("no such token")

    loop, client = make(start=False)
    works = loop.engine._make_decoder
    loop.engine._make_decoder = make_decoder
    broken = client.submit(PROMPT, greedy(5, n=2))
    loop.start()
    assert client.reasons(broken) == [FinishReason.ERROR] * 2
    assert "LookupError" in (client.run.last[broken.request_id, 1].error or "")
    loop.engine._make_decoder = works
    assert client.reasons(client.submit(PROMPT, greedy(5))) == ENDED


def test_a_receiver_that_raises_loses_its_own_request_only(make: Any) -> None:
    loop, client = make()

    def broken(ticket: Ticket, chunks: list[Chunk]) -> None:
        raise OSError("nobody listens")

    loop.submit(GenerationRequest(PROMPT, greedy(50)), broken)
    assert client.reasons(client.submit(PROMPT, greedy(20))) == ENDED
    wait_until(lambda: loop.is_empty, "empty")
    assert loop.health().ok
    assert_nothing_is_held(loop.stack)


# --- health ----------------------------------------------------------------------------------------------------------


def test_health_tells_idle_busy_and_stalled_apart(make: Any) -> None:
    loop, client = make(settings={"stall_seconds": 0.5})
    assert (loop.health().state, loop.health().ok) == ("idle", True)
    with held_model(loop.stack) as model:
        ticket = client.submit(PROMPT, greedy(3))
        assert model.faults.entered.wait(10)
        assert loop.health().state == "busy"
        wait_until(lambda: loop.health().state == "stalled", "stalled")
        health = loop.health()
        assert (health.ok, health.running, health.seconds_since_progress > 0.5) == (False, 1, True)
    assert client.reasons(ticket) == ENDED
    wait_until(lambda: loop.health().state == "idle", "idle")
    assert loop.health().seconds_since_progress == 0


def test_after_a_long_rest_a_new_request_is_no_stall(make: Any) -> None:
    loop, client = make(start=False, settings={"stall_seconds": 0.5})
    time.sleep(0.6)
    client.submit(PROMPT, greedy(3))
    assert loop.health().state == "busy"


def test_shutdown_does_not_wait_for_ever_for_a_step_that_hangs(make: Any) -> None:
    loop, client = make(settings={"stall_seconds": 0.1})
    with held_model(loop.stack) as model:
        ticket = client.submit(PROMPT, greedy(5, n=2))
        assert model.faults.entered.wait(10)
        loop.shutdown()
        assert client.reasons(ticket) == [FinishReason.ERROR] * 2
    thread = loop._thread
    assert thread is not None
    thread.join(10)
    assert not thread.is_alive()
    assert_nothing_is_held(loop.stack)


# --- looking at it ---------------------------------------------------------------------------------------------------


def test_levels_can_be_read_from_other_threads_at_any_time(make: Any) -> None:
    loop, client = make(num_blocks=20)
    tickets = [client.submit(prompt, greedy(20, n=2)) for prompt in prompts(30, 12)]
    while not loop.is_empty:
        health = loop.health()
        assert 0 <= health.running <= 8
        assert 0 <= health.waiting <= 60
        assert loop.stats()["requests"] <= 30
        time.sleep(0.001)  # leave the interpreter to the loop
    assert [client.reasons(ticket) for ticket in tickets] == [ENDED * 2] * 30
