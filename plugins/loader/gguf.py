"""GGUF files: weights, configuration, tokenizer and chat template in one file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from drivetrain.contracts.loader import FULL_BITS, Checkpoint, Loader, TokenizerData
from drivetrain.errors import LoaderError, MissingTensorError, nearest
from drivetrain.plugins.loader.gguf_config import find_architecture, read_config, read_generation_config
from drivetrain.plugins.loader.gguf_file import MAGIC, GgufFile, GgufTensor
from drivetrain.plugins.loader.gguf_names import Undo, hf_name, is_weight, undo
from drivetrain.plugins.loader.gguf_tokenizer import read_tokenizer

if TYPE_CHECKING:
    import torch
    from gguf import GGMLQuantizationType

    from drivetrain.contracts.packed import PackedWeight

_BYTES_OF_LONG_ROW = 8192
"""Measured with smollm2-135m in Q4_1: 0.39 s from here on, 0.53 s with the file's own rows of 360 bytes."""


class GgufCheckpoint(Checkpoint):
    """An opened GGUF file. Each tensor is dequantized when it is asked for, or handed out as it is packed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GgufFile(path)
        self._refuse_split()
        architecture = find_architecture(self._file)
        self.config = read_config(self._file, architecture)
        self.generation_config = read_generation_config(self._file, self.config)
        self._tensors: dict[str, tuple[GgufTensor, Undo]] = {}
        unknown = []
        for gguf_name, stored in self._file.tensors.items():
            if not is_weight(gguf_name):
                continue
            mapped = hf_name(architecture, gguf_name)
            if mapped is None:
                unknown.append(gguf_name)
            else:
                self._tensors[mapped[0]] = (stored, mapped[1])
        if unknown:
            raise LoaderError(
                f"the file holds {len(unknown)} tensors that a {architecture.hf_class} does not have",
                where=str(path),
                found=unknown[:8],
                hint="It may be a variant of the architecture; use the model's safetensors version",
            )
        self._check_types()
        if any(self._block_type(name) is not None for name in self._tensors):
            self.packed_by, self.packs_exactly = "gguf", True

    def names(self) -> Sequence[str]:
        return tuple(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored(name)[0].shape

    def stored_bytes(self) -> int:
        return sum(stored.num_bytes for stored, _ in self._tensors.values())

    def stored_bits(self, name: str) -> float | None:
        stored, _ = self._stored(name)
        bits = 8 * stored.num_bytes / max(1, math.prod(stored.shape))
        return bits if bits < FULL_BITS else None

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        import torch

        stored, step = self._stored(name)
        values = _dequantize(self._file.data(stored), stored.type).reshape(stored.shape)
        values = undo(values, step, *self._heads)
        return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)

    def packed(self, name: str) -> PackedWeight | None:
        """The tensor's blocks, as a view of the mapped file; a copy where the rows of heads go back to their order."""
        import torch

        from drivetrain.contracts.packed import PackedWeight

        stored, step = self._stored(name)
        kind = self._block_type(name)
        if kind is None:
            return None
        blocks = undo(self._file.data(stored), step, *self._heads)
        rows, inputs = stored.shape
        return PackedWeight("linear_gguf", {"blocks": torch.from_numpy(blocks)}, rows, inputs, {"type": kind})

    def packed_form(self, name: str) -> PackedWeight | None:
        import torch

        from drivetrain.contracts.packed import PackedWeight
        from drivetrain.packed.gguf import BLOCK_TYPES

        shape, kind = self.shape(name), self._block_type(name)
        if kind is None:
            return None
        rows, inputs = shape
        blocks = torch.empty(rows, BLOCK_TYPES[kind].row_bytes(inputs), dtype=torch.uint8, device="meta")
        return PackedWeight("linear_gguf", {"blocks": blocks}, rows, inputs, {"type": kind})

    def repacking_bytes(self, name: str) -> int:
        return 0

    def tokenizer(self) -> TokenizerData:
        return read_tokenizer(self._file.metadata, self.path)

    @property
    def _heads(self) -> tuple[int, int]:
        return self.config["num_attention_heads"], self.config["num_key_value_heads"]

    def _block_type(self, name: str) -> int | None:
        """ggml's number of a tensor's type, where it is a matrix of blocks that an operation multiplies by."""
        from drivetrain.packed.gguf import BLOCK_TYPES

        stored, step = self._tensors[name]
        is_matrix = len(stored.shape) == 2 and step is not Undo.NORM_PLUS_ONE
        return int(stored.type) if is_matrix and int(stored.type) in BLOCK_TYPES else None

    def _stored(self, name: str) -> tuple[GgufTensor, Undo]:
        found = self._tensors.get(name)
        if found is None:
            close = nearest(name, self._tensors)
            raise MissingTensorError(
                f"the file holds no tensor {name!r}",
                where=str(self.path),
                hint=f"The nearest name is {close!r}" if close else None,
            )
        return found

    def _refuse_split(self) -> None:
        count = self._file.metadata.get("split.count", 1)
        if isinstance(count, int) and count > 1:
            raise LoaderError(
                f"this is one of {count} parts of a split GGUF file",
                where=str(self.path),
                hint="Join them with llama.cpp's `llama-gguf-split --merge`, or use a file that is not split",
            )

    def _check_types(self) -> None:
        """Try one block of each type that the file uses, so that an unreadable one is found now and not mid-way."""
        from gguf import GGML_QUANT_SIZES

        seen: dict[GGMLQuantizationType, str] = {}
        for name, (stored, _) in self._tensors.items():
            seen.setdefault(stored.type, name)
        for kind, name in seen.items():
            try:
                _dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError as error:
                raise LoaderError(
                    f"tensor {name!r} is stored as {kind.name}, which the gguf package can't dequantize",
                    where=str(self.path),
                    hint="Run: pip install --upgrade gguf",
                ) from error


