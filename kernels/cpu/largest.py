"""The largest output of a product: what greedy decoding wants of an output layer.

Shapes: N rows; I, O features of the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drivetrain.kernels.cpu.operations import MatrixFields, Rows, matrix_fields

_LEAST_OUTPUTS = 1024
"""With fewer there is little to leave out."""

_ROUNDED_AT_ONCE = 4096
"""Rows of a weight that are turned into int8 together: what that takes beside the result stays small."""


class ScreenedLargest:
    """Each row's largest output of a product, and which it is, without most outputs: ``FindsLargest`` of the contract.

    Outputs are computed from the weight in int8 first, which tells each within a known distance; those that may be the
    largest, with the weight itself. Takes a quarter of a float32 weight's bytes beside it.
    """

    def __init__(self, rows: Rows, weight_OI: Tensor) -> None:
        self._rows = rows
        self._weight_OI = weight_OI
        outputs, size = weight_OI.shape
        self._codes_OI = torch.empty(outputs, size, dtype=torch.int8)
        self._scales_O, self._radii_O = torch.empty(outputs), torch.empty(outputs)
        self._codes = MatrixFields(
            weight=self._codes_OI.data_ptr(), rows=outputs, cols=size, stride=size, scales=self._scales_O.data_ptr()
        )
        self._seen: tuple[int, int] | None = None
        self._is_usable = True
        self._keep_up()

    def _keep_up(self) -> None:
        """Turn the weight into int8 if it is not the one that was."""
        weight_OI = self._weight_OI
        now = (weight_OI.data_ptr(), weight_OI._version)
        if now == self._seen:
            return
        parts = (slice(first, first + _ROUNDED_AT_ONCE) for first in range(0, len(weight_OI), _ROUNDED_AT_ONCE))
        self._is_usable = weight_OI.is_contiguous() and all(map(self._round, parts))
        self._seen = now

    def _round(self, some: slice) -> bool:
        """Some rows; whether all of their weights are numbers."""
        rows_OI = self._weight_OI[some].detach().float()
        largest_O1 = rows_OI.abs().amax(dim=1, keepdim=True)
        scales_O1 = largest_O1 / 127
        codes_OI = (rows_OI / scales_O1.where(scales_O1 > 0, 1)).round_()
        kept_OI = codes_OI * scales_O1
        self._codes_OI[some] = codes_OI.to(torch.int8)
        self._scales_O[some] = scales_O1[:, 0]
        # |w x - q x| <= |w - q| |x|. Beside that, x is rounded to 16 bits, and sums of so many products in float32.
        size = rows_OI.shape[1]
        rounding = 0.5 * size**0.5 / 32600 + 2 * size * 2.0**-24 + 2.0**-20
        self._radii_O[some] = 1.001 * (rows_OI - kept_OI).norm(dim=1) + rounding * kept_OI.norm(dim=1)
        return bool(self._radii_O[some].isfinite().all())

    def __call__(self, x_NI: Tensor) -> tuple[Tensor, Tensor]:
        """Their values [N] in the dtype of x, and int64 [N]. NaN counts as the largest, as torch has it."""
        self._keep_up()
        if self._is_usable:
            found = self._rows.largest(x_NI, matrix_fields(self._weight_OI), self._codes, self._radii_O)
            if found is not None:
                return found
        return self._rows.linear(x_NI, self._weight_OI, None).max(dim=-1)


def largest_of(rows: Rows, weight_OI: Tensor) -> ScreenedLargest | None:
    """What finds the largest outputs of a weight; None where it would be no faster than all outputs, or could not see
    that the weight has changed."""
    if len(weight_OI) < _LEAST_OUTPUTS or not weight_OI.is_contiguous() or weight_OI.is_inference():
        return None
    return ScreenedLargest(rows, weight_OI)
