"""How well a model predicts text, and what quantizers cost it."""

from __future__ import annotations

from drivetrain.evaluation.perplexity import Comparison, Quality, compare_quantizers
from drivetrain.evaluation.text import TextWindows, read_tokens

__all__ = ["Comparison", "Quality", "TextWindows", "compare_quantizers", "read_tokens"]
