"""Drivetrain: train and serve large models from one set of swappable parts.

Importing this package imports neither torch nor any plugin; names below are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drivetrain.errors import DrivetrainError
    from drivetrain.serving.async_engine import AsyncEngine
    from drivetrain.serving.llm import LLM
    from drivetrain.serving.types import Completion, GenerationResult, SamplingParams
    from drivetrain.training.own_loop import prepare
    from drivetrain.training.trainer import Trainer

__version__ = "0.1.0"

_EXPORTS = {
    "AsyncEngine": "drivetrain.serving.async_engine",
    "Completion": "drivetrain.serving.types",
    "DrivetrainError": "drivetrain.errors",
    "GenerationResult": "drivetrain.serving.types",
    "LLM": "drivetrain.serving.llm",
    "SamplingParams": "drivetrain.serving.types",
    "Trainer": "drivetrain.training.trainer",
    "prepare": "drivetrain.training.own_loop",
}

__all__ = [  # noqa: RUF022  the version stands last, as a test says
    "LLM",
    "AsyncEngine",
    "Completion",
    "DrivetrainError",
    "GenerationResult",
    "SamplingParams",
    "Trainer",
    "prepare",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        import importlib

        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'drivetrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
