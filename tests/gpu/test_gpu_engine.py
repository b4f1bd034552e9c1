"""The whole engine on a GPU: every way of serving gives what transformers gives in float32 on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import LLM, SamplingParams, assembly
from drivetrain.errors import ConfigError
from drivetrain.serving import runner
from support.gguf_models import KIND, write_llama
from support.quantized_models import save_round_sizes
from support.tiny_models import VOCAB_SIZE, tiny_configs

NEW_TOKENS = 16
PROMPT_LENGTHS = (1, 3, 9, 17, 26, 17, 120)
KERNELS = {"triton": {"name": "triton", "tune": False}, "reference": "reference"}
ATTENTION = {"paged-triton": {"name": "paged-triton", "tune": False}, "sdpa": "sdpa"}
SCHEDULER = {"name": "fcfs", "max_batched_tokens": 48, "max_running": 6}
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)


def prompts() -> list[list[int]]:
    """Ragged prompts, one of them longer than a step; the last but one shares a prefix with another."""
    generator = torch.Generator().manual_seed(7)
    made = [torch.randint(2, VOCAB_SIZE, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    made[5][:16] = made[3][:16]
    return made


class Reference:
    """transformers' own model in float32 on the CPU."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @torch.inference_mode()
    def scores(self, tokens: Sequence[int]) -> torch.Tensor:
        """Of what follows each of the tokens, [T, V]."""
        scores: torch.Tensor = self._model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return scores

    def continued(self, prompt: Sequence[int]) -> list[int]:
        tokens = list(prompt)
        for _ in range(NEW_TOKENS):
            tokens.append(int(self.scores(tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    def expect_near_best(self, prompt: Sequence[int], answer: Sequence[int], tolerance: float) -> None:
        """Each token of the answer is one whose score is within ``tolerance`` of the best there."""
        scores = self.scores([*prompt, *answer])[len(prompt) - 1 : -1]
        chosen = scores.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        assert float((scores.amax(1) - chosen).max()) <= tolerance


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    folder = tmp_path_factory.mktemp("models") / "llama"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    return folder, Reference(save_round_sizes(folder, **sizes))


@pytest.fixture(scope="module")
def folder(made: tuple[Path, Reference]) -> Path:
    return made[0]


@pytest.fixture(scope="module")
def reference(made: tuple[Path, Reference]) -> Reference:
    return made[1]


@pytest.fixture(scope="module")
def expected(reference: Reference) -> list[list[int]]:
    return [reference.continued(prompt) for prompt in prompts()]


def served(folder: Path, **options: Any) -> LLM:
    parts = {
        "platform": "cuda",
        "precision": "fp32",
        "kernels": KERNELS["triton"],
        "attention": ATTENTION["paged-triton"],
        "scheduler": SCHEDULER,
        **options,
    }
    engine = {"max_model_len": 160, "kv_memory": "64MiB", **parts.pop("engine", {})}
    return LLM(folder, engine=engine, **parts)


def answers(llm: LLM, params: SamplingParams = GREEDY, batch: list[list[int]] | None = None) -> list[list[int]]:
    return [list(result.token_ids) for result in llm.generate(batch or prompts(), params)]


# --- greedy tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", ["auto", "off"])
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_greedy_tokens_equal_transformers(
    folder: Path, expected: list[list[int]], attention: str, kernels: str, graphs: str
) -> None:
    """Chunked prompts, a shared prefix and decodes in one batch, twice: the second time with every prefix cached."""
    parts = {"attention": ATTENTION[attention], "kernels": KERNELS[kernels], "engine": {"graphs": graphs}}
    with served(folder, **parts) as llm:
        assert answers(llm) == expected
        assert answers(llm) == expected
        assert llm.stats()["prefix_hit_tokens"] > 0
        assert llm.stats()["fallbacks"] == 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_half_precision_stays_near_the_best_token(
    folder: Path, reference: Reference, attention: str, precision: str
) -> None:
    with served(folder, attention=ATTENTION[attention], precision=precision) as llm:
        for prompt, answer in zip(prompts(), answers(llm), strict=True):
            reference.expect_near_best(prompt, answer, 0.25)


@pytest.mark.parametrize("kv", ["int8", "fp8"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_scaled_keys_and_values_stay_near_the_best_token(
    folder: Path, reference: Reference, attention: str, kv: str
) -> None:
    with served(folder, attention=ATTENTION[attention], quantizer={"name": "none", "kv": kv}) as llm:
        for prompt, answer in zip(prompts(), answers(llm), strict=True):
            reference.expect_near_best(prompt, answer, 0.5 if kv == "int8" else 2.0)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gemma3", "phi3-window", "olmo2", "granite", "mistral"])
def test_other_architectures_answer_as_on_the_cpu(tmp_path: Path, name: str) -> None:
    """Windows, soft caps, norms of heads, fused projections: the same tokens as plain torch on the CPU."""
    config = tiny_configs()[name]
    written = {**config.to_dict(), "architectures": config.architectures, "initializer_range": 0.2}
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    loader = {"name": "random", "seed": 5}
    plain = {"platform": "cpu", "kernels": "reference", "attention": "sdpa"}
    with served(tmp_path, loader=loader, **plain) as there, served(tmp_path, loader=loader) as here:
        assert answers(here) == answers(there)


def test_a_chunk_that_gives_no_token_is_not_overwritten_on_its_way(folder: Path, reference: Reference) -> None:
    """Nobody waits for such steps, so the host may be many of them ahead of the device."""
    prompt = (prompts()[6] * 2)[:140]
    scheduler = {"name": "fcfs", "max_batched_tokens": 3, "max_running": 2}
    with served(folder, scheduler=scheduler, engine={"prefix_cache": False}) as llm:
        torch.cuda._sleep(200_000_000)
        assert answers(llm, batch=[prompt])[0] == reference.continued(prompt)


def test_preemption_changes_nothing(folder: Path, reference: Reference) -> None:
    batch = [prompts()[6], prompts()[6][::-1]]
    with served(folder, engine={"kv_memory": "600KiB", "max_model_len": 150}) as llm:
        assert answers(llm, batch=batch) == [reference.continued(prompt) for prompt in batch]
        assert llm.stats()["preemptions"] > 0


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_the_overlapped_loop_gives_what_the_plain_one_gives(
    folder: Path, expected: list[list[int]], overlap: str
) -> None:
    """With answers of many lengths, so that in most steps one of them ends."""
    params = [SamplingParams(temperature=0, max_tokens=2 + 2 * n, ignore_eos=True) for n in range(len(expected))]
    with served(folder, engine={"overlap": overlap}) as llm:
        found = [list(result.token_ids) for result in llm.generate(prompts(), params)]
    assert found == [tokens[: 2 + 2 * n] for n, tokens in enumerate(expected)]


def test_cancelled_requests_leave_nothing_behind(folder: Path, expected: list[list[int]]) -> None:
    with served(folder) as llm:
        streams = [llm.stream(prompt, GREEDY) for prompt in prompts()]
        for stream in streams:
            next(stream)
        for stream in streams[::2]:
            stream.close()
        found = [[token for chunk in stream for token in chunk.token_ids] for stream in streams[1::2]]
        assert found == [tokens[1:] for tokens in expected[1::2]]
        assert answers(llm) == expected
        deadline = time.monotonic() + 10
        while llm.stats()["kv_usage"] > 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert llm.stats()["kv_usage"] == 0


# --- drawn tokens ----------------------------------------------------------------------------------------------------


def test_drawn_tokens_are_those_of_the_reference_and_reproducible(folder: Path) -> None:
    """Each row with settings of its own, greedy ones among them."""
    params = [
        SamplingParams(max_tokens=12, temperature=1.2, seed=1, ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=0.9, top_k=20, seed=2, ignore_eos=True),
        GREEDY,
        SamplingParams(max_tokens=12, temperature=1.5, top_p=0.8, seed=3, ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=1.0, min_p=0.05, seed=4, ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=1.0, top_k=5, top_p=0.9, seed=5, ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=1.0, repetition_penalty=1.3, logprobs=3, seed=6, ignore_eos=True),
    ]
    found = []
    for kernels in ("triton", "triton", "reference"):
        with served(folder, kernels=KERNELS[kernels]) as llm:
            found.append([list(result.token_ids) for result in llm.generate(prompts(), params)])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("steps", ["launched", "in pieces", "whole"])
def test_drawing_waits_for_nothing_on_the_device(folder: Path, monkeypatch: pytest.MonkeyPatch, steps: str) -> None:
    """A step behind another is launched while that one still computes, whatever its sampling, and however steps with
    prompts are captured."""
    if steps != "whole":
        monkeypatch.setattr(runner, "can_capture_prompts", lambda attention: False)
    if steps == "launched":
        monkeypatch.setattr(assembly, "_capture_pieces", lambda parts: None)
    params = SamplingParams(max_tokens=40, temperature=0.8, top_p=0.9, seed=1, ignore_eos=True)
    with served(folder) as llm:
        answers(llm, params)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it does not see all of them
                torch.cuda.set_sync_debug_mode("error")
            assert all(len(tokens) == 40 for tokens in answers(llm, params))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert llm.stats()["fallbacks"] == 0


# --- captured steps --------------------------------------------------------------------------------------------------


def test_decode_steps_are_captured_where_they_must_be(folder: Path, expected: list[list[int]]) -> None:
    with served(folder, engine={"graphs": "on"}) as llm:
        assert answers(llm) == expected
        assert llm.stats()["fallbacks"] == 0
    with pytest.raises(ConfigError, match="captured"):
        served(folder, attention="sdpa", engine={"graphs": "on"})


# --- packed weights --------------------------------------------------------------------------------------------------

QUANTIZERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "int8": ({"name": "int8"}, "linear_int8", "triton"),
    "int4": ({"name": "int4"}, "linear_int4", "triton"),
    "int4-a8": ({"name": "int4", "activations": "int8"}, "linear_int4_a8", "triton"),
    "w8a8": ({"name": "w8a8"}, "linear_w8a8", "triton"),
    "fp8": ({"name": "fp8"}, "linear_fp8", "triton"),
    "fp8-a8": ({"name": "fp8", "activations": "dynamic"}, "linear_fp8a8", "triton"),
}
"""Options, operation, and the provider that has it."""


def first_scores(folder: Path, **options: Any) -> tuple[list[dict[int, float]], dict[str, Any]]:
    """Log-probabilities of the likeliest tokens behind each prompt."""
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=5, ignore_eos=True)
    with served(folder, **options) as llm:
        results = llm.generate(prompts(), params)
        told = llm.selection_dict()
        assert all(len(tokens) == NEW_TOKENS for tokens in answers(llm))
    return [dict(result.completions[0].logprobs[0].top) for result in results], told


@pytest.mark.parametrize("name", QUANTIZERS)
def test_packed_layers_score_as_on_the_cpu(folder: Path, name: str) -> None:
    """And who multiplies is told: what Triton lacks is left to the reference.

    Where activations are rounded, one that lies between two codes moves all behind it: two providers on a CPU are up to
    0.13 apart.
    """
    quantizer, operation, provider = QUANTIZERS[name]
    tolerance = 0.2 if operation.endswith("a8") else 0.03
    plain = {"platform": "cpu", "kernels": "reference", "attention": "sdpa"}
    there, _ = first_scores(folder, quantizer=quantizer, **plain)
    here, told = first_scores(folder, quantizer=quantizer)
    assert set(told["bindings"][operation]) == {provider}
    for mine, theirs in zip(here, there, strict=True):
        common = mine.keys() & theirs.keys()
        assert len(common) >= 4
        assert all(mine[token] == pytest.approx(theirs[token], abs=tolerance) for token in common)


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "Q4_1"])
def test_packed_blocks_of_gguf_score_as_on_the_cpu(tmp_path: Path, kind: str) -> None:
    file = write_llama(tmp_path / "model.gguf", lambda name: KIND[kind])
    engine = {"max_model_len": 128}
    batch = {"quantizer": "gguf", "engine": engine}
    plain = {"platform": "cpu", "kernels": "reference", "attention": "sdpa"}
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=5, ignore_eos=True)
    tops = []
    for parts in (plain, {}):
        with served(file, **batch, **parts) as llm:
            results = llm.generate(prompts()[:6], params)
            tops.append([dict(result.completions[0].logprobs[0].top) for result in results])
    for theirs, mine in zip(*tops, strict=True):
        common = mine.keys() & theirs.keys()
        assert len(common) >= 4
        assert all(mine[token] == pytest.approx(theirs[token], abs=0.03) for token in common)


