"""What a step costs beside the model: an engine on a model that computes nothing.

    .venv/bin/python tests/benchmarks/engine_overhead.py

Three tables: the phases of a decode step by the number of running requests; all that a step of many answers costs,
those who read them included; and the step's cost by the number of requests that wait. The vocabulary and the layers are
smollm2-135m's, so that sampling and block tables have their real sizes; for the second table the vocabulary is small,
so that choosing tokens, which a GPU does by itself, is not what is seen. Tokens are drawn by the kernels of a CPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from drivetrain import LLM
from drivetrain.assembly import Parts, ServingStack
from drivetrain.binding import KernelBinder, bind_sample
from drivetrain.config import EngineSettings, Settings
from drivetrain.contracts.attention import AttentionBatch, AttentionSpec, AttentionStep, KVGroup, LayerAttention
from drivetrain.contracts.model import ModelSpec
from drivetrain.contracts.plugin import Purpose
from drivetrain.kernels.cpu import CpuKernels
from drivetrain.observers import Observers, hookimpl
from drivetrain.plugins.scheduler.fcfs import FcfsScheduler
from drivetrain.registry import SelectionReport
from drivetrain.serving.blocks import KVManager
from drivetrain.serving.engine import Engine, EngineLimits
from drivetrain.serving.runner import ModelRunner
from drivetrain.serving.timing import OUTSIDE_THE_MODEL, Phase, StepTiming
from drivetrain.serving.tokenizer import Detokenizer
from drivetrain.serving.types import GenerationRequest, SamplingParams
from support.fake_model import FakeAttention
from support.fake_stack import make_tokenizer

VOCAB_SIZE, MAX_MODEL_LEN, BLOCK_SIZE = 49_152, 2048, 16
_READERS = ("whole", "streamed")
_LAYERS = tuple(LayerAttention(9, 3, 64, 0.125) for _ in range(30))


class NoModel:
    """Gives scores that lie ready: a few hundred of them may matter to a draw, as after a text's tokens. Those that are
    likely are below 64, for a tokenizer that has no more."""

    def __init__(self, most_rows: int, vocab_size: int = VOCAB_SIZE) -> None:
        self.spec = ModelSpec("None", vocab_size, 1, 30, MAX_MODEL_LEN, 0, AttentionSpec(_LAYERS, "float32"))
        generator = torch.Generator().manual_seed(0)
        self._scores_NV = torch.randn(most_rows, vocab_size, generator=generator) * 2.5
        self._scores_NV[:, :64] += 15
        self._hidden_TE = torch.zeros(4096, 1)

    def forward(self, ids_T: torch.Tensor, positions_T: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        return self._hidden_TE[: len(ids_T)]

    def logits(self, hidden_NE: torch.Tensor) -> torch.Tensor:
        return self._scores_NV[: len(hidden_NE)]


class NoAttention(FakeAttention):
    def allocate(self, spec: AttentionSpec, num_blocks: Sequence[int], device: torch.device) -> list[torch.Tensor]:
        return []

    def begin(self, spec: AttentionSpec, batch: AttentionBatch, cache: object) -> AttentionStep:
        return None  # type: ignore[return-value]

    def copy_blocks(self, cache: object, group: KVGroup, pairs: Sequence[tuple[int, int]]) -> None:
        pass


class Steps:
    """Keeps the timing of every step."""

    def __init__(self) -> None:
        self.timings: list[StepTiming] = []

    @hookimpl
    def step_done(self, timing: StepTiming) -> None:
        self.timings.append(timing)


def make_engine(max_running: int, steps: Steps | None = None, vocab_size: int = VOCAB_SIZE) -> Engine:
    model, attention = NoModel(max_running, vocab_size), NoAttention(BLOCK_SIZE)
    num_blocks = max_running * MAX_MODEL_LEN // BLOCK_SIZE
    scheduler = FcfsScheduler(FcfsScheduler.Config(max_batched_tokens=2048, max_running=max_running))
    kv = KVManager(
        model.spec.attention.groups,
        [num_blocks],
        BLOCK_SIZE,
        max_running=max_running,
        max_tokens=MAX_MODEL_LEN,
        prefix_cache=True,
        salt="none",
    )
    observers = Observers(installed=False)
    if steps is not None:
        observers.register(steps)
    tokenizer = make_tokenizer()
    return Engine(
        ModelRunner(model, attention, [num_blocks], torch.device("cpu")),
        kv,
        scheduler,
        EngineLimits(MAX_MODEL_LEN, vocab_size, frozenset()),
        EngineSettings(overlap="off"),
        lambda prompt, skip: Detokenizer(tokenizer, prompt, skip),
        observers,
        draw=bind_sample(KernelBinder([("cpu", CpuKernels(CpuKernels.Config()))]), "cpu", vocab_size),
    )


def add(engine: Engine, count: int, params: SamplingParams, name: str = "r") -> float:
    """Give the engine this many requests; returns the seconds of one."""
    started = time.perf_counter()
    for number in range(count):
        prompt = [(number * 7 + i * 13) % 64 for i in range(32)]
        engine.add(f"{name}{number}", GenerationRequest(prompt, params), prompt)
    return (time.perf_counter() - started) / max(1, count)


def phases(num_running: int, params: SamplingParams, num_steps: int = 300) -> dict[str, float]:
    """Median seconds of each phase of a decode step, and of all but the model."""
    steps = Steps()
    engine = make_engine(num_running, steps)
    add(engine, num_running, params)
    for _ in range(num_steps + 20):
        engine.step()
    spent = [dict.fromkeys(Phase, 0.0) for _ in steps.timings[20:]]
    for sums, timing in zip(spent, steps.timings[20:], strict=True):
        begin = 0.0
        for phase, end in timing.marks:
            sums[phase] += end - begin
            begin = end
    medians = {phase.value: statistics.median(sums[phase] for sums in spent) for phase in Phase}
    outside = statistics.median(sum(sums[phase] for phase in OUTSIDE_THE_MODEL) for sums in spent)
    return {**medians, "outside": outside}


def answers(num_running: int, is_streamed: bool, num_tokens: int = 400) -> float:
    """Seconds of a step of as many answers as run, from the engine to who reads them."""
    engine = make_engine(num_running, vocab_size=256)
    tokenizer = make_tokenizer()
    parts = Parts(Settings("none", engine=engine.settings), Purpose.SERVE, {}, SelectionReport(()))
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    prompts = [[(number * 7 + i * 13) % 64 for i in range(32)] for number in range(num_running)]
    with LLM.from_stack(ServingStack(engine, parts, tokenizer, KernelBinder([]), MAX_MODEL_LEN, {})) as llm:
        started = time.perf_counter()
        if is_streamed:
            streams = [llm.stream(prompt, params) for prompt in prompts]
            for _ in range(num_tokens):
                for stream in streams:
                    next(stream)
        else:
            llm.generate(prompts, params)
        seconds = time.perf_counter() - started
        return seconds / llm.stats()["steps"]


def waiting(num_waiting: int, num_steps: int = 200) -> dict[str, float]:
    """Seconds of a step with 16 running and this many waiting: in steady decode, and while each step lets a waiting
    request take the place of one that ends."""
    steady = SamplingParams(max_tokens=1500, temperature=0, ignore_eos=True)
    short = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    engine = make_engine(16)
    add(engine, 16, steady)
    engine.step()
    one = add(engine, num_waiting, short, "w")
    gc.collect()
    steady_seconds = _median_step(engine, num_steps)
    for number in range(16):
        engine.cancel(f"r{number}")
        engine.step()  # newcomers get in one by one, and end one by one
    return {"add": one, "steady": steady_seconds, "turnover": _median_step(engine, min(num_steps, num_waiting))}


def _median_step(engine: Engine, count: int) -> float:
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--waiting", type=int, nargs="*", default=[100, 1000, 10_000, 100_000])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    greedy = SamplingParams(max_tokens=1500, temperature=0, ignore_eos=True)
    nucleus = SamplingParams(max_tokens=1500, temperature=0.8, top_p=0.95, ignore_eos=True)
    best = SamplingParams(max_tokens=1500, temperature=0.8, top_k=40, top_p=0.9, ignore_eos=True)
    print("milliseconds of a decode step by phase; the model computes nothing")
    print(f"{'running':>8} {'sampling':>9} " + " ".join(f"{name:>9}" for name in (*Phase, "outside")))
    for count in (1, 16, 64, 256):
        for name, params in (("greedy", greedy), ("top-p", nucleus), ("top-k", best)):
            row = phases(count, params)
            print(f"{count:>8} {name:>9} " + " ".join(f"{row[key] * 1e3:>9.3f}" for key in (*Phase, "outside")))
    print("\nmilliseconds of a decode step, readers included; median of 5")
    print(f"{'running':>8} {'whole':>9} {'streamed':>9}")
    for count in (16, 64, 256):
        row = {name: statistics.median(answers(count, name == "streamed") for _ in range(5)) for name in _READERS}
        print(f"{count:>8} " + " ".join(f"{row[name] * 1e3:>9.3f}" for name in _READERS))
    print("\nmilliseconds with 16 running, by the number that wait")
    print(f"{'waiting':>8} {'add':>9} {'steady':>9} {'turnover':>9}")
    for count in options.waiting:
        row = waiting(count)
        print(f"{count:>8} " + " ".join(f"{row[key] * 1e3:>9.3f}" for key in ("add", "steady", "turnover")))


if __name__ == "__main__":
    main()
