"""Products with packed weights: what the library is told of them, and the operations that a packed layer binds.

Shapes: ``...`` any leading dims; I, O features.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from drivetrain.contracts.kernels import OPERATIONS, KernelSpec
from drivetrain.contracts.plugin import Probe
from drivetrain.errors import ConfigError
from drivetrain.kernels.cpu.library import FORMATS, check
from drivetrain.kernels.cpu.operations import MatrixFields, dense
from drivetrain.operators import Operator, define, visible
from drivetrain.packed import DECODERS
from drivetrain.packed.gguf import BLOCK_TYPES, BlockType, block_type

Kernel = Callable[..., Any]

_SCALE_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""dtype of scales that are read where they lie -> its number in the library; others are copied to float32."""

_FORMATS = {
    "linear_int8": 2,
    "linear_w8a8": 2,
    "linear_fp8": 3,
    "linear_fp8a8": 3,
    "linear_int4": 4,
    "linear_int4_a8": 4,
    "linear_int3": 5,
}
_BLOCK_FORMATS = 16
"""Operation -> number of its weights' format (``Format`` in ``src/matmul.h``); of GGUF blocks, this and ggml's type."""

_ROUNDINGS = {"linear_w8a8": 1, "linear_gguf_a8": 2, "linear_fp8a8": 3, "linear_int4_a8": 4}
"""Operation -> what is done to activations first (``Rounding`` in ``src/rounded.h``)."""

_BY_GROUP = {"linear_int4": 2, "linear_int4_a8": 32, "linear_int3": 8}
"""Operation with scales of groups -> what inputs must be a multiple of, beside the group."""

_WEIGHT_DTYPES = {
    "weight": {
        "linear_int8": torch.int8,
        "linear_w8a8": torch.int8,
        "linear_fp8": torch.float8_e4m3fn,
        "linear_fp8a8": torch.float8_e4m3fn,
        "linear_int4": torch.uint8,
        "linear_int4_a8": torch.uint8,
    },
    "low": {"linear_int3": torch.uint8},
    "high": {"linear_int3": torch.uint8},
    "blocks": {"linear_gguf": torch.uint8, "linear_gguf_a8": torch.uint8},
}
"""Argument that holds weights -> operation -> its dtype."""

PACKED = tuple(operation for operation in OPERATIONS if operation in DECODERS)
"""The operations of this module."""


def argument_names(operation: str) -> tuple[str, ...]:
    """The weight arguments: all between ``x`` and ``bias``."""
    return tuple(OPERATIONS[operation].arguments)[1:-1]


# --- what is refused -----------------------------------------------------------------------------------------------


def refused_shape(spec: KernelSpec) -> Probe | None:
    """Why sizes and params of a spec can't be served, if they can't."""
    size = spec.sizes.get("I", 0)
    if spec.operation in ("linear_gguf", "linear_gguf_a8"):
        number = spec.params.get("type")
        if number is None or number not in BLOCK_TYPES:
            known = ", ".join(str(key) for key in BLOCK_TYPES)
            return Probe.no("unsupported_type", "no such GGUF blocks", wanted=f"type {number}", offered=known)
        return _refused_multiple(size, BLOCK_TYPES[int(number)].size)
    if spec.operation in _BY_GROUP:
        group = spec.params.get("group", size)
        if group < 1 or group != int(group):
            return Probe.no("unsupported_shape", "no group size", wanted=str(group), offered="a whole number above 0")
        return _refused_multiple(size, _BY_GROUP[spec.operation]) or _refused_multiple(size, int(group))
    return None


def _refused_multiple(size: int, of: int) -> Probe | None:
    if size % of == 0:
        return None
    return Probe.no(
        "unsupported_shape", "inputs that fill no byte, group or block", wanted=str(size), offered=f"multiples of {of}"
    )


def _fail(what: str, found: object, allowed: object) -> ConfigError:
    return ConfigError(what, where="kernels/cpu", found=str(found), allowed=str(allowed))


# --- what the library is told --------------------------------------------------------------------------------------


