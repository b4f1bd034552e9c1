"""Writing a quantized model as a folder that transformers, vLLM and this project open."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from drivetrain.contracts.loader import Checkpoint
from drivetrain.contracts.packed import PackedWeight
from drivetrain.errors import ConfigError, nearest
from drivetrain.plugins.quantizer.formats.awq import awq_tensors
from drivetrain.plugins.quantizer.formats.compressed_tensors import Scheme, compressed_tensors
from drivetrain.plugins.quantizer.formats.gptq import gptq_tensors
from drivetrain.plugins.quantizer.formats.grid import IntegerGrid
from drivetrain.plugins.quantizer.formats.shards import ShardWriter, write_text

FORMATS = ("compressed-tensors", "gptq", "awq")
SHARD_BYTES = 4 << 30

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_EMBEDDINGS, _HEAD = "model.embed_tokens", "lm_head"


@dataclass
class _Written:
    """What the configuration has to tell of the layers: each scheme with its layers, and the layers left as they are.

    tied: the files hold an output layer of its own although the model ties it to the embeddings.
    """

    schemes: dict[Scheme, list[str]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    unties: bool = False


class _Encoder:
    """One format's tensors of a layer, and its ``quantization_config``."""

    def __init__(self, format: str, zero_points: bool | None) -> None:
        self.format = format
        self.zero_points = zero_points
        self.version = "gptq_v2" if zero_points else "gptq"
        self.is_symmetric = self.is_in_order = True

    def tensors(self, name: str, packed: PackedWeight) -> tuple[dict[str, torch.Tensor], Scheme]:
        if self.format == "compressed-tensors":
            return compressed_tensors(name, packed, self.zero_points)
        grid = IntegerGrid.of(packed)
        tensors = awq_tensors(name, grid) if self.format == "awq" else gptq_tensors(name, grid, self.version)
        self.is_symmetric &= grid.is_symmetric
        self.is_in_order &= grid.order is None
        return tensors, Scheme(grid.bits, group=None if grid.group == packed.in_features else grid.group)

    def config(self, written: _Written) -> dict[str, Any]:
        if self.format == "compressed-tensors":
            return _compressed_config(written)
        scheme = max(written.schemes, key=lambda scheme: len(written.schemes[scheme]))
        common = {"bits": scheme.bits, "group_size": scheme.group or -1, "quant_method": self.format}
        if self.format == "awq":
            if len(written.schemes) > 1:
                raise ConfigError(
                    "the AWQ format has one group size for all layers",
                    found=sorted({found.group or -1 for found in written.schemes}),
                    hint="Use format gptq or compressed-tensors.",
                )
            return {**common, "version": "gemm", "zero_point": True, "modules_to_not_convert": written.left or None}
        others = {
            _pattern("+:", name): {"bits": other.bits, "group_size": other.group or -1}
            for other, names in written.schemes.items()
            if other != scheme
            for name in names
        }
        dynamic = {**{_pattern("-:", name): {} for name in written.left}, **others}
        return {
            **common,
            "desc_act": not self.is_in_order,
            "sym": self.is_symmetric,
            "lm_head": any(_HEAD in names for names in written.schemes.values()),
            "checkpoint_format": self.version,
            **({"dynamic": dynamic} if dynamic else {}),
        }


def _pattern(sign: str, name: str) -> str:
    return f"{sign}^{name.replace('.', chr(92) + '.')}$"


def _compressed_config(written: _Written) -> dict[str, Any]:
    groups = {}
    for place, (scheme, names) in enumerate(written.schemes.items()):
        targets = ["Linear"] if len(written.schemes) == 1 else names
        groups[f"group_{place}"] = {"targets": targets, **scheme.entry()}
    formats = {scheme.format for scheme in written.schemes}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": written.left,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def write_quantized(
    folder: Path,
    source: Checkpoint,
    packed: Iterable[tuple[str, PackedWeight]],
    format: str,
    *,
    dtype: torch.dtype | None = None,
    changed: Mapping[str, torch.Tensor] | None = None,
    zero_points: bool | None = None,
    notes: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    wrote: Callable[[str, int], None] = lambda name, num_bytes: None,
) -> Path:
    """Write a model whose layers are quantized, and return ``folder``, which must not be there yet.

    source:      configuration, tokenizer, and every tensor that is not replaced.
    packed:      layer name (``"model.layers.0.mlp.up_proj"``) and its packed weight, in any order; each is asked for
                 once the one before is written, so that never more than one is held.
    format:      one of ``FORMATS``.
    dtype:       of the tensors that are not quantized; by default that of the source's config.json, or float16.
    changed:     name -> tensor in place of the source's, where quantizing moved scales into it: norms, biases. It is
                 read once ``packed`` is at its end.
    zero_points: True where any layer may have zero points: all are then stored so. By default, layers of
                 compressed-tensors have them where they need them, and gptq is written in its first version, which
                 has no zero points of 0. awq always stores them.
    notes:       more keys of ``quantization_config``, which readers ignore: who made it, from what data.
    wrote:       told each layer with its bytes once it is in the files.

    Everything is written into a folder beside and renamed at the end: whoever is interrupted leaves no half model.
    Raises ConfigError for a weight that the format can't hold, or a layer that the source does not have.
    """
    if format not in FORMATS:
        close = nearest(format, FORMATS)
        raise ConfigError(
            "quantized models are not written in this format",
            found=format,
            allowed=FORMATS,
            hint=f"Did you mean {close!r}?" if close else None,
        )
    if folder.exists():
        raise ConfigError("the folder to write is there already", where=str(folder), hint="Remove it, or name another.")
    encoder, dtype = _Encoder(format, zero_points), dtype or _stored_dtype(source)
    with _replacing(folder) as partial:
        shards = ShardWriter(partial, shard_bytes)
        try:
            written = _write_layers(shards, source, packed, encoder, wrote)
            _write_rest(shards, source, written, changed or {}, dtype)
            shards.finish()
        finally:
            shards.close()
        quantization = {**encoder.config(written), **(notes or {})}
        _write_settings(partial, source, quantization, written.unties, dtype)
    return folder


