"""The coarse operation: all layers of a decoder in one call, with their attention over the paged cache.

What it needs of the layers it reads from them once, as pointers to the weights where they lie; a step then fills in the
pointers that change. Weights may be dense or packed, each projection in its own way. Where gradients are asked for,
where the attention backend keeps its pages to itself, or where a layer holds something else, the layers are called one
after the other.

Shapes: T tokens of a step; S sequences; E hidden size; R rotary dims.
"""

from __future__ import annotations

import ctypes
import operator
import threading
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from drivetrain.contracts.attention import (
    AnyPagedCache,
    AttentionStep,
    OpensPages,
    PagedCache,
    PagedView,
    ScaledPages,
)
from drivetrain.contracts.kernels import Angles, DecoderLayer, DecoderLayerParts, KernelSpec, Projection
from drivetrain.fusion.joint import Part
from drivetrain.kernels.cpu.library import CACHE_FORMATS, FORMATS, check
from drivetrain.kernels.cpu.operations import MatrixFields, dense
from drivetrain.kernels.cpu.packed import PACKED, Described
from drivetrain.kernels.reference.decoder import decoder_layers
from drivetrain.packed import PackedLinear
from drivetrain.packed.gguf import block_type
from drivetrain.packed.layers import PackedModule
from drivetrain.pages import Pages

_NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp", "q_norm", "k_norm")
_PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
_SIZES = ("num_layers", "hidden", "num_heads", "kv_heads", "head_size", "rotary", "intermediate")
_KINDS = ("format", "cache_format", "block_size", "activation", "norms_heads")
_NUMBERS = ("eps", "norm_offset", "residual_scale", "attention_scale", "soft_cap")


class LayerFields(ctypes.Structure):
    """``dt_layer`` of ``src/decoder.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _NORMS),
        *((name, MatrixFields) for name in _PROJECTIONS),
        *((name, ctypes.c_int64) for name in ("rope", "group", "window")),
    )


class DecoderFields(ctypes.Structure):
    """``dt_decoder`` of ``src/decoder.cpp``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (*_SIZES, *_KINDS)),
        *((name, ctypes.c_double) for name in _NUMBERS),
        ("layers", ctypes.POINTER(LayerFields)),
    )


class StepFields(ctypes.Structure):
    """``dt_step`` of ``src/decoder.cpp``."""

    _fields_ = (
        ("num_sequences", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("ends_only", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("query_starts", "kv_lengths", "tables", "table_strides", "slots"),
                *("cos", "sin", "keys", "values", "key_scales", "value_scales"),
            )
        ),
    )


def _pointers(tensors: Sequence[torch.Tensor]) -> ctypes.Array[Any]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _codes_of(pages: Pages) -> torch.Tensor:
    return pages.codes if isinstance(pages, ScaledPages) else pages


def _stores_of(cache: AnyPagedCache) -> tuple[ctypes.Array[Any] | None, ...]:
    """Keys, values and, where they have any, their scales."""
    if isinstance(cache, PagedCache):
        return _pointers(cache.keys), _pointers(cache.values), None, None
    both = (cache.keys, cache.values)
    codes = [_pointers([pages.codes for pages in layers]) for layers in both]
    return (*codes, *(_pointers([pages.scales for pages in layers]) for layers in both))


