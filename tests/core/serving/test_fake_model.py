"""Rule: the fake model notices every fault of a paged cache that the engine's tests rely on it to notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from drivetrain.serving.engine import Engine
from support.fake_model import add, expected_tokens, fake_lm, finish, greedy, make_engine

torch.set_num_threads(1)

PROMPT = [5, 9, 12, 3, 3, 44, 60, 1, 17, 30]


def _swap_two_blocks(engine: Engine) -> None:
    table = engine.kv.tables[0][next(iter(engine.roster.running.values())).blocks.row]
    table[[0, 1]] = table[[1, 0]]


def _forget_a_value(engine: Engine) -> None:
    engine.runner.cache[0][engine.kv.tables[0][next(iter(engine.roster.running.values())).blocks.row, 0], 2] = 0.0


def _never_write_a_slot(engine: Engine) -> None:
    engine.runner.cache[1].fill_(torch.nan)


def _shift_the_position(engine: Engine) -> None:
    request = next(iter(engine.roster.running.values()))
    request.tokens.insert(0, 0)
    request.num_computed += 1


@pytest.mark.parametrize("fault", [_swap_two_blocks, _forget_a_value, _never_write_a_slot, _shift_the_position])
def test_a_fault_changes_the_tokens(fault: Callable[[Engine], None]) -> None:
    engine = make_engine()
    add(engine, "a", PROMPT, greedy(12))
    chunks = engine.step() + engine.step()
    fault(engine)
    # Not finish(): the books may be as wrong as the fault made them.
    while engine.has_work:
        chunks += engine.step()
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    assert tokens[:2] == expected_tokens(PROMPT, 2)
    assert tokens != expected_tokens(PROMPT, 12)


@pytest.mark.parametrize(("windows", "other"), [((None, 5), (None, 6)), ((None, 5), (None, None)), ((4,), (5,))])
def test_a_window_one_off_changes_the_tokens(windows: tuple[int | None, ...], other: tuple[int | None, ...]) -> None:
    assert expected_tokens(PROMPT, 12, windows) != expected_tokens(PROMPT, 12, other)


def test_paged_and_plain_agree() -> None:
    engine = make_engine(num_blocks=80, max_model_len=120)
    add(engine, "a", PROMPT, greedy(100))
    assert finish(engine).tokens["a", 0] == expected_tokens(PROMPT, 100)
    assert fake_lm(engine).num_tokens_computed == len(PROMPT) + 99
