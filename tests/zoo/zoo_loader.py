"""Loaders with one fault each, and the test of the kit that must catch it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from drivetrain.contracts.loader import Checkpoint, TokenizerData
from drivetrain.contracts.plugin import Plugin, Probe, ProbeContext
from drivetrain.plugins.loader.safetensors import SafetensorsLoader


class Wrapped(Checkpoint):
    """A checkpoint behind which another one does the work. Without fault."""

    def __init__(self, inner: Checkpoint) -> None:
        self.inner = inner
        self.path, self.config, self.generation_config = inner.path, inner.config, inner.generation_config

    def names(self) -> Sequence[str]:
        return self.inner.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.inner.shape(name)

    def stored_bytes(self) -> int:
        return self.inner.stored_bytes()

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self.inner.tensor(name, dtype)

    def tokenizer(self) -> TokenizerData:
        return self.inner.tokenizer()


class _Wrapping(SafetensorsLoader):
    wrapper: Callable[[Checkpoint], Checkpoint] = Wrapped

    def open(self, path: Path) -> Checkpoint:  # type: ignore[override]
        return type(self).wrapper(super().open(path))


class _Transposed(Wrapped):
    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        tensor = super().tensor(name, dtype)
        return tensor.T.contiguous().reshape(tensor.shape) if name.endswith("q_proj.weight") else tensor


class OtherRowOrder(_Wrapping):
    """Hands out query weights in another row order than the checkpoint's."""

    wrapper = _Transposed


class _Zeros(Wrapped):
    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return super().tensor(name, dtype) if name in self else torch.zeros(1, dtype=dtype)


class InventsMissingTensors(_Wrapping):
    """Hands out zeros for a tensor that is not there."""

    wrapper = _Zeros


class _OneDtype(Wrapped):
    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return super().tensor(name, torch.float32)


class IgnoresTheDtype(_Wrapping):
    """Hands out float32, whatever was asked for."""

    wrapper = _OneDtype


class _Late(Wrapped):
    def __init__(self, path: Path) -> None:
        self.path, self.config, self.generation_config = path, {}, {}


class ChecksNothingOnOpening(SafetensorsLoader):
    """Opens whatever it is given, and would find out when it reads."""

    def open(self, path: Path) -> Checkpoint:  # type: ignore[override]
        return _Late(path)


class ReadsPickles(SafetensorsLoader):
    """Hands the files to a library as they are, and lets its errors through."""

    def open(self, path: Path) -> Checkpoint:  # type: ignore[override]
        for file in path.glob("*.safetensors"):
            header = file.read_bytes()[:8]
            if int.from_bytes(header, "little") > file.stat().st_size:
                raise ValueError("Error while deserializing header: HeaderTooLarge")
        return super().open(path)


class PrintsABanner(SafetensorsLoader):
    """Greets on standard output when it is probed."""

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        print("FastLoader 3.1 ready")
        return super().probe(context)


ZOO: dict[type[Plugin], str] = {
    OtherRowOrder: "test_tensors_are_what_was_stored",
    InventsMissingTensors: "test_a_missing_tensor_is_named",
    IgnoresTheDtype: "test_tensors_come_in_the_dtype_asked_for",
    ChecksNothingOnOpening: "test_a_file_cut_short_is_an_error_on_opening",
    ReadsPickles: "test_a_damaged_header_is_an_error_of_the_tree",
    PrintsABanner: "test_import_and_probe_print_nothing",
}
"""Faulty loader -> the test that must fail for it."""
