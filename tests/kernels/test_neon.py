"""Rules of the C++ kernels on arm64: all sources compile, and with and without dot products of integers they compute
what this machine's kernels do. They run in an emulator, which says nothing of their speed."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from drivetrain.contracts.kernels import OPERATIONS
from drivetrain.kernels.cpu.library import FORMATS, ROW_FORMATS, open_library
from drivetrain.kernels.cpu.operations import matrix_fields
from drivetrain.kernels.cpu.packed import Described
from drivetrain.kernels.cpu.rotary import RotationFields
from drivetrain.packed import DECODERS
from drivetrain.packed.gguf import BLOCK_TYPES
from kernels.test_cpu_packed import USES, use
from support.foreign_machine import Blob, Calls, build, missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

PROCESSORS = {"baseline": "cortex-a53", "dotprod": "neoverse-n1"}
"""Variant -> a processor that has no more than it needs."""

Results = dict[Blob, tuple[str, torch.dtype, float]]
"""What is compared -> of which operation, in which dtype, and the distance that may be."""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(tmp_path_factory.mktemp("arm64"), tuple(PROCESSORS))


class Written:
    """Every operation once or a few times, on small inputs of odd sizes."""

    def __init__(self) -> None:
        self.calls, self.results = Calls(), Results()
        self._generator = torch.Generator().manual_seed(8)
        self.calls.call("dt_set_threads", 2)
        for dtype in FORMATS:
            self._by_rows(dtype)
            self._products(dtype)
            self._losses(dtype)
        for operation, number in USES:
            for rows in (1, 3, 6):
                self._packed(operation, number, rows)
        for dtype in ROW_FORMATS:
            for kept in ROW_FORMATS:
                self._written_keys(dtype, kept)
        for code in (torch.float32, torch.int8, torch.float8_e4m3fn):
            self._attention(code)
        self._sampling()

    def _random(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(dtype)

    def _put(self, *tensors: torch.Tensor) -> list[Blob]:
        return [self.calls.put(tensor) for tensor in tensors]

    def _out(self, name: str, *shape: int, dtype: torch.dtype = torch.float32, tolerance: float | None = None) -> Blob:
        blob = self.calls.put(torch.zeros(shape, dtype=dtype))
        if tolerance is None:
            tolerance = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}[dtype]
        self.results[blob] = (name, dtype, tolerance)
        return blob

    def _by_rows(self, dtype: torch.dtype) -> None:
        kind, call = FORMATS[dtype], self.calls.call
        x, other, weight = self._put(*(self._random(*shape, dtype=dtype) for shape in ((5, 37), (5, 37), (37,))))
        normed, summed = (self._out("rms_norm", 5, 37, dtype=dtype) for _ in range(2))
        call("dt_rms_norm", x, other, weight, 1e-5, 1.0, 5, 37, kind, normed, summed)
        for activation in (0, 1):
            gated = self._out("gated", 5, 37, dtype=dtype)
            call("dt_gated", x, other, 5, 37, activation, kind, gated)
        q, cos, sin = self._put(self._random(3, 2, 22, dtype=dtype), self._random(3, 18), self._random(3, 18))
        call("dt_rotate", q, cos, sin, 3, 2, 22, 18, kind, self._out("rope", 3, 2, 22, dtype=dtype))

    def _written_keys(self, dtype: torch.dtype, kept: torch.dtype) -> None:
        q, k, v = (self._random(2, heads, 22, dtype=dtype) for heads in (4, 2, 2))
        keys, values = (torch.zeros(3, 4, 2, 22, dtype=kept) for _ in range(2))
        out, slots = torch.zeros_like(q), torch.tensor([5, 11])
        tensors = (q, k, v, self._random(2, 18), self._random(2, 18), keys, values, slots, out)
        fields = RotationFields(
            *(tensor.data_ptr() for tensor in tensors),
            *(2, 4, 2, 22, 18, 3, 4, ROW_FORMATS[dtype], ROW_FORMATS[kept]),
            *(tensor.stride()[:2] for tensor in (q, k, v)),
            *(tensor.stride()[:3] for tensor in (keys, values)),
        )
        where, *blobs = self.calls.put_all(fields, *tensors)
        self.calls.call("dt_rope_write", where)
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
        for blob, of in zip((*blobs[5:7], blobs[8]), (kept, kept, dtype), strict=True):
            self.results[blob] = (f"rope_write of {dtype} into {kept}", of, tolerance[of])

    def _products(self, dtype: torch.dtype) -> None:
        kind = FORMATS[dtype]
        for rows in (1, 3, 7, 41):
            x = self.calls.put(self._random(rows, 65, dtype=dtype))
            weight, up, bias = self._random(51, 65, dtype=dtype), self._random(51, 65, dtype=dtype), self._random(51)
            gates = [self.calls.put_fields(matrix_fields(one), one) for one in (weight, up)]
            fields = self.calls.put_fields(matrix_fields(weight, bias), weight, bias)
            out = self._out("linear", rows, 51, dtype=dtype)
            self.calls.call("dt_linear", x, rows, fields, kind, out)
            out = self._out("gated_linear", rows, 51, dtype=dtype)
            self.calls.call("dt_gated_linear", x, rows, *gates, 1, kind, out)

    def _losses(self, dtype: torch.dtype) -> None:
        rows, size, kind = 3, 2061, FORMATS[dtype]
        logits = self.calls.put(self._random(rows, size, dtype=dtype))
        targets, grads = self._put(torch.tensor([5, -100, 2060]), self._random(rows))
        losses, totals = (self._out("losses", rows) for _ in range(2))
        self.calls.call("dt_token_losses", logits, targets, rows, size, 2.0, kind, losses, totals)
        self.calls.call("dt_logit_gradients", logits, targets, totals, grads, rows, size, 2.0, kind)
        self.results[logits] = ("gradients of logits", dtype, 1e-5 if dtype == torch.float32 else 1.6e-2)

    def _packed(self, operation: str, number: int, rows: int) -> None:
        inner, outer = 512, 11
        x, *weights, bias = use(operation, number, rows, inner, outer).inputs(torch.float32, "cpu", seed=rows)
        kind = BLOCK_TYPES[number] if number else None
        described = Described(operation, [w for w in weights if w is not None], bias, inner, kind, number)
        fields = self.calls.put_fields(described.fields, *described.kept)
        assert x is not None
        out = self._out(f"{operation} {number}", rows, outer, tolerance=OPERATIONS[operation].tolerance["float32"][1])
        self.calls.call("dt_linear", self.calls.put(x), rows, fields, 0, out)

    def _attention(self, code: torch.dtype) -> None:
        """Two sequences over pages of four tokens: a prompt of 9 behind 6 tokens, and a decode behind 20."""
        heads, groups, size, block = 4, 2, 20, 4
        tokens, blocks = (9, 1), 10
        has_scales = code != torch.float32
        caches, scales = (
            [torch.randn(blocks, block, groups, *last, generator=self._generator) for _ in range(2)]
            for last in ((size,), ())
        )
        codes = [(cache * (30 if code == torch.int8 else 100)).to(code) if has_scales else cache for cache in caches]
        new = [self._random(sum(tokens), count, size) for count in (heads, groups, groups)]
        tables = torch.tensor([[3, 1, 7, 2, 0, 0], [9, 4, 6, 0, 8, 5]], dtype=torch.int32)
        places = [(0, position) for position in range(6, 15)] + [(1, 20)]
        slots = torch.tensor([int(tables[s, at // block]) * block + at % block for s, at in places])
        starts, lengths = (torch.tensor(given, dtype=torch.int32) for given in ((0, 9, 10), (15, 21)))
        pages, found = self._put(*codes), self._out(f"attention {code}", 10, heads, size, tolerance=1e-4)
        kept = self._put(*(scale.abs() / 30 for scale in scales)) if has_scales else [None, None]
        self.calls.call(
            "dt_attend",
            *self._put(*new),
            *pages,
            *kept,
            *(heads, groups, size, block, {torch.float32: 0, torch.int8: 2, torch.float8_e4m3fn: 3}[code]),
            *(size**-0.5, 5.0, 11, 2, sum(tokens)),
            *self._put(starts, lengths, tables),
            tables.stride(0),
            *self._put(slots),
            found,
        )
        for page in pages:
            self.results[page] = (f"cache of {code}", code, 1e-5)

    def _sampling(self) -> None:
        rows, size = 3, 300
        settings: Sequence[torch.Tensor] = (
            torch.tensor([0.0, 1.0, 0.7]),
            torch.tensor([0, 20, 0]),
            torch.tensor([1.0, 0.9, 0.8]),
            torch.tensor([0.0, 0.0, 0.05]),
            torch.tensor([0.5, 0.3, 0.9], dtype=torch.float64),
        )
        found = self._out("sample", rows, dtype=torch.int64, tolerance=0.0)
        self.calls.call("dt_sample", self.calls.put(self._random(rows, size)), rows, size, *self._put(*settings), found)


@pytest.fixture(scope="module")
def written() -> Written:
    return Written()


def test_every_packed_operation_is_among_them() -> None:
    assert {operation for operation, _ in USES} == set(DECODERS)


@pytest.mark.parametrize("variant", PROCESSORS)
def test_arm64_computes_what_this_machine_does(programs: dict[str, Path], written: Written, variant: str) -> None:
    try:
        found = written.calls.there(programs[variant], PROCESSORS[variant])
    except subprocess.CalledProcessError as error:
        pytest.fail(f"{error}: {error.stderr.decode()}")
    wanted = written.calls.here(open_library())
    for blob, (name, dtype, tolerance) in written.results.items():
        results = [torch.frombuffer(bytearray(memory[blob.index]), dtype=dtype) for memory in (found, wanted)]
        ours, here = (result.double() for result in results)
        assert here.any(), name
        torch.testing.assert_close(ours, here, rtol=tolerance, atol=tolerance * 10, msg=lambda t, n=name: f"{n}: {t}")


def test_dot_products_are_in_use_where_they_are_compiled(programs: dict[str, Path], written: Written) -> None:
    """A processor that has none of them stops at the first."""
    with pytest.raises(subprocess.CalledProcessError) as caught:
        written.calls.there(programs["dotprod"], PROCESSORS["baseline"])
    assert caught.value.returncode == -4, "no illegal instruction"
