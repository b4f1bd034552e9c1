"""The trained model as a folder that servers and transformers load as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.errors import TrainingError
from drivetrain.training.state import model_state

if TYPE_CHECKING:
    from drivetrain.contracts.loader import Checkpoint, TokenizerData
    from drivetrain.training.ranks import Ranks

SHARD_BYTES = 5 * 10**9
"""Most bytes of one file of weights, as on the hub."""


def export_model(folder: Path, model: torch.nn.Module, checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Write weights, configuration and tokenizer to ``folder``, in place of what is there; by all ranks together.

    What another program reads meanwhile is the old folder or the new one, whole. Raises TrainingError.
    """
    whole = _whole_tensors(model)
    if not ranks.is_first:
        for _ in whole:
            pass  # a tensor that is shared out is gathered by all ranks
        ranks.together("writing the model", lambda: None)
        return
    ranks.together("writing the model", lambda: _write_folder(folder, whole, checkpoint))


def _whole_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    from torch.distributed.tensor import DTensor

    for name, tensor in model_state(model).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        yield name.removeprefix("model."), whole.detach().cpu()


def _write_folder(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], checkpoint: Checkpoint) -> None:
    unfinished = folder.with_name(f".{folder.name}-unfinished")
    replaced = folder.with_name(f".{folder.name}-replaced")
    try:
        for leftover in (unfinished, replaced):
            if leftover.exists():
                shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)
        dtype = _write_weights(unfinished, tensors)
        _write_json(unfinished / "config.json", {**checkpoint.config, "dtype": dtype, "torch_dtype": dtype})
        if checkpoint.generation_config:
            _write_json(unfinished / "generation_config.json", checkpoint.generation_config)
        _write_tokenizer(unfinished, checkpoint.tokenizer())
        if folder.exists():
            folder.rename(replaced)
        unfinished.rename(folder)
        if replaced.exists():
            shutil.rmtree(replaced)
    except OSError as error:
        raise TrainingError(f"the model can't be written: {error.strerror or error}", where=str(folder)) from error


def _write_weights(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> str:
    """Files of weights, with an index where there are several. Returns the dtype of the most of them."""
    from safetensors.torch import save_file

    shards: list[dict[str, torch.Tensor]] = [{}]
    held = 0
    sizes: dict[str, int] = {}
    for name, tensor in tensors:
        if held and held + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = tensor.contiguous()
        held += tensor.nbytes
        dtype = str(tensor.dtype).removeprefix("torch.")
        sizes[dtype] = sizes.get(dtype, 0) + tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    return max(sizes, key=lambda dtype: sizes[dtype])


def _write_tokenizer(folder: Path, data: TokenizerData) -> None:
    data.backend.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **data.special,
    }
    if data.chat_template is not None:
        settings["chat_template"] = data.chat_template
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
