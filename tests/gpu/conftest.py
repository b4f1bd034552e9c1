"""These tests need a GPU; elsewhere each is skipped under its own name."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    WHY_NOT: str | None = "there is no GPU here"
elif find_spec("triton") is None:
    WHY_NOT = "triton is not installed"
else:
    WHY_NOT = None


torch.set_num_threads(1)  # what is compared with is computed on the CPU, by several processes at a time


@pytest.fixture(autouse=True)
def gpu() -> torch.device:
    """The device; a fixture, so that a test without a GPU is reported and not merely absent."""
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    return torch.device("cuda")
