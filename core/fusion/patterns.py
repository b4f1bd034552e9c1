"""The patterns, in the order in which they are tried. Each is a small class with one method; ``PATTERNS`` is the table.

A pattern finds its places in the observed run, changes the module through the :class:`Fuser`, and tells of every place
that looked like its own and was left.

Shapes: E features of a norm; I features in; O features out; ``...`` any leading dims.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.nn import functional

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.fusion.forward import FusedForward, is_fused
from drivetrain.fusion.fuser import REFERENCE, Fuser, FusesItself
from drivetrain.fusion.joint import Joint, Part
from drivetrain.fusion.observing import Call, tensors_of
from drivetrain.fusion.recognizing import NormKind, activation_of, is_plain_linear, norm_kind
from drivetrain.fusion.rewriting import Traced


class Pattern(Protocol):
    """One way in which several operations become one."""

    name: str

    def apply(self, fuser: Fuser) -> None:
        """Fuse every place of this pattern; do nothing to one that is fused already."""


def _itemsize(tensor: torch.Tensor) -> int:
    return tensor.element_size()


# --- modules that fuse themselves ----------------------------------------------------------------------------------


class Own:
    """Modules that say how, such as the decoder's attention and MLP."""

    name = "own"

    def apply(self, fuser: Fuser) -> None:
        for module in fuser.names:
            if isinstance(module, FusesItself):
                module.fuse_with(fuser)


# --- linear layers with one input: q/k/v, gate and up ---------------------------------------------------------------


class SharedInput:
    """Linear layers of one module that are called with the same tensor become one product."""

    name = "shared_input"

    def apply(self, fuser: Fuser) -> None:
        order = {child: index for index, child in enumerate(fuser.run.calls)}
        for parent in fuser.names:
            for group in self._groups(fuser, parent, order):
                self._join(fuser, parent, group)

    def _groups(self, fuser: Fuser, parent: nn.Module, order: Mapping[nn.Module, int]) -> Iterator[list[str]]:
        """Names of children that read the same input, in the order of their calls."""
        by_input: dict[tuple[int, int], list[str]] = {}
        children = [(name, child) for name, child in parent.named_children() if child in order]
        for name, child in sorted(children, key=lambda pair: order[pair[1]]):
            call = fuser.run.only_call(child)
            if call is None or call.first is None or not _looks_linear(child) or child in fuser.taken:
                continue
            by_input.setdefault((id(call.first), call.version), []).append(name)
        yield from (names for names in by_input.values() if len(names) > 1)

    def _join(self, fuser: Fuser, parent: nn.Module, names: list[str]) -> None:
        where = fuser.name_of(parent)
        children = [(name, parent.get_submodule(name)) for name in names]
        for name, child in children:
            if not isinstance(child, Part) and not is_plain_linear(child):
                fuser.leave(self.name, where, f"{name} is a {type(child).__name__}, which is no plain product")
        plain = [(name, child) for name, child in children if isinstance(child, nn.Linear) and is_plain_linear(child)]
        if len(plain) < 2:
            return
        names, linears = [name for name, _ in plain], [linear for _, linear in plain]
        what = " + ".join(names)
        reason = _why_apart(linears, fuser)
        if reason:
            fuser.leave(self.name, where, f"{what}: {reason}")
            return
        first = linears[0]
        total = sum(linear.out_features for linear in linears)
        spec = fuser.spec(first.weight, "linear", {"I": first.in_features, "O": total})
        if fuser.provider_of(spec) is None:
            fuser.leave(self.name, where, f"{what}: no kernel provider has linear here")
            return
        joint = Joint(linears, fuser.bind(spec))
        for index, (name, linear) in enumerate(zip(names, linears, strict=True)):
            self._replace(fuser, parent, name, linear, Part(linear, joint, index))
        fuser.did(self.name, where, what, spec, (len(names) - 1) * first.in_features * _itemsize(joint.weight))

    def _replace(self, fuser: Fuser, parent: nn.Module, name: str, linear: nn.Linear, part: Part) -> None:
        # Its weights are in the joint now: what is left of the old layer holds no memory.
        linear.weight, linear.bias = nn.Parameter(part.weight.detach()[:0]), None  # type: ignore[assignment]
        part.train(linear.training)
        setattr(parent, name, part)
        fuser.undo.append(lambda: setattr(parent, name, part.split_off(linear)))


