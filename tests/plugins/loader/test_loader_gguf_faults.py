"""A damaged GGUF file is refused when it is opened, with an error that names the file and what is wrong."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.errors import LoaderError, MissingTensorError, UnknownArchitectureError
from drivetrain.plugins.loader.gguf import GgufCheckpoint, GgufLoader

torch.set_num_threads(1)
HIDDEN = 256


def open_file(path: Path) -> GgufCheckpoint:
    return GgufLoader(GgufLoader.Config()).open(path)


def write(
    path: Path, *, arch: str = "llama", types: dict[str, gguf.GGMLQuantizationType] | None = None, **keys: Any
) -> Path:
    """A GGUF file with one layer's worth of metadata and a few tensors, some of them quantized."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in keys.items():
        writer.add_uint32(key, value)
    values = np.random.default_rng(0).standard_normal((8, HIDDEN), dtype=np.float32)
    writer.add_tensor("token_embd.weight", values)
    writer.add_tensor("output_norm.weight", values[0])
    for name, kind in (types or {}).items():
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_names_shapes_and_sizes_come_without_reading_data(tmp_path: Path) -> None:
    checkpoint = open_file(write(tmp_path / "a.gguf"))
    assert list(checkpoint.names()) == ["model.embed_tokens.weight", "model.norm.weight"]
    assert "model.norm.weight" in checkpoint
    assert "lm_head.weight" not in checkpoint
    assert checkpoint.shape("model.embed_tokens.weight") == (8, HIDDEN)
    assert checkpoint.stored_bytes() == 9 * HIDDEN * 4
    assert checkpoint.config["vocab_size"] == 8


def test_missing_tensor_is_named_with_the_nearest(tmp_path: Path) -> None:
    checkpoint = open_file(write(tmp_path / "a.gguf"))
    with pytest.raises(MissingTensorError, match=r"model\.norm\.wait.*model\.norm\.weight"):
        checkpoint.tensor("model.norm.wait", torch.float32)
    with pytest.raises(MissingTensorError):
        checkpoint.shape("lm_head.weight")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_storable_type_is_dequantized(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    quantization = gguf.GGMLQuantizationType[kind]
    path = write(tmp_path / "a.gguf", types={"blk.0.ffn_up.weight": quantization})
    tensor = open_file(path).tensor("model.layers.0.mlp.up_proj.weight", dtype)
    values = np.random.default_rng(0).standard_normal((8, HIDDEN), dtype=np.float32)
    wanted = gguf.dequantize(gguf.quantize(values, quantization), quantization)
    assert tensor.dtype == dtype
    torch.testing.assert_close(tensor, torch.from_numpy(wanted).to(dtype), rtol=0, atol=0)


def test_a_type_that_the_package_cannot_dequantize_is_found_on_opening(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add in (writer.add_block_count, writer.add_context_length, writer.add_head_count):
        add(1)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((2, 292), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LoaderError, match=r"embed_tokens.*Q8_K"):
        open_file(path)


def test_reading_never_changes_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    before = path.read_bytes()
    checkpoint = open_file(path)
    checkpoint.tensor("model.norm.weight", torch.float32).zero_()
    del checkpoint
    assert path.read_bytes() == before


def test_every_way_of_cutting_the_file_short_is_noticed(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 600, 7), len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(LoaderError, match=r"cut\.gguf"):
            open_file(cut)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 500), value=st.integers(0, 255))
def test_a_flipped_header_byte_never_escapes_as_a_foreign_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    whole = folder / "whole.gguf"
    if not whole.exists():
        write(whole)
    damaged = bytearray(whole.read_bytes())
    damaged[position] = value
    path = folder / "damaged.gguf"
    path.write_bytes(damaged)
    with contextlib.suppress(LoaderError, UnknownArchitectureError):
        open_file(path)


def test_wrong_magic_and_version_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGML" + bytes(60))
    with pytest.raises(LoaderError, match="no GGUF file"):
        open_file(path)
    path.write_bytes(b"GGUF" + struct.pack("<I", 9) + bytes(60))
    with pytest.raises(LoaderError, match="version"):
        open_file(path)
    path.write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(60))
    with pytest.raises(LoaderError, match="big-endian"):
        open_file(path)


def test_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UnknownArchitectureError, match=r"'mamba'.*llama.*qwen3"):
        open_file(write(tmp_path / "a.gguf", arch="mamba"))


def test_one_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoaderError, match="one of 3 parts"):
        open_file(write(tmp_path / "a.gguf", **{"split.count": 3}))


def test_missing_metadata_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LoaderError, match=r"llama\.embedding_length"):
        open_file(path)


def test_a_file_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(LoaderError, match="no tokenizer"):
        open_file(write(tmp_path / "a.gguf")).tokenizer()


def test_a_folder_must_hold_exactly_one(tmp_path: Path) -> None:
    loader = GgufLoader(GgufLoader.Config())
    assert not GgufLoader.recognizes(tmp_path)
    write(tmp_path / "a.gguf")
    assert GgufLoader.recognizes(tmp_path)
    assert loader.open(tmp_path).path == tmp_path / "a.gguf"
    write(tmp_path / "b.gguf")
    with pytest.raises(LoaderError, match=r"exactly one.*a\.gguf.*b\.gguf"):
        loader.open(tmp_path)


def test_recognizes_by_first_bytes_or_name(tmp_path: Path) -> None:
    renamed = write(tmp_path / "weights")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"nothing")
    other = tmp_path / "notes.txt"
    other.write_text("hello")
    assert GgufLoader.recognizes(renamed)
    assert GgufLoader.recognizes(damaged)
    assert not GgufLoader.recognizes(other)
    assert not GgufLoader.recognizes(tmp_path / "absent")
