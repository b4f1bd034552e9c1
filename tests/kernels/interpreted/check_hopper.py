"""Run by ``tests/kernels/test_hopper.py`` in a process with Triton's interpreter on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from drivetrain.kernels.triton import hopper

torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(3, 1, 64), (4, 2, 128)])
def test_row_means_lie_where_the_lists_say(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lengths = np.array([130, 1, 70])
    out, grad = (torch.randn(int(lengths.sum()), heads, size, dtype=dtype) for _ in range(2))
    tiles = torch.from_numpy(hopper.forward_tiles(lengths, heads, kv_heads, 2)).int()
    means_HP = hopper.row_means(out, grad, tiles, hopper.num_places(lengths))
    wanted_TH = (out.float() * grad.float()).sum(-1)
    places = torch.cat([torch.arange(length) + begin for length, begin in ((130, 0), (1, 256), (70, 384))])
    torch.testing.assert_close(means_HP[:, places].T, wanted_TH, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 2, 64), (70, 1, 64)])
def test_sums_are_scaled_and_rounded_once(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    sums = torch.randn(shape)
    assert torch.equal(hopper.scaled(sums, 0.3, torch.float16), (sums * 0.3).half())
