"""The trained model as a folder that servers and transformers load as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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
    writer = _FolderWriter(folder)
    ranks.together("making room for the model", writer.begin if ranks.is_first else lambda: None)
    # A tensor that is shared out is gathered by all ranks, so that none may fail on the way.
    whole = [item for item in _whole_tensors(model) if ranks.is_first]
    ranks.together("writing the model", (lambda: writer.write(whole, checkpoint)) if ranks.is_first else lambda: None)


def _whole_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    from torch.distributed.tensor import DTensor

    for name, tensor in model_state(model).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        yield name.removeprefix("model."), whole.detach().cpu()


class _FolderWriter:
    """Writes a model beside ``folder`` and puts it in its place when it is whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._unfinished = folder.with_name(f".{folder.name}-unfinished")
        self._replaced = folder.with_name(f".{folder.name}-replaced")

    def begin(self) -> None:
        """Make an empty folder to write in. What an export that was killed has left behind goes away."""
        if self._folder.exists() and not self._folder.is_dir():
            raise TrainingError("the model can't be written: there is a file of this name", where=str(self._folder))
        with self._writing():
            for leftover in (self._unfinished, self._replaced):
                _remove(leftover)
            self._unfinished.mkdir(parents=True)

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]], checkpoint: Checkpoint) -> None:
        try:
            with self._writing():
                self._write(tensors, checkpoint)
        except TrainingError:
            shutil.rmtree(self._unfinished, ignore_errors=True)  # it may be what fills the disk
            raise

    def _write(self, tensors: Iterable[tuple[str, torch.Tensor]], checkpoint: Checkpoint) -> None:
        dtype = _write_weights(self._unfinished, tensors)
        _write_json(self._unfinished / "config.json", {**checkpoint.config, "dtype": dtype, "torch_dtype": dtype})
        if checkpoint.generation_config:
            _write_json(self._unfinished / "generation_config.json", checkpoint.generation_config)
        _write_tokenizer(self._unfinished, checkpoint.tokenizer())
        if self._folder.exists():
            self._folder.rename(self._replaced)
        self._unfinished.rename(self._folder)
        _remove(self._replaced)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError) as error:  # the latter for what the file system refuses while tensors go out
            told = getattr(error, "strerror", None) or error
            raise TrainingError(f"the model can't be written: {told}", where=str(self._folder)) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file that others may read as they may read any new file of this process; the library alone
    leaves one for its owner."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)


def _write_weights(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Files of weights, with an index where there are several. Returns the dtype of the most of them."""
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
        write_tensors(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    return max(sizes, key=lambda dtype: sizes[dtype])


def _write_tokenizer(folder: Path, data: TokenizerData) -> None:
    (folder / "tokenizer.json").write_text(data.backend.to_str(pretty=True), encoding="utf-8")
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