class Described:
    """A packed weight as the library sees it: ``fields``, and every tensor that they point to.

    copies: of them that are no arguments, but made here: what is written to the arguments later is not seen in them.
    Raises ConfigError for a shape, dtype or device that does not fit the operation.
    """

    def __init__(
        self,
        operation: str,
        tensors: Sequence[Tensor],
        bias_O: Tensor | None,
        in_features: int,
        kind: BlockType | None,
        number: int,
    ) -> None:
        """kind, number: of GGUF blocks, the type and ggml's number of it."""
        self.kept: list[Tensor] = []
        self.copies: list[Tensor] = []
        named = dict(zip(argument_names(operation), tensors, strict=True))
        for name, tensor in named.items():
            self._check_dtype(operation, name, tensor)
        first = next(iter(named.values()))
        if first.dim() != 2:
            raise _fail("packed weights are rows of outputs", tuple(first.shape), "(outputs, values of a row)")
        rows, size = first.shape[0], in_features
        shapes = _shapes(operation, rows, size, named, kind)
        for name, shape in shapes.items():
            if tuple(named[name].shape) != shape:
                raise _fail(f"{operation}: {name} has the wrong shape", tuple(named[name].shape), shape)
        self.fields = MatrixFields(
            rows=rows,
            cols=size,
            format=_FORMATS.get(operation, _BLOCK_FORMATS + number),
            rounding=_ROUNDINGS.get(operation, 0),
        )
        weight = self._dense(first)
        self.fields.weight, self.fields.stride = weight.data_ptr(), weight.stride(0) * weight.element_size()
        if "high" in named:
            self.fields.high = self._dense(named["high"]).data_ptr()
        if "scales" in named:
            self._scales(named, size)
        if "x_scale" in named:
            self.fields.x_scale = self._copied(named["x_scale"], torch.float32).data_ptr()
        if bias_O is not None:
            if tuple(bias_O.shape) != (rows,) or bias_O.device.type != "cpu":
                raise _fail("the bias does not fit", f"{tuple(bias_O.shape)} on {bias_O.device}", (rows,))
            self.fields.bias = self._copied(bias_O, torch.float32).data_ptr()

    @staticmethod
    def _check_dtype(operation: str, name: str, tensor: Tensor) -> None:
        wanted = _WEIGHT_DTYPES.get(name, {}).get(operation)
        fits = tensor.is_floating_point() if wanted is None else tensor.dtype == wanted
        if name == "mins" and tensor.dtype == torch.uint8:  # zero points
            fits = True
        if not fits or tensor.device.type != "cpu":
            allowed = f"{wanted or 'a floating dtype'} on cpu"
            raise _fail(
                f"{operation}: {name} has another dtype or device", f"{tensor.dtype} on {tensor.device}", allowed
            )

    def _scales(self, named: Mapping[str, Tensor], size: int) -> None:
        scales, mins = named["scales"], named.get("mins")
        has_zeros = mins is not None and mins.dtype == torch.uint8
        is_read = scales.dtype in _SCALE_FORMATS and (mins is None or has_zeros or mins.dtype == scales.dtype)
        dtype = scales.dtype if is_read else torch.float32
        self.fields.scale_format = _SCALE_FORMATS[dtype]
        self.fields.scales = self._copied(scales, dtype).data_ptr()
        if mins is not None:
            self.fields.mins = self._copied(mins, mins.dtype if has_zeros else dtype).data_ptr()
            self.fields.has_zeros = has_zeros
            self.fields.group = size // scales.shape[1]

    def _dense(self, tensor: Tensor) -> Tensor:
        return self._copied(tensor, tensor.dtype)

    def _copied(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        found = dense(tensor.detach().to(dtype))
        self.kept.append(found)
        if found.data_ptr() != tensor.data_ptr():
            self.copies.append(found)
        return found


def _shapes(
    operation: str, rows: int, size: int, named: Mapping[str, Tensor], kind: BlockType | None
) -> dict[str, tuple[int, ...]]:
    """The shapes that the arguments must have. Raises ConfigError where no scales would do."""
    if kind is not None:
        return {"blocks": (rows, kind.row_bytes(size))}
    if "mins" not in named:
        shapes: dict[str, tuple[int, ...]] = {"weight": (rows, size), "scales": (rows,)}
        return {**shapes, "x_scale": ()} if "x_scale" in named else shapes
    scales = named["scales"]
    groups = scales.shape[1] if scales.dim() == 2 else 0
    if groups < 1 or size % groups:
        raise _fail(f"{operation}: {size} inputs are not divided by scales", tuple(scales.shape), f"({rows}, groups)")
    weights = {"weight": 2} if operation != "linear_int3" else {"low": 4, "high": 8}
    divided = {name: (rows, size // count) for name, count in weights.items()}
    if size % _BY_GROUP[operation]:
        raise _fail(f"{operation}: inputs fill no whole bytes or blocks", size, f"multiples of {_BY_GROUP[operation]}")
    return {**divided, "scales": (rows, groups), "mins": (rows, groups)}


# --- what a packed layer binds -------------------------------------------------------------------------------------


def _is_same(one: object, other: object) -> bool:
    """The same tensor, or an equal number."""
    return one is other or (isinstance(one, int) and one == other)


class PackedRows:
    """One operation of one dtype of activations, with tensors that are checked first."""

    def __init__(self, operation: str, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.operation = operation
        self._library = library
        self._dtype = dtype
        self._has_blocks = "blocks" in argument_names(operation)
        self._last: tuple[tuple[Any, ...], Described] | None = None
        self.namespace = f"drivetrain_cpu_{library.variant}_{str(dtype).removeprefix('torch.')}"

    def _described(self, size: int, *arguments: Any) -> Described:
        """The weights as the library sees them. A layer comes with the same tensors again and again: what needed no
        copy is remembered by where they lie."""
        *weights, bias_O, number = arguments
        tensors = weights if bias_O is None else [*weights, bias_O]
        key = (size, number, *tensors, *map(Tensor.data_ptr, tensors))
        last = self._last
        if last is not None and len(last[0]) == len(key) and all(map(_is_same, last[0], key)):
            return last[1]
        kind = block_type({"type": number}) if self._has_blocks else None
        described = Described(self.operation, weights, bias_O, size, kind, number)
        self._last = None if described.copies else (key, described)
        return described

    def __call__(self, x: Tensor, *arguments: Any) -> Tensor:
        """arguments: the weights', the bias or None, and ggml's number of GGUF blocks or 0."""
        if x.dtype is not self._dtype or x.device.type != "cpu":
            raise _fail("bound for another dtype or device", f"{x.dtype} on {x.device}", self._dtype)
        described = self._described(x.shape[-1], *arguments)
        x = dense(x)
        out = x.new_empty((*x.shape[:-1], described.fields.rows))
        if out.numel():
            rows, place = x.numel() // x.shape[-1], ctypes.addressof(described.fields)
            check(self._library.dt_linear(x.data_ptr(), rows, place, FORMATS[self._dtype], out.data_ptr()))
        return out


def make_packed(spec: KernelSpec, library: ctypes.CDLL) -> Kernel:
    """``(x [..., I], packed weights, bias) -> [..., O]``; differentiable with respect to x."""
    operation, names = spec.operation, argument_names(spec.operation)
    run = PackedRows(operation, library, getattr(torch, spec.dtype))
    number = int(spec.params.get("type", 0))

    def compute(x: Tensor, *arguments: Any) -> Tensor:
        return run(x, *arguments)

    def fake(x: Tensor, *arguments: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], arguments[0].shape[0]))

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[1 : 1 + len(names)])
        ctx.number = inputs[-1]

    def backward(ctx: Any, grad: Tensor) -> Any:
        wide = torch.promote_types(grad.dtype, torch.float32)
        weight_OI = DECODERS[operation](*ctx.saved_tensors, wide, {"type": ctx.number})
        return ((grad.to(wide) @ weight_OI).to(grad.dtype), *(None for _ in (*names, "bias", "type")))

    operator = define(
        f"{run.namespace}::{operation}",
        f"(Tensor x, {', '.join(f'Tensor {name}' for name in names)}, Tensor? bias, int type) -> Tensor",
        compute,
        fake=fake,
        save=save,
        backward=backward,
    )

    def linear(x: Tensor, *packed: Tensor | None) -> Tensor:
        bias_O = packed[len(names)] if len(packed) > len(names) else None
        return run(x, *packed[: len(names)], bias_O, number)

    return visible(linear, Operator(operator, (number,)))
