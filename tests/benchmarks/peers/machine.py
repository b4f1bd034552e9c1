"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_FLAGS_THAT_MATTER = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
"""Instruction sets that kernels choose by; Linux's names on x86-64, then on ARM."""


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int
    flags: tuple[str, ...]
    memory_gib: float
    system: str
    python: str

    @classmethod
    def of_this_process(cls) -> Machine:
        cpuinfo = _read("/proc/cpuinfo")
        pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return cls(
            cpu=_field(cpuinfo, "model name") or platform.processor() or platform.machine(),
            cores=len(os.sched_getaffinity(0)),
            flags=flags_that_matter(cpuinfo),
            memory_gib=round(pages * page_bytes / 2**30, 1),
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def flags_that_matter(cpuinfo: str) -> tuple[str, ...]:
    present = set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features") or "").split())
    return tuple(flag for flag in _FLAGS_THAT_MATTER if flag in present)


def others_share(seconds: float = 0.2) -> float | None:
    """Share of the cores that is in use right now, while nothing of the benchmark runs; None where it can't be seen."""
    before = _busy_and_all(_read("/proc/stat"))
    time.sleep(seconds)
    after = _busy_and_all(_read("/proc/stat"))
    if before is None or after is None or after[1] == before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])


def _busy_and_all(stat: str) -> tuple[int, int] | None:
    match = re.match(r"cpu +(.*)", stat)
    if match is None:
        return None
    numbers = [int(word) for word in match[1].split()][:8]  # guests' times are part of the first two
    return sum(numbers) - numbers[3] - numbers[4], sum(numbers)  # idle and waiting for disks


def _field(text: str, name: str) -> str | None:
    match = re.search(rf"^{re.escape(name)}\s*: (.*)$", text, re.MULTILINE)
    return match[1].strip() if match else None


def _read(path: str) -> str:
    file = Path(path)
    return file.read_text(encoding="utf-8") if file.is_file() else ""
