"""The conformance kit: what a plugin has to do to be called one of its kind.

An author's whole test file is::

    from drivetrain.testing import AttentionSuite

    class TestMyAttention(AttentionSuite):
        plugin = "my-attention"

``drivetrain plugins test attention/my-attention`` runs the same without a file. Importing this package imports neither
pytest nor torch; a suite does when it is first used.
"""

from __future__ import annotations

from typing import Any

SUITES = {
    "AttentionSuite": "attention",
    "CheckpointSuite": "checkpoint",
    "KernelsSuite": "kernels",
    "LoaderSuite": "loader",
    "ModelSuite": "model",
    "OptimizerSuite": "optimizer",
    "PartitionerSuite": "partitioner",
    "PlatformSuite": "platform",
    "PrecisionSuite": "precision",
    "QuantizerSuite": "quantizer",
    "RecipeSuite": "recipe",
    "SchedulerSuite": "scheduler",
    "SourceSuite": "source",
    "StoreSuite": "store",
    "TrackerSuite": "tracker",
}
"""Name of a suite -> the kind it is for, which is also the module in ``drivetrain.testing.suites``."""

__all__ = [*SUITES, "SUITES"]


def __getattr__(name: str) -> Any:
    if name in SUITES:
        import importlib

        return getattr(importlib.import_module(f"drivetrain.testing.suites.{SUITES[name]}"), name)
    raise AttributeError(f"module 'drivetrain.testing' has no attribute {name!r}")
