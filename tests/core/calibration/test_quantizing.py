"""``drivetrain quantize``: what is written is what was decided, whenever and however often the run is made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from drivetrain import LLM, SamplingParams
from drivetrain.calibration import QuantizeOptions
from drivetrain.calibration.state import RunFolder
from drivetrain.errors import CalibrationError, ConfigError, DrivetrainError, MemoryBudgetError
from drivetrain.evaluation import compare_quantizers
from drivetrain.packed import packed_layers
from support.calibration import quantize, settings_of, write_text
from support.tiny_models import save_tiny

GPTQ = {"name": "gptq", "group": 16}
AWQ = {"name": "awq", "group": 16, "steps": 5}


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def opened(folder: Path) -> LLM:
    return LLM(folder, platform={"name": "cpu", "threads": 1})


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantizer", "operation"),
    [
        (GPTQ, "linear_int4"),
        (GPTQ | {"act_order": True, "symmetric": True}, "linear_int4"),
        (AWQ, "linear_int4"),
        (AWQ | {"bits": 3}, "linear_int3"),
        ("w8a8", "linear_w8a8"),
        ("int8", "linear_int8"),
    ],
    ids=str,
)
def test_what_is_written_is_served_packed(tmp_path: Path, quantizer: Any, operation: str) -> None:
    save_tiny("llama", tmp_path / "model")
    out = quantize(tmp_path / "model", tmp_path / "out", quantizer)
    assert not QuantizeOptions(out).run_folder.exists()
    with opened(out) as llm:
        layers = dict(packed_layers(llm._stack.engine.runner.model))
        assert len([name for name in layers if name != "lm_head"]) == 3 * 7
        assert {layer.packed.operation for layer in layers.values()} == {operation}
        assert ("lm_head" in layers) == (quantizer == "int8")
        result = llm.generate("There is more", SamplingParams(max_tokens=4, temperature=0))[0]
        assert len(result.token_ids) == 4


@pytest.mark.parametrize("name", ["llama-bias", "smollm2", "gemma2", "phi3", "olmo2"])
def test_every_architecture_predicts_nearly_as_before(tmp_path: Path, name: str) -> None:
    """With 8-bit weights after factors were folded, as with none: what was folded is in the files too."""
    save_tiny(name, tmp_path / "model")
    text = write_text(tmp_path)
    smooth = quantize(tmp_path / "model", tmp_path / "smooth", {"name": "w8a8", "smoothing": 0.7}, text)
    found = compare_quantizers(
        settings_of(tmp_path / "model"), [], text, packed=[str(smooth)], num_tokens=256, context=64
    )
    (row,) = found.rows
    assert row.name == "smooth"
    assert row.kl_divergence < 0.02, "far more than 8 bits cost"


def test_rules_decide_layer_by_layer(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    rules = {"layers.0": "none", "layers.1.mlp": {"name": "gptq", "group": 16, "bits": 4, "symmetric": True}}
    out = quantize(tmp_path / "model", tmp_path / "out", GPTQ | {"rules": rules})
    with opened(out) as llm:
        names = {name for name, _ in packed_layers(llm._stack.engine.runner.model)}
    assert {name.split(".")[2] for name in names} == {"1", "2"}
    with pytest.raises(ConfigError, match="matches no layer"):
        quantize(tmp_path / "model", tmp_path / "other", GPTQ | {"rules": {"layers.9": "none"}})


# --- the same bytes --------------------------------------------------------------------------------------------------


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    first, again, other = (
        content(quantize(tmp_path / "model", tmp_path / out, AWQ, seed=seed))
        for out, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert first == again
    assert first["model.safetensors"] != other["model.safetensors"]


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from support.calibration import quantize
model, out, text = map(Path, sys.argv[1:4])
quantize(model, out, {"name": "gptq", "group": 16}, text, resume=len(sys.argv) > 4)
"""


def start(*arguments: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *map(str, arguments)], env=environment)


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL after the first finished layer, and once more after the second."""
    save_tiny("llama", tmp_path / "model")
    text = write_text(tmp_path)
    wanted = content(quantize(tmp_path / "model", tmp_path / "whole", GPTQ, text))
    out = tmp_path / "out"
    run = RunFolder(QuantizeOptions(out).run_folder)
    for count, more in ((1, ()), (2, ("resume",))):
        process = start(tmp_path / "model", out, text, *more)
        give_up = time.monotonic() + 120
        while run.num_finished() < count and process.poll() is None and time.monotonic() < give_up:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        assert run.num_finished() >= count
        assert not out.exists()
    with pytest.raises(CalibrationError, match=r"a run that did not end is there.*--resume"):
        quantize(tmp_path / "model", out, GPTQ, text)
    with pytest.raises(CalibrationError, match=r"another one: quantizer options was .*; seed was 0 and is 1"):
        quantize(tmp_path / "model", out, GPTQ | {"damping": 0.02}, text, resume=True, seed=1)
    assert content(quantize(tmp_path / "model", out, GPTQ, text, resume=True)) == wanted
    assert not run.path.exists()


# --- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from drivetrain.calibration import QuantizeOptions, quantize_model
from support.calibration import quantize, settings_of

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

model, out, text, bound = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
quantize(Path(sys.argv[5]), Path(out + "-warm"), {"name": "awq", "group": 16, "steps": 2}, Path(text))
started, peak, plans = anonymous(), 0, []

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
rules = {"layers.1?": "none", "layers.[4-9]": "none"}
quantizer = {"name": "awq", "group": 64, "steps": 2, "sweeps": 1, "rules": rules}
options = QuantizeOptions(Path(out), Path(text), 1024, 256, memory_bytes=bound)
quantize_model(settings_of(Path(model), quantizer), options, planned=plans.append)
print(peak - started, plans[0].memory_bytes)
"""


