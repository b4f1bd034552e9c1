"""Kernel providers with one fault each, and the test of the kit that must catch it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from drivetrain.contracts import kernels as contract
from drivetrain.contracts.kernels import KernelSpec
from drivetrain.contracts.plugin import Plugin, Probe, ProbeContext
from drivetrain.kernels.reference import ReferenceKernels
from drivetrain.operators import Operator, define, visible


class _OneReplaced(ReferenceKernels):
    """One operation, of which the reference has a right one; the kit then tries no other."""

    operation = ""

    def operations(self) -> frozenset[str]:
        return frozenset({self.operation})

    def make(self, spec: KernelSpec) -> Callable[..., Any]:
        made = super().make(spec)
        return self.replace(spec, made) if spec.operation == self.operation else made

    def replace(self, spec: KernelSpec, made: Callable[..., Any]) -> Callable[..., Any]:
        raise NotImplementedError


class EpsOutsideTheRoot(_OneReplaced):
    """Adds epsilon to the root instead of under it: right for everyday values, wrong for small ones."""

    operation = "rms_norm"

    def replace(self, spec: KernelSpec, made: Callable[..., Any]) -> Callable[..., Any]:
        eps, offset = spec.params.get("eps", 1e-6), spec.params.get("weight_offset", 0.0)

        def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            wide = x.float()
            normed = wide / (wide.pow(2).mean(-1, keepdim=True).sqrt() + eps)
            return (normed * (weight.float() + offset)).to(x.dtype)

        return rms_norm


class SquaresInHalf(_OneReplaced):
    """Squares in the inputs' own format, which overflows in float16."""

    operation = "rms_norm"

    def replace(self, spec: KernelSpec, made: Callable[..., Any]) -> Callable[..., Any]:
        eps, offset = spec.params.get("eps", 1e-6), spec.params.get("weight_offset", 0.0)

        def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            scale = ((x * x).float().mean(-1, keepdim=True) + eps).rsqrt()
            return (x.float() * scale * (weight.float() + offset)).to(x.dtype)

        return rms_norm


class NeighboursAsPairs(_OneReplaced):
    """Rotates dims (2i, 2i + 1) instead of (i, i + R/2)."""

    operation = "rope"

    def replace(self, spec: KernelSpec, made: Callable[..., Any]) -> Callable[..., Any]:
        def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            size = cos.shape[-1]
            even, odd = x[..., 0:size:2].to(cos.dtype), x[..., 1:size:2].to(cos.dtype)
            cos, sin = cos[:, None, : size // 2], sin[:, None, : size // 2]
            pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
            return torch.cat((pairs.flatten(-2).to(x.dtype), x[..., size:]), dim=-1)

        return lambda q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin))


class NeedsDenseMemory(_OneReplaced):
    """Reads its input as if its elements lay side by side."""

    operation = "silu_mul"

    def replace(self, spec: KernelSpec, made: Callable[..., Any]) -> Callable[..., Any]:
        def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            dense = gate.as_strided(gate.shape, torch.empty(gate.shape).stride(), gate.storage_offset())
            return functional.silu(dense) * up

        return silu_mul


