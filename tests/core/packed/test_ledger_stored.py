"""The ledger of layers that the files hold packed: counted from their headers, and a peak that loading keeps to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import LLM
from drivetrain.assembly import build_model, resolve_parts, weigh_model
from drivetrain.config import load_settings
from drivetrain.contracts.loader import Checkpoint
from drivetrain.packed.ledger import model_bytes
from drivetrain.plugins.loader.quantized import QuantizedCheckpoint
from drivetrain.plugins.loader.safetensors import SafetensorsCheckpoint
from drivetrain.plugins.quantizer.formats import IntegerGrid, write_quantized
from drivetrain.testing.measure import Allocations
from support.allocations import LiveBytes
from support.quantized_models import open_folder, rounded_layers, save_round_sizes

SMALL = {"g_idx", "weight_g_idx", "weight_shape", "input_scale"}
GRIDS = {"scales", "qzeros", "weight_scale", "weight_zero_point"}

WIDE = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 2, "vocab_size": 512}
"""Large enough for layers to be most of what is held, and to be read in several goes."""

FORMATS = [
    pytest.param("gptq", 4, False, id="gptq"),
    pytest.param("gptq", 4, True, id="gptq in an order of its own"),
    pytest.param("gptq", 3, False, id="gptq of 3 bits"),
    pytest.param("gptq", 8, False, id="gptq of 8 bits"),
    pytest.param("awq", 4, False, id="awq"),
    pytest.param("compressed-tensors", 4, False, id="compressed-tensors"),
    pytest.param("compressed-tensors", 8, False, id="compressed-tensors of 8 bits"),
]


def save_stored(folder: Path, format: str, bits: int, is_ordered: bool, **sizes: Any) -> Path:
    save_round_sizes(folder / "full", **sizes)
    source = open_folder(folder / "full")
    grids = rounded_layers(source, bits, 32, symmetric=bits == 8)
    if is_ordered:
        for name, grid in grids.items():
            order = torch.randperm(grid.values_OI.shape[1], generator=torch.Generator().manual_seed(0))
            grids[name] = IntegerGrid(bits, grid.values_OI, grid.scales_ON, grid.zeros_ON.clamp_min(1), order)
    zero_points = True if format == "gptq" and bits < 8 else None
    packed = ((name, grid.packed()) for name, grid in grids.items())
    return write_quantized(folder / "packed", source, packed, format, zero_points=zero_points)


def parts_of(folder: Path, **more: Any) -> Any:
    chosen = {"model": str(folder), "precision": "fp32", "platform": {"name": "cpu", "threads": 1}, **more}
    return resolve_parts(load_settings(None, chosen), leave_out=("frontend",))


@pytest.mark.parametrize(("format", "bits", "is_ordered"), FORMATS)
def test_what_stored_layers_take_is_counted_from_their_headers(
    format: str, bits: int, is_ordered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, and no weight is read for it: of 8 bits, what decides whether an operation takes them."""
    folder = save_stored(tmp_path, format, bits, is_ordered)
    parts = parts_of(folder)
    read: list[str] = []
    stored = SafetensorsCheckpoint.stored

    def noted(files: SafetensorsCheckpoint, name: str) -> torch.Tensor:
        read.append(name.rpartition(".")[2])
        return stored(files, name)

    monkeypatch.setattr(SafetensorsCheckpoint, "stored", noted)
    with Allocations() as allocations:
        foreseen = weigh_model(parts, parts.quantizer)
    assert set(read) <= SMALL | (GRIDS if bits == 8 else set())
    assert allocations.largest_bytes < foreseen.total_bytes / 4, "something large was made"
    with LLM(folder, precision="fp32", platform={"name": "cpu", "threads": 1}, engine={"max_model_len": 96}) as llm:
        ledger = llm._stack.binder.ledger
        assert ledger == foreseen
        assert {row.quantizer for row in ledger.rows} >= {format}
        if not llm._stack.selection_dict()["fusion"]:  # fusing makes tensors of its own
            assert model_bytes(llm._stack.engine.runner.model) == foreseen.total_bytes  # type: ignore[arg-type]


@pytest.mark.parametrize(("format", "bits", "is_ordered"), FORMATS)
@pytest.mark.parametrize("dequantizes", [False, True])
def test_the_peak_of_loading_stored_layers_is_kept_and_not_far_off(
    format: str, bits: int, is_ordered: bool, dequantizes: bool, tmp_path: Path
) -> None:
    """All that torch makes and holds while the model is built; stored layers are read one by one, never in full."""
    folder = save_stored(tmp_path, format, bits, is_ordered, **WIDE)
    engine = {"fuse": False, "max_model_len": 96}  # fusing runs the model
    parts = parts_of(folder, kernels="reference", engine=engine, **({"quantizer": "none"} if dequantizes else {}))
    foreseen = weigh_model(parts, parts.quantizer)
    parts.checkpoint.tensor(
        "model.norm.weight", torch.float32
    )  # mapping the file counts as made where it is first read
    with LiveBytes() as live:
        model, _ = build_model(parts, parts.kernels, parts.quantizer)
    assert model_bytes(model) == foreseen.total_bytes  # type: ignore[arg-type]
    assert live.most <= foreseen.peak_bytes
    # Views of the mapped files take nothing of torch's, and count as held: a third of the bytes of some formats.
    assert foreseen.peak_bytes <= 1.6 * live.most


def test_a_checkpoint_of_its_own_needs_no_forms(tmp_path: Path) -> None:
    """One that was written before there were forms is counted by what it hands out."""
    files: Any = open_folder(save_stored(tmp_path, "gptq", 4, False))
    assert isinstance(files, QuantizedCheckpoint)
    name = "model.layers.0.mlp.down_proj.weight"
    older: Callable[..., Any] = Checkpoint.packed_form
    theirs, ours = older(files, name), files.packed_form(name)
    assert ours.num_bytes == theirs.num_bytes == files.packed(name).num_bytes
    assert {key: (t.shape, t.dtype, t.device.type) for key, t in ours.tensors.items()} == {
        key: (t.shape, t.dtype, "meta") for key, t in theirs.tensors.items()
    }
    assert Checkpoint.repacking_bytes(files, name) > files.repacking_bytes(name) - 2**23
    assert files.packed_form("model.norm.weight") is None
