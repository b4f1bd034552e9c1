"""Rotary embedding, forward and backward, and with the write of keys and values into the paged cache: one launch for
queries, keys and values.

A program takes a tile of some tokens and heads; programs are numbered queries first, then keys, then values. Memory is
the bound: everything is read and written once, and a token's angles once for all heads of a tile.

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
from drivetrain.kernels.triton.launch import INTERPRETED, dense_last, power_of_two
from drivetrain.kernels.triton.operators import define, name_of
from drivetrain.kernels.triton.tuning import FUSED, Blocks, Choice, Tuner, rows_class
from drivetrain.operators import Operator, once_differentiable, visible


@triton.jit
def _turn(
    x_row: tl.tensor,
    out_row: tl.tensor,
    cos_row: tl.tensor,
    sin_row: tl.tensor,
    is_token: tl.tensor,
    is_row: tl.tensor,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BACK: tl.constexpr,
) -> None:
    """Rotate the heads of tokens, given by the pointers to their first elements, [tokens, heads, 1]; angles are
    [tokens, 1, 1]. BACK turns the other way: the gradient."""
    pair = tl.arange(0, BLOCK_HALF)[None, None, :]
    is_in = is_row & (pair < R // 2)
    is_angle = is_token & (pair < R // 2)
    first = tl.load(x_row + pair, mask=is_in, other=0.0).to(tl.float32)
    second = tl.load(x_row + pair + R // 2, mask=is_in, other=0.0).to(tl.float32)
    cos_first = tl.load(cos_row + pair, mask=is_angle, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_row + pair + R // 2, mask=is_angle, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_row + pair, mask=is_angle, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_row + pair + R // 2, mask=is_angle, other=0.0).to(tl.float32)
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
    dims = tl.arange(0, BLOCK)[None, None, :]
    is_in = is_row & (dims < SIZE)
    x = tl.load(x_row + dims, mask=is_in, other=0.0)
    tl.store(out_row + dims, x.to(out_row.dtype.element_ty), mask=is_in)


@triton.jit
def _tile(program: tl.tensor, HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr) -> tl.tensor:
    """Tokens and heads of a program, [tokens, 1, 1] and [1, heads, 1]: the heads of a token come one after another."""
    parts: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    tokens = (program // parts).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    heads = program % parts * BLOCK_H + tl.arange(0, BLOCK_H)
    return tokens[:, None, None], heads[None, :, None]


@triton.jit
def _slot_rows(
    cache_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    is_token: tl.tensor,
    by_block: tl.tensor,
    by_token: tl.tensor,
    by_head: tl.tensor,
    N: tl.constexpr,
) -> tl.tensor:
    """Pointers to where heads of tokens are kept."""
    slots = tl.load(slots_ptr + tokens, mask=is_token, other=0)
    return cache_ptr + slots // N * by_block + slots % N * by_token + heads * by_head


@triton.jit(do_not_specialize=["num_tokens", "q_programs", "k_programs"])
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
    Q_TOKENS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_TOKENS: tl.constexpr,
    K_HEADS: tl.constexpr,
) -> None:
    """N is 0 where keys are returned, and the size of a block where keys and values are written to the cache."""
    program = tl.program_id(0)
    if program < q_programs:
        q_tokens, q_heads = _tile(program, H, Q_TOKENS, Q_HEADS)
        is_query = q_tokens < num_tokens
        _turn(
            q_ptr + q_tokens * q_by_token + q_heads * q_by_head,
            q_out_ptr + (q_tokens * H + q_heads) * D,
            cos_ptr + q_tokens * cos_by_token,
            sin_ptr + q_tokens * sin_by_token,
            is_query, is_query & (q_heads < H), D, R, BLOCK_HALF, BLOCK_REST, BACK,
        )  # fmt: skip
    elif program < q_programs + k_programs:
        tokens, heads = _tile(program - q_programs, G, K_TOKENS, K_HEADS)
        is_token = tokens < num_tokens
        if N > 0:
            out_rows = _slot_rows(
                k_out_ptr, slots_ptr, tokens, heads, is_token, k_out_by_block, k_out_by_token, k_out_by_head, N
            )
        else:
            out_rows = k_out_ptr + (tokens * G + heads) * D
        _turn(
            k_ptr + tokens * k_by_token + heads * k_by_head,
            out_rows,
            cos_ptr + tokens * cos_by_token,
            sin_ptr + tokens * sin_by_token,
            is_token, is_token & (heads < G), D, R, BLOCK_HALF, BLOCK_REST, BACK,
        )  # fmt: skip
    elif N > 0:
        tokens, heads = _tile(program - q_programs - k_programs, G, K_TOKENS, K_HEADS)
        is_token = tokens < num_tokens
        out_rows = _slot_rows(
            v_out_ptr, slots_ptr, tokens, heads, is_token, v_out_by_block, v_out_by_token, v_out_by_head, N
        )
        _copy(v_ptr + tokens * v_by_token + heads * v_by_head, out_rows, is_token & (heads < G), D, BLOCK_D)


# --- how they are launched -----------------------------------------------------------------------------------------


def _candidates() -> list[Blocks]:
    """Pairs of dims that a program turns: from 16 bytes a thread and load on."""
    if INTERPRETED:
        return [Blocks.of(PAIRS=8192)]
    tried = [(2048, 4), (1024, 4), (2048, 8), (4096, 8), (1024, 2), (4096, 4)]
    return [Blocks.of(num_warps=warps, PAIRS=pairs) for pairs, warps in tried]


def _tile_of(pairs: int, heads: int, half: int) -> tuple[int, int]:
    """Tokens and heads of a program's tile, both powers of two. Heads are not padded where they divide well."""
    even = heads & -heads
    block = min(even if even >= 4 else power_of_two(heads), max(1, pairs // half))
    return max(1, pairs // (block * half)), block


class _Rotation:
    """The launches of one use."""

    def __init__(self, spec: KernelSpec, tuner: Tuner) -> None:
        self._choice = Choice(tuner, f"{spec.operation}/{spec.dtype}")

    def launch(
        self,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor | None,
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
        outs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        slots_T: torch.Tensor | None = None,
        back: bool = False,
    ) -> None:
        """Rotate into ``outs``; with ``slots_T`` keys and values go there in a cache."""
        inputs = [dense_last(x) for x in (q_THD, k_TGD, k_TGD if v_TGD is None else v_TGD, cos_TR, sin_TR)]
        (num_tokens, heads, size), groups, rotary = q_THD.shape, k_TGD.shape[1], cos_TR.shape[1]
        if num_tokens == 0:
            return
        is_written, half = slots_T is not None, power_of_two(rotary // 2)
        outputs = (*outs[:2], outs[1] if outs[2] is None else outs[2])
        strides = [stride for x in inputs[:3] for stride in x.stride()[:2]]
        strides += [x.stride(0) for x in inputs[3:]]
        strides += [stride for x in outputs[1:] for stride in (x.stride()[:3] if is_written else (0, 0, 0))]

        def launch(blocks: Blocks) -> None:
            q_tile, k_tile = (_tile_of(blocks["PAIRS"], count, half) for count in (heads, groups))
            q_programs, k_programs = (
                triton.cdiv(num_tokens, tile[0]) * triton.cdiv(count, tile[1])
                for tile, count in ((q_tile, heads), (k_tile, groups))
            )
            _rope[(q_programs + k_programs * (2 if is_written else 1),)](
                *inputs,
                *outputs,
                slots_T,
                num_tokens,
                q_programs,
                k_programs,
                *strides,
                H=heads,
                G=groups,
                D=size,
                R=rotary,
                N=outputs[1].shape[1] if is_written else 0,
                BLOCK_HALF=half,
                BLOCK_REST=power_of_two(max(1, size - rotary)),
                BLOCK_D=power_of_two(size),
                BACK=back,
                Q_TOKENS=q_tile[0],
                Q_HEADS=q_tile[1],
                K_TOKENS=k_tile[0],
                K_HEADS=k_tile[1],
                num_warps=blocks.num_warps,
                **FUSED,
            )

        launch(self._choice((heads, groups, size, rows_class(num_tokens)), _candidates, launch))

    def rotated(
        self, q_THD: torch.Tensor, k_TGD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, back: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_THD, k_TGD))
        self.launch(q_THD, k_TGD, None, cos_TR, sin_TR, (q_out, k_out, None), back=back)
        return q_out, k_out

    def rotated_back(
        self, q_THD: torch.Tensor, k_TGD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rotated(q_THD, k_TGD, cos_TR, sin_TR, back=True)


# --- what a model binds: the plain callable, and the operator that torch sees --------------------------------------


def _fake_rope(
    q_THD: torch.Tensor, k_TGD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return q_THD.new_empty(q_THD.shape), k_TGD.new_empty(k_TGD.shape)


def make_rope(spec: KernelSpec, tuner: Tuner) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The gradient of a rotation is the rotation back."""
    rotation = _Rotation(spec, tuner)
    name, schema = name_of(spec, tuner), "(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)"
    gradients = define(
        f"{name}_backward",
        schema,
        rotation.rotated_back,
        fake=_fake_rope,
        backward=once_differentiable,
    )

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[2:])

    def backward(ctx: Any, q_grad: torch.Tensor, k_grad: torch.Tensor) -> Any:
        return (*gradients(q_grad, k_grad, *ctx.saved_tensors), None, None)

    overload = define(name, schema, rotation.rotated, fake=_fake_rope, save=save, backward=backward)
    return visible(rotation.rotated, Operator(overload))


def make_rope_write(spec: KernelSpec, tuner: Tuner) -> Callable[..., torch.Tensor]:
    rotation = _Rotation(spec, tuner)

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
        rotation.launch(q_THD, k_TGD, v_TGD, cos_TR, sin_TR, outs, slots_T.contiguous())
        return q_out

    overload = define(
        name_of(spec, tuner),
        "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor slots) "
        "-> Tensor",
        rope_write,
        fake=lambda q, *others: q.new_empty(q.shape),
    )
    return visible(rope_write, Operator(overload))
