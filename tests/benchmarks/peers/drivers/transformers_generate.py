"""transformers' ``generate``, one request after another."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer
from wire import serve


class _Clock(BaseStreamer):
    """Notes when each token came; the first call carries the prompt."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
        else:
            self.moments.append(time.perf_counter())

    def end(self) -> None:
        pass


class Transformers:
    def load(self, *, model: str, threads: int, dtype: str, **_: Any) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.model.eval()
        self.model.generation_config.eos_token_id = None  # every output has its full length
        return {"versions": {"transformers": transformers.__version__, "torch": torch.__version__}}

    def one(self, *, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        started = time.perf_counter()
        self._generate(prompt, 1, do_sample=False)
        prompt_seconds = time.perf_counter() - started
        clock = _Clock()
        token_ids = self._generate(prompt, max_tokens, streamer=clock, do_sample=False)
        decode_seconds = clock.moments[-1] - clock.moments[0]
        return {"token_ids": token_ids, "prompt_seconds": prompt_seconds, "decode_seconds": decode_seconds}

    def batch(
        self, *, prompts: list[list[int]], max_tokens: list[int], sampling: dict[str, float] | None = None
    ) -> dict[str, Any]:
        settings = {"do_sample": True, "top_k": 0, **sampling} if sampling else {"do_sample": False}
        started = time.perf_counter()
        outputs = [self._generate(prompt, count, **settings) for prompt, count in zip(prompts, max_tokens, strict=True)]
        return {"outputs": outputs, "seconds": time.perf_counter() - started}

    def close(self) -> dict[str, Any]:
        return {}

    @torch.inference_mode()
    def _generate(self, prompt: list[int], max_tokens: int, **settings: Any) -> list[int]:
        ids = torch.tensor([prompt])
        made = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            pad_token_id=0,
            **settings,
        )
        return made[0, len(prompt) :].tolist()


if __name__ == "__main__":
    serve(Transformers())
