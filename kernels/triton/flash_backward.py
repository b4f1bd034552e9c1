"""The gradients of attention over packed sequences, without a cache: one kernel for keys and values, one for queries.

Probabilities are computed again from the scores and the logarithm that the forward kept of each row. Source: Dao et al.
2022, "FlashAttention", algorithm 4, here with a kernel for either side, so that nothing is added by several programs.
Rows and tiles are those of :mod:`drivetrain.kernels.triton.flash`.

Shapes: T tokens of a step; H query heads; G key/value heads; R = H / G; D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from drivetrain.contracts.attention import LayerAttention
from drivetrain.kernels.triton.flash import TilesOf, layer_constants, score_constants, scores, seen_range
from drivetrain.kernels.triton.launch import INTERPRETED, dot, power_of_two
from drivetrain.kernels.triton.tuning import FUSED, Blocks


@triton.jit(do_not_specialize=["num_rows"])
def _row_products(
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """The inner product of each row of two dense matrices."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    is_in = (rows < num_rows)[:, None] & (dims < D)[None, :]
    a = tl.load(a_ptr + rows[:, None] * D + dims[None, :], mask=is_in, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + rows[:, None] * D + dims[None, :], mask=is_in, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, tl.sum(a * b, axis=1), mask=rows < num_rows)


