"""Rule: what has to be read, imported and built before the first token stays small.

Processor time is counted, not the time on the wall, so that a busy machine does not decide.
"""

from __future__ import annotations

import statistics

import pytest

from support.command_line import processor_seconds

MOST_SECONDS_OF_IMPORT = 0.1
MOST_SECONDS_TO_FIRST_TOKEN = 6.0


def test_importing_the_package_takes_a_tenth_of_a_second() -> None:
    empty = statistics.median(processor_seconds("-c", "pass") for _ in range(5))
    whole = statistics.median(processor_seconds("-c", "import drivetrain") for _ in range(5))
    assert whole - empty < MOST_SECONDS_OF_IMPORT


@pytest.mark.model
@pytest.mark.slow
def test_the_first_token_of_the_real_model_is_there_within_six_seconds() -> None:
    words = ("--model", "smollm2-135m", "--max-tokens", "1", "--temperature", "0", "--set", "platform.threads=1")
    command = ("-m", "drivetrain", "generate", "The capital of France is", *words)
    processor_seconds(*command)  # fetches the model, and fills the caches
    assert min(processor_seconds(*command) for _ in range(2)) < MOST_SECONDS_TO_FIRST_TOKEN
