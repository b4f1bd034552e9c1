"""Rotary embedding of queries and keys with keys and values written into the paged cache on the way.

Shapes: T tokens; H query heads; G key/value heads; D head size; R rotary dims; B blocks of the cache; N tokens in a
block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.errors import ConfigError
from drivetrain.kernels.cpu.library import ROW_FORMATS
from drivetrain.kernels.cpu.operations import dense
from drivetrain.operators import Operator, define, visible

_INPUTS = ("q", "k", "v", "cos", "sin", "keys", "values", "slots", "out")
_SIZES = ("tokens", "heads", "groups", "size", "rotary", "blocks", "block_size", "format", "cache_format")


class RotationFields(ctypes.Structure):
    """``dt_rotation`` of ``src/elementwise.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _INPUTS),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((f"{name}_strides", ctypes.c_int64 * 2) for name in ("q", "k", "v")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("key", "value")),
    )


def _fail(what: str, found: object, allowed: object) -> ConfigError:
    return ConfigError(f"rope_write: {what}", where="kernels/cpu", found=str(found), allowed=str(allowed))


def _dense_heads(x: Tensor) -> Tensor:
    """The same values, a head's side by side in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _RopeWrite:
    """``rope_write`` for one dtype of activations, with tensors that are checked first."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._run = library.dt_rope_write
        self._dtype = dtype
        self._format = ROW_FORMATS[dtype]

    def __call__(
        self,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        cos_TR: Tensor,
        sin_TR: Tensor,
        keys_BNGD: Tensor,
        values_BNGD: Tensor,
        slots_T: Tensor,
    ) -> Tensor:
        self._check(q_THD, k_TGD, v_TGD, cos_TR, sin_TR, slots_T)
        self._check_cache(k_TGD, keys_BNGD, values_BNGD)
        # Named, so that they live until the call returns.
        q, k, v = _dense_heads(q_THD), _dense_heads(k_TGD), _dense_heads(v_TGD)
        cos, sin, slots = dense(cos_TR.float()), dense(sin_TR.float()), dense(slots_T)
        out_THD = torch.empty(q.shape, dtype=q.dtype)
        tensors = (q, k, v, cos, sin, keys_BNGD, values_BNGD, slots, out_THD)
        tokens, heads, size = q.shape
        fields = RotationFields(
            *(tensor.data_ptr() for tensor in tensors),
            *(tokens, heads, k.shape[1], size, cos.shape[1], *keys_BNGD.shape[:2]),
            *(self._format, ROW_FORMATS[keys_BNGD.dtype]),
            *(tensor.stride()[:2] for tensor in (q, k, v)),
            *(tensor.stride()[:3] for tensor in (keys_BNGD, values_BNGD)),
        )
        if self._run(ctypes.addressof(fields)) != 0:
            blocks, block_size = keys_BNGD.shape[:2]
            raise _fail(
                "a slot lies outside of the cache",
                f"{slots.min()} to {slots.max()}",
                f"0 to {blocks * block_size - 1}, for {blocks} blocks of {block_size}",
            )
        return out_THD

    def _check(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor) -> None:
        for x in (q, k, v):
            if x.dtype is not self._dtype or x.device.type != "cpu":
                raise _fail("bound for another dtype or device", f"{x.dtype} on {x.device}", self._dtype)
        tokens, _, size = q.shape
        if k.shape != v.shape or k.shape[0] != tokens or k.shape[2] != size:
            raise _fail("keys and values do not fit", (tuple(k.shape), tuple(v.shape)), f"({tokens}, any, {size})")
        rotary = cos.shape[-1]
        if cos.shape != sin.shape or cos.shape != (tokens, rotary) or rotary > size or rotary % 2:
            raise _fail("cos and sin do not fit", tuple(cos.shape), f"({tokens}, an even number up to {size})")
        if slots.dtype != torch.int64 or slots.shape != (tokens,):
            raise _fail("slots do not fit", f"{slots.dtype} {tuple(slots.shape)}", f"torch.int64 ({tokens},)")

    @staticmethod
    def _check_cache(k: Tensor, keys: Tensor, values: Tensor) -> None:
        wanted = k.shape[1:]
        if keys.shape != values.shape or keys.shape[2:] != wanted or keys.stride(-1) != 1 or values.stride(-1) != 1:
            found = f"{tuple(keys.shape)} with strides {keys.stride()}, {tuple(values.shape)} with {values.stride()}"
            raise _fail("the cache does not fit", found, f"(blocks, tokens, {wanted[0]}, {wanted[1]}), heads dense")
        if keys.dtype not in ROW_FORMATS or values.dtype is not keys.dtype or keys.device.type != "cpu":
            allowed = ", ".join(map(str, ROW_FORMATS))
            raise _fail(
                "no kernel for a cache of this dtype", f"{keys.dtype}, {values.dtype} on {keys.device}", allowed
            )


def make_rope_write(spec: KernelSpec, library: ctypes.CDLL) -> Callable[..., Any]:
    """``(q [T, H, D], k, v [T, G, D], cos, sin [T, R], keys, values [B, N, G, D], slots [T]) -> q``; for the cache any
    dtype of ``ROW_FORMATS``."""
    run = _RopeWrite(library, getattr(torch, spec.dtype))
    operator = define(
        f"drivetrain_cpu_{library.variant}_{spec.dtype}::rope_write",
        "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor slots) "
        "-> Tensor",
        run.__call__,
        fake=lambda q, *others: q.new_empty(q.shape),
    )
    return visible(run, Operator(operator))
