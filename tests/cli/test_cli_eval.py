"""``drivetrain eval perplexity``: a row for each quantizer, a picture, and errors before the work begins."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain.cli.options import parse_part
from drivetrain.errors import ConfigError
from support.command_line import ONE_THREAD

Cli = Callable[..., Any]

ROW = {"name", "bits_per_weight", "num_bytes", "perplexity", "kl_divergence", "top1_agreement", "tokens_per_second"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("There is more than one way to say it, and there are other ways too. " * 20)
    return path


def test_a_row_for_the_float32_model_and_each_quantizer(cli: Cli, tiny: Path, text: Path) -> None:
    words = ("eval", "perplexity", tiny, *ONE_THREAD, "--data", text, "--tokens", 300, "--context", 128)
    shown = cli(*words, "--quantizer", "int8", "--quantizer", "none")
    assert shown.status == 0
    header, *rows = shown.out.splitlines()
    assert " ".join(header.split()) == "quantizer bits/weight bytes perplexity change KL (nats) top-1 tok/s"
    assert [row.split()[0] for row in rows] == ["float32", "int8", "none"]
    assert "note: 297 tokens predicted, in windows of 128" in shown.err


def test_json_and_picture(cli: Cli, tiny: Path, text: Path, tmp_path: Path) -> None:
    picture = tmp_path / "quality.png"
    words = ("eval", "perplexity", tiny, *ONE_THREAD, "--data", text, "--tokens", 200)
    shown = cli(*words, "--quantizer", "int8", "--plot", picture, "--json")
    found = json.loads(shown.out)
    assert (found["num_tokens"], found["context"], found["stored_bits"]) == (199, 1024, None)
    assert set(found["reference"]) == ROW
    (row,) = found["rows"]
    assert set(row) == ROW | {"perplexity_change"}
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > height > 400


def test_without_a_quantizer_it_is_the_configuration_s(cli: Cli, tiny: Path, text: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {tiny}\nquantizer: int8\nplatform: {{name: cpu, threads: 1}}\n")
    words = ("eval", "perplexity", "--config", config, "--data", text, "--tokens", 100, "--json")
    assert [row["name"] for row in json.loads(cli(*words).out)["rows"]] == ["int8"]


def test_errors_name_what_is_wrong(cli: Cli, tiny: Path, text: Path, tmp_path: Path) -> None:
    words = ("eval", "perplexity", tiny, *ONE_THREAD, "--data", text)
    (tmp_path / "empty").touch()
    for more, message in (
        (("--tokens", 10**6), "too short; found"),
        (("--data", tmp_path / "empty"), "the text is empty; found '0 tokens'"),
        (("--context", 10**6), "the model does not see as many tokens; found 1000000; allowed: at most 2048"),
        (("--quantizer", "int7"), "'int7'"),
        (("--quantizer", "int8:depth=3"), "depth"),
        (("--quantizer", "int8:depth"), "not an assignment"),
        (("--plot", tmp_path / "picture.jpg"), "--plot: the plot is a PNG; found 'picture.jpg'"),
        (("--plot", tmp_path / "absent" / "picture.png"), "the folder is not there"),
    ):
        shown = cli(*words, *more)
        assert shown.status == 1
        assert message in shown.error, shown.error
        assert "reading with" not in shown.err  # told before the text is read
    assert "no model is named" in cli("eval", "perplexity", "--data", text).error


def test_a_part_in_one_word() -> None:
    for text, name, options in (
        ("int4", "int4", {}),
        ("int4:group=32", "int4", {"group": 32}),
        ("dist/int4:group=32,symmetric=true", "dist/int4", {"group": 32, "symmetric": True}),
        ("int8:rules.lm_head=none,rules.layers.0=int4", "int8", {"rules": {"lm_head": "none", "layers.0": "int4"}}),
        ("{name: int4, group: 32, rules: {lm_head: none}}", "int4", {"group": 32, "rules": {"lm_head": "none"}}),
    ):
        part = parse_part("quantizer", text)
        assert (part.kind, part.name, dict(part.options)) == ("quantizer", name, options)
    for text in ("", ":group=1", "int4:group"):
        with pytest.raises(ConfigError):
            parse_part("quantizer", text)


def test_folders_made_of_the_model_are_measured_too(cli: Cli, tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny-gptq"
    words = ("--data", text, "--tokens", 256, "--context", 64, *ONE_THREAD)
    made = cli("quantize", tiny, "--quantizer", "gptq:group=16", "--out", out, "--memory", "1GiB", *words)
    assert (made.status, made.out) == (0, f"{out}\n")
    assert "note: takes at most" in made.err
    assert "calibrating: 1536 of 1536 tokens" in made.err
    shown = cli("eval", "perplexity", tiny, "--packed", out, "--json", *words)
    (row,) = json.loads(shown.out)["rows"]
    assert row["name"] == "tiny-gptq"
    assert row["bits_per_weight"] < 24
    assert 0 < row["kl_divergence"] < 1


def test_quantize_tells_errors_of_its_options(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    words = ("quantize", tiny, *ONE_THREAD, "--out", tmp_path / "out")
    (tmp_path / "file").touch()
    for more, message in (
        ((), "--quantizer: no quantizer is named"),
        (("--quantizer", "gptq"), "--data: quantizer 'gptq' is calibrated on a text"),
        (("--quantizer", "int8", "--memory", "much"), "--memory: 'much' is no size"),
        (("--quantizer", "int8", "--out", tmp_path / "file" / "out"), "the folder of the run can't be made"),
        (("--quantizer", "int8", "--memory", "1MiB"), "--memory: quantizing layer by layer takes at least"),
    ):
        shown = cli(*words, *more)
        assert shown.status == 1
        assert message in shown.error, shown.error
    assert not (tmp_path / "out").exists()