def _looks_linear(module: nn.Module) -> bool:
    """A linear layer, or a module that may stand for one, such as a quantized layer: it says so, or holds a matrix."""
    if isinstance(module, nn.Linear | Part) or "Linear" in type(module).__name__:
        return True
    if isinstance(module, nn.Embedding) or any(True for _ in module.children()):
        return False
    held = (*module.parameters(), *module.buffers(), *(x for x in vars(module).values() if isinstance(x, torch.Tensor)))
    return any(tensor.dim() >= 2 for tensor in held)


def _why_apart(linears: list[nn.Linear], fuser: Fuser) -> str:
    if len({(linear.weight.dtype, linear.weight.device) for linear in linears}) > 1:
        return "their dtypes or devices differ"
    if len({linear.weight.requires_grad for linear in linears}) > 1:
        return "some are trained and some are frozen"
    if len({linear.bias is None for linear in linears}) > 1:
        return "some have a bias and some have none"
    if any(id(linear.weight) in fuser.tied for linear in linears):
        return "a weight of theirs is tied to another"
    return ""


# --- norms ---------------------------------------------------------------------------------------------------------


class BoundNorm(FusedForward):
    """``rms_norm`` as one operation; takes the result that an addition before it has made already, if there is one.

    made: (the sum, its norm) from the addition of the layer before.
    """

    def __init__(self, module: nn.Module, norm: Callable[..., torch.Tensor], kind: NormKind) -> None:
        self.module, self.norm, self.kind = module, norm, kind
        self.made: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        made = self.made
        if made is not None:
            self.made = None
            if made[0] is x:
                return made[1]
        return self.norm(x, self.module.weight)


class Norm:
    """RMS norms written out in several operations become the bound one."""

    name = "norm"

    def apply(self, fuser: Fuser) -> None:
        for module, where in fuser.names.items():
            if module not in fuser.run.calls or is_fused(module):
                continue
            if isinstance(module, nn.LayerNorm):
                fuser.leave(self.name, where, "no logical operation covers LayerNorm")
            kind = norm_kind(module)
            if kind is None or kind.is_bound:
                continue
            weight: torch.Tensor = module.weight  # type: ignore[assignment]
            spec = fuser.spec(weight, "rms_norm", {"E": weight.numel()}, kind.params)
            if fuser.provider_of(spec) is None:
                fuser.leave(self.name, where, "no kernel provider has rms_norm here")
                continue
            fuser.set_forward(module, BoundNorm(module, fuser.bind(spec), kind))
            # Each operation that is gone wrote E features, in float32, that the next one read.
            num_gone = fuser.run.operations_of.get(module, 1) - 1 if fuser.provider_of(spec) != REFERENCE else 0
            fuser.did(self.name, where, type(module).__name__, spec, 2 * 4 * weight.numel() * num_gone)


# --- gate: activation and product ----------------------------------------------------------------------------------


