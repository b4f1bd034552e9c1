"""Drivetrain against other engines on this machine: each in its own environment, in turn, in one run.

    python tests/benchmarks/against_peers.py [--peers ours,llama.cpp] [--workloads single,mixed] [--rows float32]
                                             [--repeats 5] [--set attention=sdpa] [--json] [--docs docs/benchmarks]

The first use of a peer installs it under build/peers, which takes minutes; ``--peers ours`` installs nothing. Exit
status 1 says that a peer failed, or that greedy tokens in float32 disagree; what was measured is printed all the same.
"""

from __future__ import annotations

import sys

from peers.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
