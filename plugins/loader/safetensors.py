"""Checkpoints as Hugging Face lays them out: config.json, safetensors weights (sharded or not), tokenizer.json."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain.contracts.loader import FULL_BITS, Checkpoint, Loader, TokenizerData
from drivetrain.errors import LoaderError, MissingTensorError, nearest

if TYPE_CHECKING:
    import torch

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000
_PLAIN_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_ITEM_BYTES = {**_PLAIN_DTYPES, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}
_SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: its file, its safetensors dtype, its shape and its size in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


class SafetensorsCheckpoint(Checkpoint):
    """An opened folder. Every header is read and checked on construction; data is mapped when a tensor is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        self.generation_config = read_json(path / "generation_config.json", optional=True)
        self._tensors = _read_all_headers(path)
        self._handles: dict[Path, Any] = {}

    @property
    def headers(self) -> Mapping[str, StoredTensor]:
        """Where each tensor lies, by name."""
        return self._tensors

    def names(self) -> Sequence[str]:
        return tuple(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored(name).shape

    def stored_bytes(self) -> int:
        return sum(stored.num_bytes for stored in self._tensors.values())

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        stored = self._stored(name)
        if stored.dtype not in _PLAIN_DTYPES:
            raise LoaderError(
                f"tensor {name!r} has a type that means nothing without its scales",
                where=str(stored.file),
                found=stored.dtype,
                allowed=_PLAIN_DTYPES,
                hint="Use the unquantized checkpoint of this model, or a GGUF file",
            )
        return self.stored(name).to(dtype)

    def stored(self, name: str) -> torch.Tensor:
        """One tensor in the type in which it is stored; it may share memory with the mapped file."""
        tensor: torch.Tensor = self._handle(self._stored(name).file).get_tensor(name)
        return tensor

    def stored_bits(self, name: str) -> float | None:
        stored = self._stored(name)
        bits = 8 * stored.num_bytes / max(1, math.prod(stored.shape))
        return bits if bits < FULL_BITS else None

    def tokenizer(self) -> TokenizerData:
        return read_tokenizer(self.path)

    def _stored(self, name: str) -> StoredTensor:
        stored = self._tensors.get(name)
        if stored is None:
            close = nearest(name, self._tensors)
            raise MissingTensorError(
                f"the files hold no tensor {name!r}",
                where=str(self.path),
                hint=f"The nearest name is {close!r}" if close else None,
            )
        return stored

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            from safetensors import SafetensorError, safe_open

            try:
                self._handles[file] = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise LoaderError(
                    f"the file's header is damaged: {error}", where=str(file), hint="Fetch it again"
                ) from error
        return self._handles[file]


class SafetensorsLoader(Loader):
    """Reads config.json, model.safetensors (or its shards) and tokenizer.json from a folder."""

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        if not path.is_dir():
            return False
        names = [entry.name for entry in path.iterdir()]
        if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
            return True
        # Claimed so that `open` can say why it is refused, rather than no one knowing the folder.
        return _pickles(names) and not any(name.endswith(".gguf") for name in names)

    def open(self, path: Path) -> Checkpoint:
        files = SafetensorsCheckpoint(path)
        if files.config.get("quantization_config") is None:
            return files
        from drivetrain.plugins.loader.quantized import QuantizedCheckpoint

        return QuantizedCheckpoint(files)


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file; empty when the file may be absent and is. Raises LoaderError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if optional:
            return {}
        raise LoaderError(f"the checkpoint has no {path.name}", where=str(path.parent)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise LoaderError(f"the file's header is damaged: {error}", where=str(path)) from error
    try:
        value = json.loads(text)
    except ValueError as error:
        raise LoaderError(f"the file is not valid JSON: {error}", where=str(path), hint="Fetch it again") from error
    if not isinstance(value, dict):
        raise LoaderError("the file must hold a JSON object", where=str(path), found=type(value).__name__)
    return value


def _pickles(names: Sequence[str]) -> bool:
    return any(name.endswith((".bin", ".pt", ".pth")) for name in names)


def _read_all_headers(folder: Path) -> dict[str, StoredTensor]:
    if (folder / _INDEX).is_file():
        return _read_sharded(folder)
    if (folder / _WEIGHTS).is_file():
        return read_header(folder / _WEIGHTS)
    names = sorted(entry.name for entry in folder.iterdir())
    if _pickles(names):
        raise LoaderError(
            "the weights are in pickle files, which can run any code when they are opened; they are not read",
            where=str(folder),
            found=[name for name in names if _pickles([name])],
            hint="Look for a safetensors version of this model, or convert it where you trust the files",
        )
    raise LoaderError(
        f"the folder holds neither {_WEIGHTS} nor {_INDEX}",
        where=str(folder),
        found=[name for name in names if name.endswith(".safetensors")],
        hint="A full checkpoint is needed; adapters and single shards are not models by themselves",
    )


def _read_sharded(folder: Path) -> dict[str, StoredTensor]:
    index_path = folder / _INDEX
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoaderError("the index has no weight_map", where=str(index_path))
    shards: dict[str, dict[str, StoredTensor]] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise LoaderError("the index names a file outside of its folder", where=str(index_path), found=file)
        if not (folder / file).is_file():
            raise LoaderError(
                f"the index names the shard {file}, which is not there", where=str(index_path), hint="Fetch it again"
            )
        shards[file] = read_header(folder / file)
    absent = [name for name, file in weight_map.items() if name not in shards[file]]
    if absent:
        raise MissingTensorError(
            f"the index names {len(absent)} tensors that are not in their shard, the first being {absent[0]!r} in"
            f" {weight_map[absent[0]]}",
            where=str(index_path),
            hint="The files are of different versions; fetch them again",
        )
    return {name: shards[file][name] for name, file in weight_map.items()}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file, checked against the file's size.

    The format: 8 bytes of header length (little endian), a JSON header, then the data that its offsets refer to
    (https://github.com/huggingface/safetensors, "Format"). Raises LoaderError.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
        if length is None or not 2 <= length <= _MAX_HEADER_BYTES:
            raise LoaderError(
                "this is no safetensors file: its header length makes no sense", where=str(path), found=length
            )
        if 8 + length > size:
            raise _cut_short(path, size, 8 + length)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: _stored_tensor(path, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoaderError(
            f"the safetensors header is damaged: {error}", where=str(path), hint="Fetch it again"
        ) from error
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < expected:
        raise _cut_short(path, size, expected)
    if size > expected:
        raise LoaderError(
            f"the file is longer than its header says ({size} bytes, expected {expected})",
            where=str(path),
            hint="Fetch it again",
        )
    return tensors


def _stored_tensor(path: Path, entry: Mapping[str, Any]) -> StoredTensor:
    begin, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    dtype = str(entry["dtype"])
    if not 0 <= begin <= end or min(shape, default=0) < 0:
        raise ValueError(f"offsets {begin}..{end} and shape {shape} make no sense")
    if dtype in _ITEM_BYTES and math.prod(shape) * _ITEM_BYTES[dtype] != end - begin:
        raise ValueError(f"a {dtype} tensor of shape {shape} does not take {end - begin} bytes")
    return StoredTensor(path, dtype, shape, end - begin)


def _cut_short(path: Path, size: int, expected: int) -> LoaderError:
    return LoaderError(
        f"the file is cut short: it has {size} bytes where its header needs {expected}",
        where=str(path),
        hint="Fetch it again",
    )


def read_tokenizer(folder: Path) -> TokenizerData:
    """tokenizer.json with the special tokens and the chat template of the files beside it. Raises LoaderError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        others = [name for name in ("tokenizer.model", "vocab.json", "spiece.model") if (folder / name).is_file()]
        raise LoaderError(
            "the checkpoint has no tokenizer.json",
            where=str(folder),
            found=others or None,
            hint="Write one with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        )
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for every fault in the file
        raise LoaderError(f"the tokenizer can't be read: {error}", where=str(path), hint="Fetch it again") from error
    # Both are settings of a training script that were saved along; a server must see the whole text, unpadded.
    backend.no_truncation()
    backend.no_padding()
    files = _TokenizerFiles(folder)
    return TokenizerData(backend, files.chat_template, files.special)


class _TokenizerFiles:
    """The small files beside tokenizer.json, in the forms that they took over the years."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "tokenizer_config.json", optional=True)

    @cached_property
    def special(self) -> dict[str, str]:
        older = read_json(self.folder / "special_tokens_map.json", optional=True)
        found: dict[str, str] = {}
        for role in _SPECIAL_ROLES:
            value = self.config.get(role) or older.get(role)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and text:
                found[role] = text
        return found

    @cached_property
    def chat_template(self) -> str | None:
        jinja = self.folder / "chat_template.jinja"
        if jinja.is_file():
            return jinja.read_text(encoding="utf-8")
        separate = read_json(self.folder / "chat_template.json", optional=True).get("chat_template")
        template = separate or self.config.get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None
