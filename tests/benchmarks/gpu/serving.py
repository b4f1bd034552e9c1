"""Serving an 8B Llama with made-up weights on this GPU: decodes beside the floor of memory, and many requests beside
transformers' compiled generation.

    python tests/benchmarks/gpu/serving.py [--layers 4] [--running 64,256] [--batched-tokens 8192,256]
        [--peer-batches 512,256,128]

Weights are drawn on the device. One stream is measured as a share of the floor: the bytes of weights that a step reads
over what a plain copy reaches. How long a lone prompt waits for its first token is measured with steps replayed as they
are by default, and launched kernel by kernel. Rates of many requests are whole runs, prompts included, of two
workloads: ``even``, all prompts and answers of one length, and ``mixed``, that of the benchmarks on CPUs, with prompts
of 32 to 256 tokens and answers of 32 to 128. Each is run with steps of several sizes, of which the best is told.

The peer's rate is that of ``generate`` with a static cache, which compiles its decode step, at its best batch, after a
run that compiled it. A batch is padded to its longest prompt and goes on to its longest answer, of which only what was
asked for is counted. The peer has a process and a time limit of its own: batches that it did not come to are left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drivetrain import LLM, SamplingParams
from drivetrain.bench.measure import run_latency, run_throughput
from drivetrain.bench.workloads import WorkItem, mixed

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
}
"""The shape of an 8B Llama 3."""

FLOOR_TARGET, PEER_TARGET = 0.80, 3.0
MOST_OF_MIXED = 256 + 128
"""Tokens of the longest request of that workload."""

FIRST_TOKENS = 11
"""Prompts whose first token is waited for, after as many that are not timed."""


@dataclass(frozen=True)
class Row:
    """One line of the table. rate: output tokens a second; share: of the floor, or over the peer; None without."""

    name: str
    rate: float
    told: str
    share: str = ""
    target: str = ""

    def cells(self) -> str:
        return f"| {self.name} | {self.rate:,.0f} | {self.told} | {self.share} | {self.target} |"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="layers of the model")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt of even length")
    parser.add_argument("--answer", type=int, default=128, help="tokens of each answer of even length")
    parser.add_argument("--workloads", default="even,mixed", help="of many requests")
    parser.add_argument("--running", default="64,256", help="numbers of requests that run at a time")
    parser.add_argument(
        "--requests",
        type=int,
        default=768,
        help="of a run, whatever number runs at a time: so many that its start and its end matter little",
    )
    parser.add_argument(
        "--batched-tokens",
        default="8192,1024,256",
        help="most tokens of a step; of several, the best is told",
    )
    parser.add_argument("--iterations", type=int, default=3, help="runs of one stream")
    parser.add_argument("--peer-batches", default="512,256,128", help="the peer's batches; empty for no peer")
    parser.add_argument("--peer-seconds", type=float, default=900.0, help="time limit of the peer, compiling included")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in _names(text)]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def weight_bytes_of_step(layers: int) -> int:
    """Bytes of bfloat16 weights that every step reads: all but the table of embeddings."""
    size, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    heads = CONFIG["num_attention_heads"] + 2 * CONFIG["num_key_value_heads"]
    layer = size * CONFIG["head_dim"] * heads + size * size + 3 * size * inner + 2 * size
    return 2 * (layers * layer + size + CONFIG["vocab_size"] * size)


@contextmanager
def model_folder(layers: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        written = json.dumps({**CONFIG, "num_hidden_layers": layers})
        (Path(name) / "config.json").write_text(written, encoding="utf-8")
        yield Path(name)


def _most_tokens(options: argparse.Namespace) -> int:
    return max(_numbers(options.batched_tokens))


def opened(folder: Path, running: int, batched_tokens: int, length: int, graphs: str = "auto") -> LLM:
    started = time.perf_counter()
    llm = LLM(
        folder,
        platform="cuda",
        precision="bf16",
        loader={"name": "random", "seed": 0, "device": "cuda"},
        kernels="triton",
        attention="paged-triton",
        scheduler={"name": "fcfs", "max_running": running, "max_batched_tokens": batched_tokens},
        engine={"max_model_len": length, "graphs": graphs},
    )
    _say(f"ready for {running} in {time.perf_counter() - started:.1f} s")
    return llm


def requests(workload: str, count: int, options: argparse.Namespace, seed: int) -> list[WorkItem]:
    if workload == "mixed":
        return mixed(count, CONFIG["vocab_size"] - 1000, seed)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1000, CONFIG["vocab_size"] - 1000, (count, options.prompt), generator=generator).tolist()
    return [WorkItem(tuple(prompt), options.answer) for prompt in prompts]


def one_stream(folder: Path, options: argparse.Namespace, bandwidth: float) -> Row:
    with opened(folder, 1, _most_tokens(options), options.prompt + options.answer) as llm:
        lengths = {"prompt_length": options.prompt, "output_length": options.answer}
        figures = run_latency(llm, **lengths, batch=1, iterations=options.iterations, seed=0)
    rate = float(figures["decode_tokens_per_second"])
    num_bytes = weight_bytes_of_step(options.layers)
    floor = num_bytes / bandwidth
    _say(json.dumps(figures["step_phase_seconds"]))
    told = f"{1e3 / rate:.2f} ms a token; floor {floor * 1e3:.2f} ms ({num_bytes / 1e9:.1f} GB)"
    share = floor * rate
    verdict = "yes" if share >= FLOOR_TARGET else "no"
    return Row("decode, one stream", rate, told, f"{share:.0%} of the floor", f"{FLOOR_TARGET:.0%}: {verdict}")


def first_token(folder: Path, options: argparse.Namespace, graphs: str) -> float:
    """Median milliseconds from a lone prompt to its first token."""
    seconds = []
    with opened(folder, 1, _most_tokens(options), options.prompt + 1, graphs) as llm:
        for item in requests("even", 2 * FIRST_TOKENS, options, seed=3):
            started = time.perf_counter()
            llm.generate(list(item.prompt), SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
            seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds[FIRST_TOKENS:])


def many_streams(folder: Path, options: argparse.Namespace, running: int) -> dict[str, tuple[float, str]]:
    """workload -> output tokens a second at the best number of tokens in a step, and how long a token took there."""
    best: dict[str, tuple[float, str]] = {}
    for tokens in _numbers(options.batched_tokens):
        if tokens <= running:
            continue  # decodes alone would fill the steps
        for workload, found in _rates(folder, options, running, tokens).items():
            told = f"{found[1]}; steps of up to {tokens:,} tokens"
            best[workload] = max(best.get(workload, (0.0, "")), (found[0], told))
        free_memory()
    return best


def _rates(folder: Path, options: argparse.Namespace, running: int, tokens: int) -> dict[str, tuple[float, str]]:
    found = {}
    length = max(options.prompt + options.answer, MOST_OF_MIXED)
    with opened(folder, running, tokens, length) as llm:
        for workload in _names(options.workloads):
            run_throughput(llm, requests(workload, running, options, seed=1))  # what is compiled on first use
            figures = run_throughput(llm, requests(workload, options.requests, options, seed=2))
            rate, per_token = float(figures["output_tokens_per_second"]), figures["time_per_token_seconds"]["p50"]
            told = ("output_tokens_per_second", "seconds", "steps", "step_phase_seconds", "peak_memory_bytes")
            what = f"{workload}, {running} running, steps of up to {tokens} tokens"
            _say(f"{what}: {json.dumps({key: figures[key] for key in told})}")
            found[workload] = rate, f"{per_token * 1e3:.1f} ms a token in the median; {figures['seconds']:.1f} s"
    return found


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def peer_rates(options: argparse.Namespace, batches: Sequence[int]) -> dict[tuple[str, int], float]:
    """transformers' output tokens a second by workload and batch, as far as it came in its time."""
    command = [sys.executable, __file__, "--peer-only", "--peer-batches", ",".join(map(str, batches))]
    command += ["--workloads", options.workloads]
    command += ["--layers", str(options.layers), "--prompt", str(options.prompt), "--answer", str(options.answer)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=options.peer_seconds, check=True)
        told = done.stdout
    except subprocess.TimeoutExpired as error:
        _say(f"the peer was stopped after {options.peer_seconds:.0f} s")
        told = error.stdout or b""
    measured = [json.loads(line) for line in told.decode().splitlines() if line.startswith("[")]
    return {(str(workload), int(batch)): float(rate) for workload, batch, rate in measured}


