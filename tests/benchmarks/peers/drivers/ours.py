"""Drivetrain through its public API: ``LLM`` with prompts of token ids."""

from __future__ import annotations

import time
from typing import Any

import torch
from wire import serve

import drivetrain
from drivetrain import LLM, SamplingParams


def _part(quantizer: str) -> Any:
    """``+a8``: activations rounded to int8. All start from what the quantized file stands for; ``gguf`` is the file."""
    name, _, rounds = quantizer.partition("+")
    lossy = {} if name in ("none", "gguf") else {"allow_lossy": True}
    return {"name": name, **lossy, **({"activations": "int8"} if rounds else {})}


class Ours:
    llm: LLM

    def load(
        self,
        *,
        model: str,
        threads: int,
        prefix_cache: bool,
        precision: str,
        quantizer: str,
        overrides: list[str],
        kv_gib: int | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        # Many requests: memory for keys and values is taken when they are loaded, as vLLM and llama.cpp do, and lies in
        # blocks of 64 tokens (vLLM's have 128 on a CPU).
        size = {} if kv_gib is None else {"kv_memory": f"{kv_gib}GiB"}
        attention = {} if kv_gib is None else {"prefault": True, "block_size": 64}
        self.llm = LLM(
            model,
            platform={"name": "cpu", "threads": threads},
            precision=precision,
            quantizer=_part(quantizer),
            engine={"prefix_cache": prefix_cache, **size},
            attention=attention,
            overrides=overrides,
        )
        return {
            "versions": {"drivetrain": drivetrain.__version__, "torch": torch.__version__},
            "parts": dict(self.llm.explain().chosen_names),
            "weight_bytes": self._weight_bytes(),
        }

    def one(self, *, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        started = time.perf_counter()
        self.llm.generate(prompt, _greedy(1))
        prompt_seconds = time.perf_counter() - started
        token_ids: list[int] = []
        moments = []
        for chunk in self.llm.stream(prompt, _greedy(max_tokens)):
            if chunk.token_ids:
                token_ids += chunk.token_ids
                moments.append(time.perf_counter())
        return {"token_ids": token_ids, "prompt_seconds": prompt_seconds, "decode_seconds": moments[-1] - moments[0]}

    def batch(
        self, *, prompts: list[list[int]], max_tokens: list[int], sampling: dict[str, float] | None = None
    ) -> dict[str, Any]:
        params = [_params(count, sampling) for count in max_tokens]
        started = time.perf_counter()
        results = self.llm.generate(prompts, params)
        seconds = time.perf_counter() - started
        return {"outputs": [list(result.token_ids) for result in results], "seconds": seconds}

    def close(self) -> dict[str, Any]:
        self.llm.close()
        return {}

    def _weight_bytes(self) -> int:
        """Bytes of the module's tensors, each storage once: what a quantizer made of the weights."""
        model = self.llm._stack.engine.runner.model
        tensors = [*model.parameters(), *model.buffers()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())


def _greedy(max_tokens: int) -> SamplingParams:
    return _params(max_tokens, None)


def _params(max_tokens: int, sampling: dict[str, float] | None) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **(sampling or {"temperature": 0}))


if __name__ == "__main__":
    serve(Ours())