class _Gate(nn.Module):
    def __init__(self, operation: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.operation(gate, up)


class _GatedLinear(nn.Module):
    def __init__(self, operation: Callable[..., torch.Tensor], gate: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.operation, self.gate, self.up = operation, gate, up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.operation(x, self.gate.weight, self.up.weight)


class GatedActivation:
    """``act(gate(x)) * up(x)`` becomes ``gated_linear``, or at least ``silu_mul`` or ``gelu_tanh_mul``."""

    name = "gated_activation"

    def apply(self, fuser: Fuser) -> None:
        for module in fuser.names:
            linears = [child for child in module.children() if _looks_linear(child)]
            call = fuser.run.only_call(module)
            if call is None or isinstance(module, FusesItself) or len(linears) < 2 or is_fused(module):
                continue
            if not any(
                activation_of(child, torch.zeros(())) for child in module.children() if not _looks_linear(child)
            ):
                continue
            traced = fuser.trace(self.name, module, call)
            if traced is not None:
                self._rewrite(fuser, module, traced)

    def _rewrite(self, fuser: Fuser, module: nn.Module, traced: Traced) -> None:
        done = [self._fuse_product(fuser, module, traced, node) for node in list(traced.graph.nodes)]
        if any(done):
            fuser.changed.add(module)
        elif not any(one is False for one in done):
            fuser.leave(self.name, fuser.name_of(module), "no product of an activation and a second linear layer")

    def _fuse_product(self, fuser: Fuser, module: nn.Module, traced: Traced, node: fx.Node) -> bool | None:
        """True when fused, False when left with a reason, None when it is no gate."""
        if node.op != "call_function" or node.target not in (operator.mul, torch.mul) or len(node.args) != 2:
            return None
        for act, up in (node.args, node.args[::-1]):
            name = _activation_node(traced, act)
            if name is not None and isinstance(act, fx.Node) and isinstance(up, fx.Node):
                gate = act.args[0]
                assert isinstance(gate, fx.Node)
                whole = self._gated_linear(fuser, module, traced, node, name, gate, up)
                return whole or self._gate_only(fuser, module, traced, node, name, gate, up)
        return None

    def _gated_linear(
        self, fuser: Fuser, module: nn.Module, traced: Traced, node: fx.Node, name: str, gate: fx.Node, up: fx.Node
    ) -> bool:
        first, second = traced.child(gate), traced.child(up)
        if not (isinstance(first, nn.Linear) and isinstance(second, nn.Linear) and gate.args == up.args):
            return False
        plain = is_plain_linear(first) and is_plain_linear(second) and first.bias is None and second.bias is None
        if not plain or first.weight.shape != second.weight.shape:
            return False
        sizes = {"I": first.in_features, "O": first.out_features}
        params = {"activation": float(name == "gelu_tanh")}
        spec = fuser.spec(first.weight, "gated_linear", sizes, params)
        operation = fuser.better("gated_linear", fuser.name_of(module), spec)
        if operation is None:
            return False
        with traced.graph.inserting_before(node):
            target = traced.add(_GatedLinear(operation, first, second))
            traced.replace(node, traced.graph.call_module(target, gate.args))
        fuser.taken |= {first, second}
        what = f"{first.out_features} features of gate and up, activation"
        fuser.did("gated_linear", fuser.name_of(module), what, spec, 4 * first.out_features * _itemsize(first.weight))
        return True

    def _gate_only(
        self, fuser: Fuser, module: nn.Module, traced: Traced, node: fx.Node, name: str, gate: fx.Node, up: fx.Node
    ) -> bool:
        shapes = traced.shapes()
        weight = next(module.parameters(), None)
        if weight is None:
            fuser.leave(self.name, fuser.name_of(module), "its layers are packed, and tell no dtype of activations")
            return False
        size = shapes[gate][-1]
        spec = fuser.spec(weight, "silu_mul" if name == "silu" else "gelu_tanh_mul", {"E": size})
        operation = fuser.better(self.name, fuser.name_of(module), spec)
        if operation is None or shapes[gate] != shapes[up]:
            return False
        with traced.graph.inserting_before(node):
            traced.replace(node, traced.graph.call_module(traced.add(_Gate(operation)), (gate, up)))
        fuser.did(self.name, fuser.name_of(module), f"{name} * up", spec, 2 * size * _itemsize(weight))
        return True


def _activation_node(traced: Traced, node: Any) -> str | None:
    if not isinstance(node, fx.Node) or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
        return None
    child = traced.child(node)
    if child is not None:
        return activation_of(child, torch.zeros(()))
    if node.op == "call_function" and node.target in (functional.silu, torch.nn.functional.gelu):
        target: Any = node.target
        return activation_of(lambda x: target(x, **node.kwargs), torch.zeros(()))
    return None


# --- residual stream and norm --------------------------------------------------------------------------------------


class _AddNorm(nn.Module):
    """The sum and its norm, by a norm that follows in the same module."""

    def __init__(self, operation: Callable[..., Any], norm: nn.Module) -> None:
        super().__init__()
        self.operation, self.norm = operation, norm

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Any:
        return self.operation(x, residual, self.norm.weight)


class _AddForNext(nn.Module):
    """The sum; its norm is left with the norm that reads it next, in another module.

    With gradients on, only the sum: a result that goes beside the call would escape activation checkpointing.
    """

    def __init__(self, operation: Callable[..., Any], norm: nn.Module) -> None:
        super().__init__()
        self.operation, self.norm = operation, norm

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return residual + x
        normed, summed = self.operation(x, residual, self.norm.weight)
        self.norm.forward.made = (summed, normed)  # type: ignore[attr-defined]
        return summed


class AddNorm:
    """The addition to a residual stream and the RMS norm that reads the sum, in the same module or in the next."""

    name = "add_norm"

    def apply(self, fuser: Fuser) -> None:
        for module in fuser.names:
            call = fuser.run.only_call(module)
            has_norm = any(_kind_of(child) is not None for child in module.children())
            if call is None or not has_norm or is_fused(module) or isinstance(module, nn.ModuleList):
                continue
            if any(isinstance(child, nn.ModuleList) for child in module.children()):
                continue  # a whole model: its layers are looked at one by one
            self._fuse_module(fuser, module, call)

    def _fuse_module(self, fuser: Fuser, module: nn.Module, call: Call) -> None:
        where = fuser.name_of(module)
        like = call.first
        if like is None or not self._has_operation(fuser, where, like):
            return
        traced = fuser.trace(self.name, module, call)
        if traced is None:
            return
        shapes = traced.shapes()
        # All are judged before the first is replaced: what stands for it later has no shape on record.
        for node, is_plain in [(node, _is_plain_sum(node, shapes)) for node in _stream_sums(traced.graph)]:
            if not is_plain:
                fuser.leave(self.name, where, "a sum that is scaled, or of unlike tensors")
            elif self._fuse_sum(fuser, where, module, traced, node):
                fuser.changed.add(module)

    def _has_operation(self, fuser: Fuser, where: str, like: torch.Tensor) -> bool:
        spec = fuser.spec(like, "add_rms_norm", {"E": like.shape[-1]}, {"eps": 1e-6, "weight_offset": 0.0})
        provider = fuser.provider_of(spec)
        if provider is None or (provider == REFERENCE and not fuser.reference_too):
            fuser.leave(self.name, where, "only the reference has add_rms_norm, in as many operations as before")
            return False
        return True

    def _fuse_sum(self, fuser: Fuser, where: str, module: nn.Module, traced: Traced, node: fx.Node) -> bool:
        norms = [user for user in node.users if _kind_of(traced.child(user)) is not None and user.args == (node,)]
        if norms:
            norm = traced.child(norms[0])
            assert norm is not None
            self._fuse_inside(fuser, where, traced, node, norms[0], norm)
            return True
        reader = self._reader_of_output(fuser, module, node)
        if reader is None:
            fuser.leave(self.name, where, "a sum that no RMS norm reads next")
            return False
        self._fuse_across(fuser, where, traced, node, reader)
        return True

    def _fuse_inside(
        self, fuser: Fuser, where: str, traced: Traced, node: fx.Node, norm_node: fx.Node, norm: nn.Module
    ) -> None:
        spec, operation = self._bind(fuser, norm)
        left, right = node.args[:2]
        with traced.graph.inserting_before(node):
            both = traced.graph.call_module(traced.add(_AddNorm(operation, norm)), (right, left))
            normed = traced.graph.call_function(operator.getitem, (both, 0))
            summed = traced.graph.call_function(operator.getitem, (both, 1))
        traced.replace(norm_node, normed)
        traced.replace(node, summed)
        self._tell(fuser, where, fuser.name_of(norm), spec, norm)

    def _fuse_across(self, fuser: Fuser, where: str, traced: Traced, node: fx.Node, reader: nn.Module) -> None:
        spec, operation = self._bind(fuser, reader)
        if not isinstance(vars(reader).get("forward"), BoundNorm):
            kind = _kind_of(reader)
            assert kind is not None
            plain = fuser.bind(fuser.spec(reader.weight, "rms_norm", spec.sizes, kind.params))  # type: ignore[arg-type]
            fuser.set_forward(reader, BoundNorm(reader, plain, kind))
        left, right = node.args[:2]
        with traced.graph.inserting_before(node):
            summed = traced.graph.call_module(traced.add(_AddForNext(operation, reader)), (right, left))
        traced.replace(node, summed)
        self._tell(fuser, where, fuser.name_of(reader), spec, reader)

    def _bind(self, fuser: Fuser, norm: nn.Module) -> tuple[KernelSpec, Callable[..., Any]]:
        kind = _kind_of(norm)
        assert kind is not None
        weight: torch.Tensor = norm.weight  # type: ignore[assignment]
        spec = fuser.spec(weight, "add_rms_norm", {"E": weight.numel()}, kind.params)
        return spec, fuser.bind(spec)

    def _tell(self, fuser: Fuser, where: str, norm_name: str, spec: KernelSpec, norm: nn.Module) -> None:
        # The norm no longer reads the sum from memory.
        weight: torch.Tensor = norm.weight  # type: ignore[assignment]
        fuser.did(self.name, where, f"sum + {norm_name.rpartition('.')[2]}", spec, weight.numel() * _itemsize(weight))

    def _reader_of_output(self, fuser: Fuser, module: nn.Module, node: fx.Node) -> nn.Module | None:
        """The norm elsewhere that is called with what ``module`` returns, when that is this sum."""
        outputs = fuser.run.outputs.get(module, [])
        for user in node.users:
            if user.op == "output" and len(outputs) == 1:
                returned = user.args[0]
                first = returned[0] if isinstance(returned, tuple | list) and returned else returned
                tensors = tensors_of(outputs[0])
                if first is node and tensors:
                    readers = fuser.run.readers.get(id(tensors[0]), [])
                    return next((one for one in readers if _kind_of(one) and fuser.run.only_call(one)), None)
        return None


def _stream_sums(graph: fx.Graph) -> list[fx.Node]:
    """Sums that continue a stream which enters the module: something is added to an input, or to such a sum."""
    stream = {node for node in graph.nodes if node.op == "placeholder"}
    sums = []
    for node in graph.nodes:
        is_sum = node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)
        if is_sum and any(operand in stream for operand in node.args[:2] if isinstance(operand, fx.Node)):
            stream.add(node)
            sums.append(node)
    return sums


def _is_plain_sum(node: fx.Node, shapes: dict[fx.Node, torch.Size]) -> bool:
    if len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
        return False
    left, right = node.args
    return (
        isinstance(left, fx.Node) and isinstance(right, fx.Node) and shapes.get(left) == shapes.get(right) is not None
    )


def _kind_of(module: nn.Module | None) -> NormKind | None:
    """What norm a module is, before or after it was bound."""
    if module is None:
        return None
    forward = vars(module).get("forward")
    if isinstance(forward, BoundNorm):
        return forward.kind
    bound = getattr(module, "bound", None)
    return norm_kind(module) if isinstance(bound, KernelSpec) else None


# --- what no operation covers --------------------------------------------------------------------------------------


class NormLinear:
    """A norm whose result goes into linear layers only. Looked for and left, so that the report says why."""

    name = "norm_linear"

    def apply(self, fuser: Fuser) -> None:
        for module, where in fuser.names.items():
            outputs = fuser.run.outputs.get(module, [])
            if _kind_of(module) is None or len(outputs) != 1 or not isinstance(outputs[0], torch.Tensor):
                continue
            readers = [other for other in fuser.run.readers.get(id(outputs[0]), []) if _looks_linear(other)]
            if readers:
                fuser.leave(
                    self.name,
                    where,
                    "no kernel provider has a norm with a product, and a norm's weight folded into the next weights "
                    "would round them anew",
                )


PATTERNS: tuple[Pattern, ...] = (Own(), Norm(), GatedActivation(), SharedInput(), AddNorm(), NormLinear())
"""Every pattern, in the order in which they are applied. Give ``fuse`` a longer tuple to add one."""