class _Weights:
    """The layers as the library sees them, and every tensor that it points to."""

    def __init__(self, parts: Sequence[DecoderLayerParts], view: PagedView, ropes: Sequence[int | None]) -> None:
        self._replacements = PackedModule.replacements
        self._tensors: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] = []
        # Of packed layers: the dict that a layer keeps its tensors in, the name there, and the tensor that was found.
        self._owners: list[dict[str, torch.Tensor | None]] = []
        self._names: list[str] = []
        self._packed: list[torch.Tensor] = []
        groups = {layer: group for group in view.spec.groups for layer in group.layers}
        self.layers = (LayerFields * len(parts))()
        for index, part in enumerate(parts):
            fields = self.layers[index]
            for name in _NORMS:
                weight = getattr(part, name)
                setattr(fields, name, None if weight is None else self._keep(weight).data_ptr())
            for name in _PROJECTIONS:
                setattr(fields, name, self._matrix(getattr(part, name)))
            rope = ropes[index]
            fields.rope = -1 if rope is None else rope
            fields.group = groups[index].index
            fields.window = view.spec.layers[index].window or 0
        self._places = [tensor.data_ptr() for tensor in self._tensors]

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self._tensors.append(tensor)
        return tensor

    def _matrix(self, projection: Projection) -> MatrixFields:
        if isinstance(projection.module, PackedLinear):
            return self._packed_matrix(projection, projection.module)
        linear = cast(nn.Linear, projection.module)
        if isinstance(linear, Part):
            self._keep(linear.joint_weight)  # of whose memory the part's weight is a view
        weight_OI = self._keep(linear.weight)
        row_bytes = weight_OI.shape[1] * weight_OI.element_size()
        count = projection.rows or weight_OI.shape[0]
        bias = None
        if linear.bias is not None:
            self._keep(linear.bias)
            rows = slice(projection.first, projection.first + count)
            bias = linear.bias.detach()[rows].float().contiguous()
            self._copies.append(bias)
        return MatrixFields(
            weight_OI.data_ptr() + projection.first * row_bytes,
            None if bias is None else bias.data_ptr(),
            count,
            weight_OI.shape[1],
            FORMATS[weight_OI.dtype],
        )

    def _packed_matrix(self, projection: Projection, layer: PackedLinear) -> MatrixFields:
        described = describe(projection, layer)
        for name, tensor in layer.packed.tensors.items():
            self._owners.append(layer._buffers)
            self._names.append(name)
            self._packed.append(tensor)
        self._copies += described.kept
        return described.fields

    @property
    def are_where_they_were(self) -> bool:
        """False once a parameter has other memory or a packed layer another tensor: what the library holds is stale."""
        # Hundreds of tensors, at every step: they are only looked at where any packed layer has got another one.
        if self._replacements != PackedModule.replacements:
            self._replacements = PackedModule.replacements
            if not all(map(operator.is_, map(operator.getitem, self._owners, self._names), self._packed)):
                return False
        return list(map(torch.Tensor.data_ptr, self._tensors)) == self._places


class _Bound(threading.local):
    """What one thread has described to the library: the layers' weights, and the cache that it used last.

    A swap warms new parts up in a thread of its own while the engine's thread goes on with the same model.
    """

    weights: _Weights | None = None
    layers: Sequence[DecoderLayer] | None = None
    is_plain = False
    cache: object = None
    stores: tuple[ctypes.Array[Any] | None, ...] = ()
    fields = DecoderFields()