def run_peer(options: argparse.Namespace, batches: Sequence[int]) -> None:
    """Print workload, batch and rate of each, measured after a run that compiled the decode step."""
    import transformers

    config = transformers.LlamaConfig(**{**CONFIG, "num_hidden_layers": options.layers})
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for batch in batches:
        for workload in _names(options.workloads):
            items = requests(workload, batch, options, seed=2)
            prompt = max(len(item.prompt) for item in items)
            answer = max(item.max_tokens for item in items)
            ids, mask = torch.zeros(2, batch, prompt, dtype=torch.int64)
            for row, item in enumerate(items):
                ids[row, prompt - len(item.prompt) :] = torch.tensor(item.prompt)
                mask[row, prompt - len(item.prompt) :] = 1
            torch._dynamo.reset()  # each has steps compiled for its own sizes
            for name in ("compiling", "measured"):
                torch.cuda.synchronize()
                started = time.perf_counter()
                with torch.inference_mode():
                    out = model.generate(
                        ids.cuda(),
                        attention_mask=mask.cuda(),
                        min_new_tokens=answer,
                        max_new_tokens=answer,
                        do_sample=False,
                        pad_token_id=0,
                        cache_implementation="static",
                    )
                torch.cuda.synchronize()
                seconds = time.perf_counter() - started
                assert out.shape[1] == prompt + answer
                _say(f"transformers, {workload}, batch {batch}, {name}: {seconds:.1f} s")
            wanted = sum(item.max_tokens for item in items)
            print(json.dumps([workload, batch, wanted / seconds]), flush=True)


