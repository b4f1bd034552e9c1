"""Rotary embedding, forward and backward, and with the write of keys and values into the paged cache: one launch for
queries, keys and values.

A program takes ROWS rows, a row being one head of one token; programs are numbered queries first, then keys, then
values. Memory is the bound: everything is read and written once, the angles a few times from the nearest cache.

Shapes: T tokens; H query heads; G key/value heads; D head size; R rotary dims; B blocks of the cache; N tokens in a
block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.kernels.triton.launch import INTERPRETED, dense_last, needs_gradient, power_of_two
from drivetrain.kernels.triton.tuning import FUSED


@triton.jit
def _turn(
    x_row: tl.tensor,
    out_row: tl.tensor,
    cos_row: tl.tensor,
    sin_row: tl.tensor,
    is_row: tl.tensor,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BACK: tl.constexpr,
) -> None:
    """Rotate rows, given by the pointers to their first elements. BACK turns the other way: the gradient."""
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    is_in = is_row & (pair < R // 2)
    first = tl.load(x_row + pair, mask=is_in, other=0.0).to(tl.float32)
    second = tl.load(x_row + pair + R // 2, mask=is_in, other=0.0).to(tl.float32)
    cos_first = tl.load(cos_row + pair, mask=is_in, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_row + pair + R // 2, mask=is_in, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_row + pair, mask=is_in, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_row + pair + R // 2, mask=is_in, other=0.0).to(tl.float32)
    if BACK:
        turned_first = first * cos_first + second * sin_second
        turned_second = second * cos_second - first * sin_first
    else:
        turned_first = first * cos_first - second * sin_first
        turned_second = second * cos_second + first * sin_second
    to = out_row.dtype.element_ty
    tl.store(out_row + pair, turned_first.to(to), mask=is_in)
    tl.store(out_row + pair + R // 2, turned_second.to(to), mask=is_in)
    if D > R:
        _copy(x_row + R, out_row + R, is_row, D - R, BLOCK_REST)


@triton.jit
def _copy(x_row: tl.tensor, out_row: tl.tensor, is_row: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr) -> None:
    dims = tl.arange(0, BLOCK)[None, :]
    is_in = is_row & (dims < SIZE)
    x = tl.load(x_row + dims, mask=is_in, other=0.0)
    tl.store(out_row + dims, x.to(out_row.dtype.element_ty), mask=is_in)


@triton.jit
def _slot_rows(
    cache_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    is_row: tl.tensor,
    by_block: tl.tensor,
    by_token: tl.tensor,
    by_head: tl.tensor,
    N: tl.constexpr,
) -> tl.tensor:
    """Pointers to where heads of tokens are kept."""
    slots = tl.load(slots_ptr + tokens, mask=is_row, other=0)
    return cache_ptr + slots // N * by_block + slots % N * by_token + heads * by_head


@triton.jit
def _rope(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    q_out_ptr: tl.tensor,
    k_out_ptr: tl.tensor,
    v_out_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    num_tokens: tl.tensor,
    q_programs: tl.tensor,
    k_programs: tl.tensor,
    q_by_token: tl.tensor,
    q_by_head: tl.tensor,
    k_by_token: tl.tensor,
    k_by_head: tl.tensor,
    v_by_token: tl.tensor,
    v_by_head: tl.tensor,
    cos_by_token: tl.tensor,
    sin_by_token: tl.tensor,
    k_out_by_block: tl.tensor,
    k_out_by_token: tl.tensor,
    k_out_by_head: tl.tensor,
    v_out_by_block: tl.tensor,
    v_out_by_token: tl.tensor,
    v_out_by_head: tl.tensor,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """N is 0 where keys are returned, and the size of a block where keys and values are written to the cache."""
    program = tl.program_id(0)
    if program < q_programs:
        rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        tokens, heads = rows // H, rows % H
        is_row = tokens < num_tokens
        _turn(
            q_ptr + tokens * q_by_token + heads * q_by_head,
            q_out_ptr + rows * D,
            cos_ptr + tokens * cos_by_token,
            sin_ptr + tokens * sin_by_token,
            is_row, D, R, BLOCK_HALF, BLOCK_REST, BACK,
        )  # fmt: skip
    elif program < q_programs + k_programs:
        rows = (program - q_programs).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        tokens, heads = rows // G, rows % G
        is_row = tokens < num_tokens
        if N > 0:
            out_rows = _slot_rows(
                k_out_ptr, slots_ptr, tokens, heads, is_row, k_out_by_block, k_out_by_token, k_out_by_head, N
            )
        else:
            out_rows = k_out_ptr + rows * D
        _turn(
            k_ptr + tokens * k_by_token + heads * k_by_head,
            out_rows,
            cos_ptr + tokens * cos_by_token,
            sin_ptr + tokens * sin_by_token,
            is_row, D, R, BLOCK_HALF, BLOCK_REST, BACK,
        )  # fmt: skip
    elif N > 0:
        rows = (program - q_programs - k_programs).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        tokens, heads = rows // G, rows % G
        is_row = tokens < num_tokens
        out_rows = _slot_rows(
            v_out_ptr, slots_ptr, tokens, heads, is_row, v_out_by_block, v_out_by_token, v_out_by_head, N
        )
        _copy(v_ptr + tokens * v_by_token + heads * v_by_head, out_rows, is_row, D, BLOCK_D)


def _rows_of_a_program(size: int) -> int:
    """About 2048 elements a program; more in the interpreter, where every program costs the same."""
    return max(1, (16384 if INTERPRETED else 2048) // power_of_two(size))


def _launch(
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor | None,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    outs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    slots_T: torch.Tensor | None,
    back: bool,
) -> None:
    q_THD, k_TGD, cos_TR, sin_TR = (dense_last(x) for x in (q_THD, k_TGD, cos_TR, sin_TR))
    (num_tokens, heads, size), groups, rotary = q_THD.shape, k_TGD.shape[1], cos_TR.shape[1]
    if num_tokens == 0:
        return
    v_TGD = k_TGD if v_TGD is None else dense_last(v_TGD)
    q_out, k_out, v_out = outs
    v_out = k_out if v_out is None else v_out
    is_written = slots_T is not None
    block_rows = _rows_of_a_program(size)
    q_programs, k_programs = (triton.cdiv(num_tokens * count, block_rows) for count in (heads, groups))
    _rope[(q_programs + k_programs * (2 if is_written else 1),)](
        q_THD,
        k_TGD,
        v_TGD,
        cos_TR,
        sin_TR,
        q_out,
        k_out,
        v_out,
        slots_T,
        num_tokens,
        q_programs,
        k_programs,
        q_THD.stride(0),
        q_THD.stride(1),
        k_TGD.stride(0),
        k_TGD.stride(1),
        v_TGD.stride(0),
        v_TGD.stride(1),
        cos_TR.stride(0),
        sin_TR.stride(0),
        *(k_out.stride()[:3] if is_written else (0, 0, 0)),
        *(v_out.stride()[:3] if is_written else (0, 0, 0)),
        H=heads,
        G=groups,
        D=size,
        R=rotary,
        N=k_out.shape[1] if is_written else 0,
        BLOCK_HALF=power_of_two(rotary // 2),
        BLOCK_REST=power_of_two(max(1, size - rotary)),
        BLOCK_D=power_of_two(size),
        BACK=back,
        ROWS=block_rows,
        num_warps=4,
        **FUSED,
    )


def _rotated(
    q_THD: torch.Tensor, k_TGD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, back: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_THD, k_TGD))
    _launch(q_THD, k_TGD, None, cos_TR, sin_TR, (q_out, k_out, None), None, back)
    return q_out, k_out


class _Rope(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(
        context: Any, q_THD: torch.Tensor, k_TGD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor
    ) -> Any:
        context.save_for_backward(cos_TR, sin_TR)
        return _rotated(q_THD, k_TGD, cos_TR, sin_TR)

    @staticmethod
    def backward(context: Any, q_grad: torch.Tensor, k_grad: torch.Tensor) -> Any:
        cos_TR, sin_TR = context.saved_tensors
        return *_rotated(q_grad, k_grad, cos_TR, sin_TR, back=True), None, None


def make_rope(spec: KernelSpec) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def rope(
        q_THD: torch.Tensor, k_TGD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if needs_gradient(q_THD, k_TGD):
            return _Rope.apply(q_THD, k_TGD, cos_TR, sin_TR)
        return _rotated(q_THD, k_TGD, cos_TR, sin_TR)

    return rope


def make_rope_write(spec: KernelSpec) -> Callable[..., torch.Tensor]:
    @torch.no_grad()
    def rope_write(
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
        keys_BNGD: torch.Tensor,
        values_BNGD: torch.Tensor,
        slots_T: torch.Tensor,
    ) -> torch.Tensor:
        q_out = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        outs = (q_out, keys_BNGD, values_BNGD)
        _launch(q_THD, k_TGD, v_TGD, cos_TR, sin_TR, outs, slots_T.contiguous(), back=False)
        return q_out

    return rope_write
