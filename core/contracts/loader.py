"""Contract of a loader: it opens weight files and hands out configuration, tensors and tokenizer.

Whatever the format, names and layout are those of the Hugging Face checkpoint of the architecture: a GGUF file's
``blk.0.attn_q.weight`` arrives as ``model.layers.0.self_attn.q_proj.weight``, in that checkpoint's row order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from drivetrain.contracts.plugin import Plugin, Probe, ProbeContext
from drivetrain.errors import LoaderError

if TYPE_CHECKING:
    import tokenizers
    import torch

    from drivetrain.contracts.packed import PackedWeight


FULL_BITS = 16
"""Weights that are stored in fewer bits have been quantized by whoever wrote the files."""


@dataclass(frozen=True)
class TokenizerData:
    """Everything that text needs on its way to token ids and back.

    backend:       the tokenizer of the ``tokenizers`` library.
    chat_template: Jinja source of the chat template; None when the files carry none.
    special:       role -> token text: ``bos_token``, ``eos_token``, ``unk_token``, ``pad_token``; absent when unset.
    """

    backend: tokenizers.Tokenizer
    chat_template: str | None
    special: Mapping[str, str]


class Checkpoint(ABC):
    """Opened weight files. Tensors are read when asked for; closing is left to the garbage collector.

    path:              the folder or file that was opened.
    config:            the model's configuration with the keys of its Hugging Face ``config.json``.
    generation_config: defaults for sampling with the keys of ``generation_config.json``; may be empty.
    packed_by:         name of the quantizer that uses the files' packed layers as they are; None without such layers.
    why_not_packed:    why that quantizer can't; None where it can.
    is_packed_first:   whether it is the first choice when no quantizer is named: where the files were made to be used
                       so, and dequantizing them needs to be asked for.
    packs_exactly:     whether its products are those of the dequantized weights, so that only speed and memory differ:
                       then it is the first choice where kernels other than the reference multiply by what is packed.
    """

    path: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    packed_by: str | None = None
    why_not_packed: str | None = None
    is_packed_first: bool = False
    packs_exactly: bool = False

    is_resident: ClassVar[bool] = False
    """Whether the tensors lie in memory already, so that handing one out takes none."""

    @property
    def architecture(self) -> str:
        """The first entry of ``config["architectures"]``, for example ``"LlamaForCausalLM"``. Raises LoaderError when
        that is no list of names."""
        architectures = self.config.get("architectures") or ["unknown"]
        if not isinstance(architectures, list | tuple) or not isinstance(architectures[0], str):
            raise LoaderError(
                "architectures must be a list of names", where=f"{self.path}, config.json", found=architectures
            )
        return architectures[0]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer, from the generation configuration and the model's. Raises LoaderError for what
        is no token id: with it, answers would never end."""
        found: list[int] = []
        for config in (self.generation_config, self.config):
            value = config.get("eos_token_id")
            ids = value if isinstance(value, list | tuple) else () if value is None else (value,)
            if not all(type(token) is int for token in ids):
                raise LoaderError(
                    "eos_token_id is no token id and no list of them",
                    where=str(self.path),
                    found=value,
                    hint="Mend it in config.json or generation_config.json.",
                )
            found += ids
        return tuple(dict.fromkeys(found))

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Names of all tensors."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor as the model sees it, without reading its data. Raises MissingTensorError."""

    @abstractmethod
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the files."""

    @abstractmethod
    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor on the CPU in ``dtype``, dequantized where the file is quantized. Raises MissingTensorError.

        The result may share memory with the mapped file: callers copy before they write.
        """

    def packed(self, name: str) -> PackedWeight | None:
        """One linear layer's weight as the files hold it, on the CPU, when that is a packed form that a logical
        operation multiplies by; None otherwise. Nothing is decoded; the tensors may be views of the mapped file."""
        return None

    def packed_form(self, name: str) -> PackedWeight | None:
        """What :meth:`packed` returns, on the meta device: so the core counts bytes without reading weights.

        A checkpoint that does not override it reads them.
        """
        import torch

        found = self.packed(name)
        return None if found is None else found.to(torch.device("meta"))

    def repacking_bytes(self, name: str) -> int:
        """The most memory that :meth:`packed` takes beside what it returns, where that is not None. Reads nothing."""
        return 8 * math.prod(self.shape(name))

    def stored_bits(self, name: str) -> float | None:
        """Bits that one weight of a tensor takes in the files, scales included, when it is quantized there: in fewer
        than 16. None when it is stored in full. Raises MissingTensorError.

        A checkpoint that does not override it answers with the average over all of its tensors.
        """
        self.shape(name)
        bits = 8 * self.stored_bytes() / max(1, sum(math.prod(self.shape(other)) for other in self.names()))
        return bits if bits < FULL_BITS else None

    @abstractmethod
    def tokenizer(self) -> TokenizerData:
        """The tokenizer that belongs to the weights. Raises LoaderError when the files carry none that can be read."""

    def __contains__(self, name: str) -> bool:
        return name in self.names()


class Loader(Plugin):
    """Opens one format of weight files."""

    kind = "loader"

    @classmethod
    @abstractmethod
    def recognizes(cls, path: Path) -> bool:
        """True when ``path`` (a folder or a file) holds this format. Looks at names and first bytes only."""

    @abstractmethod
    def open(self, path: Path) -> Checkpoint:
        """Open the files and check them against their own index: a file cut short raises LoaderError here."""

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        if context.path is None:
            return Probe.yes("no files located yet")
        if cls.recognizes(Path(context.path)):
            return Probe.yes(f"{context.path} holds this format")
        return Probe.no("other_format", f"{context.path} does not hold this format")