def first_tokens(options: argparse.Namespace, bandwidth: float) -> str:
    """A sentence of the page."""
    floor = weight_bytes_of_step(options.layers) / bandwidth * 1e3
    found = []
    with model_folder(options.layers) as folder:
        for graphs in ("off", "auto"):
            found.append(first_token(folder, options, graphs))
            free_memory()
    return (
        f"One prompt of {options.prompt} tokens, with nothing else running, has its first token after {found[1]:.1f} "
        f"ms, {found[0]:.1f} where each kernel is launched from Python. Reading the weights takes {floor:.1f}."
    )


def rows(options: argparse.Namespace, bandwidth: float) -> list[Row]:
    found = []
    with model_folder(options.layers) as folder:
        found.append(one_stream(folder, options, bandwidth))
        _say(found[-1].cells())
        free_memory()
        ours = {}
        for running in _numbers(options.running):
            ours[running] = many_streams(folder, options, running)
    batches = _numbers(options.peer_batches)
    peer = peer_rates(options, batches) if batches else {}
    free_memory()
    for workload in _names(options.workloads):
        rates = {batch: rate for (name, batch), rate in peer.items() if name == workload}
        best = max(rates, key=lambda batch: rates[batch], default=None)
        for running, measured in ours.items():
            rate, told = measured[workload]
            share = target = ""
            if best is not None:
                ratio = rate / rates[best]
                share = f"{ratio:.1f} times the peer"
                target = f"{PEER_TARGET:g} times: {'yes' if ratio >= PEER_TARGET else 'no'}"
            found.append(Row(f"{workload}, {running} running", rate, told, share, target))
        found += [
            Row(
                f"{workload}, transformers, batch {batch}",
                rate,
                "static cache, compiled decode" + ", its best" * (batch == best),
            )
            for batch, rate in rates.items()
        ]
    return found


def section(options: argparse.Namespace, bandwidth: float) -> list[str]:
    """The lines of the page."""
    return [
        "## Serving",
        "",
        f"An 8B Llama with made-up weights, {options.layers} layers, greedy. Even: prompts of {options.prompt} tokens,",
        f"answers of {options.answer}; mixed: prompts of 32 to 256, answers of 32 to 128. Output tokens a second of",
        f"whole runs of {options.requests} requests, all there at once; the peer's is of one full batch. The floor is",
        "the time in which a copy moves the weights that a step reads.",
        "",
        "| measured | tok/s | details | share | asked |",
        "|---|---|---|---|---|",
        *(row.cells() for row in rows(options, bandwidth)),
        "",
        first_tokens(options, bandwidth),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--peer-only", action="store_true", help="run the peer, and print its rates as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this machine has no GPU that torch can use; nothing was measured")
    if options.peer_only:
        run_peer(options, _numbers(options.peer_batches))
        return
    from run import Clock, copy_bandwidth

    print("\n".join(section(options, copy_bandwidth(Clock()))))


if __name__ == "__main__":
    main()
