"""ZeRO stage 3 by torch's FSDP2 and DTensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from drivetrain.contracts.partitioner import PartitionContext
from drivetrain.errors import ConfigError
from drivetrain.plugins.partitioner.layout import floating_parameters
from drivetrain.plugins.partitioner.masters import needs_copy, wide_dtype
from drivetrain.plugins.partitioner.sharded import Options, ShardMesh, copy_from_first, norm_of
from drivetrain.training.state import model_state, optimizer_state

if TYPE_CHECKING:
    from drivetrain.contracts.partitioner import OptimizerFactory

_WHERE = "partitioner.engine"


class FsdpModel:
    """A model cut by FSDP2. Its parameters are in the optimizer's dtype, and in ``dtypes.param`` while gathered."""

    def __init__(self, model: nn.Module, context: PartitionContext, options: Options) -> None:
        self.model: Any = model
        self._options, self._dtypes = options, context.dtypes
        self._mesh = ShardMesh(context.mesh, options.shard)
        assert self._mesh.mesh is not None
        assert self._mesh.world is not None
        self._check(model)
        copy_from_first(model, self._mesh.world)
        self._narrowed: dict[str, torch.Tensor] = {}
        self._set_dtypes(model)
        has_masters = context.dtypes.master_weight is not None
        policy = MixedPrecisionPolicy(
            param_dtype=getattr(torch, context.dtypes.param) if has_masters else None,
            reduce_dtype=getattr(torch, context.dtypes.reduce),
            cast_forward_inputs=False,
        )
        settings: dict[str, Any] = {"mesh": self._mesh.mesh, "mp_policy": policy}
        if options.offload.moves_parameters and self._mesh.mesh.device_type != "cpu":
            settings["offload_policy"] = CPUOffloadPolicy()
        for name in context.shard_units:
            fully_shard(model.get_submodule(name), **settings)
        fully_shard(model, **settings)
        for name in context.methods:
            register_fsdp_forward_method(model, name)

    def _check(self, model: nn.Module) -> None:
        scalars = [name for name, parameter in floating_parameters(model).items() if not parameter.dim()]
        if scalars:
            raise ConfigError(
                "FSDP2 can't cut a parameter without dims", where=_WHERE, found=scalars[0], allowed="engine: direct"
            )
        if self._dtypes.master_weight is None and self._dtypes.param != self._dtypes.reduce:
            raise ConfigError(
                "with FSDP2 the optimizer works on the parameters themselves, or on master weights",
                where=_WHERE,
                found=f"{self._dtypes.param} without master weights",
                allowed="engine: direct, or a precision with master weights",
            )
        if self._options.offload.is_on_disk:
            raise ConfigError("FSDP2 does not offload to files", where="partitioner.offload", allowed="engine: direct")

    def _set_dtypes(self, model: nn.Module) -> None:
        """One dtype for all: what the optimizer works in."""
        has_masters = self._dtypes.master_weight is not None
        dtype = wide_dtype(self._dtypes) if has_masters else getattr(torch, self._dtypes.param)
        self._masters: set[str] = set()
        for name, parameter in floating_parameters(model).items():
            if has_masters and parameter.requires_grad and needs_copy(parameter.dtype, self._dtypes):
                self._masters.add(name)
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)

    @property
    def notes(self) -> tuple[str, ...]:
        assert self._mesh.mesh is not None
        note = self._options.offload.note(torch.device(self._mesh.mesh.device_type))
        return () if note is None else (note,)

    def make_optimizer(self, factory: OptimizerFactory) -> torch.optim.Optimizer:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if not named:
            raise ConfigError(
                "the model has no trainable parameter", where="partitioner", hint="Unfreeze what is to be trained."
            )
        return factory(named)

    @contextmanager
    def accumulating(self, *, is_last: bool) -> Iterator[None]:
        self.model.set_requires_gradient_sync(is_last or self._options.every_time)
        if self._mesh.replicas is not None:
            self.model.set_requires_all_reduce(is_last)
        yield

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float, scale: float) -> torch.Tensor:
        gradients = [_local(p.grad) for p in self.model.parameters() if p.grad is not None]
        gradients = [gradient for gradient in gradients if gradient.numel()]
        assert self._mesh.mesh is not None
        device = torch.device(self._mesh.mesh.device_type)
        square = norm_of(gradients, device).square()
        if self._mesh.group is not None:
            dist.all_reduce(square, group=self._mesh.group)
        norm = torch.sqrt(square) / scale
        if gradients:
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0) / scale
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))
        return norm

    def state(self, optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
        """Frozen parameters, which FSDP2 holds in the optimizer's dtype, are given in the model's."""
        state = model_state(self.model)
        param: torch.dtype = getattr(torch, self._dtypes.param)
        self._narrowed = {}
        for name in floating_parameters(self.model):
            key = f"model.{name}"
            if name not in self._masters and state[key].dtype != param:
                state[key] = self._narrowed[key] = state[key].to(param)
        if optimizer is not None:
            state |= optimizer_state(optimizer, self.model.named_parameters())
        return state

    @torch.no_grad()
    def loaded(self) -> None:
        live = model_state(self.model)
        for key, tensor in self._narrowed.items():
            live[key].copy_(tensor)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