@pytest.mark.slow
def test_memory_stays_within_the_bound_for_a_model_that_is_larger(tmp_path: Path) -> None:
    """20 layers of 12 MiB, a fifth of them quantized, and a bound below the size of the model: one at a time fits."""
    import transformers

    from support.tiny_models import tiny_model, tiny_tokenizer

    config = transformers.LlamaConfig(
        vocab_size=288,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=20,
        num_attention_heads=8,
        num_key_value_heads=4,
        architectures=["LlamaForCausalLM"],
    )
    tiny_model(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    save_tiny("llama", tmp_path / "small")
    text = write_text(tmp_path)
    bound = 224 * 2**20
    assert sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors")) > bound
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    words = [tmp_path / "model", tmp_path / "out", text, bound, tmp_path / "small"]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, words)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    peak, planned = map(int, done.stdout.split())
    assert planned <= bound
    assert peak <= planned, f"it took {peak / 2**20:.0f} MiB, and had said {planned / 2**20:.0f}"
    with pytest.raises(MemoryBudgetError, match=r"at least \d+ MiB: \d+ MiB for one layer's weights.*found '20 MiB'"):
        quantize(tmp_path / "model", tmp_path / "never", {"name": "awq"}, text, memory_bytes=20 * 2**20)


# --- what can be wrong -----------------------------------------------------------------------------------------------


def spoil(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[5:8] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    text = write_text(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "file").touch()
    out = tmp_path / "out"
    cases: list[tuple[dict[str, Any], Any, Path, str]] = [
        ({}, GPTQ, tmp_path / "full", "--out: the output folder is not empty"),
        ({}, GPTQ, tmp_path / "file", "--out: the output is no folder"),
        ({"text": tmp_path / "empty.txt"}, GPTQ, out, "the text is empty; found '0 tokens'"),
        ({"num_tokens": 10**6}, GPTQ, out, r"the text is too short; found '\d+ tokens'; allowed: 1000000 tokens"),
        ({"num_tokens": 60}, GPTQ, out, "--tokens: too few tokens to calibrate on; found 60; allowed: 128 or more"),
        ({"context": 512}, GPTQ, out, "--context: the model does not see as many tokens; found 512; allowed: at most"),
        ({}, {"name": "gptq", "group": 64}, out, r"q_proj: rows of 48 weights are no whole number of groups of 64"),
        ({}, {"name": "gptq", "bits": 3, "group": 16}, out, r"q_proj: the inputs of the layer fill no whole words"),
        ({}, {"name": "gptq", "bits": 5}, out, r"quantizer\.bits: Input should be 3 or 4; found 5"),
        ({}, {"name": "awq", "group": 24}, out, r"quantizer\.group: Input should be 16, 32, 64 or 128; found 24"),
        ({}, "none", out, "--quantizer: no quantizer is named"),
        ({}, "awk", out, "awk"),
        ({}, "compressed-tensors", out, "packs none"),
    ]
    for options, quantizer, folder, message in cases:
        with pytest.raises(DrivetrainError, match=message):
            quantize(tmp_path / "model", folder, quantizer, **({"text": text} | options))
        assert not QuantizeOptions(out).run_folder.exists(), message


def test_weights_and_activations_that_are_no_numbers_are_told_with_their_layer(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    for name, value, message in (
        ("model.layers.1.self_attn.v_proj.weight", float("nan"), r"layers\.1\.self_attn\.v_proj: 3 of the 768 weights"),
        ("model.layers.2.input_layernorm.weight", float("inf"), r"layers\.2\.self_attn\.q_proj: 1536 of the 24576 num"),
        ("model.layers.0.post_attention_layernorm.weight", 1e30, r"layers\.0\.mlp\.down_proj: .*NaN or infinite"),
    ):
        folder = tmp_path / name
        save_tiny("llama", folder)
        spoil(folder, name, value)
        with pytest.raises(DrivetrainError, match=message):
            quantize(folder, tmp_path / f"{name}.out", GPTQ, text)


def test_quantized_weights_are_not_quantized_again_unless_it_is_said(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    text = write_text(tmp_path)
    once = quantize(tmp_path / "model", tmp_path / "once", "int8", text)
    with pytest.raises(ConfigError, match=r"q_proj.weight is quantized in the files already.*allow_lossy"):
        quantize(once, tmp_path / "twice", GPTQ, text)
    twice = quantize(once, tmp_path / "again", GPTQ | {"allow_lossy": True}, text)
    with opened(twice) as llm:
        assert next(packed_layers(llm._stack.engine.runner.model))[1].packed.operation == "linear_int4"


def test_an_empty_output_folder_will_do(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "out").mkdir()
    out = quantize(tmp_path / "model", tmp_path / "out", "int8")
    assert (out / "config.json").is_file()


def test_a_state_that_can_not_be_read_is_told(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.begin({"model": "a"}, resume=False)
    (run.path / "layer-00000.safetensors").write_bytes(b"cut")
    with pytest.raises(CalibrationError, match="the finished layer can't be read"):
        run.load(0)
    (run.path / "run.json").write_text("{")
    with pytest.raises(CalibrationError, match="no run can be taken up here"):
        run.begin({"model": "a"}, resume=True)