@triton.jit
def _score_gradients(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    grad: tl.tensor,
    log: tl.tensor,
    mean: tl.tensor,
    tokens: tl.tensor,
    keys: tl.tensor,
    is_key: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_MASKED: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tensor:
    """Probabilities, and the gradients of the scores before the soft cap: ``p * (grad . v - mean)``. q, grad [M, D];
    k, v [D, N]."""
    s = scores(q, k, factor, cap, HAS_CAP, WIDE)
    if IS_MASKED:
        is_seen = is_key[None, :] & (keys[None, :] <= tokens[:, None])
        if WINDOW > 0:
            is_seen = is_seen & (keys[None, :] > tokens[:, None] - WINDOW)
        p = tl.exp2(tl.where(is_seen, s, float("-inf")) - log[:, None])
    else:
        p = tl.exp2(s - log[:, None])
    ds = p * (dot(grad, v, WIDE) - mean[:, None])
    if HAS_CAP:
        ds *= 1.0 - (s / cap) * (s / cap)
    return p, ds


@triton.jit
def _add_queries(
    k_grad: tl.tensor,
    v_grad: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    keys: tl.tensor,
    is_key: tl.tensor,
    q_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    log_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    start: tl.tensor,
    group: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    q_by_token: tl.tensor,
    q_by_head: tl.tensor,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Add what the rows from ``begin`` to ``end`` give to the gradients of keys and values. k, v [N, D]."""
    dims = tl.arange(0, BLOCK_D)
    for first_row in range(begin, end, BLOCK_M):
        rows = first_row + tl.arange(0, BLOCK_M)
        tokens, heads = rows // R, group * R + rows % R
        is_row = rows < end
        is_in = is_row[:, None] & (dims < D)[None, :]
        q_rows = q_ptr + (start + tokens) * q_by_token + heads * q_by_head
        own_rows = (start + tokens) * (G * R) + heads
        q = tl.load(q_rows[:, None] + dims[None, :], mask=is_in, other=0.0)
        grad = tl.load(grad_ptr + own_rows[:, None] * D + dims[None, :], mask=is_in, other=0.0)
        log = tl.load(log_ptr + own_rows, mask=is_row, other=float("inf"))  # a row that is not there weighs nothing
        mean = tl.load(mean_ptr + own_rows, mask=is_row, other=0.0)
        p, ds = _score_gradients(
            q, tl.trans(k), tl.trans(v), grad, log, mean, tokens, keys, is_key, factor, cap,
            WINDOW, HAS_CAP, IS_MASKED, WIDE,
        )  # fmt: skip
        v_grad += dot(tl.trans(p).to(grad.dtype), grad, WIDE)
        k_grad += dot(tl.trans(ds).to(q.dtype), q, WIDE)
    return k_grad, v_grad


@triton.jit
def _key_gradients(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    log_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    k_grad_ptr: tl.tensor,
    v_grad_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    scale: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    q_by_token: tl.tensor,
    q_by_head: tl.tensor,
    k_by_token: tl.tensor,
    k_by_head: tl.tensor,
    v_by_token: tl.tensor,
    v_by_head: tl.tensor,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """BLOCK_N keys of one sequence and one key/value head a program: the gradients of keys and values."""
    sequence = tl.load(tiles_ptr + 2 * tl.program_id(0))
    first_key = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    group = tl.program_id(1)
    start = tl.load(starts_ptr + sequence).to(tl.int64)
    length = tl.load(starts_ptr + sequence + 1).to(tl.int32) - start.to(tl.int32)
    keys = first_key + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    is_key = keys < length
    is_in = is_key[:, None] & (dims < D)[None, :]
    k_rows = k_ptr + (start + keys) * k_by_token + group * k_by_head
    v_rows = v_ptr + (start + keys) * v_by_token + group * v_by_head
    k = tl.load(k_rows[:, None] + dims[None, :], mask=is_in, other=0.0)
    v = tl.load(v_rows[:, None] + dims[None, :], mask=is_in, other=0.0)
    k_grad = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    v_grad = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    begin = first_key * R
    end = length * R
    if WINDOW > 0:
        end = tl.minimum(length, first_key + BLOCK_N - 1 + WINDOW) * R
        whole = end
    else:
        # From the token of the last key on, rows see all keys of this program.
        whole = tl.minimum(end, begin + tl.cdiv((BLOCK_N - 1) * R, BLOCK_M) * BLOCK_M)
    # A tile with keys that are not there is masked throughout: their products are of zeros, not of what rows expect.
    whole = tl.where(first_key + BLOCK_N > length, end, whole)
    k_grad, v_grad = _add_queries(
        k_grad, v_grad, k, v, keys, is_key, q_ptr, grad_ptr, log_ptr, mean_ptr, begin, whole, start, group,
        factor, cap, q_by_token, q_by_head, G, R, D, WINDOW, HAS_CAP, True, WIDE, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    k_grad, v_grad = _add_queries(
        k_grad, v_grad, k, v, keys, is_key, q_ptr, grad_ptr, log_ptr, mean_ptr, whole, end, start, group,
        factor, cap, q_by_token, q_by_head, G, R, D, WINDOW, HAS_CAP, False, WIDE, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    where = ((start + keys) * G + group)[:, None] * D + dims[None, :]
    tl.store(k_grad_ptr + where, (k_grad * scale).to(k_grad_ptr.dtype.element_ty), mask=is_in)
    tl.store(v_grad_ptr + where, v_grad.to(v_grad_ptr.dtype.element_ty), mask=is_in)


@triton.jit
def _add_keys(
    q_grad: tl.tensor,
    q: tl.tensor,
    grad: tl.tensor,
    log: tl.tensor,
    mean: tl.tensor,
    tokens: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    end_key: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    k_by_token: tl.tensor,
    v_by_token: tl.tensor,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Add what the keys from ``begin`` to ``end`` give to the gradient of queries."""
    dims = tl.arange(0, BLOCK_D)
    for first_key in range(begin, end, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        is_key = keys < end_key
        is_in = is_key[None, :] & (dims < D)[:, None]
        k = tl.load(k_ptr + keys.to(tl.int64)[None, :] * k_by_token + dims[:, None], mask=is_in, other=0.0)
        v = tl.load(v_ptr + keys.to(tl.int64)[None, :] * v_by_token + dims[:, None], mask=is_in, other=0.0)
        _, ds = _score_gradients(
            q, k, v, grad, log, mean, tokens, keys, is_key, factor, cap, WINDOW, HAS_CAP, IS_MASKED, WIDE
        )
        q_grad += dot(ds.to(k.dtype), tl.trans(k), WIDE)
    return q_grad


@triton.jit
def _query_gradients(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    log_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    q_grad_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    scale: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    q_by_token: tl.tensor,
    q_by_head: tl.tensor,
    k_by_token: tl.tensor,
    k_by_head: tl.tensor,
    v_by_token: tl.tensor,
    v_by_head: tl.tensor,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One tile and one key/value head a program: the gradient of queries."""
    sequence = tl.load(tiles_ptr + 2 * tl.program_id(0))
    first_row = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    group = tl.program_id(1)
    start = tl.load(starts_ptr + sequence).to(tl.int64)
    length = tl.load(starts_ptr + sequence + 1).to(tl.int32) - start.to(tl.int32)
    rows = first_row + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    tokens, heads = rows // R, group * R + rows % R
    is_row = rows < length * R
    is_in = is_row[:, None] & (dims < D)[None, :]
    q_rows = q_ptr + (start + tokens) * q_by_token + heads * q_by_head
    own_rows = (start + tokens) * (G * R) + heads
    where = own_rows[:, None] * D + dims[None, :]
    q = tl.load(q_rows[:, None] + dims[None, :], mask=is_in, other=0.0)
    grad = tl.load(grad_ptr + where, mask=is_in, other=0.0)
    log = tl.load(log_ptr + own_rows, mask=is_row, other=float("inf"))
    mean = tl.load(mean_ptr + own_rows, mask=is_row, other=0.0)
    k_group = k_ptr + start * k_by_token + group * k_by_head
    v_group = v_ptr + start * v_by_token + group * v_by_head
    last = tl.minimum(length - 1, (first_row + BLOCK_M - 1) // R)
    begin, whole_from, whole_to = seen_range(first_row // R, last, WINDOW, BLOCK_N)
    q_grad = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if WINDOW > 0:
        q_grad = _add_keys(
            q_grad, q, grad, log, mean, tokens, k_group, v_group, begin, whole_from, last + 1,
            factor, cap, k_by_token, v_by_token, D, WINDOW, HAS_CAP, True, WIDE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    q_grad = _add_keys(
        q_grad, q, grad, log, mean, tokens, k_group, v_group, whole_from, whole_to, last + 1,
        factor, cap, k_by_token, v_by_token, D, WINDOW, HAS_CAP, False, WIDE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    q_grad = _add_keys(
        q_grad, q, grad, log, mean, tokens, k_group, v_group, whole_to, last + 1, last + 1,
        factor, cap, k_by_token, v_by_token, D, WINDOW, HAS_CAP, True, WIDE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    tl.store(q_grad_ptr + where, (q_grad * scale).to(q_grad_ptr.dtype.element_ty), mask=is_in)


# --- how they are launched -----------------------------------------------------------------------------------------


def backward_candidates(layer: LayerAttention, itemsize: int) -> list[Blocks]:
    """Tiles that fit, for either backward kernel; the first one is safe everywhere."""
    if INTERPRETED:
        return [Blocks.of(BLOCK_M=64, BLOCK_N=64)]
    size = power_of_two(layer.head_size)
    if itemsize == 4 or size > 128:
        return [Blocks.of(4, 1, BLOCK_M=32, BLOCK_N=32), Blocks.of(8, 1, BLOCK_M=64, BLOCK_N=64)]
    return [
        Blocks.of(4, 1, BLOCK_M=64, BLOCK_N=64),
        Blocks.of(4, 2, BLOCK_M=64, BLOCK_N=64),
        Blocks.of(8, 2, BLOCK_M=64, BLOCK_N=128),
        Blocks.of(8, 2, BLOCK_M=128, BLOCK_N=64),
        Blocks.of(8, 2, BLOCK_M=128, BLOCK_N=128),
    ]


class BackwardInputs:
    """What both backward kernels read: everything of the forward, and the gradient of its output."""

    def __init__(
        self,
        layer: LayerAttention,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        out_THD: torch.Tensor,
        log_TH: torch.Tensor,
        grad_THD: torch.Tensor,
        starts: torch.Tensor,
    ) -> None:
        self.layer, self.q_THD, self.k_TGD, self.v_TGD, self.starts = layer, q_THD, k_TGD, v_TGD, starts
        self.grad_THD, self.log_TH = grad_THD.contiguous(), log_TH
        # By the softmax's derivative, each row's mean of (grad . v) under its probabilities: that is grad . out.
        self.mean_TH = torch.empty_like(log_TH)
        rows, size = log_TH.numel(), layer.head_size
        _row_products[(triton.cdiv(rows, 32),)](
            out_THD, self.grad_THD, self.mean_TH, rows, D=size, BLOCK_D=power_of_two(size), ROWS=32, **FUSED
        )

    def _launch(self, kernel: Any, tiles: torch.Tensor, outs: tuple[torch.Tensor, ...], blocks: Blocks) -> None:
        if tiles.shape[0] == 0:
            return
        kernel[(tiles.shape[0], self.layer.num_kv_heads)](
            self.q_THD,
            self.k_TGD,
            self.v_TGD,
            self.grad_THD,
            self.log_TH,
            self.mean_TH,
            *outs,
            tiles,
            self.starts,
            self.layer.scale,
            *score_constants(self.layer),
            *self.q_THD.stride()[:2],
            *self.k_TGD.stride()[:2],
            *self.v_TGD.stride()[:2],
            **layer_constants(self.layer),
            **blocks.launch,
        )

    def key_gradients(self, outs: tuple[torch.Tensor, torch.Tensor], tiles_of: TilesOf, blocks: Blocks) -> None:
        """Gradients of keys and values, dense [T, G, D]; a tile is BLOCK_N keys."""
        self._launch(_key_gradients, tiles_of(1, blocks["BLOCK_N"]), outs, blocks)

    def query_gradients(self, out: torch.Tensor, tiles_of: TilesOf, blocks: Blocks) -> None:
        """Gradient of queries, dense [T, H, D]."""
        repeats = self.layer.num_heads // self.layer.num_kv_heads
        self._launch(_query_gradients, tiles_of(repeats, blocks["BLOCK_M"]), (out,), blocks)
