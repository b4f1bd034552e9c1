"""Products with the blocks of GGUF files, read as they lie in memory: nothing is packed anew.

Blocks of most types lie at even addresses only (they have 18, 22, 34 or 210 bytes), so that a thread can load no more
than two bytes at a time. Its neighbours load what follows, and a row's bytes arrive by whole lines. Q4_1, Q5_1, Q4_K
and Q5_K can be loaded in wider pieces. Sums are float32; codes are exact in every dtype that they are multiplied in,
and scales and minima are applied to sums, so that no weight is rounded. Many rows may be multiplied by the weight in
full instead, which is (:mod:`drivetrain.kernels.triton.expansion`).

A block is gone through in the units of :mod:`drivetrain.kernels.triton.gguf_blocks`.

Shapes: M rows, all leading dims together; O outputs; U units; K bytes, or W pairs of bytes, of a unit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.errors import ConfigError
from drivetrain.kernels.triton import expansion
from drivetrain.kernels.triton.gguf_blocks import (
    LAYOUTS,
    Layout,
    codes_of,
    first_input,
    half,
    heads_of,
    high_at,
    in_a_float,
    load,
    low_at,
    scale_and_least_of,
    unit_at,
)
from drivetrain.kernels.triton.launch import INTERPRETED, dot
from drivetrain.kernels.triton.product_tiles import (
    LIBRARY,
    Product,
    multiply_by_library,
    quantized,
    store_tile,
    tile_of,
)
from drivetrain.kernels.triton.rounding import ROUNDED_BLOCK, to_int8_blocks
from drivetrain.kernels.triton.tuning import Blocks, Choice, Tuner
from drivetrain.packed.gguf import BLOCK_TYPES, by_block

_GRADIENT_OUTPUTS = 4096
"""So many outputs' weights are decoded at a time in a backward pass."""

PLAIN, BFLOAT16_PAIRS, FLOAT16_PAIRS = 0, 1, 2
"""How one row is read: number by number, or two of them as one integer."""


# --- one row ---------------------------------------------------------------------------------------------------------


@triton.jit
def _pairs(
    x_ptr: tl.tensor, pairs: tl.tensor, is_in: tl.tensor, X_FORMAT: tl.constexpr, EVEN: tl.constexpr
) -> tl.tensor:
    """Inputs ``2 * pairs`` and ``2 * pairs + 1`` of a row, in float32."""
    if X_FORMAT == 0:
        first = load(x_ptr + 2 * pairs, is_in, EVEN).to(tl.float32)
        second = load(x_ptr + 2 * pairs + 1, is_in, EVEN).to(tl.float32)
    else:
        both = load(x_ptr + pairs, is_in, EVEN)
        if X_FORMAT == 1:
            first = (both << 16).to(tl.float32, bitcast=True)
            second = (both & -65536).to(tl.float32, bitcast=True)
        else:
            first, second = half(both), half(both >> 16)
    return first, second


