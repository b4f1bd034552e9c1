"""What is written in a format of quantized checkpoints is read back as it was, by tensors of the published layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from drivetrain.contracts.loader import Checkpoint
from drivetrain.contracts.packed import PackedWeight
from drivetrain.errors import ConfigError, LoaderError
from drivetrain.packed import decode
from drivetrain.plugins.quantizer.formats import FORMATS, IntegerGrid, write_quantized
from drivetrain.plugins.quantizer.formats.bits import pack_bits, unpack_bits
from support.quantized_models import layer_names, open_folder, rounded, rounded_layers, save_round_sizes

torch.set_num_threads(1)

LAYER = "model.layers.1.mlp.down_proj"
SCHEMES = [
    (format, bits, group, symmetric)
    for format in FORMATS
    for bits in (3, 4, 8)
    for group in (32, None)
    for symmetric in (True, False)
    if not (format == "awq" and bits != 4) and (bits < 8 or symmetric)
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("full")
    save_round_sizes(folder)
    return open_folder(folder)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("count", [1, 31, 32, 100])
def test_fields_run_on_over_the_words(bits: int, count: int) -> None:
    values = torch.randint(0, 1 << bits, (3, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    words = pack_bits(values, bits)
    assert words.shape == (3, -(-count * bits // 32))
    assert torch.equal(unpack_bits(words, bits, count), values)
    # One long number a row, the first value in its lowest bits: the definition itself.
    for row, packed in zip(values.tolist(), words.tolist(), strict=True):
        number = sum(value << bits * place for place, value in enumerate(row))
        assert packed == [
            word - (1 << 32) if (word := number >> 32 * place & 0xFFFFFFFF) >> 31 else word
            for place in range(len(packed))
        ]


@pytest.mark.parametrize(("format", "bits", "group", "symmetric"), SCHEMES)
def test_written_layers_are_read_back_to_the_bit(
    format: str, bits: int, group: int | None, symmetric: bool, source: Checkpoint, tmp_path: Path
) -> None:
    grids = rounded_layers(source, bits, group, symmetric=symmetric)
    packed = {name: grid.packed() for name, grid in grids.items()}
    folder = write_quantized(tmp_path / "out", source, packed.items(), format, zero_points=None if symmetric else True)
    found = open_folder(folder)
    assert found.packed_by == format
    assert set(found.names()) == set(source.names())
    assert found.stored_bytes() < source.stored_bytes()
    for name, grid in grids.items():
        assert found.shape(f"{name}.weight") == source.shape(f"{name}.weight")
        assert torch.equal(found.tensor(f"{name}.weight", torch.float32), grid.weights())
        read = found.packed(f"{name}.weight")
        assert read is not None
        assert read.operation == packed[name].operation
        for part, tensor in packed[name].tensors.items():
            assert torch.equal(read.tensors[part], tensor), (name, part)
    untouched = set(source.names()) - {f"{name}.weight" for name in grids}
    for name in untouched:
        assert found.packed(name) is None
        assert torch.equal(found.tensor(name, torch.float32), source.tensor(name, torch.float32))


def test_an_order_of_inputs_survives_gptq_and_is_refused_elsewhere(source: Checkpoint, tmp_path: Path) -> None:
    weight = source.tensor(f"{LAYER}.weight", torch.float32)
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    grid = rounded(weight[:, order], 4, 32)
    ordered = IntegerGrid(4, grid.values_OI, grid.scales_ON, grid.zeros_ON, order)
    packed = ordered.packed()
    torch.testing.assert_close(decode(packed), ordered.weights(), rtol=0, atol=0)
    folder = write_quantized(tmp_path / "gptq", source, [(LAYER, packed)], "gptq")
    assert config_of(folder)["desc_act"] is True
    read = open_folder(folder).packed(f"{LAYER}.weight")
    assert read is not None
    assert read.order is not None
    assert torch.equal(decode(read), ordered.weights())
    for format in ("awq", "compressed-tensors"):
        with pytest.raises(ConfigError, match="order"):
            write_quantized(tmp_path / format, source, [(LAYER, packed)], format)
        assert not (tmp_path / format).exists()


def test_layers_of_several_schemes_are_told_apart(source: Checkpoint, tmp_path: Path) -> None:
    four, eight = rounded_layers(source, 4, 32), rounded_layers(source, 8, None)
    grids = {name: eight[name] if ".layers.0." in name else four[name] for name in four}
    del grids[LAYER]
    for format in ("compressed-tensors", "gptq"):
        packed = [(name, grid.packed()) for name, grid in grids.items()]
        found = open_folder(write_quantized(tmp_path / format, source, packed, format))
        for name, grid in grids.items():
            assert torch.equal(found.tensor(f"{name}.weight", torch.float32), grid.weights()), (format, name)
        assert found.packed(f"{LAYER}.weight") is None
    with pytest.raises(ConfigError, match=r"have 4 bits; found 8"):
        write_quantized(tmp_path / "awq", source, packed, "awq")


@pytest.mark.parametrize("shard_bytes", [1, 20_000])
def test_shards_and_their_index_hold_the_same(shard_bytes: int, source: Checkpoint, tmp_path: Path) -> None:
    packed = {name: grid.packed() for name, grid in rounded_layers(source, 4, 32).items()}
    whole = write_quantized(tmp_path / "whole", source, packed.items(), "compressed-tensors")
    parts = write_quantized(tmp_path / "parts", source, packed.items(), "compressed-tensors", shard_bytes=shard_bytes)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(path.name for path in parts.glob("*.safetensors"))
    assert len(files) > 2
    with safe_open(whole / "model.safetensors", framework="pt") as wanted:
        assert set(index["weight_map"]) == set(wanted.keys())
        for name, file in index["weight_map"].items():
            with safe_open(parts / file, framework="pt") as shard:
                assert torch.equal(shard.get_tensor(name), wanted.get_tensor(name))


def test_layers_are_asked_for_one_by_one(source: Checkpoint, tmp_path: Path) -> None:
    """Memory is bounded by one layer: the next is made only once the one before is in the files."""
    written: list[str] = []
    names = layer_names(source)

    def one_by_one() -> Any:
        for place, name in enumerate(names):
            assert len(written) == place
            yield name, rounded(source.tensor(f"{name}.weight", torch.float32), 4, 32).packed()

    write_quantized(tmp_path / "out", source, one_by_one(), "gptq", wrote=lambda name, num_bytes: written.append(name))
    assert written == names


def test_what_fails_leaves_nothing_behind(source: Checkpoint, tmp_path: Path) -> None:
    def breaks() -> Any:
        yield LAYER, rounded(source.tensor(f"{LAYER}.weight", torch.float32), 4, 32).packed()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_quantized(tmp_path / "out", source, breaks(), "gptq")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="there already"):
        write_quantized(tmp_path / "out", source, [], "gptq")


def test_what_can_not_be_written_is_named(source: Checkpoint, tmp_path: Path) -> None:
    grid = rounded(source.tensor(f"{LAYER}.weight", torch.float32), 4, 32)
    packed = grid.packed()
    off = dict(packed.tensors) | {"mins": (0.4 - packed.tensors["mins"].float()) * packed.tensors["scales"]}
    narrow = {name: tensor[:12] for name, tensor in packed.tensors.items()}
    down = PackedWeight("linear_int4", packed.tensors, 64, 96)
    cases: list[tuple[str, str, PackedWeight, str]] = [
        ("gptk", LAYER, packed, "'gptk'.*Did you mean 'gptq'"),
        ("gptq", "model.layers.9.mlp.up_proj", packed, "layers.9.*no linear layer"),
        ("gptq", "model.embed_tokens", packed, "no linear layer"),
        ("gptq", "model.layers.1.mlp.up_proj", down, r"another shape.*\(64, 96\).*\(96, 64\)"),
        ("gptq", LAYER, PackedWeight("linear_int4", off, 64, 96), "whole multiple"),
        ("awq", LAYER, rounded(source.tensor(f"{LAYER}.weight", torch.float32), 3, 32).packed(), "have 4 bits.*3"),
        ("gptq", LAYER, PackedWeight("linear_fp8", {}, 64, 96), "linear_fp8"),
        ("compressed-tensors", LAYER, PackedWeight("linear_gguf", {}, 64, 96), "linear_gguf"),
        ("gptq", LAYER, PackedWeight("linear_int4", narrow, 64, 96), "outputs fill whole words.*12"),
    ]
    for format, name, weight, message in cases:
        with pytest.raises(ConfigError, match=message):
            write_quantized(tmp_path / "out", source, [(name, weight)], format)
    with pytest.raises(ConfigError, match="no layer was quantized"):
        write_quantized(tmp_path / "out", source, [], "gptq")
    with pytest.raises(ConfigError, match="given twice"):
        write_quantized(tmp_path / "out", source, [(LAYER, packed), (LAYER, packed)], "gptq")
    wide = dict(packed.tensors) | {"scales": packed.tensors["scales"].float() * 1e9}
    wide["mins"] = -8 * wide["scales"]
    with pytest.raises(ConfigError, match="does not fit float16"):
        write_quantized(tmp_path / "out", source, [(LAYER, PackedWeight("linear_int4", wide, 64, 96))], "gptq")
    assert list(tmp_path.iterdir()) == []


def test_a_tied_output_layer_that_is_packed_is_untied(tmp_path: Path) -> None:
    save_round_sizes(tmp_path / "tied", tie_word_embeddings=True)
    tied = open_folder(tmp_path / "tied")
    assert "lm_head.weight" not in tied
    head = rounded(tied.tensor("model.embed_tokens.weight", torch.float32), 4, 32)
    found = open_folder(write_quantized(tmp_path / "out", tied, [("lm_head", head.packed())], "compressed-tensors"))
    assert found.config["tie_word_embeddings"] is False
    assert torch.equal(found.tensor("lm_head.weight", torch.float32), head.weights())
    assert "model.embed_tokens.weight" in found


def test_changed_tensors_stand_in_place_of_the_source_s(source: Checkpoint, tmp_path: Path) -> None:
    changed: dict[str, torch.Tensor] = {}
    norm = "model.layers.0.input_layernorm.weight"

    def layers() -> Any:
        yield LAYER, rounded(source.tensor(f"{LAYER}.weight", torch.float32), 4, 32).packed()
        changed[norm] = source.tensor(norm, torch.float32) * 2

    found = open_folder(write_quantized(tmp_path / "out", source, layers(), "awq", changed=changed))
    assert torch.equal(found.tensor(norm, torch.float32), source.tensor(norm, torch.float32) * 2)


def test_notes_are_kept_in_the_configuration(source: Checkpoint, tmp_path: Path) -> None:
    layers = [(LAYER, rounded(source.tensor(f"{LAYER}.weight", torch.float32), 4, 32).packed())]
    folder = write_quantized(tmp_path / "out", source, layers, "gptq", notes={"meta": {"seed": 7}})
    assert config_of(folder)["meta"] == {"seed": 7}
    assert open_folder(folder).packed(f"{LAYER}.weight") is not None


Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


def without(part: str) -> Change:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        del tensors[f"{LAYER}.{part}"]

    return change


def cut(part: str) -> Change:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors[f"{LAYER}.{part}"] = tensors[f"{LAYER}.{part}"][:1].clone()

    return change


def group(**changes: Any) -> Change:
    """Other settings of the weights of the only group."""
    return lambda tensors, config: config["config_groups"]["group_0"]["weights"].update(changes)


def settings(**changes: Any) -> Change:
    return lambda tensors, config: config.update(changes)


def inputs_of_a_group(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    inputs = {"num_bits": 4, "type": "int", "strategy": "group", "dynamic": True, "symmetric": True}
    config["config_groups"]["group_0"]["input_activations"] = inputs


FAULTS: dict[str, tuple[Change, str]] = {
    "no-scales": (without("weight_scale"), rf"layer {LAYER} lacks its tensor {LAYER}\.weight_scale"),
    "no-zeros": (without("weight_zero_point"), rf"lacks its tensor {LAYER}\.weight_zero_point"),
    "no-shape": (without("weight_shape"), rf"lacks its tensor {LAYER}\.weight_shape"),
    "no-weight": (without("weight_packed"), rf"lacks its tensor {LAYER}\.weight_packed"),
    "short-scales": (cut("weight_scale"), rf"{LAYER}\.weight_scale has another shape.*\(1, 3\).*\(64, 3\)"),
    "short-zeros": (cut("weight_zero_point"), rf"{LAYER}\.weight_zero_point has another shape.*\(1, 3\).*\(8, 3\)"),
    "group": (group(group_size=48), r"weight_packed is no row of \d+ weights of 4 bits.*words"),
    "bits": (group(num_bits=9), r"config_groups\.group_0: weights of these bits.*found 9.*2 \.\. 8"),
    "type": (group(type="float"), r"group_0: weights of this type.*'float'"),
    "strategy": (group(strategy="block"), r"group_0: scales of this strategy.*'block'.*channel, group, tensor"),
    "activations": (inputs_of_a_group, r"group_0: activations in this form.*'num_bits': 4"),
    "format": (
        lambda tensors, config: config["config_groups"]["group_0"].update(format="nvfp4-pack-quantized"),
        r"group_0: this format is not known; found 'nvfp4-pack-quantized'.*pack-quantized",
    ),
    "no-groups": (settings(config_groups={}), "no usable config_groups"),
    "preset": (settings(config_groups={"W4A16": ["Linear"]}), r"config_groups\.W4A16 must be written out"),
    "no-target": (
        lambda tensors, config: config["config_groups"]["group_0"].update(targets=["re:.*experts.*"]),
        "names no group for layer .* which is stored quantized",
    ),
    "kv": (settings(kv_cache_scheme={"num_bits": 8}), "scales for keys and values.*quantizer.kv"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_compressed_tensors_are_found_on_opening(fault: str, source: Checkpoint, tmp_path: Path) -> None:
    grids = rounded_layers(source, 4, 32, symmetric=False)
    packed = ((name, grid.packed()) for name, grid in grids.items())
    folder = write_quantized(tmp_path / "out", source, packed, "compressed-tensors")
    change, message = FAULTS[fault]
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoaderError, match=message):
        open_folder(folder)
