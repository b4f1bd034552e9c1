"""Rewriting what a module does between its children, by a graph of one call of it.

``torch.fx`` can't trace a method with named or any number of arguments, as decoder layers have. So a call is traced as
it was observed: tensors, and objects that are no plain values, become the graph's inputs, wherever they stand in the
arguments; everything else (None, numbers, texts) is part of the graph. A call that differs in that goes to the module's
own ``forward``.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from drivetrain.fusion.forward import FusedForward
from drivetrain.fusion.observing import Call

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_INNER = "inner"
_TRACING = threading.Lock()
"""fx takes its wrappers off again in the order in which it put them on: one trace at a time."""


class _Mismatch(Exception):
    """A call has another form than the traced one."""


@dataclass(frozen=True)
class Form:
    """The shape of a call's arguments.

    kind:  ``tensor``, ``object``, ``plain``, ``sequence`` or ``mapping``.
    value: of a plain one; the type of a sequence or mapping.
    keys:  of a mapping.
    parts: of a sequence or mapping.
    """

    kind: str
    value: Any = None
    keys: tuple[Any, ...] = ()
    parts: tuple[Form, ...] = ()

    @classmethod
    def of(cls, value: Any) -> Form:
        if isinstance(value, torch.Tensor):
            return cls("tensor")
        if isinstance(value, _PLAIN):
            return cls("plain", value)
        if type(value) in (tuple, list):
            return cls("sequence", type(value), (), tuple(cls.of(part) for part in value))
        if type(value) is dict:
            return cls("mapping", dict, tuple(value), tuple(cls.of(part) for part in value.values()))
        return cls("object")

    def leaves(self, value: Any, into: list[Any]) -> None:
        """Append tensors and objects of ``value`` in order. Raises _Mismatch when it has another form."""
        kind = self.kind
        if kind == "tensor":
            if not isinstance(value, torch.Tensor):
                raise _Mismatch
            into.append(value)
        elif kind == "plain":
            if type(value) is not type(self.value) or value != self.value:
                raise _Mismatch
        elif kind == "object":
            if isinstance(value, (torch.Tensor, *_PLAIN)):
                raise _Mismatch
            into.append(value)
        elif type(value) is not self.value or len(value) != len(self.parts):
            raise _Mismatch
        elif kind == "sequence":
            for part, own in zip(self.parts, value, strict=True):
                part.leaves(own, into)
        elif tuple(value) != self.keys:
            raise _Mismatch
        else:
            for part, own in zip(self.parts, value.values(), strict=True):
                part.leaves(own, into)

    def rebuild(self, leaves: list[Any]) -> Any:
        """The value again, from its leaves; takes them from the front."""
        if self.kind in ("tensor", "object"):
            return leaves.pop(0)
        if self.kind == "plain":
            return self.value
        parts = [part.rebuild(leaves) for part in self.parts]
        return dict(zip(self.keys, parts, strict=True)) if self.kind == "mapping" else self.value(parts)


class _ChildrenAsLeaves(fx.Tracer):
    """fx wraps calls and attributes of every module in the process while it traces, and a swap fuses beside an engine
    that goes on with its steps: what other threads do passes through as it is."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    @property
    def _is_elsewhere(self) -> bool:
        return threading.get_ident() != self._thread

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name != _INNER

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return forward(*args, **kwargs) if self._is_elsewhere else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._is_elsewhere else super().getattr(attr, attr_val, parameter_proxy_cache)


def _beside_compiled_code() -> AbstractContextManager[object]:
    """Code that another thread has compiled runs uncompiled while this one traces, where it would be an error."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    patch: AbstractContextManager[object] = torch._dynamo.config.patch(error_on_nested_fx_trace=False)
    return patch


@dataclass
class Traced:
    """One call of a module as a graph. ``root`` has the module as its child ``inner``; operations are added to it."""

    module: nn.Module
    form: Form
    leaves: list[Any]
    root: nn.Module
    graph: fx.Graph

    def child(self, node: Any) -> nn.Module | None:
        """The child that a node calls."""
        if isinstance(node, fx.Node) and node.op == "call_module":
            return self.root.get_submodule(str(node.target))
        return None

    def shapes(self) -> dict[fx.Node, torch.Size]:
        """The shape of every tensor in the observed call."""
        found: dict[str, torch.Size] = {}

        class Watch(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if isinstance(value, torch.Tensor):
                    found[n.name] = value.shape
                return value

        # A graph belongs to the first module that is made of it, so this one is made of a copy.
        with torch.no_grad():
            Watch(fx.GraphModule(self.root, copy.deepcopy(self.graph))).run(*self.leaves)
        return {node: found[node.name] for node in self.graph.nodes if node.name in found}

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let ``new`` stand for ``old``, and drop ``old`` and what only it needed of calls of children."""
        old.replace_all_uses_with(new)
        needed = [node for node in old.all_input_nodes if node.op == "call_module"]
        self.graph.erase_node(old)
        for node in needed:
            if not node.users:
                self.replace(node, new)

    def add(self, operation: nn.Module) -> str:
        """Make an operation callable from the graph; returns its name there."""
        name = f"fused_{len(list(self.root.children()))}"
        self.root.add_module(name, operation)
        return name

    def forward(self) -> Rewritten:
        """The graph as the module's forward."""
        self.graph.lint()
        return Rewritten(self.module, self.form, fx.GraphModule(self.root, self.graph))


class Rewritten(FusedForward):
    """Runs a graph in place of a module's own ``forward``."""

    def __init__(self, module: nn.Module, form: Form, graph: fx.GraphModule) -> None:
        self.own: Callable[..., Any] = module.forward
        self.module, self.form, self.graph = module, form, graph
        self.is_for_training = module.training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves: list[Any] = []
        try:
            self.form.leaves((args, kwargs), leaves)
        except _Mismatch:
            return self.own(*args, **kwargs)
        if self.module.training is not self.is_for_training:
            return self.own(*args, **kwargs)
        return self.graph(*leaves)


def trace(module: nn.Module, call: Call) -> Traced:
    """The graph of ``call``, with the module's children as single nodes.

    Raises whatever the module's forward raises when it is given stand-ins for its tensors.
    """
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]] = (tuple(call.args), dict(call.kwargs))
    form = Form.of(arguments)
    leaves: list[Any] = []
    form.leaves(arguments, leaves)

    def run(self: Any, proxies: tuple[Any, ...]) -> Any:
        args, kwargs = form.rebuild(list(proxies))
        return self.inner(*args, **kwargs)

    names = ", ".join(f"leaf_{index}" for index in range(len(leaves)))
    scope: dict[str, Any] = {"run": run}
    # fx reads the arguments off the code of forward, so there must be a function with just as many.
    exec(f"def forward(self, {names}): return run(self, ({names}{',' if leaves else ''}))", scope)
    root = type("Root", (nn.Module,), {"forward": scope["forward"]})()
    root.add_module(_INNER, module)
    with _TRACING, _beside_compiled_code():
        graph = _ChildrenAsLeaves().trace(root)
    return Traced(module, form, leaves, root, graph)
