"""What every kernel provider has to do: each operation it has, against an oracle in float64.

Shapes: T tokens; H query heads; G key/value heads; D head size; R rotary dims; E, I, O features.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import pytest
import torch

from drivetrain.contracts.kernels import OPERATIONS, KernelProvider, KernelSpec
from drivetrain.contracts.plugin import Probe
from drivetrain.errors import DrivetrainError
from drivetrain.testing.suite import Suite, about, not_run

Arguments = tuple[torch.Tensor | None, ...]
Results = tuple[torch.Tensor, ...]

_ROWS = (0, 1, 3, 17)
_GRADIENT_FACTOR = 10.0
"""A gradient is a longer sum than its forward; it may be this much farther from the oracle."""


@dataclass(frozen=True)
class Case:
    """One use of an operation: the spec that ``make`` is given, but for dtype and device, and shapes of the inputs.

    shapes: of each tensor argument; None for an argument that is left out.
    scale:  standard deviation of the first input; large values show sums that overflow a narrow format.
    """

    operation: str
    shapes: tuple[tuple[int, ...] | None, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    params: Mapping[str, float] = field(default_factory=dict)
    scale: float = 1.0

    def spec(self, device_type: str, dtype: str) -> KernelSpec:
        return KernelSpec(self.operation, device_type, dtype, self.sizes, self.params)

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> Arguments:
        """Random inputs; the angles of rope are cosines and sines, and come in float32 or wider."""
        generator = torch.Generator().manual_seed(seed)

        def draw(shape: tuple[int, ...], scale: float) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

        values = [
            None if shape is None else draw(shape, self.scale if index == 0 else 1.0)
            for index, shape in enumerate(self.shapes)
        ]
        if self.operation == "rope":
            angle = cast(torch.Tensor, values[2])[..., : self.shapes[2][-1] // 2]  # type: ignore[index]
            wide = torch.promote_types(dtype, torch.float32)
            angles = [torch.cat((part, part), dim=-1).to(device, wide) for part in (angle.cos(), angle.sin())]
            return (*(cast(torch.Tensor, value).to(device, dtype) for value in values[:2]), *angles)
        return tuple(None if value is None else value.to(device, dtype) for value in values)


# --- what the operations mean, in float64 and without any of torch's fused functions ---------------------------------


def _rms_norm(params: Mapping[str, float], x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    mean = (x * x).sum(dim=-1, keepdim=True) / x.shape[-1]
    return x / (mean + params.get("eps", 1e-6)).sqrt() * (weight + params.get("weight_offset", 0.0))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1] // 2
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def _rope(params: Mapping[str, float], q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _silu_mul(params: Mapping[str, float], gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate / (1 + torch.exp(-gate)) * up


def _gelu_tanh_mul(params: Mapping[str, float], gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


def _linear(
    params: Mapping[str, float], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    product = (x[..., None, :] * weight).sum(dim=-1)
    return product if bias is None else product + bias


ORACLES: Mapping[str, Callable[..., Any]] = {
    "rms_norm": _rms_norm,
    "rope": _rope,
    "silu_mul": _silu_mul,
    "gelu_tanh_mul": _gelu_tanh_mul,
    "linear": _linear,
}
"""Operation -> its meaning: called with the spec's params and float64 inputs."""


# --- the grid --------------------------------------------------------------------------------------------------------


def _rms_norm_cases() -> Iterator[Case]:
    for rows in _ROWS:
        for size in (8, 33, 576):
            yield Case("rms_norm", ((rows, size), (size,)), {"E": size}, {"eps": 1e-5})
    yield Case("rms_norm", ((2, 3, 64), (64,)), {"E": 64}, {"eps": 1e-6})
    yield Case("rms_norm", ((3, 64), (64,)), {"E": 64}, {"eps": 1e-6, "weight_offset": 1.0})
    yield Case("rms_norm", ((3, 64), (64,)), {"E": 64}, {"eps": 1e-2}, scale=0.05)
    yield Case("rms_norm", ((3, 64), (64,)), {"E": 64}, {"eps": 1e-6}, scale=500.0)


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


