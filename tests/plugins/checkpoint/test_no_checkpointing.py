"""The trivial policy changes nothing: same module, same gradients."""

from __future__ import annotations

import torch

from drivetrain.plugins.checkpoint.none import NoCheckpointing


def test_the_model_is_returned_as_it_is() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    before = [(name, id(module)) for name, module in model.named_modules()]
    policy = NoCheckpointing(NoCheckpointing.Config())
    assert policy.apply(model, ("0", "1")) is model
    assert [(name, id(module)) for name, module in model.named_modules()] == before
