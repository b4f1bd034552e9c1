"""``drivetrain explain`` tells what the weights will take, layer by layer, before anything is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.command_line import run_command
from support.tiny_models import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama3"
    save_tiny("llama3", folder)
    return folder


def test_layers_are_listed_by_quantizer_and_rule(folder: Path) -> None:
    part = "quantizer={name: int8, rules: {lm_head: none, layers.0: {name: int4, group: 16}}}"
    done = run_command("explain", "--model", str(folder), "--set", part)
    assert done.returncode == 0, done.stderr
    for row in (("none", "lm_head", "1"), ("int4", "layers.0", "7"), ("int8", "14")):
        assert any(line.split()[: len(row)] == list(row) for line in done.stdout.splitlines()), row
    assert "the weights take" in done.stdout
    told = json.loads(run_command("explain", "--model", str(folder), "--set", part, "--json").stdout)["weights"]
    assert told["is_exact"]
    assert told["total_bytes"] == sum(row["num_bytes"] for row in told["rows"]) + told["other_bytes"]
    assert told["peak_bytes"] > told["total_bytes"]


def test_a_rule_without_a_layer_is_an_error(folder: Path) -> None:
    done = run_command("explain", "--model", str(folder), "--set", "quantizer={name: int8, rules: {lm_haed: none}}")
    assert done.returncode != 0
    assert "Did you mean 'lm_head'" in done.stderr