def cases(operation: str) -> list[Case]:
    """Every case of one operation: odd sizes, no row, one row, more leading dims, large and small values."""
    grids: Mapping[str, Callable[[], Iterator[Case]]] = {
        "rms_norm": _rms_norm_cases,
        "rope": _rope_cases,
        "silu_mul": lambda: _gated_cases("silu_mul"),
        "gelu_tanh_mul": lambda: _gated_cases("gelu_tanh_mul"),
        "linear": _linear_cases,
    }
    return list(grids[operation]())


def _tensors(result: Any) -> Results:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def _wide(arguments: Arguments) -> Arguments:
    return tuple(None if value is None else value.detach().cpu().double() for value in arguments)


def _strided(value: torch.Tensor | None) -> torch.Tensor | None:
    """The same values in memory with gaps between them."""
    if value is None:
        return None
    roomy = torch.zeros((*value.shape[:-1], value.shape[-1] * 2), dtype=value.dtype, device=value.device)
    roomy[..., ::2] = value
    return roomy[..., ::2]


class KernelsSuite(Suite):
    """Every operation that the provider has, against its meaning, in every dtype and on every device here.

    dtypes: that are tried; those that ``supports`` refuses are left out.
    """

    kind = "kernels"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")

    @classmethod
    def device_types(cls) -> list[str]:
        """Devices of this machine."""
        found = ["cpu"]
        found += [name for name in ("cuda", "xpu") if getattr(torch, name).is_available()]
        return found

    @classmethod
    def provider(cls) -> KernelProvider:
        return cast(KernelProvider, cls.make())

    @classmethod
    def require_operation(cls, operation: str) -> None:
        if operation not in cls.provider().operations():
            pytest.skip(f"not claimed: operation {operation}")

    @classmethod
    def covered(cls, operation: str, *dtypes: str) -> list[tuple[Case, str, str]]:
        """Case, device and dtype of everything that ``supports`` says yes to; ends the test where it is nothing."""
        cls.require_operation(operation)
        provider = cls.provider()
        tried = [
            (case, device, dtype)
            for case in cases(operation)
            for device in cls.device_types()
            for dtype in dtypes or cls.dtypes
        ]
        found = [entry for entry in tried if provider.supports(entry[0].spec(entry[1], entry[2])).ok]
        if not found:
            case, device, dtype = tried[0]
            not_run(f"no case of {operation} is supported here: {provider.supports(case.spec(device, dtype)).reason}")
        return found

    def compare(self, case: Case, dtype: str, arguments: Arguments, result: Any) -> None:
        """Hold a result against the oracle on the same, already rounded inputs."""
        wanted = _tensors(ORACLES[case.operation](case.params, *_wide(arguments)))
        relative, absolute = OPERATIONS[case.operation].tolerance[dtype]
        for found, right in zip(_tensors(result), wanted, strict=True):
            assert found.dtype == getattr(torch, dtype), f"{case}: the result is {found.dtype} for inputs in {dtype}"
            torch.testing.assert_close(
                found.detach().cpu().double(), right, rtol=relative, atol=absolute, msg=about(f"{case} {dtype}")
            )

    # --- what the provider says --------------------------------------------------------------------------------------

    def test_operations_are_known(self) -> None:
        """Every operation it has is a logical operation of the core."""
        operations = self.provider().operations()
        assert operations, "a provider without any operation is of no use"
        unknown = operations - OPERATIONS.keys()
        assert not unknown, f"no such operations: {', '.join(sorted(unknown))}"
        assert operations == self.provider().operations()

    def test_supports_answers_with_a_probe(self) -> None:
        """Every spec of the grid gets a Probe, the same one when asked again, and a refusal carries a code."""
        provider = self.provider()
        for operation in sorted(provider.operations() & ORACLES.keys()):
            for case in cases(operation):
                for dtype in self.dtypes:
                    spec = case.spec("cpu", dtype)
                    probe = provider.supports(spec)
                    assert isinstance(probe, Probe)
                    assert probe.reason
                    assert probe.ok or probe.code not in ("", "ok")
                    assert probe == provider.supports(spec)

    def test_what_it_has_not_is_refused(self) -> None:
        """A spec of an operation it has not is refused by supports, and an error of the tree in make."""
        provider = self.provider()
        absent = sorted(OPERATIONS.keys() - provider.operations())[:1]
        for operation in ("surely_no_such_operation", *absent):
            spec = KernelSpec(operation, "cpu", "float32")
            assert not provider.supports(spec).ok, f"supports says yes to {operation}"
            with pytest.raises(DrivetrainError):
                provider.make(spec)

    # --- numbers -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("operation", sorted(ORACLES))
    def test_parity(self, operation: str) -> None:
        """Results equal the operation's meaning within its published tolerance, in every supported case."""
        provider = self.provider()
        for case, device, dtype in self.covered(operation):
            arguments = case.inputs(getattr(torch, dtype), device)
            result = provider.make(case.spec(device, dtype))(*arguments)
            self.compare(case, dtype, arguments, result)

    @pytest.mark.parametrize("operation", sorted(ORACLES))
    def test_strided_inputs(self, operation: str) -> None:
        """Inputs whose elements do not lie side by side in memory give the same results."""
        provider = self.provider()
        for case, device, dtype in self.covered(operation, self.dtypes[0]):
            arguments = tuple(_strided(value) for value in case.inputs(getattr(torch, dtype), device))
            self.compare(case, dtype, arguments, provider.make(case.spec(device, dtype))(*arguments))

    @pytest.mark.parametrize("operation", sorted(ORACLES))
    def test_inputs_are_left_unchanged(self, operation: str) -> None:
        """No input is written to."""
        provider = self.provider()
        for case, device, dtype in self.covered(operation):
            arguments = case.inputs(getattr(torch, dtype), device)
            before = [None if value is None else value.clone() for value in arguments]
            provider.make(case.spec(device, dtype))(*arguments)
            for index, (value, copy) in enumerate(zip(arguments, before, strict=True)):
                assert value is None or torch.equal(value, cast(torch.Tensor, copy)), f"{case}: wrote to input {index}"

    @pytest.mark.parametrize("operation", sorted(ORACLES))
    def test_gradients(self, operation: str) -> None:
        """Gradients of every input equal the oracle's, in float32."""
        provider = self.provider()
        relative, absolute = OPERATIONS[operation].tolerance["float32"]
        for case, device, dtype in self.covered(operation, "float32"):
            arguments = _asking(case.inputs(torch.float32, device), operation)
            found = _gradients(provider.make(case.spec(device, dtype))(*arguments), arguments)
            wide = _asking(_wide(arguments), operation)
            wanted = _gradients(ORACLES[operation](case.params, *wide), wide)
            scale = max([1.0, *(float(w.abs().max()) for w in wanted if w.numel())])
            for index, (mine, right) in enumerate(zip(found, wanted, strict=True)):
                torch.testing.assert_close(
                    mine.cpu().double(),
                    right,
                    rtol=_GRADIENT_FACTOR * relative,
                    atol=_GRADIENT_FACTOR * absolute * scale,
                    msg=about(f"{case}, gradient {index}"),
                )

    @pytest.mark.parametrize("operation", sorted(ORACLES))
    def test_gradcheck(self, operation: str) -> None:
        """Where float64 is supported, gradients equal finite differences."""
        self.require_operation(operation)
        provider = self.provider()
        small = min((c for c in cases(operation) if c.shapes[0] and c.shapes[0][0] == 3), key=lambda c: str(c.shapes))
        spec = small.spec("cpu", "float64")
        if not provider.supports(spec).ok:
            pytest.skip("not claimed: float64")
        arguments = _asking(small.inputs(torch.float64, "cpu"), operation)
        given = [value for value in arguments if value is not None]
        kernel = provider.make(spec)

        def with_left_out(*tensors: torch.Tensor) -> Any:
            left = iter(tensors)
            return kernel(*(None if value is None else next(left) for value in arguments))

        assert torch.autograd.gradcheck(with_left_out, given, atol=1e-6)

    @pytest.mark.parametrize("operation", sorted(ORACLES))
    def test_runs_are_bitwise_equal(self, operation: str) -> None:
        """The same inputs give the same bits, where the ability ``deterministic`` is claimed."""
        self.require_claim("deterministic")
        provider = self.provider()
        for case, device, dtype in self.covered(operation):
            kernel = provider.make(case.spec(device, dtype))
            arguments = case.inputs(getattr(torch, dtype), device)
            for one, other in zip(_tensors(kernel(*arguments)), _tensors(kernel(*arguments)), strict=True):
                assert torch.equal(one, other), f"{case} {dtype}"

    @pytest.mark.parametrize("operation", sorted(ORACLES))
    def test_rows_do_not_depend_on_each_other(self, operation: str) -> None:
        """A row's bits do not depend on its neighbours, where the ability ``batch_invariant`` is claimed."""
        self.require_claim("batch_invariant")
        provider = self.provider()
        for case, device, dtype in self.covered(operation):
            rows = cast(tuple[int, ...], case.shapes[0])[0]
            if rows < 2 or len(cast(tuple[int, ...], case.shapes[0])) > 3:
                continue
            arguments = case.inputs(getattr(torch, dtype), device)
            kernel = provider.make(case.spec(device, dtype))
            alone = kernel(*(_first_row(value, rows) for value in arguments))
            for together, one in zip(_tensors(kernel(*arguments)), _tensors(alone), strict=True):
                assert torch.equal(together[:1], one), f"{case} {dtype}: the first row changes with those behind it"

    def test_dtypes_of_the_grid_have_a_tolerance(self) -> None:
        """Every dtype that is tried has a published tolerance in every operation it is tried on."""
        for operation in sorted(self.provider().operations() & ORACLES.keys()):
            assert set(self.dtypes) <= OPERATIONS[operation].tolerance.keys(), operation

    def test_a_made_callable_needs_no_provider(self) -> None:
        """Two uses of one operation with different constants do not share them."""
        self.require_operation("rms_norm")
        provider = self.provider()
        base = Case("rms_norm", ((3, 64), (64,)), {"E": 64}, {"eps": 1e-6})
        other = dataclasses.replace(base, params={"eps": 0.5})
        if not all(provider.supports(case.spec("cpu", "float32")).ok for case in (base, other)):
            pytest.skip("not claimed: rms_norm in float32 on the CPU")
        made = [(case, provider.make(case.spec("cpu", "float32"))) for case in (base, other)]
        for case, kernel in made:
            arguments = case.inputs(torch.float32, "cpu")
            self.compare(case, "float32", arguments, kernel(*arguments))


def _asking(arguments: Arguments, operation: str) -> Arguments:
    """Copies that ask for gradients; the angles of rope are constants."""
    count = 2 if operation == "rope" else len(arguments)
    return tuple(
        value if value is None or index >= count else value.detach().clone().requires_grad_()
        for index, value in enumerate(arguments)
    )


def _gradients(result: Any, arguments: Arguments) -> list[torch.Tensor]:
    """Gradients of a sum in which every element counts differently."""
    total = torch.zeros((), dtype=torch.float64)
    for tensor in _tensors(result):
        weights = torch.linspace(-1.0, 1.0, tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        total = total.to(tensor) + (tensor.reshape(-1) * weights).sum()
    asking = [value for value in arguments if value is not None and value.requires_grad]
    found = torch.autograd.grad(total, asking, allow_unused=True)
    return [torch.zeros_like(a) if g is None else g for a, g in zip(asking, found, strict=True)]


def _first_row(value: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """The first row of an input that has ``rows`` rows; weights stay whole."""
    return value[:1] if value is not None and value.dim() > 1 and value.shape[0] == rows else value
