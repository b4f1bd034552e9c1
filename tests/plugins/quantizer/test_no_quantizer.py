"""The trivial quantizer leaves every layer as it is."""

from __future__ import annotations

import torch

from drivetrain.plugins.quantizer.none import NoQuantizer


def test_a_layer_keeps_its_weights_and_type() -> None:
    quantizer = NoQuantizer(NoQuantizer.Config())
    linear = torch.nn.Linear(4, 3, bias=False)
    assert quantizer.convert("layers.0.mlp.up", linear) is linear
    assert quantizer.bits_per_weight() is None