def _stored_dtype(source: Checkpoint) -> torch.dtype:
    name = source.config.get("dtype") or source.config.get("torch_dtype")
    return _DTYPES.get(str(name), torch.float16)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder`` that takes its name if all goes well, and is removed if not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(folder)
        parent = os.open(folder.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def _write_layers(
    shards: ShardWriter,
    source: Checkpoint,
    packed: Iterable[tuple[str, PackedWeight]],
    encoder: _Encoder,
    wrote: Callable[[str, int], None],
) -> _Written:
    written, done = _Written(), set[str]()
    is_tied = f"{_HEAD}.weight" not in source and f"{_EMBEDDINGS}.weight" in source
    for name, weight in packed:
        known = f"{name}.weight" in source or (is_tied and name == _HEAD)
        if not known or name in done or name == _EMBEDDINGS:
            reason = "is given twice" if name in done else "is no linear layer of the model"
            raise ConfigError(f"layer {name} {reason}", where=str(source.path), found=name)
        shape = source.shape(f"{_EMBEDDINGS if is_tied and name == _HEAD else name}.weight")
        if shape != (weight.out_features, weight.in_features):
            raise ConfigError(
                f"the packed weight of layer {name} has another shape than the model's",
                where=str(source.path),
                found=(weight.out_features, weight.in_features),
                allowed=str(shape),
            )
        tensors, scheme = encoder.tensors(name, weight)
        for part, tensor in tensors.items():
            shards.add(f"{name}.{part}", tensor)
        done.add(name)
        written.schemes.setdefault(scheme, []).append(name)
        written.unties |= is_tied and name == _HEAD
        wrote(name, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    if not done:
        raise ConfigError("no layer was quantized, so there is nothing to write", where=str(source.path))
    return written


def _write_rest(
    shards: ShardWriter,
    source: Checkpoint,
    written: _Written,
    changed: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Every tensor whose place no packed weight takes."""
    replaced = {f"{name}.weight" for names in written.schemes.values() for name in names}
    for name in source.names():
        if name in replaced:
            continue
        shards.add(name, changed[name].to(dtype) if name in changed else source.tensor(name, dtype))
        layer, _, part = name.rpartition(".")
        if part == "weight" and len(source.shape(name)) == 2 and layer != _EMBEDDINGS:
            written.left.append(layer)
    if f"{_HEAD}.weight" not in replaced and f"{_HEAD}.weight" not in source:
        # Tied to the embeddings, it is a layer without a tensor of its own; readers must leave it alone too.
        written.left.append(_HEAD)


def _write_settings(
    folder: Path, source: Checkpoint, quantization: Mapping[str, Any], unties: bool, dtype: torch.dtype
) -> None:
    config = {key: value for key, value in source.config.items() if key != "torch_dtype"}
    config |= {"dtype": str(dtype).removeprefix("torch."), "quantization_config": dict(quantization)}
    if unties:
        config["tie_word_embeddings"] = False
    write_text(folder / "config.json", _json(config))
    if source.generation_config:
        write_text(folder / "generation_config.json", _json(source.generation_config))
    if source.path.is_dir() and (source.path / "tokenizer.json").is_file():
        for name in _TOKENIZER_FILES:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, folder / name)
        return
    tokenizer = source.tokenizer()
    write_text(folder / "tokenizer.json", tokenizer.backend.to_str(pretty=True))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special}
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    write_text(folder / "tokenizer_config.json", _json(settings))


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
