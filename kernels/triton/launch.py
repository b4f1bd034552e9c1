"""What all launches share: how rows lie in memory, and what Triton's interpreter can't do.

Triton compiles a kernel of its own for each argument that is 1, and for each that is a multiple of 16. Counts of
tokens, rows and sequences change from step to step, so kernels name them in ``do_not_specialize``: a step would wait
for up to a second. Sizes by which loads are masked within a row are left to it, or loads would not be wide.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on the CPU."""

_GLUON_VERSIONS = ((3, 6), (3, 9))
"""The first and the last version of Triton whose experimental part the kernels in Gluon are written for."""


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    """``a @ b`` summed in float32; float32 factors are not rounded.

    WIDE: multiply in float32, because the interpreter gets products of bfloat16 wrong.
    """
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """Without an overflow at either end."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, small) / (1.0 + small)


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    return 2.0 * sigmoid(2.0 * x) - 1.0


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """``[..., E] -> [rows, E]`` with a dense last dim: a view where the memory allows it."""
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def dense_last(x: torch.Tensor) -> torch.Tensor:
    """The same tensor, or a copy, whose last dim has no gaps."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def power_of_two(n: int) -> int:
    """The smallest power of two that is not less than ``n``."""
    return 1 << max(0, n - 1).bit_length()


def num_processors(device: torch.device) -> int:
    """Multiprocessors of the device; a few in the interpreter, so that work is split there too."""
    if INTERPRETED:
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def has_gluon(device: torch.device) -> bool:
    """Whether kernels in Gluon run there: on NVIDIA GPUs, with versions of Triton that they are written for."""
    if INTERPRETED or device.type != "cuda" or torch.version.hip is not None:
        return False
    first, last = _GLUON_VERSIONS
    return first <= tuple(map(int, triton.__version__.split(".")[:2])) <= last


@functools.cache
def multiplies_float8(device: torch.device) -> bool:
    """Whether the device has products of float8_e4m3fn of its own: NVIDIA's from Ada on."""
    return not INTERPRETED and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