# --- swaps -----------------------------------------------------------------------------------------------------------


def swapped_under_load(llm: LLM, swaps: Sequence[dict[str, Any]], params: SamplingParams) -> list[list[list[int]]]:
    """What a thread that asks again and again was answered while the parts were exchanged."""
    found: list[list[list[int]]] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            found.append(answers(llm, params))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for parts in swaps:
            report = llm.swap(**parts)
            assert report.outcome.value == "finalized", report.reason
    finally:
        stop.set()
        thread.join()
    return [*found, answers(llm, params)]


def test_attention_is_exchanged_under_load(folder: Path, expected: list[list[int]]) -> None:
    there_and_back = [{"attention": "sdpa"}, {"attention": ATTENTION["paged-triton"]}] * 2
    with served(folder) as llm:
        for found in swapped_under_load(llm, there_and_back, GREEDY):
            assert found == expected


def test_a_quantizer_is_exchanged_under_load(folder: Path, expected: list[list[int]]) -> None:
    """int8, four bits, and back to the weights of the files: then the answers are those of before."""
    swaps = [{"quantizer": "int8"}, {"quantizer": "int4"}, {"quantizer": "none"}]
    with served(folder) as llm:
        found = swapped_under_load(llm, swaps, GREEDY)
    assert all(len(tokens) == NEW_TOKENS for round_ in found for tokens in round_)
    assert found[-1] == expected


