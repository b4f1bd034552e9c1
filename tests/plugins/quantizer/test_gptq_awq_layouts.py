"""GPTQ and AWQ checkpoints, written weight by weight after the published layouts, are used packed.

The packages that make them need a newer torch than this project's, so the layouts are written out here once more, in
plain Python, as AutoGPTQ and AutoAWQ define them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drivetrain import LLM, SamplingParams
from drivetrain.assembly import resolve_parts
from drivetrain.config import load_settings
from drivetrain.contracts.loader import Checkpoint
from drivetrain.contracts.plugin import Purpose
from drivetrain.errors import ConfigError, LoaderError, MissingTensorError, PluginRefusedError
from drivetrain.packed import decode
from support.quantized_models import PROMPTS, generated, layer_names, open_folder, save_round_sizes

torch.set_num_threads(1)

GROUP = 32
LAYER = "model.layers.0.mlp.up_proj"
Made = dict[str, dict[str, torch.Tensor]]


def words_of(values: list[int], bits: int) -> list[int]:
    """One long number, the first value in its lowest bits, cut into signed words of 32 bits."""
    number = sum(value << bits * place for place, value in enumerate(values))
    words = [number >> 32 * place & 0xFFFFFFFF for place in range(-(-len(values) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def random_layer(rows: int, inputs: int, bits: int, symmetric: bool, seed: int) -> dict[str, torch.Tensor]:
    """Values [O, I], scales and zeros [O, N]."""
    generator = torch.Generator().manual_seed(seed)
    shape = rows, inputs // GROUP
    middle = torch.full(shape, 1 << bits - 1)
    zeros = middle if symmetric else torch.randint(1, 1 << bits, shape, generator=generator)
    scales = (torch.rand(shape, generator=generator) + 0.5) * 2.0 * inputs**-0.5 / (1 << bits - 1)
    values = torch.randint(0, 1 << bits, (rows, inputs), generator=generator)
    return {"values": values, "scales": scales.half(), "zeros": zeros}


def meant(layer: dict[str, torch.Tensor], group_of_input: torch.Tensor) -> torch.Tensor:
    """``(value - zero) * scale``, input by input, [O, I]."""
    values, scales, zeros = (layer[name].float() for name in ("values", "scales", "zeros"))
    return (values - zeros[:, group_of_input]) * scales[:, group_of_input]


def gptq_parts(layer: dict[str, torch.Tensor], bits: int, stored_zero: int, group_of_input: torch.Tensor) -> Any:
    columns = [words_of(row, bits) for row in layer["values"].tolist()]
    zero_rows = [words_of([zero - stored_zero for zero in row], bits) for row in layer["zeros"].T.tolist()]
    return {
        "qweight": torch.tensor(columns, dtype=torch.int32).T.contiguous(),
        "qzeros": torch.tensor(zero_rows, dtype=torch.int32),
        "scales": layer["scales"].T.contiguous(),
        "g_idx": group_of_input.int(),
    }


def awq_parts(layer: dict[str, torch.Tensor]) -> Any:
    def packed(rows: list[list[int]]) -> torch.Tensor:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        eights = [[row[start : start + 8] for start in range(0, len(row), 8)] for row in rows]
        words = [[words_of([eight[place] for place in order], 4)[0] for eight in row] for row in eights]
        return torch.tensor(words, dtype=torch.int32)

    return {
        "qweight": packed(layer["values"].T.tolist()),
        "qzeros": packed(layer["zeros"].T.tolist()),
        "scales": layer["scales"].T.contiguous(),
    }


def save_quantized(folder: Path, made: Made, config: dict[str, Any]) -> Path:
    """A Llama folder in which each layer's weight is replaced by the parts."""
    save_round_sizes(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, parts in made.items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def make(
    folder: Path, method: str, bits: int = 4, *, symmetric: bool = False, version: str = "gptq", ordered: bool = False
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A model folder of random layers in one of the layouts, and the weights that are meant."""
    save_round_sizes(folder / "names")
    names: Checkpoint = open_folder(folder / "names")
    made, wanted = {}, {}
    for seed, name in enumerate(layer_names(names)):
        rows, inputs = names.shape(f"{name}.weight")
        layer = random_layer(rows, inputs, bits, symmetric, seed)
        group_of_input = torch.arange(inputs) // GROUP
        if ordered:
            group_of_input = group_of_input[torch.randperm(inputs, generator=torch.Generator().manual_seed(seed))]
        wanted[name] = meant(layer, group_of_input)
        stored_zero = int(version == "gptq")
        made[name] = awq_parts(layer) if method == "awq" else gptq_parts(layer, bits, stored_zero, group_of_input)
    config: dict[str, Any] = {"quant_method": method, "bits": bits, "group_size": GROUP}
    if method == "gptq":
        config |= {"desc_act": ordered, "sym": symmetric, "checkpoint_format": version}
    return save_quantized(folder / method, made, config), wanted


CASES: dict[str, dict[str, Any]] = {
    "gptq-4": {"method": "gptq"},
    "gptq-4-symmetric": {"method": "gptq", "symmetric": True},
    "gptq-4-v2": {"method": "gptq", "version": "gptq_v2"},
    "gptq-4-ordered": {"method": "gptq", "ordered": True},
    "gptq-3": {"method": "gptq", "bits": 3},
    "gptq-3-v2-ordered": {"method": "gptq", "bits": 3, "version": "gptq_v2", "ordered": True},
    "gptq-8-symmetric": {"method": "gptq", "bits": 8, "symmetric": True},
    "awq": {"method": "awq"},
    "awq-symmetric": {"method": "awq", "symmetric": True},
}
OPERATIONS = {3: "linear_int3", 4: "linear_int4", 8: "linear_gguf"}


@pytest.mark.parametrize("case", CASES)
def test_each_layout_means_what_was_written_and_is_used_packed(case: str, tmp_path: Path) -> None:
    folder, wanted = make(tmp_path, **CASES[case])
    method, bits = CASES[case]["method"], CASES[case].get("bits", 4)
    checkpoint = open_folder(folder)
    assert checkpoint.packed_by == method
    for name, weight in wanted.items():
        assert torch.equal(checkpoint.tensor(f"{name}.weight", torch.float32), weight), name
        packed = checkpoint.packed(f"{name}.weight")
        assert packed is not None
        assert packed.operation == OPERATIONS[bits]
        assert (packed.order is not None) == CASES[case].get("ordered", False)
        torch.testing.assert_close(decode(packed), weight, rtol=1e-6, atol=1e-7)
    found, report = generated(folder)
    chosen = next(one for one in report["selections"] if one["kind"] == "quantizer")
    assert chosen["chosen"]["name"] == method
    dequantized, report = generated(folder, quantizer="none")
    assert found == dequantized
    assert report["weights"]["rows"][0]["quantizer"] == "none"
    assert not report["notes"]


def test_whole_rows_of_8_bits_are_the_rows_of_int8(tmp_path: Path) -> None:
    save_round_sizes(tmp_path / "names")
    rows, inputs = open_folder(tmp_path / "names").shape(f"{LAYER}.weight")
    values = torch.randint(0, 256, (rows, inputs), generator=torch.Generator().manual_seed(0))
    layer = {"values": values, "scales": torch.full((rows, 1), 0.001).half(), "zeros": torch.full((rows, 1), 128)}
    parts = gptq_parts(layer, 8, 1, torch.zeros(inputs))
    folder = save_quantized(tmp_path / "out", {LAYER: parts}, {"quant_method": "gptq", "bits": 8, "group_size": -1})
    packed = open_folder(folder).packed(f"{LAYER}.weight")
    assert packed is not None
    assert packed.operation == "linear_int8"
    assert torch.equal(packed.tensors["weight"], (values - 128).to(torch.int8))


def test_a_zero_of_nought_borrows_from_its_neighbour_in_the_first_version(tmp_path: Path) -> None:
    """GPTQModel subtracts 1 from every field of a word at once."""
    folder, wanted = make(tmp_path, "gptq")
    tensors = load_file(folder / "model.safetensors")
    zeros = torch.zeros_like(tensors[f"{LAYER}.qzeros"]) - 0x11111111
    save_file(tensors | {f"{LAYER}.qzeros": zeros}, folder / "model.safetensors", metadata={"format": "pt"})
    values = open_folder(folder).tensor(f"{LAYER}.weight", torch.float32)
    assert bool((values >= 0).all())
    assert float(values.max()) > float(wanted[LAYER].max())


def test_what_no_operation_multiplies_by_is_dequantized_with_the_reason(tmp_path: Path) -> None:
    """Two bits: refused by name, and under auto the choice falls to none, and says why."""
    folder, _ = make(tmp_path, "gptq", 2)
    with pytest.raises(PluginRefusedError, match="weights of 2 bits, only of 3, 4 and 8"):
        resolve_parts(load_settings(None, {"model": str(folder), "quantizer": "gptq"}), leave_out=("frontend",))
    found, report = generated(folder)
    chosen = next(one for one in report["selections"] if one["kind"] == "quantizer")
    assert chosen["chosen"]["name"] == "none"
    assert "'none' is used in place of 'gptq'" in chosen["fallback"]
    assert "2 bits" in chosen["fallback"]
    assert found == generated(folder, quantizer="none")[0]


def test_eight_bits_with_zero_points_are_dequantized_with_a_note(tmp_path: Path) -> None:
    folder, _ = make(tmp_path, "gptq", 8)
    found, report = generated(folder)
    (note,) = [note for note in report["notes"] if "dequantized" in note]
    assert "14 of 15 layers" in note
    assert found == generated(folder, quantizer="none")[0]


def test_training_needs_the_full_weights(tmp_path: Path) -> None:
    folder, _ = make(tmp_path, "gptq")
    settings = {"model": str(folder)}
    left_out = ("partitioner", "checkpoint", "store")
    parts = resolve_parts(load_settings(None, settings), purpose=Purpose.TRAIN, leave_out=left_out)
    assert parts.report["quantizer"].chosen.name == "none"
    named = load_settings(None, {**settings, "quantizer": "gptq"})
    with pytest.raises(PluginRefusedError, match="no gradient"):
        resolve_parts(named, purpose=Purpose.TRAIN, leave_out=left_out)


def test_a_running_engine_changes_to_dequantized_weights_and_back(tmp_path: Path) -> None:
    folder, _ = make(tmp_path, "gptq", ordered=True)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    with LLM(folder, engine={"max_model_len": 96}, platform={"name": "cpu", "threads": 1}) as llm:
        before = [result.token_ids for result in llm.generate(PROMPTS, params)]
        for name in ("none", "auto"):
            llm.swap(quantizer=name)
            assert [result.token_ids for result in llm.generate(PROMPTS, params)] == before
        chosen = next(one for one in llm.selection_dict()["selections"] if one["kind"] == "quantizer")
        assert chosen["chosen"]["name"] == "gptq"


def test_rounding_packed_weights_once_more_is_refused(tmp_path: Path) -> None:
    from drivetrain.errors import ConfigError

    folder, _ = make(tmp_path, "awq")
    with pytest.raises(ConfigError, match=r"quantized in the files already.*4\.\d\d bits"):
        LLM(folder, quantizer="int8", engine={"max_model_len": 96})


# --- bad input -----------------------------------------------------------------------------------------------------


def _without(part: str) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        del tensors[f"{LAYER}.{part}"]

    return change


def _cut(part: str) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors[f"{LAYER}.{part}"] = tensors[f"{LAYER}.{part}"][:1].clone()

    return change


def _as(part: str, dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors[f"{LAYER}.{part}"] = tensors[f"{LAYER}.{part}"].to(dtype)

    return change


def _set(**changes: Any) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    return lambda tensors, config: config.update(changes)


def _full_beside(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[f"{LAYER}.weight"] = torch.zeros(96, 64)


FAULTS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor], dict[str, Any]], None], str]] = {
    "no-scales": ("gptq", _without("scales"), rf"layer {LAYER} lacks its tensor {LAYER}\.scales"),
    "no-zeros": ("gptq", _without("qzeros"), rf"lacks its tensor {LAYER}\.qzeros"),
    "no-weight": ("gptq", _without("qweight"), rf"lacks its tensor {LAYER}\.qweight"),
    "awq-no-zeros": ("awq", _without("qzeros"), rf"lacks its tensor {LAYER}\.qzeros"),
    "short-scales": ("gptq", _cut("scales"), rf"{LAYER}\.scales has another shape.*\(1, 96\).*\(2, 96\)"),
    "awq-short-zeros": ("awq", _cut("qzeros"), rf"{LAYER}\.qzeros has another shape.*\(1, 12\).*\(2, 12\)"),
    "short-order": ("gptq", _cut("g_idx"), rf"{LAYER}\.g_idx has another shape.*\(1,\).*\(64,\)"),
    "wide-scales": ("gptq", _as("scales", torch.float64), rf"{LAYER}\.scales has a type.*'F64'"),
    "small-words": ("awq", _as("qweight", torch.int16), rf"{LAYER}\.qweight has a type.*'I16'.*I32"),
    "group": ("gptq", _set(group_size=80), r"group size of layer .* does not divide its 96 inputs; found 80"),
    "no-group": ("gptq", _set(group_size=0), "no usable group_size; found 0"),
    "bits": ("gptq", _set(bits=5), r"GPTQ checkpoints of these bits.*found 5.*2, 3, 4, 8"),
    "awq-bits": ("awq", _set(bits=3), r"AWQ checkpoints of these bits.*found 3"),
    "no-bits": ("gptq", _set(bits="four"), "no usable bits; found 'four'"),
    "version": ("gptq", _set(checkpoint_format="marlin"), "version of the GPTQ format.*'marlin'"),
    "awq-version": ("awq", _set(version="gemv"), "order of AWQ weights.*'gemv'.*gemm"),
    "method": ("gptq", _set(quant_method="bitsandbytes"), r"format that this loader does not read.*'bitsandbytes'"),
    "full-beside": ("gptq", _full_beside, rf"{LAYER}\.weight is stored in full, and yet g_idx, qweight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_found_on_opening_and_named(fault: str, tmp_path: Path) -> None:
    method, change, message = FAULTS[fault]
    folder, _ = make(tmp_path, method)
    tensors = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    change(tensors, settings["quantization_config"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings))
    error = MissingTensorError if "lacks" in message else LoaderError
    with pytest.raises(error, match=message):
        open_folder(folder)


def test_groups_of_different_sizes_and_beyond_the_last_are_named(tmp_path: Path) -> None:
    folder, _ = make(tmp_path, "gptq")
    tensors = load_file(folder / "model.safetensors")
    for value, message in ((0, r"different numbers of inputs.*31 \.\. 33.*32 each"), (7, r"make no sense.*0 \.\. 7")):
        order = tensors[f"{LAYER}.g_idx"].clone()
        order[-1] = value
        save_file(tensors | {f"{LAYER}.g_idx": order}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(LoaderError, match=message):
            open_folder(folder).packed(f"{LAYER}.weight")


def test_full_files_with_a_quantization_config_are_told(tmp_path: Path) -> None:
    folder = save_quantized(tmp_path, {}, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(LoaderError, match=r"stored quantized by gptq, but none is.*Remove quantization_config"):
        open_folder(folder)


def test_a_quantized_file_cut_short_is_refused(tmp_path: Path) -> None:
    folder, _ = make(tmp_path, "awq")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LoaderError, match="cut short"):
        open_folder(folder)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_scales_that_are_no_numbers_are_told_with_their_layer(method: str, tmp_path: Path) -> None:
    folder, _ = make(tmp_path, method)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.scales"][0, 5:8] = float("nan")
    tensors[f"{name}.scales"][1, 9] = float("inf")
    total = tensors[f"{name}.scales"].numel()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"layers\.1\.mlp\.up_proj: 4 of the {total} scales and minima .* are NaN"):
        LLM(folder, engine={"max_model_len": 96}, platform={"name": "cpu", "threads": 1})
