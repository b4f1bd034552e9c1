"""Rules of choosing tokens: the published filters, exact penalties, reproducible draws, honest log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from drivetrain.serving.adjusting import ScoreAdjuster
from drivetrain.serving.request import Request
from drivetrain.serving.sampler import (
    Sampler,
    _keep_top_p,
    _most_likely_in_parts,
    distributions,
    most_likely,
    sequence_seed,
    token_logprobs,
    uniform,
)
from drivetrain.serving.text import TextStream
from drivetrain.serving.types import SamplingParams
from drivetrain.testing.measure import Allocations

torch.set_num_threads(1)

V = 300
CPU = torch.device("cpu")


class NoText:
    def push(self, ids: Sequence[int]) -> str:
        return ""

    def flush(self) -> str:
        return ""


def request(name: str = "r", prompt: Sequence[int] = (1, 2), output: Sequence[int] = (), **params: Any) -> Request:
    settings_ = SamplingParams(**params)
    return Request(
        request_id=name,
        index=0,
        tokens=[*prompt, *output],
        num_prompt_tokens=len(prompt),
        params=settings_,
        max_tokens=100,
        seed=settings_.seed or 0,
        priority=0,
        arrival_seconds=0.0,
        sequence_number=0,
        deadline_seconds=None,
        text=TextStream(NoText(), (), False),
        end_tokens=frozenset({7}),
    )


def logits(rows: int, seed: int = 0, vocab_size: int = V, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def warped(row_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """transformers' distribution, its warpers in the order in which its ``generate`` has them."""
    warpers = LogitsProcessorList()
    if params.temperature != 1:
        warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), row_V.unsqueeze(0)).softmax(-1)[0]


# --- filters ---------------------------------------------------------------------------------------------------------

row_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.7]),
    top_k=st.sampled_from([-1, 0, 1, 3, 50, V, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)


@settings(max_examples=60, deadline=None)
@given(
    params=st.lists(row_params, min_size=1, max_size=6), seed=st.integers(0, 1000), scale=st.sampled_from([0.5, 4.0])
)
def test_distributions_are_those_of_transformers_for_any_mix_of_rows(
    params: list[SamplingParams], seed: int, scale: float
) -> None:
    scores = logits(len(params), seed, scale=scale)
    found = distributions(scores, params)
    for row, own in enumerate(params):
        expected = warped(scores[row], own)
        assert torch.equal(found[row] > 0, expected > 0), own
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-7)


def test_top_p_reaches_beyond_its_first_try() -> None:
    scores = logits(2, vocab_size=5000, scale=0.1)  # nearly flat: half the mass lies in over a thousand tokens
    params = [SamplingParams(top_p=0.5), SamplingParams()]
    found = distributions(scores, params)
    assert int((found[0] > 0).sum()) > 1000
    for row in range(2):
        torch.testing.assert_close(found[row], warped(scores[row], params[row]), rtol=1e-4, atol=1e-8)


def test_top_p_below_the_first_probability_keeps_one_token() -> None:
    scores = torch.tensor([[5.0, 1.0, 0.0]])
    assert distributions(scores, [SamplingParams(top_p=1e-9)]).tolist() == [[1.0, 0.0, 0.0]]


def test_top_p_stops_at_the_token_that_reaches_p_exactly() -> None:
    found = _keep_top_p(torch.tensor([[0.25, 0.5, 0.25]]), torch.tensor([0.5]))
    assert found.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("temperature", [1e-3, 1e-12, 1e-40, 1e-300])
def test_a_tiny_temperature_draws_the_most_likely_token(temperature: float) -> None:
    scores = logits(1)
    found = distributions(scores, [SamplingParams(temperature=temperature)])
    assert int(found[0].argmax()) == int(scores[0].argmax())
    assert float(found[0].max()) == pytest.approx(1.0)
    assert bool(found.isfinite().all())
    sampled = Sampler(V, CPU).sample(scores, [request(temperature=temperature, seed=3)])
    assert sampled.token_ids == [int(scores[0].argmax())]