class GgufLoader(Loader):
    """Reads a .gguf file, or the only one in a folder."""

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        if path.is_dir():
            files = sorted(path.glob("*.gguf"))
            return bool(files) and not any(path.glob("*.safetensors"))
        if not path.is_file():
            return False
        with path.open("rb") as file:
            # A damaged file with the right name is claimed too, so that `open` can say what is wrong with it.
            return file.read(len(MAGIC)) == MAGIC or path.suffix == ".gguf"

    def open(self, path: Path) -> GgufCheckpoint:
        if path.is_dir():
            files = sorted(path.glob("*.gguf"))
            if len(files) != 1:
                raise LoaderError(
                    "the folder must hold exactly one GGUF file",
                    where=str(path),
                    found=[file.name for file in files],
                    hint="Name the file itself as the model",
                )
            path = files[0]
        return GgufCheckpoint(path)


def _dequantize(data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Blocks of one type ([rows, bytes of a row] uint8) as float32 [rows, columns]."""
    from gguf import GGMLQuantizationType, dequantize

    if kind == GGMLQuantizationType.F64:
        return data.view("<f8").astype(np.float32)
    # Unused lanes of a block may overflow float16 on the way; numpy would mention it.
    with np.errstate(all="ignore"):
        values: np.ndarray = dequantize(_in_long_rows(data), kind)
    return values.reshape(*data.shape[:-1], -1)


def _in_long_rows(data: np.ndarray) -> np.ndarray:
    """The same blocks as fewer, longer rows. The gguf package works on 16 rows at a time, which for a small model are
    too few to outweigh its Python: a quarter of the time goes."""
    rows, width = math.prod(data.shape[:-1]), data.shape[-1]
    together = 1
    while rows % (2 * together) == 0 and 2 * together * width <= _BYTES_OF_LONG_ROW:
        together *= 2
    return data.reshape(rows // together, together * width)
