"""The layouts of compressed-tensors, as llm-compressor writes them and vLLM and transformers read them.

``pack-quantized``: ``weight_packed`` int32 [O, W], fields of ``value + 2**(bits - 1)`` along the inputs;
``weight_scale`` [O, N]; ``weight_zero_point`` int32, packed in the same way along the outputs; ``weight_shape``.
``int-quantized``, ``float-quantized`` and ``naive-quantized``: ``weight`` int8 or float8_e4m3fn [O, I];
``weight_scale`` [O, 1] or of one value; ``input_scale`` where activations have a scale of the files. A weight is
``(value - zero) * scale``.

Shapes: O output features; I input features; N groups of a row; W words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from drivetrain.contracts.packed import PackedWeight
from drivetrain.errors import ConfigError, LoaderError
from drivetrain.plugins.quantizer.formats.bits import num_words, pack_bits, unpack_bits
from drivetrain.plugins.quantizer.formats.grid import IntegerGrid, why_not_bits
from drivetrain.plugins.quantizer.formats.layer import FLOATS, StoredLayer, StoredWeight, order_of, positive

PACK, INTS, FLOAT8 = "pack-quantized", "int-quantized", "float-quantized"
_NAIVE, _MIXED = "naive-quantized", "mixed-precision"
_WIDTHS = range(2, 9)


@dataclass(frozen=True)
class Scheme:
    """How one group of layers is stored.

    kind:       ``"int"`` or ``"float"``.
    group:      inputs that share a scale; None for whole rows, or for one scale for all.
    activation: None where they stay as they are; ``"dynamic"`` for a scale for each token, ``"static"`` for one of the
                files.
    packed:     several weights in a word.
    """

    bits: int
    kind: str = "int"
    symmetric: bool = True
    group: int | None = None
    per_tensor: bool = False
    activation: str | None = None
    packed: bool = False

    @property
    def format(self) -> str:
        """The library's name of it."""
        if self.packed:
            return PACK
        return INTS if self.kind == "int" else FLOAT8

    def why_not_packed(self) -> str | None:
        """Why no operation multiplies by weights in this form; None where one does."""
        if self.packed:
            return why_not_bits(self.bits)
        if self.kind == "int" and self.activation == "static":
            return "no operation multiplies integer weights by activations with a scale of the files"
        return None

    def entry(self) -> dict[str, Any]:
        """Its entry of ``config_groups``, without the targets."""
        strategy = "group" if self.group is not None else "channel"
        weights = {
            "num_bits": self.bits,
            "type": self.kind,
            "symmetric": self.symmetric,
            "strategy": strategy,
            "group_size": self.group,
            "dynamic": False,
        }
        inputs = None
        if self.activation is not None:
            is_dynamic = self.activation == "dynamic"
            inputs = {
                "num_bits": self.bits,
                "type": self.kind,
                "symmetric": True,
                "strategy": "token" if is_dynamic else "tensor",
                "group_size": None,
                "dynamic": is_dynamic,
            }
        return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": self.format}


# --- reading -------------------------------------------------------------------------------------------------------