# --- penalties and bias ----------------------------------------------------------------------------------------------


def adjusted(scores: torch.Tensor, row: Request) -> torch.Tensor:
    return adjusted_by(ScoreAdjuster(CPU), scores, row)


def adjusted_by(adjuster: ScoreAdjuster, scores: torch.Tensor, row: Request) -> torch.Tensor:
    with adjuster.adjusted(scores, [row]):
        return scores[0].clone()


def test_repetition_penalty_is_transformers_own_and_counts_the_prompt() -> None:
    scores = logits(1)
    row = request(prompt=[4, 9, 9, 200], output=[17, 4, 30], repetition_penalty=1.3)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([row.tokens]), scores.clone())
    torch.testing.assert_close(adjusted(scores, row), expected[0])


def test_frequency_and_presence_penalties_count_the_output_only() -> None:
    scores = logits(1)
    row = request(prompt=[4, 9], output=[17, 17, 17, 9], frequency_penalty=0.5, presence_penalty=-0.25)
    expected = scores[0].clone()
    expected[17] -= 3 * 0.5 - 0.25
    expected[9] -= 0.5 - 0.25
    torch.testing.assert_close(adjusted(scores, row), expected)


def test_counts_follow_the_output_step_by_step() -> None:
    sampler = Sampler(V, CPU)
    row = request(frequency_penalty=1.0, repetition_penalty=1.1, temperature=0.0)
    for step in range(12):
        scores = logits(1, seed=step)
        stepwise = adjusted_by(sampler._adjuster, scores, row)
        torch.testing.assert_close(stepwise, adjusted(scores, row))
        row.tokens += sampler.sample(scores, [row]).token_ids
    assert sampler.num_tracked == 1
    sampler.forget(row)
    assert sampler.num_tracked == 0


def test_rows_are_adjusted_together_as_alone_with_a_token_under_every_setting() -> None:
    """Token 9 is in the output, has a bias, and is forbidden in one row, as it ends the sequence."""
    scores = logits(5, seed=4)
    rows = [
        request("a", prompt=[4, 9], output=[9, 9], repetition_penalty=1.3, frequency_penalty=0.5, logit_bias={9: 2.0}),
        request("b"),
        request("c", prompt=[8, 9], output=[17], presence_penalty=1.5),
        request(
            "d", output=[9], repetition_penalty=0.7, logit_bias={9: 3.0, 5: -1.0}, min_tokens=3, stop_token_ids=[9]
        ),
        request("e", prompt=list(range(200)), output=list(range(200, 290)), repetition_penalty=1.2),
    ]
    with ScoreAdjuster(CPU).adjusted(together := scores.clone(), rows):
        found = together.clone()
    assert torch.equal(together, scores)
    for row, alone in enumerate(rows):
        assert torch.equal(found[row], adjusted(scores[row : row + 1], alone))
    penalized = scores[0, 9] / 1.3 if scores[0, 9] > 0 else scores[0, 9] * 1.3
    assert found[0, 9] == pytest.approx(float(penalized) - 1.0 + 2.0)
    assert found[3, 9] == -math.inf
    assert torch.equal(found[1], scores[1])


def test_adjusting_touches_few_scores_of_a_large_vocabulary() -> None:
    scores = torch.randn(2, 100_000)
    rows = [request(output=[7, 9], repetition_penalty=1.3, logit_bias={5: 1.0}, min_tokens=4) for _ in range(2)]
    with Allocations() as made, ScoreAdjuster(CPU).adjusted(scores, rows):
        pass
    assert 0 < made.largest_bytes < 1000


def test_logit_bias_is_added_and_can_force_or_forbid() -> None:
    scores = logits(3)
    best = int(scores[1].argmax())
    rows = [
        request(temperature=0.0, logit_bias={123: 100.0}),
        request(temperature=0.0, logit_bias={best: -100.0}),
        request(temperature=0.0),
    ]
    sampled = Sampler(V, CPU).sample(scores, rows)
    assert sampled.token_ids[0] == 123
    assert sampled.token_ids[1] == int(scores[1].topk(2).indices[1])
    assert sampled.token_ids[2] == int(scores[2].argmax())