@triton.jit
def _one_row(
    x_ptr: tl.tensor,
    x_scales_ptr: tl.tensor,
    halves_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    num_outputs: tl.tensor,
    num_units: tl.tensor,
    halves_by_output: tl.tensor,
    TYPE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    UNITS: tl.constexpr,
    UNIT_BYTES: tl.constexpr,
    PARTS: tl.constexpr,
    X_FORMAT: tl.constexpr,
    EVEN: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_U: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """A thread multiplies the codes that it has loaded, and sums are added up at the end.

    EVEN: no unit of a program would lie behind the end of a row. Outputs that would are the last one over again.
    """
    tl.static_assert(BLOCK_U % UNITS == 0)
    split = tl.program_id(1)
    outputs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    units = split * BLOCK_U + tl.arange(0, BLOCK_U)
    unit, block = (units % UNITS)[None, :], (units // UNITS)[None, :]
    blocks = halves_ptr + tl.minimum(outputs, num_outputs - 1).to(tl.int64)[:, None] * halves_by_output
    blocks += block * (BLOCK_BYTES // 2)
    words = tl.max_contiguous(tl.arange(0, UNIT_BYTES // 2), WIDTH)
    words_OUW, unit_OUW = words[None, None, :], unit[:, :, None]
    low_ptrs = (blocks + low_at(unit, 0, TYPE, BLOCK_BYTES) // 2)[:, :, None] + words_OUW
    high_ptrs = (blocks + high_at(unit, TYPE) // 2)[:, :, None] + words_OUW
    total = tl.zeros([BLOCK_O, BLOCK_U, UNIT_BYTES // 2], dtype=tl.float32)
    for start in range(split * BLOCK_U, num_units, BLOCK_U * SPLITS):
        units = start + tl.arange(0, BLOCK_U)
        is_unit = units < num_units
        is_unit_OU, is_unit_OUW = is_unit[None, :], is_unit[None, :, None]
        low = in_a_float(load(low_ptrs, is_unit_OUW, EVEN), TYPE)
        odd_low, high = low, low
        if TYPE == 14:
            odd_low = in_a_float(load(low_ptrs + 16, is_unit_OUW, EVEN), TYPE)
        if TYPE >= 13:
            high = load(high_ptrs, is_unit_OUW, EVEN).to(tl.int32)
        heads = heads_of(blocks, unit, is_unit_OU, TYPE, EVEN)
        for PART in tl.static_range(PARTS):
            if (TYPE == 6) | (TYPE == 7):
                high = load(blocks + (TYPE - 5 + PART), is_unit_OU, EVEN).to(tl.int32)[:, :, None]
            bits = odd_low if PART % 2 else low
            even = codes_of(bits, high, 2 * words_OUW, unit_OUW, PART, 0, TYPE)
            odd = codes_of(bits, high, 2 * words_OUW, unit_OUW, PART, 8, TYPE)
            scale, least = scale_and_least_of(blocks, heads, unit, is_unit_OU, PART, TYPE, EVEN)
            first_inputs = first_input(units, PART, TYPE, UNIT_BYTES, PARTS)
            pairs = first_inputs[:, None] // 2 + words[None, :]
            x, next_x = _pairs(x_ptr, pairs, is_unit[:, None], X_FORMAT, EVEN)
            if IS_ROUNDED:
                x_scale = load(x_scales_ptr + first_inputs // 32, is_unit, EVEN)[:, None]
                x, next_x = x * x_scale, next_x * x_scale
            # The second byte's codes are 256 times what they should be.
            product = x[None, :, :] * even + (next_x * 0.00390625)[None, :, :] * odd
            total += product * scale[:, :, None]
            if (TYPE == 3) | (TYPE == 7) | (TYPE == 12) | (TYPE == 13):
                total += (x + next_x)[None, :, :] * least[:, :, None]
        blocks += BLOCK_U * SPLITS // UNITS * (BLOCK_BYTES // 2)
        low_ptrs += BLOCK_U * SPLITS // UNITS * (BLOCK_BYTES // 2)
        high_ptrs += BLOCK_U * SPLITS // UNITS * (BLOCK_BYTES // 2)
    out = tl.sum(tl.sum(total, axis=2), axis=1)[None, :]
    row = tl.arange(0, 1)
    store_tile(out, row, outputs, split, bias_ptr, out_ptr, parts_ptr, 1, num_outputs, HAS_BIAS, SPLITS)


# --- more rows -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows"])
def _more_rows(
    x_ptr: tl.tensor,
    x_scales_ptr: tl.tensor,
    bytes_ptr: tl.tensor,
    halves_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    num_units: tl.tensor,
    x_stride: tl.tensor,
    num_x_scales: tl.tensor,
    halves_by_output: tl.tensor,
    TYPE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    UNITS: tl.constexpr,
    UNIT_BYTES: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_U: tl.constexpr,
) -> None:
    """Products on tensor cores. Each warp takes a unit of its own, so that many bytes are under way and no warp waits
    for another; what they have summed is added up at the end.

    Rounded activations are whole numbers up to 127: float16 multiplies them exactly, and float32 sums them exactly.
    """
    tile_m, tile_o = tile_of(tl.program_id(0), num_rows, num_outputs, BLOCK_M, BLOCK_O)
    split = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    is_row = rows < num_rows
    halves = tl.minimum(outputs, num_outputs - 1).to(tl.int64)[None, None, :] * halves_by_output
    places = tl.arange(0, UNIT_BYTES)
    places_UKO, places_UMK = places[None, :, None], places[None, None, :]
    x_rows, x_scale_rows = rows.to(tl.int64)[None, :, None] * x_stride, rows.to(tl.int64)[None, :, None] * num_x_scales
    if BLOCK_U == 1:
        total = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
    else:
        total = tl.zeros([BLOCK_U, BLOCK_M, BLOCK_O], dtype=tl.float32)
    for start in range(split * BLOCK_U, num_units, BLOCK_U * SPLITS):
        units = (start + tl.arange(0, BLOCK_U))[:, None, None]
        unit, is_unit = units % UNITS, units < num_units
        at = halves + units // UNITS * (BLOCK_BYTES // 2)
        blocks, codes_ptrs = halves_ptr + at, bytes_ptr + 2 * at + places_UKO
        is_x = is_row[None, :, None] & is_unit
        low, odd_low, high = unit_at(codes_ptrs, unit, is_unit, TYPE, BLOCK_BYTES, EVEN)
        heads = heads_of(blocks, unit, is_unit, TYPE, EVEN)
        for PART in tl.static_range(PARTS):
            if (TYPE == 6) | (TYPE == 7):
                high = load(blocks + (TYPE - 5 + PART), is_unit, EVEN).to(tl.int32)
            codes = codes_of(odd_low if PART % 2 else low, high, places_UKO, unit, PART, 0, TYPE)
            first_inputs = first_input(units, PART, TYPE, UNIT_BYTES, PARTS)
            x = tl.load(x_ptr + x_rows + first_inputs + places_UMK, mask=is_x, other=0)
            if IS_ROUNDED:
                x = x.to(tl.float32).to(tl.float16)
            scale, least = scale_and_least_of(blocks, heads, unit, is_unit, PART, TYPE, EVEN)
            x_scale = scale
            if IS_ROUNDED:
                x_scale = tl.load(x_scales_ptr + x_scale_rows + first_inputs // 32, mask=is_x, other=0.0)
            if BLOCK_U == 1:
                x, codes = tl.reshape(x, [BLOCK_M, UNIT_BYTES]), tl.reshape(codes, [UNIT_BYTES, BLOCK_O])
                scale, least = tl.reshape(scale, [1, BLOCK_O]), tl.reshape(least, [1, BLOCK_O])
                if IS_ROUNDED:
                    x_scale = tl.reshape(x_scale, [BLOCK_M, 1])
            product = dot(x, codes.to(x.dtype), WIDE)
            sums = tl.sum(x.to(tl.float32), axis=1 if BLOCK_U == 1 else 2, keep_dims=True)
            if IS_ROUNDED:
                product *= x_scale
                sums *= x_scale
            total += product * scale
            if (TYPE == 3) | (TYPE == 7) | (TYPE == 12) | (TYPE == 13):
                total += sums * least
    if BLOCK_U > 1:
        total = tl.sum(total, axis=0)
    store_tile(total, rows, outputs, split, bias_ptr, out_ptr, parts_ptr, num_rows, num_outputs, HAS_BIAS, SPLITS)


# --- how they are launched -------------------------------------------------------------------------------------------


def _splits(programs: int, steps: int, wanted: int) -> int:
    """Over how many programs to split the inputs of a tile: until there are as many programs as are wanted, or each has
    four steps left."""
    splits = 1
    while splits < 16 and programs * splits < wanted and steps >= splits * 8:
        splits *= 2
    return splits


def _interpreted(rows: int, outputs: int, units: int) -> dict[str, int]:
    """Tiles for few programs, since each takes the same time whatever its size; small sizes are cut all the same."""
    width = 16 if outputs <= 64 else 256
    depth = 1 if rows > 16 else 4 if units <= 12 else 16
    return {"SPLITS": 2 if units > 4 else 1, "BLOCK_M": 1 if rows == 1 else 16, "BLOCK_O": width, "BLOCK_U": depth}


def _candidates_for_one(layout: Layout, outputs: int, units: int, processors: int) -> list[Blocks]:
    """A thread has ``WIDTH`` neighbouring pairs of bytes of each output of its tile, which share what is read of x.

    As many units as threads cover once: then inputs are loaded by the threads that multiply by them, and needn't be
    handed over. At least so many that each scale is loaded by one thread.
    """
    if INTERPRETED:
        return [Blocks.of(WIDTH=1, **_interpreted(1, outputs, units))]
    found = []
    for width, warps, most_words in ((8, 2, 2), (8, 1, 4), (4, 2, 2), (16, 2, 1)):
        words = min(most_words, layout.alignment // 2)
        depth = max(layout.units, 64 * warps * words // layout.unit_bytes, 32 * warps // width)
        splits = _splits(triton.cdiv(outputs, width), triton.cdiv(units, depth), processors * 32 // warps)
        sizes = {"BLOCK_M": 1, "BLOCK_O": width, "BLOCK_U": depth, "WIDTH": words}
        found += [Blocks.of(warps, 1, SPLITS=splits, **sizes)]
    unsplit = dict(found[0].sizes) | {"SPLITS": 1}
    return list(dict.fromkeys([*found, Blocks.of(found[0].num_warps, 1, **unsplit)]))


def _candidates_for_more(rows: int, outputs: int, units: int, processors: int, itemsize: int) -> list[Blocks]:
    """Few rows: a unit of its own for each warp. Many: a large tile, whose warps share what they unpack, with as many
    outputs as threads, so that each scale is loaded by one."""
    if INTERPRETED:
        return [Blocks.of(**_interpreted(rows, outputs, units))]
    if itemsize == 4:
        tiles = [(16, 32, 4, 4), (64, 64, 1, 4)]
    elif rows <= 16:
        tiles = [(16, 32, 4, 4), (16, 64, 4, 4), (16, 128, 1, 4)]
    elif rows <= 64:
        tiles = [(32, 32, 4, 4), (64, 128, 1, 4), (16, 64, 4, 4)]
    else:
        tiles = [(64, 128, 1, 4), (64, 256, 1, 8), (32, 32, 4, 4)]
    found = []
    for height, width, depth, warps in tiles:
        programs = triton.cdiv(outputs, width) * triton.cdiv(rows, height)
        splits = _splits(programs, triton.cdiv(units, depth), processors * 16 // warps) if rows <= 64 else 1
        found.append(Blocks.of(warps, 2, SPLITS=splits, BLOCK_M=height, BLOCK_O=width, BLOCK_U=depth))
    return found


def _x_format(x_MI: torch.Tensor) -> int:
    """How one row is read: two numbers at once where they take four bytes and lie on a border of four."""
    is_paired = x_MI.element_size() == 2 and x_MI.data_ptr() % 4 == 0
    if not is_paired:
        return PLAIN
    return BFLOAT16_PAIRS if x_MI.dtype == torch.bfloat16 else FLOAT16_PAIRS


def _readable(blocks: torch.Tensor) -> torch.Tensor:
    """Rows without gaps inside, at even addresses: as a loader leaves them. Other blocks are copied."""
    is_dense = blocks.stride(1) == 1 and blocks.stride(0) % 2 == 0
    is_even = blocks.storage_offset() % 2 == 0 and blocks.data_ptr() % 2 == 0
    return blocks if is_dense and is_even else blocks.clone(memory_format=torch.contiguous_format)


class _LinearGGUF(Product):
    """``linear_gguf`` and ``linear_gguf_a8``."""

    def __init__(self, spec: KernelSpec, tuner: Tuner) -> None:
        super().__init__(spec, tuner)
        self._type = int(spec.params["type"])
        self._layout = LAYOUTS[self._type]
        self._rounds = spec.operation == "linear_gguf_a8"
        self._choice = Choice(tuner, f"{spec.operation}/{spec.dtype}/{BLOCK_TYPES[self._type].name}")

    def __call__(self, x: torch.Tensor, blocks: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self._check(x, blocks)
        blocks = _readable(blocks)
        bias = None if bias is None else bias.contiguous()
        rounded = to_int8_blocks(x)[:2] if self._rounds else None
        is_one = x.numel() == x.shape[-1]
        launch = self._launch_one if is_one else self._launch_more

        def launch_on(x_MI: Any, out: Any, parts: Any, grid: tuple[int, int], options: dict[str, int]) -> None:
            factors, scales_MB = (x_MI, None) if rounded is None else rounded
            launch(factors, scales_MB, blocks, bias, (out, parts), grid, options)

        def by_library(x_MI: torch.Tensor, out_MO: torch.Tensor) -> None:
            full_OI = expansion.blocks_in_full(self._type, blocks, x_MI.dtype)
            multiply_by_library(x_MI, full_OI, bias, out_MO)

        unused, itemsize = ("BLOCK_M",) if is_one else (), 2 if self._rounds else None
        return self.run(x, blocks.shape[0], bias, launch_on, unused, itemsize, by_library)

    def _check(self, x: torch.Tensor, blocks: torch.Tensor) -> None:
        if blocks.shape[1] % self._layout.block_bytes or self._num_inputs(blocks) != x.shape[-1]:
            raise ConfigError(
                f"rows of {BLOCK_TYPES[self._type].name} have another length than the activations",
                where="kernels/triton: gguf",
                found=f"{x.shape[-1]} inputs and {blocks.shape[1]} bytes a row",
                allowed=f"{self._layout.block_bytes} bytes for each {BLOCK_TYPES[self._type].size} inputs",
            )

    def candidates(self, rows: int, outputs: int, inputs: int, processors: int, itemsize: int) -> list[Blocks]:
        units = inputs // self._layout.unit_inputs
        if rows == 1:
            return _candidates_for_one(self._layout, outputs, units, processors)
        found = _candidates_for_more(rows, outputs, units, processors, itemsize)
        return [*found, LIBRARY] if expansion.worth_trying(rows, itemsize) and not self._rounds else found

    def _launch_one(
        self,
        x_MI: torch.Tensor,
        scales_MB: torch.Tensor | None,
        blocks: torch.Tensor,
        bias: torch.Tensor | None,
        to: tuple[torch.Tensor, torch.Tensor],
        grid: tuple[int, int],
        options: dict[str, int],
    ) -> None:
        x_format = _x_format(x_MI)
        x_read = x_MI if x_format == PLAIN else x_MI[0].view(torch.int32)
        halves = blocks.view(torch.int16)
        _one_row[grid](
            x_read,
            scales_MB,
            halves,
            bias,
            *to,
            halves.shape[0],
            x_MI.shape[1] // self._layout.unit_inputs,
            halves.stride(0),
            X_FORMAT=x_format,
            **self._constants(x_MI, scales_MB, bias, options),
        )

    def _constants(
        self,
        x_MI: torch.Tensor,
        scales_MB: torch.Tensor | None,
        bias: torch.Tensor | None,
        options: dict[str, int],
    ) -> dict[str, int]:
        """What both kernels are compiled for."""
        return {
            "TYPE": self._type,
            **self._layout.constants,
            "EVEN": x_MI.shape[1] // self._layout.unit_inputs % options["BLOCK_U"] == 0,
            "IS_ROUNDED": scales_MB is not None,
            "HAS_BIAS": bias is not None,
            **options,
        }

    def _launch_more(
        self,
        x_MI: torch.Tensor,
        scales_MB: torch.Tensor | None,
        blocks: torch.Tensor,
        bias: torch.Tensor | None,
        to: tuple[torch.Tensor, torch.Tensor],
        grid: tuple[int, int],
        options: dict[str, int],
    ) -> None:
        halves = blocks.view(torch.int16)
        _more_rows[grid](
            x_MI,
            scales_MB,
            blocks,
            halves,
            bias,
            *to,
            x_MI.shape[0],
            halves.shape[0],
            x_MI.shape[1] // self._layout.unit_inputs,
            x_MI.stride(0),
            x_MI.shape[1] // ROUNDED_BLOCK,
            halves.stride(0),
            WIDE=INTERPRETED,
            **self._constants(x_MI, scales_MB, bias, options),
        )

    def transposed(self, grad: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """``grad @ w``, with some outputs' weights decoded at a time; rounding activations has the gradient of 1."""
        wide = torch.zeros(*grad.shape[:-1], self._num_inputs(blocks), dtype=torch.float32, device=grad.device)
        for some, of_some in zip(blocks.split(_GRADIENT_OUTPUTS), grad.split(_GRADIENT_OUTPUTS, dim=-1), strict=True):
            wide += of_some.float() @ by_block(some, torch.float32, {"type": self._type})
        return wide.to(grad.dtype)

    def _num_inputs(self, blocks: torch.Tensor) -> int:
        return blocks.shape[1] // self._layout.block_bytes * BLOCK_TYPES[self._type].size


def make_linear_gguf(spec: KernelSpec, tuner: Tuner) -> Callable[..., torch.Tensor]:
    """``linear_gguf`` or ``linear_gguf_a8``."""
    return quantized(spec, _LinearGGUF(spec, tuner))