class CoarseDecoder:
    """The bound operation ``decoder_layers``. Any thread may call it."""

    def __init__(self, spec: KernelSpec, library: ctypes.CDLL) -> None:
        self._spec = spec
        self._library = library
        self._bound = _Bound()

    def __call__(
        self,
        layers: Sequence[DecoderLayer],
        x_TE: torch.Tensor,
        angles: Sequence[Angles],
        ropes: Sequence[int | None],
        step: AttentionStep,
    ) -> torch.Tensor:
        bound = self._bound
        if bound.layers is not layers:
            bound.layers, bound.weights = layers, None
            bound.is_plain = all(_is_plain(layer, self._spec) for layer in layers)
        if torch.is_grad_enabled() or not bound.is_plain or not isinstance(step, OpensPages):
            return decoder_layers(layers, x_TE, angles, ropes, step)
        view = step.pages
        if bound.weights is None or not bound.weights.are_where_they_were:
            bound.weights = _Weights([layer.parts() for layer in layers], view, ropes)
            bound.cache = None
        if bound.cache is not view.cache:
            bound.cache = view.cache
            bound.stores = _stores_of(view.cache)
            bound.fields = self._describe(bound.weights, view)
        x = x_TE.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        self._run(bound, view, x, [(dense(cos.float()), dense(sin.float())) for cos, sin in angles])
        return x.to(x_TE.dtype)

    def _describe(self, weights: _Weights, view: PagedView) -> DecoderFields:
        sizes, params = self._spec.sizes, self._spec.params
        first = view.spec.layers[0]
        return DecoderFields(
            len(weights.layers),
            *(sizes[name] for name in ("E", "H", "G", "D", "R", "I")),
            FORMATS[getattr(torch, self._spec.dtype)],
            CACHE_FORMATS[_codes_of(view.cache.keys[0]).dtype],
            view.block_size,
            int(params["activation"]),
            int(params["norms_heads"]),
            *(params[name] for name in ("eps", "weight_offset", "residual_scale")),
            first.scale,
            first.soft_cap or 0.0,
            ctypes.cast(weights.layers, ctypes.POINTER(LayerFields)),
        )

    def _run(self, bound: _Bound, view: PagedView, x_TE: torch.Tensor, angles: Sequence[Angles]) -> None:
        batch = view.batch
        # Named, so that they live until the call returns.
        arrays = (
            _pointers(batch.block_tables),
            (ctypes.c_int64 * len(batch.block_tables))(*(table.stride(0) for table in batch.block_tables)),
            _pointers(batch.slots),
            _pointers([cos for cos, _ in angles]),
            _pointers([sin for _, sin in angles]),
            *bound.stores,
        )
        step = StepFields(
            batch.num_sequences,
            x_TE.shape[0],
            batch.ends_only,
            batch.query_starts.data_ptr(),
            batch.kv_lengths.data_ptr(),
            *(None if array is None else ctypes.addressof(array) for array in arrays),
        )
        fields = ctypes.addressof(bound.fields)
        check(self._library.dt_decoder_forward(fields, ctypes.addressof(step), x_TE.data_ptr()))


def describe(projection: Projection, layer: PackedLinear) -> Described:
    """The outputs of a packed layer that a projection is. Raises ConfigError where its tensors do not fit."""
    packed, bias_O = layer.packed, layer.bias
    if projection.rows is not None:
        packed = packed.rows(projection.first, projection.rows)
        bias_O = None if bias_O is None else bias_O[projection.first : projection.first + projection.rows]
    kind = block_type(packed.params) if "blocks" in packed.tensors else None
    number = int(packed.params.get("type", 0))
    return Described(packed.operation, list(packed.tensors.values()), bias_O, packed.in_features, kind, number)


def _is_plain(layer: DecoderLayer, spec: KernelSpec) -> bool:
    """Whether every weight of a layer can be read: norms and dense weights of the expected dtype, or packed ones."""
    parts = layer.parts()
    dtype = getattr(torch, spec.dtype)
    weights = [weight for name in _NORMS if (weight := getattr(parts, name)) is not None]
    for name in _PROJECTIONS:
        projection: Projection = getattr(parts, name)
        if isinstance(projection.module, PackedLinear):
            if not _can_read(projection, projection.module):
                return False
        elif isinstance(projection.module, nn.Linear | Part):
            weights.append(cast(nn.Linear, projection.module).weight)
        else:
            return False
    return all(weight.dtype == dtype and weight.device.type == "cpu" and weight.is_contiguous() for weight in weights)


def _can_read(projection: Projection, layer: PackedLinear) -> bool:
    """Whether packed weights can be read where they lie: in main memory, in order, without a copy of them."""
    packed = layer.packed
    if packed.order is not None or packed.operation not in PACKED:
        return False
    if any(tensor.device.type != "cpu" for tensor in packed.tensors.values()):
        return False
    described = describe(projection, layer)
    places = {tensor.data_ptr() for tensor in described.copies}
    bias = described.fields.bias
    return not places - {bias}