def test_before_min_tokens_end_tokens_are_never_chosen() -> None:
    scores = logits(1)
    scores[0, [7, 5]] = 50.0
    for output, expected in [((), 3), ((9,), 3), ((9, 9), 7)]:
        scores[0, 3] = 40.0
        row = request(output=output, temperature=0.0, min_tokens=2, stop_token_ids=[5])
        assert Sampler(V, CPU).sample(scores, [row]).token_ids[0] in ({expected} if expected == 3 else {5, 7})
    ignoring = request(temperature=0.0, min_tokens=2, ignore_eos=True)
    scores[0, 5] = 0.0
    assert Sampler(V, CPU).sample(scores, [ignoring]).token_ids == [7]


def test_end_tokens_that_the_model_has_no_scores_for_are_left_alone() -> None:
    row = request(temperature=0.0, min_tokens=2)
    row.end_tokens = frozenset({V + 5})
    scores = logits(1)
    assert Sampler(V, CPU).sample(scores, [row]).token_ids == [int(scores[0].argmax())]


# --- draws -----------------------------------------------------------------------------------------------------------


def draw(scores: torch.Tensor, seed: int, place: int, **params: Any) -> int:
    row = request(output=[0] * place, seed=seed, **params)
    return Sampler(scores.shape[-1], CPU).sample(scores, [row]).token_ids[0]


@pytest.mark.parametrize("by", ["seed", "place"])
def test_draws_follow_the_distribution(by: str) -> None:
    """Pearson's statistic over 20,000 draws with fixed seeds, against the 0.999 quantile for 9 degrees of freedom."""
    probs = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.08, 0.07, 0.05, 0.03, 0.015, 0.005])
    num_draws = 20_000
    points = [uniform(seed, 0) if by == "seed" else uniform(12345, seed) for seed in range(num_draws)]
    cumulative = probs.double().cumsum(0)
    tokens = torch.searchsorted(cumulative / cumulative[-1], torch.tensor(points, dtype=torch.float64), right=True)
    counts = torch.bincount(tokens, minlength=10)
    expected = probs * num_draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 27.88


def test_the_sampler_inverts_the_cumulative_distribution() -> None:
    probs = torch.tensor([[0.1, 0.0, 0.4, 0.5]])
    for seed in range(200):
        point = uniform(seed, 0)
        expected = 0 if point < 0.1 else 2 if point < 0.5 else 3
        if min(abs(point - 0.1), abs(point - 0.5)) > 1e-6:
            assert draw(probs.log(), seed, 0) == expected


def test_a_draw_at_the_very_edge_never_takes_a_token_without_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.tensor([[-math.inf, 2.0, 1.0, -math.inf]])
    for point, expected in ((0.0, 1), (1 - 2**-53, 2)):
        monkeypatch.setattr("drivetrain.serving.sampler.uniform", lambda seed, index, point=point: point)
        assert draw(scores, 0, 0) == expected


def test_uniform_numbers_lie_in_the_unit_interval_and_differ_between_streams() -> None:
    numbers = [
        uniform(sequence_seed(seed, index), place) for seed in (-5, 0, 7) for index in range(8) for place in range(50)
    ]
    assert all(0 <= number < 1 for number in numbers)
    assert len(set(numbers)) == len(numbers)
    assert uniform(-1, 3) == uniform(2**64 - 1, 3)
    assert sequence_seed(42, 0) == 42


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(-(2**63), 2**63 - 1), place=st.integers(0, 30), others=st.integers(0, 4), at=st.integers(0, 4))
def test_a_draw_depends_on_nothing_but_its_own_request(seed: int, place: int, others: int, at: int) -> None:
    scores = logits(1, seed=place)
    params: dict[str, Any] = {"temperature": 1.4, "top_p": 0.9, "repetition_penalty": 1.1}
    alone = draw(scores, seed, place, **params)
    at = min(at, others)
    rows = [request(f"o{i}", temperature=[0.0, 0.5, 2.0][i % 3], top_k=i * 5, seed=i) for i in range(others)]
    rows.insert(at, request("own", output=[0] * place, seed=seed, **params))
    batch = logits(others + 1, seed=99)
    batch[at] = scores[0]
    assert Sampler(V, CPU).sample(batch, rows).token_ids[at] == alone


