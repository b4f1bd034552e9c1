"""On a real model, in float32, tensors and greedy tokens equal those of transformers for the same GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from drivetrain import LLM, SamplingParams
from drivetrain.plugins.loader.gguf import GgufLoader

pytestmark = pytest.mark.model

NEW_TOKENS = 64
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
LONG = "The history of the steam engine begins long before the railways. " * 24

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "#include <stdio.h>\nint main(void) {\n",
    "SELECT name, count(*) FROM orders WHERE",
    "Il était une fois, dans un petit village,",
    "Es war einmal ein König, der",
    "むかしむかし、あるところに",
    "Однажды в студёную зимнюю пору",
    "人工智能的未来",
    "مرحبا بالعالم",
    "I love pizza 🍕 and sushi 🍣 because",
    "🎉🎉🎉",
    "1, 1, 2, 3, 5, 8, 13,",
    "Q: What is 12 * 12?\nA:",
    "Once upon a time",
    "    indented\n\n\n\tand tabbed   text",
    "A",
    LONG,
    "Dear Sir or Madam,\n\nI am writing to",
    '{"name": "Ada", "born": 1815, "known_for": [',
    "The three laws of thermodynamics are:\n1.",
]
CHATS = ["What is gravity?", "Write a haiku about the sea.", "Translate 'good morning' into Spanish."]


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    torch.set_num_threads(2)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> Iterator[LLM]:
    with LLM(smollm2, quantizer="none", engine={"max_model_len": 1024}) as llm:
        yield llm


@pytest.fixture(scope="module")
def prompts(llm: LLM) -> list[list[int]]:
    chats = [llm.tokenizer.render_chat([{"role": "user", "content": text}]) for text in CHATS]
    texts = [(text, True) for text in PROMPTS] + [(text, False) for text in chats]
    return [list(llm.tokenizer.encode(text, add_special_tokens=special)) for text, special in texts]


@pytest.fixture(scope="module")
def batched(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    """Our answers to all prompts at a time."""
    return [list(result.token_ids) for result in llm.generate(prompts, GREEDY)]


@torch.inference_mode()
def _generate(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=0,
        eos_token_id=None,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@torch.inference_mode()
def _likeliest(model: Any, prompt: list[int], answer: list[int]) -> list[int]:
    """transformers' choice at each place of the answer, given all before it.

    Equal to the answer, it is what its greedy ``generate`` gives, by induction over the places; and it takes one
    forward pass instead of one for each token.
    """
    logits = model(torch.tensor([prompt + answer])).logits[0]
    chosen: list[int] = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    return chosen


def test_every_tensor_is_that_of_transformers(smollm2: Path, theirs: Any) -> None:
    checkpoint, state = GgufLoader(GgufLoader.Config()).open(smollm2), theirs.state_dict()
    assert set(state) - set(checkpoint.names()) == {"lm_head.weight"}
    for name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(name, torch.float32), state[name]), name
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size", "eos_token_id"):
        assert checkpoint.config[key] == getattr(theirs.config, key)
    assert checkpoint.config["rope_theta"] == theirs.config.rope_parameters["rope_theta"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_greedy_tokens_equal_transformers(
    llm: LLM, theirs: Any, prompts: list[list[int]], batched: list[list[int]]
) -> None:
    """64 tokens of 24 varied prompts, batched; of the first by ``generate`` itself, in all by one pass each."""
    assert len(prompts) >= 20
    assert {len(answer) for answer in batched} == {NEW_TOKENS}
    assert batched[0] == _generate(theirs, prompts[0])
    assert batched == [_likeliest(theirs, *pair) for pair in zip(prompts, batched, strict=True)]


@pytest.mark.slow
def test_greedy_tokens_one_by_one(llm: LLM, prompts: list[list[int]], batched: list[list[int]]) -> None:
    """With a prefix cache that the batch has warmed."""
    alone = [list(llm.generate(prompt, GREEDY)[0].token_ids) for prompt in prompts[:2]]
    assert alone == batched[:2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_greedy_tokens_in_small_chunks(smollm2: Path, prompts: list[list[int]], batched: list[list[int]]) -> None:
    """A token budget far below the prompts, and a cache so small that requests are preempted."""
    options = {"name": "fcfs", "max_batched_tokens": 48, "max_running": 16}
    engine = {"max_model_len": 256, "kv_memory": "20MiB"}
    with LLM(smollm2, quantizer="none", scheduler=options, engine=engine) as llm:
        found = [list(result.token_ids) for result in llm.generate(prompts[:10], GREEDY)]
        assert llm.stats()["preemptions"] > 0
    assert found == batched[:10]


def test_every_token_is_the_likeliest_by_transformers(llm: LLM, theirs: Any) -> None:
    """The quick form of the same rule."""
    ids = [list(llm.tokenizer.encode(text)) for text in (PROMPTS[1], PROMPTS[6], PROMPTS[10])]
    for prompt, result in zip(ids, llm.generate(ids, GREEDY), strict=True):
        assert _likeliest(theirs, prompt, list(result.token_ids)) == list(result.token_ids)


def test_log_probabilities_equal_transformers(llm: LLM, theirs: Any) -> None:
    """Of the prompt and of what was generated, within float32 rounding."""
    prompt = llm.tokenizer.encode(PROMPTS[0])
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2, prompt_logprobs=0)
    result = llm.generate(prompt, params)[0]
    tokens = [*prompt, *result.token_ids]
    with torch.inference_mode():
        wanted = theirs(torch.tensor([tokens])).logits[0].log_softmax(-1)
    entries = [*(result.prompt.logprobs or ()), *(result.completions[0].logprobs or ())]
    assert entries[0] is None
    for place, entry in enumerate(entries[1:]):
        assert entry is not None
        assert entry.token_id == tokens[place + 1]
        assert entry.logprob == pytest.approx(float(wanted[place, entry.token_id]), abs=2e-4)
