"""What every kernel provider has to do: each operation it has, against an oracle in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

import pytest
import torch

from drivetrain.contracts.kernels import OPERATIONS, FindsLargest, KernelProvider, KernelSpec, LargestOutput
from drivetrain.contracts.plugin import Probe
from drivetrain.errors import DrivetrainError
from drivetrain.operators import Operator
from drivetrain.testing.kernel_oracle import ORACLES, Arguments, Case, cases
from drivetrain.testing.suite import Suite, about, not_run

__all__ = ["ORACLES", "Case", "KernelsSuite", "cases"]

Results = tuple[torch.Tensor, ...]

_GRADIENT_FACTOR = 10.0
"""A gradient is a longer sum than its forward; it may be this much farther from the oracle."""


_CHECKS = ("test_autograd_registration", "test_faketensor")
"""Checks of torch's that every dtype passes; the schema too, and tracing with free sizes once on each device."""


def _tensors(result: Any) -> Results:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def _call(operation: str, kernel: Callable[..., Any], arguments: Arguments) -> Results:
    """What the kernel returns, and after it what it wrote to."""
    results = _tensors(kernel(*arguments))
    named = zip(OPERATIONS[operation].arguments, arguments, strict=True)
    return (*results, *(cast(torch.Tensor, a) for name, a in named if name in OPERATIONS[operation].writes))


def _copies(arguments: Arguments) -> Arguments:
    """Copies in the same form, gaps included."""
    return tuple(
        None
        if value is None
        else torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)
        for value in arguments
    )


def _wide(arguments: Arguments) -> Arguments:
    """In main memory and float64; integers stay as they are."""

    def widened(value: torch.Tensor) -> torch.Tensor:
        value = value.detach().cpu()
        return value.double() if value.is_floating_point() else value

    return tuple(None if value is None else widened(value) for value in arguments)


_answers: dict[tuple[str, str], tuple[Arguments, Results]] = {}
"""Case and dtype -> inputs, and what they mean. Several tests of several providers ask for the same."""


def _wanted(case: Case, dtype: str, wide: Arguments) -> Results:
    """What the oracle says of these inputs."""
    key = str(case), dtype
    known, wanted = _answers.get(key, ((), ()))
    if len(known) != len(wide) or not all(map(_equal, known, wide)):
        wanted = _tensors(ORACLES[case.operation](case.params, *wide))
        _answers[key] = wide, wanted
    return wanted


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """In dtype and numbers; unlike :func:`_same`, of tensors with gaps too."""
    return one is other if one is None or other is None else one.dtype == other.dtype and torch.equal(one, other)


def _strided(value: torch.Tensor | None, *, dense: bool = False) -> torch.Tensor | None:
    """The same values in memory with gaps between them; between rows only, where the last dim has to be ``dense``."""
    if value is None or value.dim() == 0:
        return value
    *lead, last = value.shape
    if dense:
        shape: tuple[int, ...] = (*lead[:-1], lead[-1] * 2, last)
        gaps: tuple[Any, ...] = (..., slice(None, None, 2), slice(None))
    else:
        shape, gaps = (*lead, last * 2), (..., slice(None, None, 2))
    roomy = torch.zeros(shape, dtype=value.dtype, device=value.device)
    roomy[gaps] = value
    return roomy[gaps]


def _misaligned(value: torch.Tensor | None) -> torch.Tensor | None:
    """The same values, dense, starting one element behind the start of its memory."""
    if value is None:
        return None
    roomy = torch.empty(value.numel() + 1, dtype=value.dtype, device=value.device)
    return roomy[1:].view(value.shape).copy_(value)


