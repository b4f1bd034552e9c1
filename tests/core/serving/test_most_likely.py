"""Rules of greedy tokens that are found without all scores: they are the tokens of all scores, whatever runs beside
them. Scores are computed where anything else is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from drivetrain import LLM, SamplingParams
from drivetrain.contracts.kernels import FindsLargest
from drivetrain.contracts.model import FindsMostLikely
from drivetrain.errors import RequestFailedError

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
    "Water boils at",
    "The three laws of motion are",
]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def opened(precision: str, **engine: Any) -> LLM:
    engine = {"max_model_len": 256, "prefix_cache": False, **engine}
    return LLM("smollm2-135m", quantizer="none", precision=precision, engine=engine)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with opened(request.param) as llm:
        if not isinstance(module_of(llm).lm_head._linear, FindsLargest):
            pytest.skip("these kernels have nothing that finds the largest output")
        yield llm


def module_of(llm: LLM) -> Any:
    return llm._stack.engine.runner.model


@pytest.fixture
def scored(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call that computed all scores."""
    module, rows = module_of(llm), []
    plain = module.logits

    def logits(hidden_NE: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden_NE))
        return plain(hidden_NE)

    monkeypatch.setattr(module, "logits", logits)
    return rows


def test_the_tokens_are_those_of_all_scores(llm: LLM, scored: list[int]) -> None:
    """Each is the best of what the model scores where prompt and output are one prompt, but for rounding."""
    prompts = [llm._stack.tokenizer.encode(prompt) for prompt in PROMPTS]
    for count in (1, len(PROMPTS)):
        results = llm.generate(prompts[:count], [GREEDY] * count)
        assert scored == []
        room = 1e-3 if module_of(llm).lm_head.weight.dtype == torch.float32 else 0.2
        for prompt, result in zip(prompts, results, strict=False):
            whole = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
            (again,) = llm.generate([[*prompt, *result.token_ids]], [whole])
            for entry in again.prompt.logprobs[len(prompt) :]:
                assert entry.logprob >= entry.top[0][1] - room
        scored.clear()


def test_neighbours_that_want_more_change_no_token(llm: LLM, scored: list[int]) -> None:
    if module_of(llm).lm_head.weight.dtype != torch.float32:
        pytest.skip("in bfloat16 a row of a larger batch may be rounded otherwise")
    alone = [result.token_ids for result in llm.generate(PROMPTS, [GREEDY] * len(PROMPTS))]
    assert scored == []
    others = [
        SamplingParams(temperature=1.0, seed=1, max_tokens=8),
        SamplingParams(temperature=0, max_tokens=8, logprobs=2, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=8, repetition_penalty=1.3, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=1, ignore_eos=True),
    ]
    for other in others:
        scored.clear()
        together = llm.generate([*PROMPTS, PROMPTS[0]], [*[GREEDY] * len(PROMPTS), other])
        assert [result.token_ids for result in together[:-1]] == alone
        assert scored, "somebody wanted scores"


def test_scores_that_are_no_numbers_end_the_request(llm: LLM) -> None:
    weight = module_of(llm).model.norm.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[3] = float("nan")
        with pytest.raises(RequestFailedError, match="not finite"):
            llm.generate(PROMPTS[:1], [GREEDY])
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert llm.generate(PROMPTS[:1], [GREEDY])


def test_it_can_be_turned_off() -> None:
    with opened("fp32", screen_output=False) as llm:
        module = module_of(llm)
        assert isinstance(module, FindsMostLikely)
        assert module.most_likely(torch.zeros(1, 576)) is None
        assert llm.generate(PROMPTS[:1], [GREEDY])