# --- weights that are made up, and commands --------------------------------------------------------------------------


def test_made_up_weights_are_drawn_on_the_device(tmp_path: Path) -> None:
    config = tiny_configs()["llama"]
    written = {**config.to_dict(), "architectures": config.architectures}
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    loader = {"name": "random", "seed": 0, "device": "cuda:0"}
    found = []
    for _ in range(2):
        with served(tmp_path, loader=loader) as llm:
            found.append(answers(llm))
    assert found[0] == found[1]


def drivetrain(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "drivetrain", *arguments], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_doctor_and_explain_see_the_device(folder: Path) -> None:
    assert torch.cuda.get_device_name(0) in drivetrain("doctor")
    chosen = json.loads(drivetrain("explain", "--model", str(folder), "--json"))
    names = {selection["kind"]: selection["chosen"]["name"] for selection in chosen["selections"]}
    assert names["platform"] == "cuda"
    assert names["precision"] == "bf16"
    assert names["kernels"] == "triton"
    assert names["attention"] == "paged-triton"


def test_latency_is_measured(folder: Path) -> None:
    options = ("--prompt-length", "16", "--output-length", "8", "--iterations", "1", "--set", "kernels.tune=false")
    told = json.loads(drivetrain("bench", "latency", "--model", str(folder), *options, "--kernels", "triton", "--json"))
    assert told["parts"]["platform"] == "cuda"
    assert told["decode_tokens_per_second"] > 0
    assert told["peak_memory_bytes"] > 0
