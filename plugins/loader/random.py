"""Weights that nobody trained: for measuring speed and memory of a model by its configuration alone."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from drivetrain.contracts.loader import Checkpoint, Loader, TokenizerData
from drivetrain.contracts.plugin import PluginConfig
from drivetrain.errors import ConfigError, LoaderError, MissingTensorError, nearest
from drivetrain.plugins.loader.safetensors import read_json, read_tokenizer

if TYPE_CHECKING:
    import torch

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf", ".bin", ".pt", ".pth")
_USUAL_SPREAD = 0.02
"""Standard deviation where ``initializer_range`` does not tell it."""


class RandomCheckpoint(Checkpoint):
    """A configuration, and numbers drawn anew whenever a tensor is asked for: the same for equal seeds and devices."""

    def __init__(self, path: Path, seed: int, device: str) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        self.generation_config = read_json(path / "generation_config.json", optional=True)
        self._seed, self._device = seed, device

    @cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        from drivetrain.plugins.model.decoder import parameter_shapes

        return parameter_shapes(self.config)

    def names(self) -> Sequence[str]:
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._shapes.get(name)
        if shape is None:
            close = nearest(name, self._shapes)
            raise MissingTensorError(
                f"{self.architecture} has no tensor {name!r}",
                where=str(self.path),
                hint=f"The nearest name is {close!r}" if close else None,
            )
        return shape

    def stored_bytes(self) -> int:
        return 0

    def stored_bits(self, name: str) -> float | None:
        self.shape(name)
        return None

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Weights of norms are 1 and biases 0; all else is drawn from a normal distribution."""
        import torch

        shape = self.shape(name)
        if len(shape) == 1:
            fill = 0.0 if name.endswith(".bias") else 1.0
            return torch.full(shape, fill, dtype=dtype, device=self._device)
        generator = torch.Generator(self._device)
        generator.manual_seed(zlib.crc32(f"{self._seed}/{name}".encode()))  # a CPU's takes 32 bits
        spread = float(self.config.get("initializer_range") or _USUAL_SPREAD)
        drawn = torch.empty(shape, dtype=torch.float32, device=self._device)
        return drawn.normal_(0.0, spread, generator=generator).to(dtype)

    def tokenizer(self) -> TokenizerData:
        """The folder's own; without one, bytes: what is beyond 255 is no text."""
        return read_tokenizer(self.path) if (self.path / "tokenizer.json").is_file() else _bytes_tokenizer()


class RandomLoader(Loader):
    """Makes up the weights of a folder that holds config.json alone, for measurements; it has to be given a seed."""

    class Config(PluginConfig):
        seed: int | None = Field(
            None,
            ge=0,
            lt=2**31,
            description="of the numbers that are drawn; without one the folder is refused: nobody serves them unawares",
        )
        device: str = Field(
            "cpu",
            description="torch device on which they are drawn, such as cuda:0; that of the platform is the fastest",
        )

    config: Config

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        if not (path / "config.json").is_file():
            return False
        return not any(entry.name.endswith(_WEIGHTS) for entry in path.iterdir())

    def open(self, path: Path) -> Checkpoint:
        if self.config.seed is None:
            raise LoaderError(
                "the folder holds no weights",
                where=str(path),
                found=sorted(entry.name for entry in path.iterdir()) if path.is_dir() else None,
                hint="To measure the model with made-up weights: --loader random --set loader.seed=0",
            )
        checkpoint = RandomCheckpoint(path, self.config.seed, self._checked_device())
        checkpoint.names()  # a configuration that makes no model is told now
        return checkpoint

    def _checked_device(self) -> str:
        import torch

        try:
            return str(torch.device(self.config.device))
        except RuntimeError as error:
            raise ConfigError(
                "there is no such device", where="loader.device", found=self.config.device, hint="Write cpu or cuda:0."
            ) from error


def _bytes_tokenizer() -> TokenizerData:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend: Any = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return TokenizerData(backend, None, {})
