"""Models that are quantized here run in transformers, and models that the compressed-tensors library made run here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from drivetrain import LLM
from drivetrain.contracts.loader import Checkpoint
from drivetrain.contracts.packed import PackedWeight
from drivetrain.contracts.quantizer import Quantizer
from drivetrain.errors import ConfigError
from drivetrain.packed import PackedLinear
from drivetrain.plugins.quantizer.formats import write_quantized
from drivetrain.plugins.quantizer.fp8 import Fp8Quantizer
from drivetrain.plugins.quantizer.int8 import Int8Quantizer
from drivetrain.plugins.quantizer.w8a8 import W8A8Quantizer
from support.quantized_models import (
    PROMPTS,
    continued,
    generated,
    layer_names,
    open_folder,
    rounded_layers,
    save_round_sizes,
)

compressed_tensors = pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("full")
    save_round_sizes(folder)
    return open_folder(folder)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The libraries warn of their own ways of being called."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def loaded(folder: Path, *, dequantize: bool = False) -> Any:
    """The model in transformers, which reads the folder with the compressed-tensors library."""
    options = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def quantizer_of(report: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in report["selections"] if one["kind"] == "quantizer")
    return found


def converted(source: Checkpoint, quantizer: Quantizer) -> Iterator[tuple[str, PackedWeight]]:
    for name in layer_names(source):
        weight = source.tensor(f"{name}.weight", torch.float32)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight)
        module = quantizer.convert(name, linear)
        assert isinstance(module, PackedLinear)
        yield name, module.packed


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 32, True), (4, 32, False), (3, 32, False), (8, None, True), (8, 32, True)]
)
def test_a_model_quantized_here_gives_its_tokens_in_transformers(
    bits: int, group: int | None, symmetric: bool, source: Checkpoint, tmp_path: Path
) -> None:
    grids = rounded_layers(source, bits, group, symmetric=symmetric)
    folder = write_quantized(
        tmp_path / "out", source, ((name, grid.packed()) for name, grid in grids.items()), "compressed-tensors"
    )
    # With zero points, transformers reads the files only when it may dequantize them while loading.
    theirs = loaded(folder, dequantize=not symmetric)
    wanted = continued(theirs)
    found, report = generated(folder)
    assert quantizer_of(report)["chosen"]["name"] == "compressed-tensors"
    assert "the files' order of preference (compressed-tensors, none)" in quantizer_of(report)["reason"]
    assert {row["quantizer"] for row in report["weights"]["rows"]} == {"compressed-tensors", "none"}
    assert found == wanted
    for name, grid in grids.items():
        assert torch.equal(theirs.get_submodule(name).weight, grid.weights()), name


@pytest.mark.parametrize(
    "options", [{}, {"activations": "dynamic"}, {"activations": "static", "activation_range": 8.0}], ids=str
)
def test_float8_made_here_gives_its_tokens_in_transformers(
    options: dict[str, Any], source: Checkpoint, tmp_path: Path
) -> None:
    quantizer = Fp8Quantizer(Fp8Quantizer.Config(**options))
    folder = write_quantized(tmp_path / "out", source, converted(source, quantizer), "compressed-tensors")
    found, report = generated(folder)
    assert quantizer_of(report)["chosen"]["name"] == "compressed-tensors"
    assert found == continued(loaded(folder))


@torch.inference_mode()
def test_w8a8_made_here_has_its_weights_and_nearly_its_scores_in_transformers(
    source: Checkpoint, tmp_path: Path
) -> None:
    """The library rounds activations to 127.5 steps, vLLM and this project to 127: scores are close, not the same."""
    quantizer = W8A8Quantizer(W8A8Quantizer.Config())
    folder = write_quantized(tmp_path / "out", source, converted(source, quantizer), "compressed-tensors")
    theirs = loaded(folder)
    ids = torch.tensor([PROMPTS[1]])
    rounded = theirs(ids, use_cache=False).logits
    packed = {f"{name}.weight": open_folder(folder).packed(f"{name}.weight") for name in layer_names(source)}
    assert {weight.operation for weight in packed.values() if weight is not None} == {"linear_w8a8"}
    for name in layer_names(source):
        wanted = open_folder(folder).tensor(f"{name}.weight", torch.float32)
        assert torch.equal(theirs.get_submodule(name).weight, wanted), name
        assert theirs.get_submodule(name).quantization_scheme.input_activations.dynamic is True
    found, _ = generated(folder)
    first = [continued_once(theirs, prompt) for prompt in PROMPTS]
    assert [tokens[0] for tokens in found] == first
    assert torch.isfinite(rounded).all()


def spoiled(folder: Path, part: str) -> None:
    """Write a NaN over the first two numbers of one layer's ``part``."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.1.mlp.up_proj.{part}"
    numbers = tensors[name].float()
    numbers.view(-1)[:2] = float("nan")
    tensors[name] = numbers.to(tensors[name].dtype)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("quantizer", "part"),
    [
        (Int8Quantizer(Int8Quantizer.Config()), "weight_scale"),
        (Fp8Quantizer(Fp8Quantizer.Config()), "weight_scale"),
        (Fp8Quantizer(Fp8Quantizer.Config()), "weight"),
    ],
    ids=["int8-scale", "float8-scale", "float8-weight"],
)
def test_numbers_that_are_none_are_told_with_their_layer(
    quantizer: Quantizer, part: str, source: Checkpoint, tmp_path: Path
) -> None:
    """A float8 weight can itself be a NaN, an integer can't."""
    folder = write_quantized(tmp_path / "out", source, converted(source, quantizer), "compressed-tensors")
    spoiled(folder, part)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj: 2 of the \d+ scales and minima .* are NaN"):
        LLM(folder, engine={"max_model_len": 96}, platform={"name": "cpu", "threads": 1})