class CompressedTensorsFormat:
    """Reads compressed-tensors checkpoints."""

    method = "compressed-tensors"
    parts = frozenset(
        {"weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale"}
    )

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where = where
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise LoaderError("quantization_config has no usable config_groups", where=where, found=groups)
        if config.get("kv_cache_scheme") is not None:
            raise LoaderError(
                "the files hold scales for keys and values, which are not read",
                where=where,
                found="kv_cache_scheme",
                hint="Remove kv_cache_scheme from config.json and the k_scale and v_scale tensors, and set "
                "quantizer.kv.",
            )
        self._groups = [
            (list(group.get("targets") or ()), _scheme(name, group, config.get("format"), where))
            for name, group in groups.items()
            if isinstance(group, Mapping) or _bad_group(name, group, where)
        ]

    def check(self, layer: StoredLayer) -> tuple[int, int]:
        scheme = self._scheme(layer)
        if scheme.packed:
            rows, words = layer.matrix("weight_packed", ["I32"])
            layer.need("weight_shape", ["I64", "I32"], (2,))
            # The true number of inputs is data; the words bound it, and the scales tell it where there are groups.
            inputs = words * 32 // scheme.bits
            if scheme.group is not None:
                _, groups = layer.matrix("weight_scale", FLOATS)
                inputs = groups * scheme.group
            else:
                inputs = _stored_shape(layer)[1]
            if num_words(inputs, scheme.bits) != words:
                raise layer.error(
                    f"tensor {layer.name}.weight_packed is no row of {inputs} weights of {scheme.bits} bits",
                    f"{words} words",
                    f"{num_words(inputs, scheme.bits)} words",
                )
        else:
            stored = ["I8"] if scheme.kind == "int" else ["F8_E4M3"]
            rows, inputs = layer.matrix("weight", stored)
        self._check_scales(layer, scheme, rows, inputs)
        return rows, inputs

    def _check_scales(self, layer: StoredLayer, scheme: Scheme, rows: int, inputs: int) -> None:
        shape = layer.need("weight_scale", FLOATS)
        groups = inputs // (scheme.group or inputs)
        allowed = [(1,), (), (1, 1)] if scheme.per_tensor else [(rows, groups), *([(rows,)] if groups == 1 else [])]
        if shape not in allowed:
            raise layer.error(
                f"tensor {layer.name}.weight_scale has another shape than its layer needs", shape, allowed
            )
        if scheme.packed and not scheme.symmetric:
            layer.need("weight_zero_point", ["I32"], (num_words(rows, scheme.bits), groups))
        if scheme.activation == "static":
            found = layer.need("input_scale", FLOATS)
            if found not in [(1,), ()]:
                raise layer.error(f"tensor {layer.name}.input_scale must be one value", found, "(1,)")
        if "weight_g_idx" in layer.headers:
            layer.need("weight_g_idx", ["I32", "I64"], (inputs,))

    def why_not_packed(self) -> str | None:
        return next((reason for _, scheme in self._groups if (reason := scheme.why_not_packed())), None)

    def read(self, layer: StoredLayer) -> StoredWeight:
        scheme = self._scheme(layer)
        rows, inputs = self.check(layer)
        if scheme.packed:
            return StoredWeight.of_grid(_read_grid(layer, scheme, rows, inputs))
        weight_OI = layer.read("weight")
        scales_O = layer.read("weight_scale").reshape(-1).expand(rows).contiguous()
        tensors = {"weight": weight_OI, "scales": scales_O}
        operation = {
            ("int", None): "linear_int8",
            ("int", "dynamic"): "linear_w8a8",
            ("float", None): "linear_fp8",
        }.get((scheme.kind, scheme.activation))
        reason = None
        if scheme.kind == "float" and scheme.activation is not None:
            operation = "linear_fp8a8"
            is_static = scheme.activation == "static"
            tensors["x_scale"] = (
                layer.read("input_scale").float().reshape(()) if is_static else torch.zeros((), dtype=torch.float32)
            )
        elif operation is None:
            reason = scheme.why_not_packed()
        packed = PackedWeight(operation or "", tensors, rows, inputs)
        return StoredWeight(lambda: packed, lambda: weight_OI.float() * scales_O.float().unsqueeze(1), reason)

    def form(self, layer: StoredLayer) -> StoredWeight:
        scheme = self._scheme(layer)
        # Of 8 bits, zero points and scales decide whether an operation multiplies by them.
        decides = ("weight_scale", "weight_zero_point") if scheme.packed and scheme.bits == 8 else ()
        return self.read(layer.without_values(*decides))

    def _scheme(self, layer: StoredLayer) -> Scheme:
        """The first group that names the layer, or else the first that names its class."""
        named = [scheme for targets, scheme in self._groups if any(_names(t, layer.name) for t in targets)]
        classes = [scheme for targets, scheme in self._groups if "Linear" in targets]
        if not named and not classes:
            raise layer.error(
                f"quantization_config names no group for layer {layer.name}, which is stored quantized",
                [targets for targets, _ in self._groups],
                "a target that names it",
            )
        return (named or classes)[0]