def _with_rows(covered: list[tuple[Case, str, str]]) -> tuple[Case, str, str]:
    """The first case that has several rows, if any has."""
    return next((entry for entry in covered if (entry[0].shapes[0] or (0,))[0] > 1), covered[0])


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit by bit."""
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


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
    def require_gradients(cls, operation: str) -> None:
        cls.require_operation(operation)
        if not OPERATIONS[operation].differentiable:
            pytest.skip(f"not claimed: {operation} is not differentiable")

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

    def compare(self, case: Case, dtype: str, arguments: Arguments, results: Results) -> None:
        """Hold results against the oracle on the same, already rounded inputs."""
        wanted = _wanted(case, dtype, _wide(arguments))
        operation = OPERATIONS[case.operation]
        relative, absolute = operation.tolerance[dtype]
        right_dtype = operation.result_dtype or dtype
        for found, right in zip(results, wanted, strict=True):
            assert found.dtype == getattr(torch, right_dtype), f"{case}: the result is {found.dtype} for {dtype}"
            found = found.detach().cpu()
            if right.dtype == torch.bool:
                _expect_allowed(f"{case} {dtype}", found, right)
                continue
            torch.testing.assert_close(
                found.double(), right, rtol=relative, atol=absolute, msg=about(f"{case} {dtype}")
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
            kernel = provider.make(case.spec(device, dtype))
            self.compare(case, dtype, arguments, _call(operation, kernel, _copies(arguments)))

    @pytest.mark.parametrize("operation", sorted(ORACLES))
    def test_strided_inputs(self, operation: str) -> None:
        """Inputs whose elements do not lie side by side in memory give the same results."""
        provider = self.provider()
        for case, device, dtype in self.covered(operation, self.dtypes[0]):
            named = zip(OPERATIONS[operation].arguments, case.inputs(getattr(torch, dtype), device), strict=True)
            arguments = tuple(_strided(value, dense=name in OPERATIONS[operation].writes) for name, value in named)
            kernel = provider.make(case.spec(device, dtype))
            self.compare(case, dtype, arguments, _call(operation, kernel, _copies(arguments)))

    @pytest.mark.parametrize("operation", sorted(ORACLES))
    def test_misaligned_inputs(self, operation: str) -> None:
        """Inputs that start one element after an aligned address give the same results."""
        provider = self.provider()
        for case, device, dtype in self.covered(operation):
            arguments = case.inputs(getattr(torch, dtype), device)
            kernel = provider.make(case.spec(device, dtype))
            moved = tuple(_misaligned(value) for value in arguments)
            self.compare(case, dtype, arguments, _call(operation, kernel, moved))

    @pytest.mark.parametrize("operation", sorted(ORACLES))
    def test_another_dtype_is_an_error_or_right(self, operation: str) -> None:
        """Activations in another dtype than the one it was bound for: an error, or the right answer in that dtype."""
        provider = self.provider()
        case, device, dtype = _with_rows(self.covered(operation))
        kernel = provider.make(case.spec(device, dtype))
        for other in sorted({"float32", "bfloat16", "float16"} - {dtype}):
            arguments = case.inputs(getattr(torch, other), device)
            try:
                results = _call(operation, kernel, _copies(arguments))
            except (DrivetrainError, RuntimeError, TypeError, ValueError):
                continue  # it says that it can't
            self.compare(case, other, arguments, results)

    @pytest.mark.parametrize("operation", sorted(ORACLES))
    def test_inputs_are_left_unchanged(self, operation: str) -> None:
        """No input is written to, but for those that the operation is there to write to."""
        provider = self.provider()
        for case, device, dtype in self.covered(operation):
            arguments = case.inputs(getattr(torch, dtype), device)
            before = _copies(arguments)
            provider.make(case.spec(device, dtype))(*arguments)
            for name, value, copy in zip(OPERATIONS[operation].arguments, arguments, before, strict=True):
                if value is not None and name not in OPERATIONS[operation].writes:
                    assert _same(value, cast(torch.Tensor, copy)), f"{case}: wrote to {name}"

    @pytest.mark.parametrize("operation", sorted(ORACLES))
    def test_gradients(self, operation: str) -> None:
        """Gradients of every input that is no constant equal the oracle's, in float32."""
        self.require_gradients(operation)
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
        self.require_gradients(operation)
        if OPERATIONS[operation].rounds_inputs:
            pytest.skip(f"not claimed: {operation} is no smooth function, and its gradient is that of a smooth one")
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
            first, second = (_call(operation, kernel, _copies(arguments)) for _ in range(2))
            for one, other in zip(first, second, strict=True):
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
            alone = kernel(*_first_row(arguments, operation))
            for together, one in zip(_tensors(kernel(*_copies(arguments))), _tensors(alone), strict=True):
                assert torch.equal(together[:1], one), f"{case} {dtype}: the first row changes with those behind it"

    # --- what torch sees, where the ability ``operators`` is claimed -------------------------------------------------

    def visible(self, operation: str) -> list[tuple[Case, str, str, Callable[..., Any]]]:
        """A case of each device and dtype, and its callable."""
        self.require_claim("operators")
        covered, provider = self.covered(operation), self.provider()
        found = []
        for device, dtype in dict.fromkeys((device, dtype) for _, device, dtype in covered):
            case, *_ = _with_rows([entry for entry in covered if entry[1:] == (device, dtype)])
            found.append((case, device, dtype, provider.make(case.spec(device, dtype))))
        return found

    def operators(self, operation: str) -> list[tuple[Case, str, str, Callable[..., Any]]]:
        """Those of them that carry an operator; what is made of torch's own functions needs none."""
        found = [
            entry for entry in self.visible(operation) if isinstance(getattr(entry[3], "operator", None), Operator)
        ]
        if not found:
            pytest.skip(f"not claimed: an operator for {operation}")
        return found

    @pytest.mark.parametrize("operation", sorted(ORACLES))
    def test_operators_keep_the_rules(self, operation: str) -> None:
        """Each operator passes torch's own check: schema, what it writes to, fake results, autograd, tracing."""
        traced: set[str] = set()
        for case, device, dtype, kernel in self.operators(operation):
            operator = cast(Any, kernel).operator
            inputs = case.inputs(getattr(torch, dtype), device)
            arguments = _asking(inputs, operation) if OPERATIONS[operation].differentiable else inputs
            checks = list(_CHECKS)
            # The check of what is written to compares arguments by arithmetic that torch does not have for float8.
            if all(value is None or value.dtype != torch.float8_e4m3fn for value in inputs):
                checks.append("test_schema")
            if device not in traced:  # compiling, which comes next, traces in every dtype
                checks.append("test_aot_dispatch_dynamic")
                traced.add(device)
            try:
                torch.library.opcheck(operator.overload, (*arguments, *operator.constants), test_utils=checks)
            except Exception as error:  # whatever rule is broken, by whatever exception torch tells it
                pytest.fail(f"{case} {dtype}: {type(error).__name__}: {error}")

    @pytest.mark.parametrize("operation", sorted(ORACLES))
    def test_operators_equal_the_plain_callable(self, operation: str) -> None:
        """What is computed under autograd is what is computed without it, bit by bit."""
        for case, device, dtype, kernel in self.operators(operation):
            inputs = case.inputs(getattr(torch, dtype), device)
            with torch.inference_mode():
                plain = _call(operation, kernel, _copies(inputs))
            visible = _call(operation, cast(Any, kernel).operator, _copies(inputs))
            for one, other in zip(plain, visible, strict=True):
                assert _same(one, other), f"{case} {dtype}: the operator and the plain callable differ"

    @pytest.mark.parametrize("operation", sorted(ORACLES))
    def test_operators_are_compiled(self, operation: str) -> None:
        """torch.compile takes the callable whole, and results and gradients are those of eager mode."""
        for case, device, dtype, kernel in self.visible(operation):
            inputs = case.inputs(getattr(torch, dtype), device)
            torch.compiler.reset()  # it counts how often one piece of code was compiled, and gives up after a few
            compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
            with torch.no_grad():
                self.compare(case, dtype, inputs, _call(operation, compiled, _copies(inputs)))
            if OPERATIONS[operation].differentiable:
                one, other = _asking(inputs, operation), _asking(inputs, operation)
                gradients = _gradients(kernel(*one), one), _gradients(compiled(*other), other)
                for eager, traced in zip(*gradients, strict=True):
                    torch.testing.assert_close(traced, eager, msg=about(f"gradients of {case} {dtype} when compiled"))

    # --- what a callable of ``linear`` may do beside -----------------------------------------------------------------

    def test_largest_outputs(self) -> None:
        """A callable of ``linear`` that is a FindsLargest finds the largest of its own outputs, where others are near,
        equal or no numbers, and sees what is written to the weight later."""
        self.require_operation("linear")
        provider, found = self.provider(), 0
        for device in self.device_types():
            for dtype in self.dtypes:
                for rows, inner, outer in _LARGEST_OF:
                    spec = KernelSpec("linear", device, dtype, {"I": inner, "O": outer})
                    kernel = provider.make(spec) if provider.supports(spec).ok else None
                    if not isinstance(kernel, FindsLargest):
                        continue
                    x, weight = _close_outputs(rows, inner, outer, getattr(torch, dtype), device)
                    largest_of = kernel.largest_of(weight)
                    if largest_of is None:
                        continue
                    found += 1
                    with torch.inference_mode():
                        _expect_largest(f"{rows} rows {dtype}", kernel, largest_of, x, weight)
                        weight.copy_(weight.flip(0))
                        _expect_largest(f"{rows} rows {dtype}, flipped", kernel, largest_of, x, weight)
        if not found:
            pytest.skip("not claimed: the largest outputs of linear")

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
            self.compare(case, "float32", arguments, _tensors(kernel(*arguments)))