def continued_once(model: Any, prompt: list[int]) -> int:
    return int(model(torch.tensor([prompt]), use_cache=False).logits[0, -1].argmax())


# --- made by the library -------------------------------------------------------------------------------------------


def made_by_the_library(folder: Path, scheme: dict[str, Any], format: str) -> Path:
    """A model that the library compressed, with scales by its own rule, in the folder that it writes."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = save_round_sizes(folder / "full")
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format=format)
    apply_quantization_config(model, config)
    for module in model.modules():
        args = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if args is None:
            continue
        groups = module.weight.detach().unflatten(1, (-1, args.group_size or module.weight.shape[1]))
        scales, zeros = calculate_qparams(groups.amin(2), groups.amax(2), args)
        module.weight_scale.data.copy_(scales)
        if getattr(module, "weight_zero_point", None) is not None:
            module.weight_zero_point.data.copy_(zeros)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    out = folder / "library"
    model.save_pretrained(out)
    compressor.update_config(str(out))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((folder / "full" / name).read_bytes())
    return out


def weights(bits: int, group: int | None, **more: Any) -> dict[str, Any]:
    strategy = "channel" if group is None else "group"
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": group, **more}


TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
MADE = {
    "w4a16": ({"weights": weights(4, 32)}, "pack-quantized", "linear_int4"),
    "w4a16-channel": ({"weights": weights(4, None)}, "pack-quantized", "linear_int4"),
    "w4a16-asym": ({"weights": weights(4, 32, symmetric=False)}, "pack-quantized", "linear_int4"),
    "w3a16-asym": ({"weights": weights(3, 32, symmetric=False)}, "pack-quantized", "linear_int3"),
    "w8a16-channel": ({"weights": weights(8, None)}, "pack-quantized", "linear_int8"),
    "w8a8": ({"weights": weights(8, None), "input_activations": TOKENS}, "int-quantized", "linear_w8a8"),
    "fp8": (
        {"weights": weights(8, None, type="float"), "input_activations": {**TOKENS, "type": "float"}},
        "float-quantized",
        "linear_fp8a8",
    ),
    "fp8-weights": ({"weights": weights(8, None, type="float")}, "naive-quantized", "linear_fp8"),
}


@pytest.mark.parametrize("case", MADE)
def test_a_model_that_the_library_made_is_used_packed(case: str, tmp_path: Path) -> None:
    scheme, format, operation = MADE[case]
    folder = made_by_the_library(tmp_path, {"targets": ["Linear"], **scheme}, format)
    checkpoint = open_folder(folder)
    assert checkpoint.packed_by == "compressed-tensors"
    names = layer_names(checkpoint)
    assert len(names) == 14
    theirs = loaded(folder, dequantize="asym" in case)
    wanted = continued(theirs)  # the first forward decompresses
    for name in names:
        packed = checkpoint.packed(f"{name}.weight")
        assert packed is not None
        assert packed.operation == operation
        assert torch.equal(checkpoint.tensor(f"{name}.weight", torch.float32), theirs.get_submodule(name).weight), name
    found, report = generated(folder)
    assert quantizer_of(report)["chosen"]["name"] == "compressed-tensors"
    if operation != "linear_w8a8":
        assert found == wanted
    if "input_activations" not in scheme:
        dequantized, report = generated(folder, quantizer="none")
        assert quantizer_of(report)["chosen"]["name"] == "none"
        assert found == dequantized