def _names(target: str, layer: str) -> bool:
    return re.match(target[3:], layer) is not None if target.startswith("re:") else target == layer


def _bad_group(name: str, group: object, where: str) -> bool:
    raise LoaderError(
        f"config_groups.{name} must be written out, with targets and weights", where=where, found=type(group).__name__
    )


def _scheme(name: str, group: Mapping[str, Any], stored: object, where: str) -> Scheme:
    """The scheme of an entry of ``config_groups``. Raises LoaderError for one that is not known."""
    at = f"config_groups.{name}"

    def refused(what: str, found: object, allowed: object) -> LoaderError:
        listed = allowed if isinstance(allowed, str) else ", ".join(str(a) for a in allowed)  # type: ignore[attr-defined]
        return LoaderError(f"{at}: {what}", where=where, found=found, allowed=listed)

    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise refused("weights are not described", weights, "a table")
    own_format = group.get("format") or stored
    formats = (PACK, INTS, FLOAT8, _NAIVE)
    if own_format not in formats:
        raise refused("this format is not known", own_format, formats)
    bits, kind = positive(weights, "num_bits", f"{where}: {at}", 8), str(weights.get("type", "int"))
    strategy = weights.get("strategy") or {None: "tensor", -1: "channel"}.get(weights.get("group_size"), "group")
    is_packed = own_format == PACK
    allowed = ("channel", "group", "tensor") if is_packed else ("channel", "tensor")
    if strategy not in allowed:
        raise refused("scales of this strategy are not known", strategy, allowed)
    if kind not in ("int", "float") or (is_packed and kind != "int"):
        raise refused("weights of this type are not known here", kind, "int" if is_packed else "int, float")
    if bits not in (_WIDTHS if is_packed else (8,)):
        raise refused("weights of these bits are not known", bits, "2 .. 8" if is_packed else "8")
    symmetric = bool(weights.get("symmetric", True))
    if not symmetric and not is_packed:
        raise refused("zero points of whole rows are not known", "symmetric: false", "true")
    return Scheme(
        bits,
        kind,
        symmetric,
        positive(weights, "group_size", f"{where}: {at}") if strategy == "group" else None,
        strategy == "tensor",
        _activation(group.get("input_activations"), kind, is_packed, refused),
        is_packed,
    )


def _activation(inputs: Any, kind: str, is_packed: bool, refused: Any) -> str | None:
    if inputs is None:
        return None
    found = {key: inputs.get(key) for key in ("num_bits", "type", "strategy", "dynamic", "symmetric")}
    is_known = not is_packed and found["num_bits"] == 8 and found["type"] == kind and found["symmetric"] in (True, None)
    if is_known and found["dynamic"] is True and found["strategy"] == "token":
        return "dynamic"
    if is_known and found["dynamic"] in (False, None) and found["strategy"] in ("tensor", None):
        return "static"
    raise refused(
        "activations in this form are not known",
        found,
        "none, 8 bits a token dynamic symmetric, or 8 bits a tensor static symmetric, of the weights' type",
    )


def _stored_shape(layer: StoredLayer) -> tuple[int, int]:
    rows, inputs = (int(size) for size in layer.read("weight_shape"))
    return rows, inputs


