"""Fusion: operations of a built module become fewer bound ones, in place, with a report of what was done and left."""

from __future__ import annotations

from drivetrain.fusion.forward import FusedForward
from drivetrain.fusion.fuser import Binder, Fuser, FusesItself
from drivetrain.fusion.fusing import TOLERANCE, fuse, fuse_model
from drivetrain.fusion.patterns import PATTERNS, Pattern
from drivetrain.fusion.recognizing import is_plain_linear
from drivetrain.fusion.report import Fused, FusionReport, Left

__all__ = [
    "PATTERNS",
    "TOLERANCE",
    "Binder",
    "Fused",
    "FusedForward",
    "Fuser",
    "FusesItself",
    "FusionReport",
    "Left",
    "Pattern",
    "fuse",
    "fuse_model",
    "is_plain_linear",
]
