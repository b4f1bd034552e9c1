"""What each logical operation means, in float64 and by the plain formula, and the grid of cases that is tried.

Shapes: T tokens; S sequences; V vocabulary; H query heads; G key/value heads; D head size; R rotary dims; E, I, O
features; B blocks of the cache; N tokens in a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from drivetrain.contracts.kernels import OPERATIONS, KernelSpec
from drivetrain.packed.gguf import BLOCK_TYPES, block_type

Arguments = tuple[torch.Tensor | None, ...]
Shapes = tuple[tuple[int, ...] | None, ...]

_ROWS = (0, 1, 3, 17)
_IGNORED_TARGET = -100


@dataclass(frozen=True)
class Case:
    """One use of an operation: the spec that ``make`` is given, but for dtype and device, and shapes of the inputs.

    shapes: of each tensor argument; None for an argument that is left out.
    scale:  standard deviation of the first input; large values show sums that overflow a narrow format.
    """

    operation: str
    shapes: Shapes
    sizes: Mapping[str, int] = field(default_factory=dict)
    params: Mapping[str, float] = field(default_factory=dict)
    scale: float = 1.0

    def spec(self, device_type: str, dtype: str) -> KernelSpec:
        return KernelSpec(self.operation, device_type, dtype, self.sizes, self.params)

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> Arguments:
        """Random inputs. What has a dtype of its own, such as angles or quantized weights, comes in that."""
        draw = _Draw(self, dtype, torch.Generator().manual_seed(seed))
        values = dict(zip(OPERATIONS[self.operation].arguments, map(draw.normal, self.shapes), strict=True))
        values.update(_SPECIAL[self.operation](draw, values) if self.operation in _SPECIAL else {})
        first = next(iter(values))
        values[first] = cast(torch.Tensor, values[first]) * self.scale

        def placed(value: torch.Tensor) -> torch.Tensor:
            is_plain = value.dtype == torch.float64 and not (self.operation == "sample" and value.dim() == 1)
            return value.to(device, dtype) if is_plain else value.to(device)

        return tuple(None if value is None else placed(value) for value in values.values())


# --- inputs that are not just normal numbers -------------------------------------------------------------------------


@dataclass
class _Draw:
    """Random tensors for one case; float64 stands for "the dtype of the activations"."""

    case: Case
    dtype: torch.dtype
    generator: torch.Generator

    @property
    def rows(self) -> int:
        return cast(tuple[int, ...], self.case.shapes[0])[0]

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def normal(self, shape: tuple[int, ...] | None) -> torch.Tensor | None:
        return None if shape is None else torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, shape: Any, low: float, high: float) -> torch.Tensor:
        return torch.rand(tuple(shape), generator=self.generator, dtype=torch.float64) * (high - low) + low

    def integers(self, shape: Any, low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, tuple(shape), generator=self.generator)

    def scales(self, shape: Any, low: float, high: float) -> torch.Tensor:
        """In float32, or in the dtype of the activations where the rows are even."""
        drawn = self.uniform(shape, low, high)
        return drawn if self.rows % 2 == 0 else drawn.to(self.wide)


Values = dict[str, torch.Tensor | None]


def _angles(draw: _Draw, values: Values) -> Values:
    angles = cast(torch.Tensor, values["cos"])
    angles = angles[..., : angles.shape[-1] // 2]
    return {
        name: torch.cat((part, part), dim=-1).to(draw.wide)
        for name, part in (("cos", angles.cos()), ("sin", angles.sin()))
    }


def _angles_and_slots(draw: _Draw, values: Values) -> Values:
    blocks, size = cast(torch.Tensor, values["keys"]).shape[:2]
    slots = torch.randperm(blocks * size, generator=draw.generator)[: draw.rows]
    return {**_angles(draw, values), "slots": slots}


def _targets(draw: _Draw, values: Values) -> Values:
    targets = draw.integers((draw.rows,), 0, cast(torch.Tensor, values["weight"]).shape[0])
    targets[1::3] = _IGNORED_TARGET
    return {"targets": targets}


def _int8_weight(draw: _Draw, values: Values) -> Values:
    shape = cast(torch.Tensor, values["weight"]).shape
    return {
        "weight": draw.integers(shape, -128, 128).to(torch.int8),
        "scales": draw.scales(shape[:1], 0.002, 0.006),
    }


def _grids(draw: _Draw, values: Values, low: float, high: float, bits: int) -> Values:
    """Scales with minima, or with zero points where the spec asks for them."""
    groups = cast(torch.Tensor, values["scales"]).shape
    scales = draw.scales(groups, low, high)
    if draw.case.params.get("zero_points"):
        return {"scales": scales, "mins": draw.integers(groups, 0, 1 << bits).to(torch.uint8)}
    return {"scales": scales, "mins": draw.scales(groups, -0.5, -0.1)}


def _int4_weight(draw: _Draw, values: Values) -> Values:
    weight = draw.integers(cast(torch.Tensor, values["weight"]).shape, 0, 256).to(torch.uint8)
    return {"weight": weight, **_grids(draw, values, 0.02, 0.06, 4)}


def _fp8_weight(draw: _Draw, values: Values) -> Values:
    weight = cast(torch.Tensor, values["weight"])
    return {"weight": weight.to(torch.float8_e4m3fn), "scales": draw.scales(weight.shape[:1], 0.1, 0.5)}


def _int3_weight(draw: _Draw, values: Values) -> Values:
    low, high = (cast(torch.Tensor, values[name]).shape for name in ("low", "high"))
    return {
        "low": draw.integers(low, 0, 256).to(torch.uint8),
        "high": draw.integers(high, 0, 256).to(torch.uint8),
        **_grids(draw, values, 0.04, 0.12, 3),
    }


def _fp8_weight_and_input_scale(draw: _Draw, values: Values) -> Values:
    """A static scale where the rows are odd in number; a small one, so that some values are cut."""
    scale = 0.0 if draw.rows % 2 == 0 else 0.005
    return {**_fp8_weight(draw, values), "x_scale": torch.tensor(scale)}


def _gguf_blocks(draw: _Draw, values: Values) -> Values:
    """Random bytes, with sane numbers where float16 stand: scales, and minima behind them."""
    kind = block_type(draw.case.params)
    shape = cast(torch.Tensor, values["blocks"]).shape
    blocks = draw.integers(shape, 0, 256).to(torch.uint8)
    in_blocks = blocks.view(-1, kind.num_bytes)
    for at in kind.halves:
        # A k-quant's scale is a product of two numbers, the second of up to six bits.
        low, high = (0.01, 0.05) if kind.size == 32 else (0.0002, 0.001)
        halves = draw.uniform((in_blocks.shape[0], 1), low, high) * (-1 if at else 1)
        in_blocks[:, at : at + 2] = halves.to(torch.float16).view(torch.uint8)
    return {"blocks": blocks}


_SETTINGS = (
    (1.0, 20, 0.8, 0.05),
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.3, 0, 0.9, 0.0),
    (1.0, 0, 1.0, 0.1),
    (1.5, 1, 1.0, 0.0),
    (0.0, 3, 0.5, 0.2),
    (2.0, 3, 0.5, 0.0),
    (1e-40, 0, 1.0, 0.0),
    (5.0, 100_000, 0.999, 0.001),
    (1.0, 0, 0.0, 0.0),
    (1.0, 0, 1.0, 1.0),
)
"""Temperature, top-k, top-p and min-p of the rows, one after another."""


def _settings(draw: _Draw, values: Values) -> Values:
    rows = [_SETTINGS[row % len(_SETTINGS)] for row in range(draw.rows)]
    columns: Any = list(zip(*rows, strict=True)) or [[]] * 4
    logits = cast(torch.Tensor, values["logits"])
    for row in range(draw.rows):
        logits[row, (row * 5) % logits.shape[1]] = -math.inf  # a forbidden token
    return {
        "temperature": torch.tensor(columns[0], dtype=torch.float32),
        "top_k": torch.tensor(columns[1], dtype=torch.int64),
        "top_p": torch.tensor(columns[2], dtype=torch.float32),
        "min_p": torch.tensor(columns[3], dtype=torch.float32),
        "draws": draw.uniform((draw.rows,), 0.0, 1.0),
    }


_SPECIAL: Mapping[str, Callable[[_Draw, Values], Values]] = {
    "rope": _angles,
    "rope_write": _angles_and_slots,
    "linear_cross_entropy": _targets,
    "linear_int8": _int8_weight,
    "linear_int4": _int4_weight,
    "linear_int4_a8": _int4_weight,
    "linear_fp8": _fp8_weight,
    "linear_int3": _int3_weight,
    "linear_w8a8": _int8_weight,
    "linear_fp8a8": _fp8_weight_and_input_scale,
    "linear_gguf": _gguf_blocks,
    "linear_gguf_a8": _gguf_blocks,
    "sample": _settings,
}


# --- what the operations mean, without any of torch's fused functions ------------------------------------------------

Params = Mapping[str, float]


def _rms_norm(params: Params, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    mean = (x * x).sum(dim=-1, keepdim=True) / x.shape[-1]
    return x / (mean + params.get("eps", 1e-6)).sqrt() * (weight + params.get("weight_offset", 0.0))


def _add_rms_norm(params: Params, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    return _rms_norm(params, x + residual, weight), x + residual


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1] // 2
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def _rope(params: Params, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rope_write(
    params: Params,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
) -> Any:
    """The rotated queries, and what the cache holds afterwards."""
    keys, values, turned, size = keys.clone(), values.clone(), _rotated(k, cos, sin), keys.shape[1]
    for token, slot in enumerate(slots.tolist()):
        keys[slot // size, slot % size] = turned[token]
        values[slot // size, slot % size] = v[token]
    return _rotated(q, cos, sin), keys, values


def _silu_mul(params: Params, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate / (1 + torch.exp(-gate)) * up


def _gelu_tanh_mul(params: Params, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


def _linear(params: Params, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product = (x[..., None, :] * weight).sum(dim=-1)
    return product if bias is None else product + bias


def _gated_linear(params: Params, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gated = _gelu_tanh_mul if params["activation"] == 1 else _silu_mul
    return gated(params, _linear(params, x, gate, None), _linear(params, x, up, None))


def _linear_cross_entropy(params: Params, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits, cap = _linear(params, x, weight, None), params.get("soft_cap", 0.0)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    best = logits.amax(dim=-1, keepdim=True) if logits.numel() else logits[:, :1]
    total = (logits - best).exp().sum(dim=-1).log() + best[:, 0]
    is_counted = targets != _IGNORED_TARGET
    chosen = logits.gather(1, (targets * is_counted).unsqueeze(1))[:, 0]
    return (total - chosen) * is_counted


def _linear_by_row(
    params: Params, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return _linear(params, x, weight * scales[:, None], bias)


def _mins(params: Params, scales: torch.Tensor, mins: torch.Tensor) -> torch.Tensor:
    return -(mins.double() * scales) if params.get("zero_points") else mins


def _linear_int4(
    params: Params,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    mins: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    group, mins = int(params["group"]), _mins(params, scales, mins)
    wide = torch.zeros(weight.shape[0], weight.shape[1] * 2, dtype=torch.float64)
    for i in range(wide.shape[1]):
        nibble = weight[:, i // 2] >> 4 if i % 2 else weight[:, i // 2] & 15
        wide[:, i] = nibble * scales[:, i // group] + mins[:, i // group]
    return _linear(params, x, wide, bias)


def _linear_int3(
    params: Params,
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    scales: torch.Tensor,
    mins: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    group, mins = int(params["group"]), _mins(params, scales, mins)
    wide = torch.zeros(low.shape[0], low.shape[1] * 4, dtype=torch.float64)
    for i in range(wide.shape[1]):
        value = low[:, i // 4].int() >> 2 * (i % 4) & 3 | (high[:, i // 8].int() >> i % 8 & 1) << 2
        wide[:, i] = value * scales[:, i // group] + mins[:, i // group]
    return _linear(params, x, wide, bias)


def _passing(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """``rounded``, with gradients as if nothing had been rounded."""
    return rounded.detach() + x - x.detach()


def _in_int8(x: torch.Tensor) -> torch.Tensor:
    """Rows that are kept in integers up to 127."""
    if not x.numel():
        return x
    scale = _in_float32(x.abs().amax(dim=-1, keepdim=True) / 127)
    return _passing(x, torch.round(_in_float32(x / torch.where(scale == 0, 1.0, scale))) * scale)


def _in_float32(x: torch.Tensor) -> torch.Tensor:
    """Rounded as float32 rounds it: whatever lies half-way between two integers must do so here too."""
    return x.float().double()


def _linear_w8a8(
    params: Params, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return _linear_by_row(params, _in_int8(x), weight, scales, bias)


def _linear_fp8a8(
    params: Params,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    x_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    scale = x_scale
    if x_scale == 0 and x.numel():
        scale = _in_float32(x.abs().amax(dim=-1, keepdim=True) / 448)
    value = _in_float32(x / torch.where(scale == 0, 1.0, scale)).clamp(-448, 448)
    # Four significant bits; below 2^-6, as many as are left above 2^-9.
    step = 2.0 ** (torch.floor(torch.log2(value.abs().clamp(min=2.0**-6))) - 3)
    rounded = torch.round(value / step) * step
    return _linear_by_row(params, _passing(x, rounded * scale), weight, scales, bias)


def _linear_int4_a8(
    params: Params,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    mins: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return _linear_int4(params, _in_int8(x.unflatten(-1, (-1, 32))).flatten(-2), weight, scales, mins, bias)


def _linear_gguf(params: Params, x: torch.Tensor, blocks: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _linear(params, x, _from_blocks(int(params["type"]), blocks), bias)


def _linear_gguf_a8(params: Params, x: torch.Tensor, blocks: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _linear_gguf(params, _in_int8(x.unflatten(-1, (-1, 32))).flatten(-2), blocks, bias)


def _from_blocks(number: int, blocks: torch.Tensor) -> torch.Tensor:
    """Weights [O, I] from GGUF blocks, one input after another by ggml's own description of each type."""
    kind = BLOCK_TYPES[number]
    block, columns = blocks.contiguous().reshape(-1, kind.num_bytes).int(), []
    halves = {at: block[:, at : at + 2].to(torch.uint8).view(torch.float16).double().squeeze(1) for at in kind.halves}
    for i in range(kind.size):
        if kind.name in ("Q4_K", "Q5_K"):
            scale, least = _k_scale_and_min(block[:, 4:16], i // 32)
            value = block[:, (16 if number == 12 else 48) + i // 64 * 32 + i % 32] >> 4 * (i // 32 % 2) & 15
            if number == 13:
                value = value + 16 * (block[:, 16 + i % 32] >> i // 32 & 1)
            columns.append(halves[0] * scale * value - halves[2] * least)
        elif kind.name == "Q6_K":
            half, within = i // 128, i % 128
            value = block[:, 64 * half + within % 64] >> 4 * (within // 64) & 15
            value = value + 16 * (block[:, 128 + 32 * half + within % 32] >> 2 * (within // 32) & 3) - 32
            columns.append(halves[208] * _signed(block[:, 192 + i // 16]) * value)
        elif kind.name == "Q8_0":
            columns.append(halves[0] * _signed(block[:, 2 + i]))
        else:
            value = block[:, kind.num_bytes - 16 + i % 16] >> 4 * (i // 16) & 15
            if kind.name.startswith("Q5"):
                value = value + 16 * (block[:, kind.num_bytes - 20 + i // 8] >> i % 8 & 1)
            middle = {"Q4_0": 8, "Q5_0": 16}.get(kind.name, 0)
            columns.append(halves[0] * (value - middle) + halves.get(2, 0.0))
    weights = torch.stack(columns, dim=1) if block.numel() else torch.zeros(0, kind.size, dtype=torch.float64)
    return weights.reshape(blocks.shape[0], -1)


def _signed(byte: torch.Tensor) -> torch.Tensor:
    return torch.where(byte > 127, byte - 256, byte)


def _k_scale_and_min(packed: torch.Tensor, run: int) -> tuple[torch.Tensor, torch.Tensor]:
    if run < 4:
        return packed[:, run] & 63, packed[:, run + 4] & 63
    rest = packed[:, run + 4]
    return rest & 15 | (packed[:, run - 4] >> 6) << 4, rest >> 4 | (packed[:, run] >> 6) << 4


def _sample(
    params: Params,
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    draws: torch.Tensor,
) -> torch.Tensor:
    """Which tokens pass: bool [S, V]. More than one only where the draw, or what a filter keeps, is within the
    published tolerance of going the other way."""
    allowed = torch.zeros(logits.shape, dtype=torch.bool)
    slack = OPERATIONS["sample"].tolerance["float32"][1]
    for row in range(logits.shape[0]):
        if temperature[row] <= 0:
            allowed[row, int((logits[row] == logits[row].max()).nonzero()[0])] = True
            continue
        heat = max(float(temperature[row]), 1e-30)
        settings = (heat, int(top_k[row]), float(top_p[row]), float(min_p[row]))
        for shift in (-slack, 0.0, slack):
            probs = _row_distribution(logits[row], settings, shift)
            total, draw = 0.0, float(draws[row])
            for token, prob in enumerate(probs.tolist()):
                if prob > 0 and total <= draw + slack and total + prob >= draw - slack:
                    allowed[row, token] = True
                total += prob
    return allowed


def _row_distribution(logits: torch.Tensor, settings: tuple[float, int, float, float], shift: float) -> torch.Tensor:
    """The distribution of one row after its filters, with the bounds of top-p and min-p moved by ``shift``."""
    heat, top_k, top_p, min_p = settings
    scores = (logits - logits.max()) / heat
    order = sorted(range(len(scores)), key=lambda token: -float(scores[token]))
    if 0 < top_k < len(scores):
        scores = torch.where(scores < scores[order[top_k - 1]], -math.inf, scores)
    probs = scores.exp() / scores.exp().sum()
    if top_p < 1:
        before = 0.0
        kept = torch.zeros_like(probs)
        for token in order:
            if before >= top_p + shift and before > 0:
                break
            kept[token] = probs[token]
            before += float(probs[token])
        probs = kept / kept.sum()
    floor = probs.max() * min_p * (1 + shift)
    probs = torch.where(probs < min(floor, probs.max()), 0.0, probs)
    return probs / probs.sum()


ORACLES: Mapping[str, Callable[..., Any]] = {
    "rms_norm": _rms_norm,
    "rope": _rope,
    "silu_mul": _silu_mul,
    "gelu_tanh_mul": _gelu_tanh_mul,
    "linear": _linear,
    "add_rms_norm": _add_rms_norm,
    "rope_write": _rope_write,
    "gated_linear": _gated_linear,
    "linear_cross_entropy": _linear_cross_entropy,
    "sample": _sample,
    "linear_int8": _linear_by_row,
    "linear_int4": _linear_int4,
    "linear_int4_a8": _linear_int4_a8,
    "linear_fp8": _linear_by_row,
    "linear_int3": _linear_int3,
    "linear_w8a8": _linear_w8a8,
    "linear_fp8a8": _linear_fp8a8,
    "linear_gguf": _linear_gguf,
    "linear_gguf_a8": _linear_gguf_a8,
}
"""Operation -> its meaning: called with the spec's params and inputs in float64, integers as they are. What an
operation writes to follows its results; ``sample`` gives the tokens that pass."""


# --- the grid --------------------------------------------------------------------------------------------------------


def _rms_norm_cases() -> Iterator[Case]:
    for rows in _ROWS:
        for size in (8, 33, 576):
            yield Case("rms_norm", ((rows, size), (size,)), {"E": size}, {"eps": 1e-5})
    yield Case("rms_norm", ((2, 3, 64), (64,)), {"E": 64}, {"eps": 1e-6})
    yield Case("rms_norm", ((3, 64), (64,)), {"E": 64}, {"eps": 1e-6, "weight_offset": 1.0})
    yield Case("rms_norm", ((3, 64), (64,)), {"E": 64}, {"eps": 1e-2}, scale=0.05)
    yield Case("rms_norm", ((3, 64), (64,)), {"E": 64}, {"eps": 1e-6}, scale=500.0)


def _add_rms_norm_cases() -> Iterator[Case]:
    for case in _rms_norm_cases():
        x, weight = case.shapes
        yield Case("add_rms_norm", (x, x, weight), case.sizes, case.params, case.scale)


def _rope_cases() -> Iterator[Case]:
    for rows in _ROWS:
        for heads, kv_heads in ((1, 1), (6, 2), (9, 3)):
            yield _rope_case(rows, heads, kv_heads, 16, 16)
    yield _rope_case(5, 4, 4, 64, 64)
    yield _rope_case(5, 4, 2, 32, 8)
    yield _rope_case(1, 3, 1, 10, 6)


def _rope_case(rows: int, heads: int, kv_heads: int, size: int, rotary: int) -> Case:
    shapes = ((rows, heads, size), (rows, kv_heads, size), (rows, rotary), (rows, rotary))
    return Case("rope", shapes, {"H": heads, "G": kv_heads, "D": size, "R": rotary})


def _rope_write_cases() -> Iterator[Case]:
    for case in _rope_cases():
        q, k, cos, sin = case.shapes
        heads, size = cast(tuple[int, ...], k)[1:]
        for block in (1, 16):
            cache = (24 // block + 1, block, heads, size)
            yield Case("rope_write", (q, k, k, cos, sin, cache, cache, cast(Any, q)[:1]), {**case.sizes, "N": block})


def _gated_cases(operation: str) -> Iterator[Case]:
    for rows in _ROWS:
        for size in (8, 33, 96):
            yield Case(operation, ((rows, size), (rows, size)), {"E": size})
    yield Case(operation, ((2, 3, 40), (2, 3, 40)), {"E": 40})
    yield Case(operation, ((4, 40), (4, 40)), {"E": 40}, scale=20.0)


def _linear_cases() -> Iterator[Case]:
    for rows in _ROWS:
        for inner, outer in ((8, 8), (33, 17), (96, 1)):
            for bias in (None, (outer,)):
                yield Case("linear", ((rows, inner), (outer, inner), bias), {"I": inner, "O": outer})
    yield Case("linear", ((2, 3, 40), (24, 40), (24,)), {"I": 40, "O": 24})


def _gated_linear_cases() -> Iterator[Case]:
    for activation in (0.0, 1.0):
        for lead in (*((rows,) for rows in _ROWS), (2, 3)):
            for inner, outer in ((8, 8), (33, 17), (96, 1)):
                shapes = ((*lead, inner), (outer, inner), (outer, inner))
                yield Case("gated_linear", shapes, {"I": inner, "O": outer}, {"activation": activation})


def _linear_cross_entropy_cases() -> Iterator[Case]:
    for rows in _ROWS:
        for inner, vocab in ((8, 11), (33, 50), (64, 257)):
            for params in ({}, {"soft_cap": 2.0}):
                shapes = ((rows, inner), (vocab, inner), (rows,))
                yield Case("linear_cross_entropy", shapes, {"E": inner, "V": vocab}, params, scale=0.25)


def _sample_cases() -> Iterator[Case]:
    for rows in _ROWS:
        for vocab in (8, 33, 300, 1000):
            yield Case("sample", ((rows, vocab), *((rows,),) * 5), {"V": vocab}, scale=2.0)


_LEADS = (*((rows,) for rows in _ROWS), (2, 3))


def _linear_by_row_cases(operation: str, *more: tuple[int, ...]) -> Iterator[Case]:
    """more: shapes of weight arguments behind the scales."""
    for lead in _LEADS:
        for inner, outer in ((8, 8), (33, 17), (96, 1), (130, 40)):
            bias = None if inner == 8 else (outer,)
            shapes = ((*lead, inner), (outer, inner), (outer,), *more, bias)
            yield Case(operation, shapes, {"I": inner, "O": outer})


def _by_group_cases(operation: str, *weights_in_a_byte: int) -> Iterator[Case]:
    for lead in _LEADS:
        for inner, outer, group in ((32, 8, 32), (48, 17, 16), (128, 5, 64), (256, 40, 128)):
            bias = (outer,) if group != 32 else None
            groups = (outer, inner // group)
            weights = [(outer, inner // count) for count in weights_in_a_byte]
            shapes = ((*lead, inner), *weights, groups, groups, bias)
            yield Case(operation, shapes, {"I": inner, "O": outer}, {"group": float(group)})
            if lead in ((1,), (3,), (17,)):
                params = {"group": float(group), "zero_points": 1.0}
                yield Case(operation, shapes, {"I": inner, "O": outer}, params)


def _linear_int4_a8_cases() -> Iterator[Case]:
    """Those of ``linear_int4`` whose inputs fill blocks, and groups smaller and larger than a block."""
    yield from (case for case in _by_group_cases("linear_int4_a8", 2) if case.sizes["I"] % 32 == 0)
    for lead in _LEADS:
        for inner, outer, group in ((64, 7, 16), (96, 17, 48), (160, 9, 32), (192, 5, 192)):
            groups = (outer, inner // group)
            shapes = ((*lead, inner), (outer, inner // 2), groups, groups, (outer,))
            for params in ({}, {"zero_points": 1.0}):
                yield Case("linear_int4_a8", shapes, {"I": inner, "O": outer}, {"group": float(group), **params})


def _linear_gguf_cases(operation: str) -> Iterator[Case]:
    for number, kind in BLOCK_TYPES.items():
        for lead in _LEADS:
            for blocks, outer in ((1, 8), (3, 17)):
                bias = (outer,) if blocks == 3 else None
                inner = blocks * kind.size
                shapes = ((*lead, inner), (outer, kind.row_bytes(inner)), bias)
                yield Case(operation, shapes, {"I": inner, "O": outer}, {"type": float(number)})


_GRIDS: Mapping[str, Callable[[], Iterator[Case]]] = {
    "rms_norm": _rms_norm_cases,
    "rope": _rope_cases,
    "silu_mul": lambda: _gated_cases("silu_mul"),
    "gelu_tanh_mul": lambda: _gated_cases("gelu_tanh_mul"),
    "linear": _linear_cases,
    "add_rms_norm": _add_rms_norm_cases,
    "rope_write": _rope_write_cases,
    "gated_linear": _gated_linear_cases,
    "linear_cross_entropy": _linear_cross_entropy_cases,
    "sample": _sample_cases,
    "linear_int8": lambda: _linear_by_row_cases("linear_int8"),
    "linear_int4": lambda: _by_group_cases("linear_int4", 2),
    "linear_int4_a8": _linear_int4_a8_cases,
    "linear_fp8": lambda: _linear_by_row_cases("linear_fp8"),
    "linear_int3": lambda: _by_group_cases("linear_int3", 4, 8),
    "linear_w8a8": lambda: _linear_by_row_cases("linear_w8a8"),
    "linear_fp8a8": lambda: _linear_by_row_cases("linear_fp8a8", ()),
    "linear_gguf": lambda: _linear_gguf_cases("linear_gguf"),
    "linear_gguf_a8": lambda: _linear_gguf_cases("linear_gguf_a8"),
}


def cases(operation: str) -> list[Case]:
    """Every case of one operation: odd sizes, no row, one row, more leading dims, large and small values."""
    return list(_GRIDS[operation]())
