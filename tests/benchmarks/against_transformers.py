"""Drivetrain against transformers' ``generate``, one request after another, on the same machine in one run.

    python tests/benchmarks/against_transformers.py [--peer-requests 8] [--json]

Both run the ``mixed`` workload of ``drivetrain bench throughput`` in float32 with the same threads; of the peer, the
first ``--peer-requests`` requests are timed, since its rate does not depend on how many follow. The second table is
``shared-prefix`` with and without the prefix cache.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
import transformers

from drivetrain import LLM
from drivetrain.bench.measure import run_throughput
from drivetrain.bench.workloads import WorkItem, make_workload
from drivetrain.contracts.source import silent
from drivetrain.plugins.source.catalogue import CatalogueSource

MODEL = "smollm2-135m"


@torch.inference_mode()
def time_peer(items: list[WorkItem]) -> dict[str, float]:
    """Output tokens per second of transformers' ``generate`` over ``items``, one by one, after one to warm up."""
    source = CatalogueSource(CatalogueSource.Config())
    path = source.locate(MODEL) or source.fetch(MODEL, silent)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.eval()

    def generate(item: WorkItem) -> None:
        ids = torch.tensor([item.prompt])
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=item.max_tokens,
            min_new_tokens=item.max_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )

    generate(WorkItem(items[0].prompt[:32], 4))
    started = time.perf_counter()
    for item in items:
        generate(item)
    seconds = time.perf_counter() - started
    output = sum(item.max_tokens for item in items)
    return {"output_tokens": output, "seconds": seconds, "output_tokens_per_second": output / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--peer-requests", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    with LLM(MODEL, quantizer="none") as llm:
        result["threads"] = torch.get_num_threads()
        items = make_workload("mixed", arguments.requests, llm.vocab_size, seed=0)
        prefix_items = make_workload("shared-prefix", None, llm.vocab_size, seed=0)
        run_throughput(llm, items[:2])
        result["mixed"] = run_throughput(llm, items)
        result["shared_prefix"] = run_throughput(llm, prefix_items)
    result["transformers_one_by_one"] = time_peer(items[: arguments.peer_requests])
    with LLM(MODEL, quantizer="none", engine={"prefix_cache": False}) as llm:
        run_throughput(llm, items[:2])
        result["shared_prefix_without_cache"] = run_throughput(llm, prefix_items)
    rate = "output_tokens_per_second"
    result["mixed_ratio"] = result["mixed"][rate] / result["transformers_one_by_one"][rate]
    result["shared_prefix_ratio"] = result["shared_prefix"][rate] / result["shared_prefix_without_cache"][rate]
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"torch {result['torch']}, transformers {result['transformers']}, {result['threads']} threads, float32")
    print(f"mixed, {arguments.requests} requests:        {result['mixed'][rate]:7.1f} output tokens/s")
    print(f"transformers, one by one:      {result['transformers_one_by_one'][rate]:7.1f} output tokens/s")
    print(f"ratio:                         {result['mixed_ratio']:7.2f}")
    print(f"shared-prefix:                 {result['shared_prefix'][rate]:7.1f} output tokens/s")
    print(f"shared-prefix, no cache:       {result['shared_prefix_without_cache'][rate]:7.1f} output tokens/s")
    print(f"ratio:                         {result['shared_prefix_ratio']:7.2f}")


if __name__ == "__main__":
    main()