def of_width(width: int, scores: torch.Tensor, params: list[SamplingParams], draws: list[float]) -> list[int]:
    tokens: list[int] = Sampler(scores.shape[-1], CPU)._draw_from_best(scores, width, params, draws).tolist()
    return tokens


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), top_k=st.integers(1, 63), top_p=st.sampled_from([1.0, 0.9, 0.3]))
def test_drawing_from_the_best_tokens_is_drawing_from_all(seed: int, top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(4, 1500, generator=generator) * 3
    scores[1] = (scores[1] * 2).round() / 2  # many scores are equal
    params = [
        SamplingParams(temperature=0.9, top_k=top_k, top_p=top_p),
        SamplingParams(temperature=0.9, top_k=min(top_k, 5)),  # top-p would have to break ties
        SamplingParams(temperature=2.0, top_k=top_k, min_p=0.02),
        SamplingParams(temperature=0.1, top_k=top_k),
    ]
    draws = [uniform(seed, row) for row in range(4)]
    assert of_width(64, scores, params, draws) == of_width(1500, scores, params, draws)


@pytest.mark.parametrize("others", [[0], [10, 100], [100, 500, 0], [2000, 5]])
def test_rows_that_look_at_different_numbers_of_tokens_do_not_touch_each_other(others: list[int]) -> None:
    scores = torch.randn(len(others) + 1, 3000, generator=torch.Generator().manual_seed(len(others)))
    own = request("own", seed=5, top_k=40, top_p=0.8)
    alone = Sampler(3000, CPU).sample(scores[:1], [own]).token_ids[0]
    rows = [own, *(request(f"o{k}", seed=k, top_k=k) for k in others)]
    together = Sampler(3000, CPU).sample(scores, rows).token_ids
    assert together[0] == alone
    for row, k in enumerate(others, start=1):
        assert scores[row, together[row]] >= scores[row].topk(k or 3000).values[-1]


def test_the_most_likely_token_is_the_first_of_equals_and_nothing_that_is_no_number_hides() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0], [1.0, math.nan, 3.0], [-math.inf] * 3, [0.0, math.inf, 1.0]])
    best, tokens = most_likely(scores)
    assert tokens.tolist() == [1, 1, 0, 1]
    assert [math.isfinite(value) for value in best.tolist()] == [True, False, False, False]


