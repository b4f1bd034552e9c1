"""Rule: threads that compute lie on cores of their own and near their memory; on one node nobody is bound unasked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from drivetrain.backends import cpu
from drivetrain.backends.placement import place, settle
from drivetrain.errors import ConfigError
from drivetrain.hardware import Core, read_cores


def machine(num_nodes: int, cores_per_node: int, threads_per_core: int = 2) -> list[Core]:
    """Logical cores as Linux numbers them: the first thread of every core, node by node, then the second ones."""
    total = num_nodes * cores_per_node
    return [
        Core(thread * total + core, (core // cores_per_node, core), core // cores_per_node)
        for thread in range(threads_per_core)
        for core in range(total)
    ]


@pytest.mark.parametrize(
    ("num_threads", "expected"),
    [(1, [0]), (4, [0, 1, 2, 3]), (6, [0, 1, 2, 3, 4, 5]), (8, list(range(8))), (9, [*range(9)])],
)
def test_physical_cores_come_first_and_one_node_is_filled_before_the_next(
    num_threads: int, expected: list[int]
) -> None:
    assert place(machine(2, 4), num_threads) == tuple(expected)


def test_the_node_with_the_most_cores_is_the_first() -> None:
    cores = [core for core in machine(2, 4) if core.node == 1 or core.number == 0]
    assert place(cores, 4) == (4, 5, 6, 7)


def test_on_one_node_nobody_is_bound() -> None:
    cores, why = settle("auto", machine(1, 8), 8)
    assert cores is None
    assert "one NUMA node" in why


def test_on_several_nodes_threads_stay_on_as_few_as_hold_them() -> None:
    assert settle("auto", machine(2, 4), 4) == ((0, 1, 2, 3), "pinned to cores 0-3 of NUMA node 0 (of 2)")
    cores, why = settle("auto", machine(4, 2), 3)
    assert cores == (0, 1, 2)
    assert why == "pinned to cores 0-2 of NUMA node 0, 1 (of 4)"
    assert settle("none", machine(2, 4), 4)[0] is None


def test_a_list_is_taken_or_refused() -> None:
    cores, why = settle([5, 1, 2], machine(2, 4), 2)
    assert cores == (1, 2, 5)
    assert "1-2,5" in why
    with pytest.raises(ConfigError, match="can't be pinned to these cores"):
        settle([0, 99], machine(2, 4), 2)
    with pytest.raises(ConfigError, match="fewer cores are named"):
        settle([0, 0], machine(2, 4), 2)


def test_cores_and_their_nodes_are_read_from_the_kernels_files(tmp_path: Path) -> None:
    for node, text in enumerate(("0-1,4", "2-3")):
        folder = tmp_path / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(text + "\n")
    assert [(core.number, core.node) for core in read_cores(tmp_path, affinity=[0, 2, 3, 4])] == [
        (0, 0),
        (2, 1),
        (3, 1),
        (4, 0),
    ]
    assert [core.node for core in read_cores(tmp_path / "nothing", affinity=[0, 1])] == [0, 0]


def test_the_facts_say_where_threads_run() -> None:
    facts = cpu.CpuPlatform(cpu.CpuPlatform.Config(threads=1, pin="none")).facts()
    assert facts.details["threads"] == "1, not pinned, as was asked"
    assert int(facts.details["numa_nodes"]) >= 1


PROGRAM = """
import json, os, sys, threading
from drivetrain.backends.cpu import CpuPlatform
before = sorted(os.sched_getaffinity(0))
platform = CpuPlatform(CpuPlatform.Config(threads=1, pin=json.loads(sys.argv[1])))
platform.facts()
untouched = sorted(os.sched_getaffinity(0)) == before
platform.activate()
seen = []
thread = threading.Thread(target=lambda: seen.append(sorted(os.sched_getaffinity(0))))
thread.start()
thread.join()
print(json.dumps([before, untouched, sorted(os.sched_getaffinity(0)), seen[0]]))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no threads")
@pytest.mark.parametrize("asked", ["none", "list"])
def test_activating_binds_this_thread_and_those_it_starts_and_describing_binds_nobody(asked: str) -> None:
    last = max(os.sched_getaffinity(0))
    pin = json.dumps([last] if asked == "list" else asked)
    done = subprocess.run([sys.executable, "-c", PROGRAM, pin], check=True, capture_output=True, text=True)
    before, untouched, bound, inherited = json.loads(done.stdout)
    assert untouched
    assert bound == inherited == ([last] if asked == "list" else before)