def _read_grid(layer: StoredLayer, scheme: Scheme, rows: int, inputs: int) -> IntegerGrid:
    stored = _stored_shape(layer)
    if stored != (rows, inputs):
        raise layer.error(f"tensor {layer.name}.weight_shape disagrees with the others", stored, (rows, inputs))
    values_OI = unpack_bits(layer.read("weight_packed"), scheme.bits, inputs)
    scales_ON = layer.read("weight_scale")
    scales_ON = scales_ON.reshape(rows, -1) if scales_ON.numel() != 1 else scales_ON.reshape(1, 1).expand(rows, 1)
    if scheme.symmetric:
        zeros_ON = torch.full(scales_ON.shape, 1 << scheme.bits - 1, dtype=torch.uint8)
    else:
        zeros_ON = unpack_bits(layer.read("weight_zero_point").T, scheme.bits, rows).T.contiguous()
    order = order_of(layer, "weight_g_idx", scales_ON.shape[1])
    if order is not None:
        values_OI = values_OI[:, order]
    return IntegerGrid(scheme.bits, values_OI, scales_ON.contiguous(), zeros_ON, order)


# --- writing -------------------------------------------------------------------------------------------------------


def compressed_tensors(
    name: str, packed: PackedWeight, zero_points: bool | None = None
) -> tuple[dict[str, torch.Tensor], Scheme]:
    """The tensors of a layer, by part, and how they are stored.

    zero_points: whether to store them; None for where they are not all in the middle.
    Raises ConfigError for a weight that none of the layouts holds.
    """
    if packed.order is not None:
        raise ConfigError(
            f"layer {name} has its inputs in an order of its own, which compressed-tensors has no place for",
            where=name,
            hint="Use format gptq.",
        )
    if packed.operation in ("linear_int3", "linear_int4", "linear_int8", "linear_gguf"):
        return _packed_tensors(name, IntegerGrid.of(packed), zero_points)
    if packed.operation not in ("linear_w8a8", "linear_fp8", "linear_fp8a8"):
        raise ConfigError(
            f"layer {name} can't be stored as compressed-tensors",
            where=name,
            found=packed.operation,
            allowed="linear_int3, linear_int4, linear_int8, linear_w8a8, linear_fp8, linear_fp8a8, and linear_gguf of "
            "type Q8_0",
        )
    tensors = {"weight": packed.tensors["weight"], "weight_scale": packed.tensors["scales"].unsqueeze(1).contiguous()}
    kind = "int" if packed.operation == "linear_w8a8" else "float"
    activation = None if packed.operation == "linear_fp8" else "dynamic"
    x_scale = packed.tensors.get("x_scale")
    if x_scale is not None and float(x_scale) != 0:
        activation, tensors["input_scale"] = "static", x_scale.reshape(1)
    return tensors, Scheme(8, kind, activation=activation)


def _packed_tensors(name: str, grid: IntegerGrid, zero_points: bool | None) -> tuple[dict[str, torch.Tensor], Scheme]:
    rows, inputs = grid.values_OI.shape
    tensors = {
        "weight_packed": pack_bits(grid.values_OI, grid.bits),
        "weight_scale": grid.scales_ON.contiguous(),
        "weight_shape": torch.tensor([rows, inputs]),
    }
    is_symmetric = grid.is_symmetric if zero_points is None else not zero_points
    if is_symmetric and not grid.is_symmetric:
        raise ConfigError(
            f"layer {name} has zero points, which are not to be stored",
            where=name,
            found=f"{int(grid.zeros_ON.min())} .. {int(grid.zeros_ON.max())}",
            allowed=str(grid.middle),
            hint="Write with zero_points=True.",
        )
    if not is_symmetric:
        # With zero points the library computes in the dtype of the scales, and float16 would round the weights.
        tensors["weight_scale"] = tensors["weight_scale"].float()
        tensors["weight_zero_point"] = pack_bits(grid.zeros_ON.T.contiguous(), grid.bits).T.contiguous()
    group = None if grid.group == inputs else grid.group
    return tensors, Scheme(grid.bits, "int", is_symmetric, group, packed=True)