@pytest.mark.parametrize("vocab_size", [64, 96, 192, 97, 1])
def test_a_vocabulary_in_parts_has_the_same_most_likely_token(vocab_size: int) -> None:
    """Also where the best scores are equal and lie in several parts, and where one is no number."""
    generator = torch.Generator().manual_seed(vocab_size)
    scores = torch.randint(-4, 5, (40, vocab_size), generator=generator).float()
    scores[3, vocab_size // 2] = math.nan
    scores[4] = -math.inf
    best, tokens = _most_likely_in_parts(scores)
    wanted_best, wanted = most_likely(scores)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(best, wanted_best, equal_nan=True)


def test_greedy_rows_are_not_touched_by_their_neighbours() -> None:
    scores = logits(4)
    rows = [request("a", temperature=0.0), request("b", seed=1), request("c", temperature=0.0, top_k=1), request("d")]
    tokens = Sampler(V, CPU).sample(scores, rows).token_ids
    assert [tokens[0], tokens[2]] == [int(scores[0].argmax()), int(scores[2].argmax())]


def test_the_scores_given_are_not_changed() -> None:
    scores = logits(2)
    before = scores.clone()
    rows = [request("a", logit_bias={1: 5.0}, repetition_penalty=2.0, top_k=3), request("b", min_tokens=4, logprobs=3)]
    Sampler(V, CPU).sample(scores, rows)
    assert torch.equal(scores, before)


# --- log-probabilities -----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 500), count=st.sampled_from([0, 1, 5, V, V + 50]))
def test_logprobs_and_ranks_are_those_of_the_model(seed: int, count: int) -> None:
    scores = logits(3, seed)
    tokens = [int(scores[0].argmax()), 17, 250]
    expected = scores.log_softmax(-1)
    for row, entry in enumerate(token_logprobs(scores, tokens, count)):
        assert entry.token_id == tokens[row]
        assert entry.logprob == pytest.approx(float(expected[row, tokens[row]]), abs=1e-6)
        assert entry.rank == 1 + int((expected[row] > expected[row, tokens[row]]).sum())
        assert [token for token, _ in entry.top] == expected[row].topk(min(count, V)).indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(expected[row].topk(min(count, V)).values.tolist())


def test_logprobs_of_many_rows_take_memory_for_some(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, tokens = logits(5).bfloat16(), [3, 1, 4, 1, 5]
    whole = token_logprobs(scores, tokens, 2)
    monkeypatch.setattr("drivetrain.serving.sampler._SCORED_BYTES", 2 * 4 * V + 1)
    with Allocations() as made:
        assert token_logprobs(scores, tokens, 2) == whole
    assert made.largest_bytes == 2 * 4 * V


def test_logprobs_are_before_temperature_penalties_and_bias_and_for_those_who_asked() -> None:
    scores = logits(3)
    rows = [
        request("a", temperature=0.2, logit_bias={3: 100.0}, frequency_penalty=1.0, output=[3], logprobs=2),
        request("b"),
        request("c", logprobs=0),
    ]
    sampled = Sampler(V, CPU).sample(scores, rows)
    first, second, third = sampled.logprobs
    assert first is not None
    assert (first.token_id, len(first.top)) == (3, 2)
    assert first.logprob == pytest.approx(float(scores[0].log_softmax(-1)[3]), abs=1e-6)
    assert second is None
    assert third is not None
    assert third.top == ()


# --- scores that are no numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_row_with_nan_or_infinity_is_flagged_and_no_other_suffers(bad: float, row: int) -> None:
    scores = logits(3)
    rows = [
        request("a", temperature=0.0),
        request("b", top_p=0.9, seed=1),
        request("c", top_k=5, min_p=0.1, logprobs=3),
    ]
    whole = Sampler(V, CPU).sample(scores, rows)
    scores[row, 11] = bad
    sampled = Sampler(V, CPU).sample(scores, rows)
    assert sampled.is_sound == [index != row for index in range(3)]
    assert all(sampled.token_ids[i] == whole.token_ids[i] for i in range(3) if i != row)


def test_a_row_that_allows_nothing_is_flagged_and_single_minus_infinities_are_not() -> None:
    scores = logits(2)
    scores[0] = -math.inf
    scores[1, :290] = -math.inf
    sampled = Sampler(V, CPU).sample(scores, [request("a"), request("b", seed=2)])
    assert sampled.is_sound == [False, True]
    assert sampled.token_ids[1] >= 290


def test_nothing_to_sample_gives_nothing() -> None:
    assert Sampler(V, CPU).sample(logits(0), []).token_ids == []


def test_half_precision_scores_are_sampled_in_float32() -> None:
    scores = logits(2).bfloat16()
    sampled = Sampler(V, CPU).sample(scores, [request("a", temperature=0.0, logprobs=1), request("b", seed=1)])
    assert sampled.token_ids[0] == int(scores[0].float().argmax())
    assert sampled.logprobs[0] is not None
    assert sampled.logprobs[0].logprob == pytest.approx(float(scores[0].float().log_softmax(-1).max()), abs=1e-6)
