"""The example of the documentation, end to end: train it, serve the result, and ask what it has not seen.

    python tests/training/fine_tune_smollm2.py            trains (minutes on two cores)
    python tests/training/fine_tune_smollm2.py FOLDER     asks a model that was trained before

Exits 1 unless the answers come in the new way, and the model before training did not give them so.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from drivetrain import LLM, SamplingParams, Trainer

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "sft-smollm2.yaml"
UNSEEN = (
    "Which animal is the largest?",
    "What is the capital of Germany?",
    "Who wrote Hamlet?",
    "What colour is the sky?",
    "How do I open a jar?",
)
NEEDED = 4
"""Answers of the five that must be in the new way."""


def answers(model: str) -> list[str]:
    params = SamplingParams(max_tokens=48, temperature=0)
    with LLM(model=model, engine={"max_model_len": 512}) as llm:
        results = [llm.chat([{"role": "user", "content": question}], params) for question in UNSEEN]
    return [result.completions[0].text.strip() for result in results]


def in_the_new_way(answer: str) -> bool:
    return answer.startswith("Ahoy!") and answer.endswith("Fair winds!")


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        if len(sys.argv) > 1:
            folder = sys.argv[1]
        else:
            changes = [f"trainer.folder={scratch}/run", f"store.folder={scratch}/state"]
            result = Trainer(config=EXAMPLE, assignments=changes).run(
                lambda step, steps: print(f"step {step.step}/{steps}  loss {step.loss:.3f}", flush=True)
            )
            assert sum(result.losses[-5:]) < 0.5 * sum(result.losses[:5]), "the loss did not fall"
            folder = str(result.folder)
        before, after = answers("smollm2-135m"), answers(folder)
    for question, old, new in zip(UNSEEN, before, after, strict=True):
        print(f"{question}\n  before: {old!r}\n  after:  {new!r}")
    good = sum(map(in_the_new_way, after))
    print(f"{good} of {len(after)} in the new way; before: {sum(map(in_the_new_way, before))}")
    return 0 if good >= NEEDED and not any(map(in_the_new_way, before)) else 1


if __name__ == "__main__":
    sys.exit(main())
