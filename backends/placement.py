"""On which cores the threads that compute may run.

Memory belongs to the NUMA node whose core first writes it, so threads that stay on one node read weights and cache
from near. A *set* of cores is bound, not one core a thread: pools of threads that are made later inherit what the
thread that makes them is bound to, and a pool on one core would compute one thread at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from drivetrain.errors import ConfigError
from drivetrain.hardware import Core

Pin = Literal["auto", "none"] | list[int]


def place(cores: Sequence[Core], num_threads: int) -> tuple[int, ...]:
    """``num_threads`` logical cores: one of each physical core before any second one, and one NUMA node filled before
    the next, the one with the most physical cores first."""
    size_of_node = Counter(node for node, _ in {(core.node, core.physical) for core in cores})
    by_node = sorted(cores, key=lambda core: (-size_of_node[core.node], core.node, core.number))
    taken: set[tuple[int, int]] = set()
    firsts: list[Core] = []
    seconds: list[Core] = []
    for core in by_node:
        (seconds if core.physical in taken else firsts).append(core)
        taken.add(core.physical)
    return tuple(sorted(core.number for core in (firsts + seconds)[:num_threads]))


def settle(pin: Pin, cores: Sequence[Core], num_threads: int) -> tuple[tuple[int, ...] | None, str]:
    """The cores to bind to, or None to leave it to the system, and the reason. Pure.

    Raises ConfigError for a list that names cores which are not there, or fewer than there are threads.
    """
    if pin == "none":
        return None, "not pinned, as was asked"
    if isinstance(pin, list):
        return _as_asked(pin, cores, num_threads), f"pinned to cores {_ranges(sorted(set(pin)))}, as was asked"
    nodes = {core.node for core in cores}
    if len(nodes) < 2:
        return None, "not pinned: there is one NUMA node, and the system moves threads well within it"
    chosen = place(cores, num_threads)
    used = sorted({core.node for core in cores if core.number in chosen})
    return chosen, f"pinned to cores {_ranges(chosen)} of NUMA node {', '.join(map(str, used))} (of {len(nodes)})"


def _as_asked(pin: Sequence[int], cores: Sequence[Core], num_threads: int) -> tuple[int, ...]:
    here = {core.number for core in cores}
    absent = sorted(set(pin) - here)
    if absent or len(set(pin)) < num_threads:
        raise ConfigError(
            "threads can't be pinned to these cores"
            if absent
            else f"{num_threads} threads are to compute, but fewer cores are named",
            where="platform.pin",
            found=list(pin),
            allowed=f"cores of {_ranges(sorted(here))}, at least as many as threads",
        )
    return tuple(sorted(set(pin)))


def _ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2,5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
