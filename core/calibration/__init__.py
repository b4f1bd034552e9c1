"""Calibration: a model is packed layer by layer, by what its inputs are on some text, and written as files."""

from __future__ import annotations

from drivetrain.calibration.quantizing import DEFAULT_TOKENS, QuantizeOptions, quantize_model

__all__ = ["DEFAULT_TOKENS", "QuantizeOptions", "quantize_model"]
