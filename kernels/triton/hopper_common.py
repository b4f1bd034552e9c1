"""What the kernels for Hopper GPUs share.

They are written in Gluon, the part of Triton in which layouts, copies and the roles of warps are the program's own. It
is called experimental there; these names are those of Triton 3.6 to 3.9.
"""

from __future__ import annotations

from typing import Any

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma


@builtin
def _reduce_tensor(tensor_map: Any, coordinates: Any, source: Any, _semantic: Any = None) -> None:
    handles = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_map.handle, handles, source.handle)


# Triton 3.6 has the first under another name, and the second without one.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_add = getattr(tma, "async_atomic_add", None) or _reduce_tensor


@gluon.jit
def exp2(x: gl.tensor) -> gl.tensor:
    """2^x in one instruction; tiny results are 0."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def zero_behind(buffer: gl.shared_memory_descriptor, end: gl.tensor, WARPS: gl.constexpr) -> None:
    """Rows from ``end`` on become 0. They are another sequence's, and not even a weight of 0 undoes a NaN."""
    ROWS: gl.constexpr = buffer.shape[0]
    D: gl.constexpr = buffer.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    buffer.store(gl.where((rows < end)[:, None], buffer.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def load_tile(tiles_ptr: gl.tensor, tile: gl.tensor, num_tiles: gl.tensor) -> gl.tuple:
    """First token of the sequence, its length, first row of the tile in it, head, first place of its logarithms."""
    entry = tiles_ptr + 5 * tile
    is_there = tile < num_tiles
    start = gl.load(entry, mask=is_there, other=0)
    length = gl.load(entry + 1, mask=is_there, other=0)
    first = gl.load(entry + 2, mask=is_there, other=0)
    head = gl.load(entry + 3, mask=is_there, other=0)
    log_start = gl.load(entry + 4, mask=is_there, other=0)
    return start, length, first, head, log_start


@gluon.jit
def store_rows(
    out_ptr: gl.tensor,
    rows_MD: gl.tensor,
    start: gl.tensor,
    length: gl.tensor,
    first: gl.tensor,
    head: gl.tensor,
    HEADS: gl.constexpr,
    WARPS: gl.constexpr,
) -> None:
    """Write rows ``first ..`` of a sequence to [T, HEADS, D], as far as they are there."""
    ROWS: gl.constexpr = rows_MD.shape[0]
    D: gl.constexpr = rows_MD.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    places = ((start + rows).to(gl.int64) * HEADS + head) * D
    found = gl.convert_layout(rows_MD, layout)
    gl.store(out_ptr + places[:, None] + dims[None, :], found, mask=(rows < length)[:, None])