class WrongGradient(_OneReplaced):
    """Takes silu's slope for the sigmoid alone in its backward."""

    operation = "silu_mul"

    def replace(self, spec: KernelSpec, made: Callable[..., Any]) -> Callable[..., Any]:
        class SiluMul(torch.autograd.Function):
            @staticmethod
            def forward(context: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
                context.save_for_backward(gate, up)
                return functional.silu(gate) * up

            @staticmethod
            def backward(context: Any, gradient: torch.Tensor) -> Any:
                gate, up = context.saved_tensors
                return gradient * up * gate.sigmoid(), gradient * functional.silu(gate)

        return SiluMul.apply


class WritesInPlace(_OneReplaced):
    """Uses its first input as its output buffer."""

    operation = "gelu_tanh_mul"

    def replace(self, spec: KernelSpec, made: Callable[..., Any]) -> Callable[..., Any]:
        def gelu_tanh_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            return gate.copy_(made(gate, up))

        return gelu_tanh_mul


class SharesItsConstants(_OneReplaced):
    """Keeps the constants of whichever use was made last for all of them."""

    operation = "rms_norm"
    last: dict[str, Callable[..., Any]] = {}

    def replace(self, spec: KernelSpec, made: Callable[..., Any]) -> Callable[..., Any]:
        self.last["rms_norm"] = made
        return lambda x, weight: self.last["rms_norm"](x, weight)


class WritesBesideTheSlot(_OneReplaced):
    """Takes the cache's blocks for one token shorter than they are."""

    operation = "rope_write"

    def replace(self, spec: KernelSpec, made: Callable[..., Any]) -> Callable[..., Any]:
        def rope_write(*arguments: torch.Tensor) -> torch.Tensor:
            *others, keys, values, slots = arguments
            return made(*others, keys, values, slots - (slots % keys.shape[1] == keys.shape[1] - 1).long())

        return rope_write


class HighNibbleFirst(_OneReplaced):
    """Takes the nibbles of a byte the other way round."""

    operation = "linear_int4"

    def replace(self, spec: KernelSpec, made: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, weight, *others: made(x, (weight << 4) | (weight >> 4), *others)


class TopPBeforeTopK(_OneReplaced):
    """Sums up to p over the whole vocabulary, not over what top-k has left."""

    operation = "sample"

    def replace(self, spec: KernelSpec, made: Callable[..., Any]) -> Callable[..., Any]:
        def sample(logits: torch.Tensor, heat: torch.Tensor, top_k: torch.Tensor, *others: torch.Tensor) -> Any:
            top_p, min_p, draws = others
            order = (logits.float() / heat.clamp(min=1e-6)[:, None]).softmax(-1).sort(descending=True)
            outside = (order.values.cumsum(-1) - order.values >= top_p[:, None]) & (top_p < 1)[:, None]
            outside[:, :1] = False
            logits = logits.masked_fill(outside.gather(1, order.indices.argsort()), -float("inf"))
            return made(logits, heat, top_k, torch.ones_like(top_p), min_p, draws)

        return sample


class ForgetsMaskedTargets(_OneReplaced):
    """Lets positions without a target add to the gradient."""

    operation = "linear_cross_entropy"

    def replace(self, spec: KernelSpec, made: Callable[..., Any]) -> Callable[..., Any]:
        def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            losses = made(x, weight, targets.clamp(min=0))
            return losses - (losses * (targets < 0)).detach()

        return linear_cross_entropy


class ReadsBytes(_OneReplaced):
    """Takes whatever it is given for what it was bound for."""

    operation = "silu_mul"

    def replace(self, spec: KernelSpec, made: Callable[..., Any]) -> Callable[..., Any]:
        dtype = getattr(torch, spec.dtype)
        return lambda gate, up: made(gate.view(dtype), up.view(dtype))


class ReadsAlignedOnly(_OneReplaced):
    """Loads from the last aligned address before its input."""

    operation = "linear"

    def replace(self, spec: KernelSpec, made: Callable[..., Any]) -> Callable[..., Any]:
        def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            offset = x.storage_offset() // 4 * 4
            return made(x.as_strided(x.shape, x.stride(), offset), weight, bias)

        return linear


class TrustsRoundedWeights(_OneReplaced):
    """Finds the largest output by weights in int8, and leaves it at that."""

    operation = "linear"

    def replace(self, spec: KernelSpec, made: Callable[..., Any]) -> Callable[..., Any]:
        def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return made(x, weight, bias)

        def largest_of(weight: torch.Tensor) -> Callable[..., Any]:
            def largest(x: torch.Tensor) -> Any:
                scales = weight.abs().amax(dim=1, keepdim=True) / 127
                index = made(x, (weight / scales).round() * scales, None).argmax(dim=-1)
                return made(x, weight, None).gather(1, index[:, None])[:, 0], index

            return largest

        linear.largest_of = largest_of
        return linear


class KeepsOldWeights(TrustsRoundedWeights):
    """Finds the largest output of a weight as it was."""

    def replace(self, spec: KernelSpec, made: Callable[..., Any]) -> Callable[..., Any]:
        def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return made(x, weight, bias)

        def largest_of(weight: torch.Tensor) -> Callable[..., Any]:
            kept = weight.clone()
            return lambda x: made(x, kept, None).max(dim=-1)

        linear.largest_of = largest_of
        return linear


class _Visible(_OneReplaced):
    """Shows one operation to torch, by an operator that a fault is built into."""

    operation = "silu_mul"

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"operators"})

    @staticmethod
    def compute(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return functional.silu(gate) * up

    @staticmethod
    def shape(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return gate.new_empty(gate.shape)

    @staticmethod
    def save(context: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        context.save_for_backward(*inputs)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        gate, up = context.saved_tensors
        slope = gate.sigmoid() * (1 + gate * (1 - gate.sigmoid()))
        return gradient * up * slope, gradient * functional.silu(gate)

    def replace(self, spec: KernelSpec, made: Callable[..., Any]) -> Callable[..., Any]:
        operator = define(
            f"zoo::{type(self).__name__}",
            "(Tensor gate, Tensor up) -> Tensor",
            self.compute,
            fake=self.shape,
            save=self.save,
            backward=self.backward,
        )
        return visible(made, Operator(operator))


class ForgetsAShape(_Visible):
    """Tells torch.compile of one element, whatever comes out."""

    @staticmethod
    def shape(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return gate.new_empty(1)


class ComputesTwice(_Visible):
    """Another formula under autograd than in serving."""

    @staticmethod
    def compute(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return (gate.double() * gate.double().sigmoid() * up.double()).to(gate.dtype)


class LeavesTheGraph(_Visible):
    """A backward that reads the numbers themselves, which torch.compile does not have while it traces."""

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        gate, up = context.saved_tensors
        slope = torch.tensor([[float(x) for x in row] for row in gate.sigmoid() * (1 + gate * (1 - gate.sigmoid()))])
        return gradient * up * slope, gradient * functional.silu(gate)


class SaysYesToEverything(ReferenceKernels):
    """Supports operations that it does not have."""

    def supports(self, spec: KernelSpec) -> Probe:
        return Probe.yes("why not")


class LooksAtItsNeighbours(_OneReplaced):
    """Claims batch invariance, and scales by the largest value of the whole batch on the way."""

    operation = "linear"

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"batch_invariant"})

    def replace(self, spec: KernelSpec, made: Callable[..., Any]) -> Callable[..., Any]:
        def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            largest = x.abs().amax() + 1 if x.numel() else torch.ones(())
            product = made((x.float() / largest.float()).to(x.dtype), weight, None) * largest
            return (product if bias is None else product + bias).to(x.dtype)

        return linear


class CompilesInItsProbe(ReferenceKernels):
    """Starts a compiler when it is probed."""

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        subprocess.run([sys.executable, "--version"], capture_output=True, check=True)
        return Probe.yes("compiled")


class ReplacesTheCore(ReferenceKernels):
    """Loosens the core's table of tolerances when it is probed."""

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        contract.OPERATIONS["linear"] = contract.Operation("linear", "", "", {"float32": (1.0, 1.0)})
        return Probe.yes("passes everything")


ZOO: dict[type[Plugin], str] = {
    EpsOutsideTheRoot: "test_parity",
    SquaresInHalf: "test_parity",
    NeighboursAsPairs: "test_parity",
    NeedsDenseMemory: "test_strided_inputs",
    WrongGradient: "test_gradients",
    WritesInPlace: "test_inputs_are_left_unchanged",
    WritesBesideTheSlot: "test_parity",
    HighNibbleFirst: "test_parity",
    TopPBeforeTopK: "test_parity",
    TrustsRoundedWeights: "test_largest_outputs",
    KeepsOldWeights: "test_largest_outputs",
    ForgetsMaskedTargets: "test_gradients",
    SharesItsConstants: "test_a_made_callable_needs_no_provider",
    ReadsBytes: "test_another_dtype_is_an_error_or_right",
    ReadsAlignedOnly: "test_misaligned_inputs",
    ForgetsAShape: "test_operators_keep_the_rules",
    ComputesTwice: "test_operators_equal_the_plain_callable",
    LeavesTheGraph: "test_operators_are_compiled",
    SaysYesToEverything: "test_what_it_has_not_is_refused",
    LooksAtItsNeighbours: "test_rows_do_not_depend_on_each_other",
    CompilesInItsProbe: "test_import_and_probe_start_no_process",
    ReplacesTheCore: "test_import_and_probe_leave_drivetrain",
}
"""Faulty kernel provider -> the test that must fail for it."""