_LARGEST_OF = ((0, 64, 1024), (1, 96, 1500), (3, 33, 1024), (7, 576, 4096), (17, 64, 2048), (70, 200, 1100))
"""Rows, inputs and outputs."""


def _close_outputs(
    rows: int, inner: int, outer: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and a weight whose outputs are hard to tell from each other. The last rows are one with a single large
    number, one of zeros, and one with NaN; there is always a plain one."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inner, generator=generator)
    weight = torch.randn(outer, inner, generator=generator)
    for row in range(rows):
        own = 3 * x[row] / x[row].norm() * inner**0.5 + torch.randn(inner, generator=generator)
        near = own + 3e-3 * torch.randn(2, inner, generator=generator)  # by less than int8 tells, and twice the same
        places = [row, row + outer // 3, row + outer // 2, outer - 1 - row]
        weight[places] = torch.stack((own, near[0], near[1], near[1]))
    if rows > 3:
        x[-3, inner // 2] = 1000.0
        x[-2], x[-1, 0] = 0.0, float("nan")
    return x.to(device, dtype), weight.to(device, dtype)


def _expect_largest(
    what: str, kernel: Callable[..., torch.Tensor], largest_of: LargestOutput, x: torch.Tensor, weight: torch.Tensor
) -> None:
    outputs = kernel(x, weight, None)
    best, index = largest_of(x)
    assert (best.shape, index.shape, index.dtype) == (outputs.shape[:1], outputs.shape[:1], torch.int64), what
    assert best.dtype == outputs.dtype, f"{what}: the largest are {best.dtype}"
    relative, absolute = OPERATIONS["linear"].tolerance[str(x.dtype).removeprefix("torch.")]
    for row, (of_row, value, place) in enumerate(zip(outputs.tolist(), best.tolist(), index.tolist(), strict=True)):
        if any(map(math.isnan, of_row)):
            assert math.isnan(of_row[place] + value), f"{what}: row {row} has NaN, and gave {value}"
            continue
        most = max(of_row)
        room = absolute + relative * abs(most)
        assert of_row[place] >= most - room, f"{what}: row {row} gave an output of {of_row[place]}, one is {most}"
        assert abs(value - most) <= room, f"{what}: row {row} gave {value}, and the largest is {most}"
        first = int((weight == weight[place]).all(dim=1).nonzero()[0])
        assert place == first, f"{what}: row {row} gave output {place}, and {first} before it is the same"


def _expect_allowed(what: str, found: torch.Tensor, allowed: torch.Tensor) -> None:
    """Each row's token is one of those that pass."""
    assert found.shape == allowed.shape[:1], f"{what}: {tuple(found.shape)} tokens for {allowed.shape[0]} rows"
    for row, token in enumerate(found.tolist()):
        assert 0 <= token < allowed.shape[1], f"{what}: row {row} gave {token}, which is no token"
        assert allowed[row, token], (
            f"{what}: row {row} gave token {token}, right is {allowed[row].nonzero().flatten().tolist()}"
        )


def _asking(arguments: Arguments, operation: str) -> Arguments:
    """Copies that ask for gradients, but for constants."""
    named = zip(OPERATIONS[operation].arguments, arguments, strict=True)
    return tuple(
        value if value is None or name in OPERATIONS[operation].constants else value.detach().clone().requires_grad_()
        for name, value in named
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


def _first_row(arguments: Arguments, operation: str) -> Arguments:
    """Copies of the inputs with the first row only; weights and caches stay whole."""
    shapes = OPERATIONS[operation].arguments.values()
    return tuple(
        value[:1] if value is not None and shape.split(",")[0] in ("...", "T", "S") else value
        for value, shape in zip(_copies(arguments), shapes, strict=True)
    )
