"""Collects what the calibration tokens tell of the inputs of linear layers, while a decoder layer runs.

Shapes: T tokens; I channels of an input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from drivetrain.calibration.groups import InputGroup
from drivetrain.contracts.quantizer import InputStatistics
from drivetrain.errors import CalibrationError


class _Collector:
    """Sums over the tokens of one input."""

    def __init__(self, name: str, size: int, wants_gram: bool, device: torch.device) -> None:
        self._name = name
        self._num_tokens = 0
        self._sum_abs_I = torch.zeros(size, device=device)
        self._max_abs_I = torch.zeros(size, device=device)
        self._gram_II = torch.zeros(size, size, device=device) if wants_gram else None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x_TI = inputs[0].detach().float().flatten(0, -2)
        absolute_TI = x_TI.abs()
        sums_I = absolute_TI.sum(0)
        if not bool(torch.isfinite(sums_I).all()):
            wrong = int((~torch.isfinite(x_TI)).sum())
            raise CalibrationError(
                f"{wrong} of the {x_TI.numel()} numbers that go into the layer are NaN or infinite, or they are too "
                "large to add up",
                where=self._name,
                found=f"largest finite {float(absolute_TI.nan_to_num(0, 0, 0).max()):.3g}",
                hint="Run in another precision (--precision fp32), or check the model with drivetrain generate.",
            )
        self._num_tokens += x_TI.shape[0]
        self._sum_abs_I += sums_I
        torch.maximum(self._max_abs_I, absolute_TI.amax(0), out=self._max_abs_I)
        if self._gram_II is not None:
            self._gram_II.addmm_(x_TI.T, x_TI)

    def statistics(self) -> InputStatistics:
        count = max(1, self._num_tokens)
        gram_II = None if self._gram_II is None else self._gram_II.div_(count)
        return InputStatistics(self._num_tokens, self._sum_abs_I / count, self._max_abs_I, gram_II)


class Collectors:
    """One for each group of a layer."""

    def __init__(
        self, layer: nn.Module, prefix: str, groups: Sequence[InputGroup], wanting_gram: Sequence[bool]
    ) -> None:
        self._layer = layer
        self._firsts = [group.linears[0] for group in groups]
        self._collectors = []
        for first, wants_gram in zip(self._firsts, wanting_gram, strict=True):
            weight = layer.get_parameter(f"{first}.weight")
            self._collectors.append(_Collector(f"{prefix}.{first}", weight.shape[1], wants_gram, weight.device))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, every call of the layer is counted."""
        handles = [
            self._layer.get_submodule(first).register_forward_pre_hook(collector)
            for first, collector in zip(self._firsts, self._collectors, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def statistics(self) -> list[InputStatistics]:
        """What was seen, group by group."""
        return [collector.statistics() for collector in self._collectors]
