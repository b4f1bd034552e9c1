"""llama.cpp's server, driven over HTTP on loopback with token ids; concurrent requests share its slots."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from wire import end_with_parent, serve

_START_SECONDS = 120.0
_GREEDY = {"temperature": 0, "samplers": ["top_k"], "top_k": 1}
_FLAGS_WITHOUT_A_PAGE = ("--no-webui", "--offline")


class LlamaServer:
    def load(
        self,
        *,
        model: str,
        binaries: str,
        threads: int,
        prefix_cache: bool,
        slots: int,
        max_model_len: int,
        flags: list[str],
        source: str,
        **_: Any,
    ) -> dict[str, Any]:
        self.prefix_cache = prefix_cache
        self.slots = slots
        self.max_model_len = max_model_len
        self.port = _free_port()
        program = str(Path(binaries, "llama-server"))
        command = [
            program,
            *("--model", model, "--host", "127.0.0.1", "--port", str(self.port)),
            *("--threads", str(threads), "--threads-batch", str(threads)),
            *("--parallel", str(slots), "--ctx-size", str(slots * max_model_len)),
            *_FLAGS_WITHOUT_A_PAGE,
            *flags,
        ]
        self.server = subprocess.Popen(command, stdout=2, preexec_fn=end_with_parent)
        self._wait_until_ready()
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        version = re.search(r"version: (\S+)", said.stdout + said.stderr)
        return {"versions": {"llama-server": version[1] if version else "unknown", "source": source}}

    def one(self, *, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        answer = self._complete(prompt, max_tokens, _GREEDY)
        timings = answer["timings"]  # the server's own, so that HTTP is not counted against it
        return {
            "token_ids": answer["tokens"],
            "prompt_seconds": timings["prompt_ms"] / 1e3,
            "decode_seconds": timings["predicted_ms"] / 1e3,
        }

    def batch(
        self, *, prompts: list[list[int]], max_tokens: list[int], sampling: dict[str, float] | None = None
    ) -> dict[str, Any]:
        settings = self._drawn(sampling) if sampling else _GREEDY
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            started = time.perf_counter()
            answers = list(pool.map(lambda *item: self._complete(*item, settings), prompts, max_tokens))
            seconds = time.perf_counter() - started
        return {"outputs": [answer["tokens"] for answer in answers], "seconds": seconds}

    def close(self) -> dict[str, Any]:
        self.server.terminate()
        self.server.wait(timeout=30)
        return {}

    def _complete(self, prompt: list[int], max_tokens: int, settings: dict[str, Any]) -> dict[str, Any]:
        body = {
            "prompt": prompt,
            "n_predict": max_tokens,
            "ignore_eos": True,
            **settings,
            "cache_prompt": self.prefix_cache,
            "return_tokens": True,
        }
        status, text = self._ask("POST", "/completion", json.dumps(body))
        if status != 200:
            raise RuntimeError(f"llama-server answered {status}: {text[:300]}")
        return dict(json.loads(text))

    def _drawn(self, sampling: dict[str, float]) -> dict[str, Any]:
        """Settings under the server's own names; a penalty looks at the whole context, as the other engines' does."""
        own = {name: value for name, value in sampling.items() if name != "repetition_penalty"}
        penalty = {"repeat_penalty": sampling.get("repetition_penalty", 1.0), "repeat_last_n": self.max_model_len}
        return {**own, **penalty, "samplers": ["penalties", "temperature", "top_p"]}

    def _ask(self, method: str, path: str, body: str | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode("utf-8", errors="replace")
        finally:
            connection.close()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        last: object = "no answer"
        while time.monotonic() < deadline:
            if self.server.poll() is not None:
                raise RuntimeError(f"llama-server ended with status {self.server.returncode}")
            try:
                last, _ = self._ask("GET", "/health")
                if last == 200:
                    return
            except (OSError, http.client.HTTPException) as error:
                last = error  # not listening yet, or not answering yet
            time.sleep(0.1)
        raise TimeoutError(f"llama-server was not ready within {_START_SECONDS:.0f} seconds: {last}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    serve(LlamaServer())
