"""The ZeRO stages directly on collectives: what lies where, and what happens around a step.

Stage 1 cuts what the optimizer keeps, stage 2 gradients too, stage 3 parameters too (Rajbhandari et al. 2020, "ZeRO:
Memory Optimizations Toward Training Trillion Parameter Models"). All of them cut every parameter by rows, see
:mod:`drivetrain.plugins.partitioner.layout`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from drivetrain.contracts.partitioner import PartitionContext
from drivetrain.errors import ConfigError, StoreError
from drivetrain.plugins.partitioner.layout import (
    Bucket,
    Piece,
    copy_all,
    floating_parameters,
    make_buckets,
    pieces_of,
    units_of_pieces,
)
from drivetrain.plugins.partitioner.masters import Masters, needs_copy
from drivetrain.plugins.partitioner.offload import Offload
from drivetrain.plugins.partitioner.shard_gradients import ShardGradients
from drivetrain.plugins.partitioner.transport import make_transport
from drivetrain.plugins.partitioner.units import CutBucket, Units
from drivetrain.training.state import model_state, optimizer_state

if TYPE_CHECKING:
    from drivetrain.contracts.partitioner import OptimizerFactory


@dataclass(frozen=True)
class Options:
    """What the plugins' configurations come to.

    stage:      of ZeRO: 1, 2, 3.
    shard:      ranks that one copy of the state is cut for; None: all of them.
    every_time: reduce gradients in every micro-batch.
    """

    stage: int
    shard: int | None
    transport: str
    bucket_bytes: int
    every_time: bool
    offload: Offload


class ShardMesh:
    """The ranks that share out one copy of the state, and those that hold the same shard.

    mesh: of one dim, or of replicas times shards; None for one process.
    """

    def __init__(self, mesh: DeviceMesh | None, shard: int | None) -> None:
        self.world: dist.ProcessGroup | None = None
        self.replicas: dist.ProcessGroup | None = None
        self.group: dist.ProcessGroup | None = None
        self.mesh: DeviceMesh | None = None
        count = 1 if mesh is None else mesh.size()
        _check_shard(count, shard)
        if mesh is None or count == 1:
            return
        self.world = mesh.get_group()
        if shard is None or shard == count:
            self.mesh, self.group = mesh, self.world
            return
        ranks = mesh.mesh.reshape(-1, shard)
        self.mesh = DeviceMesh(mesh.device_type, ranks, mesh_dim_names=("replica", "shard"))
        self.replicas = self.mesh.get_group("replica")
        self.group = self.mesh.get_group("shard") if shard > 1 else None

    def share(self, local: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The whole tensor whose rows of this rank are ``local``."""
        if self.mesh is None:
            return local
        placements = [Shard(0)] if self.replicas is None else [Replicate(), Shard(0)]
        shape = torch.Size(shape)
        stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=shape, stride=stride)


def _check_shard(count: int, shard: int | None) -> None:
    if shard is not None and count % shard:
        raise ConfigError(
            f"{count} ranks can't be put together in groups of {shard}",
            where="partitioner.shard",
            found=shard,
            allowed=f"a divisor of {count}",
        )


class ShardedModel:
    """A model laid out by one of the stages."""

    def __init__(self, model: nn.Module, context: PartitionContext, options: Options) -> None:
        self.model, self.options, self.dtypes = model, options, context.dtypes
        self.mesh = ShardMesh(context.mesh, options.shard)
        if self.mesh.world is not None:
            copy_from_first(model, self.mesh.world)
        values = {name: parameter.data for name, parameter in floating_parameters(model).items()}
        self._param: torch.dtype = getattr(torch, context.dtypes.param)
        for parameter in floating_parameters(model).values():
            if parameter.dtype != self._param:
                parameter.data = parameter.data.to(self._param)
        size = 1 if self.mesh.group is None else dist.get_world_size(self.mesh.group)
        self._names = list(values)
        pieces, self.alone = pieces_of(model, size)
        self._device = pieces[0].parameter.device if pieces else torch.device("cpu")
        self.offload = options.offload.on(self._device)
        self.cuts_parameters = options.stage == 3 and (size > 1 or self.offload.moves_parameters)
        self.buckets = self._make_buckets(pieces, context, values)
        self.transport, self.reason = make_transport(
            self.mesh.group, self._device, self._slot_bytes(size), self._wanted_transport()
        )
        self._stored: dict[str, torch.Tensor] = {}
        self.cut = self._cut() if self.cuts_parameters else []
        if not self.cuts_parameters:
            for piece in pieces:
                self._stored[piece.name] = piece.of_rank(piece.parameter.data, self.transport.rank)
        self.masters = self._make_masters(pieces, values)
        self.units = Units(model, context.shard_units, context.methods, self.cut, self.transport) if self.cut else None
        self.gradients = self._make_gradients()

    @property
    def notes(self) -> tuple[str, ...]:
        note = self.options.offload.note(self._device)
        return () if note is None else (note,)

    # --- layout ------------------------------------------------------------------------------------------------------

    def _make_buckets(
        self, pieces: list[Piece], context: PartitionContext, values: dict[str, torch.Tensor]
    ) -> list[Bucket]:
        """Of everything that is cut; where parameters are not, only what is trained is reduced and passed on."""
        if not self.cuts_parameters:
            pieces = [piece for piece in pieces if piece.parameter.requires_grad]
        units = units_of_pieces(self.model, context.shard_units, pieces)
        kinds = [(p.parameter.requires_grad, needs_copy(values[p.name].dtype, self.dtypes)) for p in pieces]
        return make_buckets(pieces, units, kinds, self.options.bucket_bytes)

    def _slot_bytes(self, size: int) -> int:
        reduce: torch.dtype = getattr(torch, self.dtypes.reduce)
        itemsize = max(reduce.itemsize * size, self._param.itemsize)
        return max((bucket.size * itemsize for bucket in self.buckets if bucket.trained), default=64)

    def _wanted_transport(self) -> str:
        """Sections in files are no memory that processes share. Raises ConfigError where they are to be both."""
        wanted = self.options.transport
        if not (self.offload.is_on_disk and self.offload.moves_parameters):
            return wanted
        if wanted == "shared" and self.mesh.group is not None:
            raise ConfigError(
                "parameters that are offloaded to files lie in no memory that processes share",
                where="partitioner.transport",
                found=wanted,
                allowed="auto, collective",
            )
        return "collective"

    @torch.no_grad()
    def _cut(self) -> list[CutBucket]:
        """Put the values of all buckets into sections, and free the parameters."""
        cut = []
        for bucket in self.buckets:
            section_S = self.offload.section(self.transport, bucket.size, self._param, self._device)
            views = bucket.in_section(section_S, self.transport.rank)
            shown = []
            for piece, view in zip(bucket.pieces, views, strict=True):
                view.copy_(piece.of_rank(piece.parameter.data, self.transport.rank))
                self._stored[piece.name] = view
                shared_out = self.mesh.share(view, piece.shape)
                shown.append(nn.Parameter(shared_out, requires_grad=piece.parameter.requires_grad))
            file = self.offload.file_of(section_S)
            cut.append(CutBucket(bucket, section_S, self._device, shown, self.transport.size, file))
        self.transport.settle()
        return cut

    def _make_masters(self, pieces: list[Piece], values: dict[str, torch.Tensor]) -> Masters:
        by_name = {piece.name: piece for piece in pieces}
        trained = {piece.name: piece.parameter for piece in (*pieces, *self.alone) if piece.parameter.requires_grad}
        named = []
        for name in self._names:
            if name not in trained:
                continue
            if name not in by_name:
                named.append((name, trained[name], values[name]))
                continue
            mine = by_name[name].of_rank(values[name], self.transport.rank)
            named.append((name, nn.Parameter(self._stored[name]), self.offload.home(mine)))
        return Masters(named, self.dtypes)

    def _make_gradients(self) -> ShardGradients:
        targets = {name: target for name, _, target in self.masters.named}
        trained = [bucket for bucket in self.buckets if bucket.trained]
        return ShardGradients(
            [(bucket, [targets[piece.name] for piece in bucket.pieces]) for bucket in trained],
            [(piece, targets[piece.name]) for piece in self.alone if piece.name in targets],
            self.transport,
            getattr(torch, self.dtypes.reduce),
            world=self.mesh.world,
            replicas=self.mesh.replicas,
            every_time=self.options.every_time,
            after_bucket=self.units.taken if self.units is not None else lambda bucket: None,
        )

    # --- a step ------------------------------------------------------------------------------------------------------

    def make_optimizer(self, factory: OptimizerFactory) -> torch.optim.Optimizer:
        if not self.masters.named:
            raise ConfigError(
                "the model has no trainable parameter", where="partitioner", hint="Unfreeze what is to be trained."
            )
        optimizer = factory(self.masters.for_optimizer)
        offload = self.offload
        if offload.is_on_disk and offload.moves_optimizer:
            offload.take_over(optimizer, self._groups_of_steps(), self.masters.fill, self._after_step)
        else:
            optimizer.register_step_pre_hook(lambda *_: self.masters.fill())
            optimizer.register_step_post_hook(lambda *_: self._after_step())
        return optimizer

    def _after_step(self) -> None:
        self.masters.publish()
        self.publish()

    def _groups_of_steps(self) -> list[list[nn.Parameter]]:
        """What the optimizer works on, by bucket."""
        targets = {name: target for name, _, target in self.masters.named}
        groups = [[targets[p.name] for p in bucket.pieces] for bucket in self.buckets if bucket.trained]
        alone = [targets[piece.name] for piece in self.alone if piece.name in targets]
        return [*groups, alone] if alone else groups

    @contextmanager
    def accumulating(self, *, is_last: bool) -> Iterator[None]:
        if self.units is None:
            with self.gradients.accumulating(is_last=is_last):
                yield
        else:
            with self.units.accumulating(), self.gradients.accumulating(is_last=is_last):
                yield

    @torch.no_grad()
    def publish(self) -> None:
        """Have every rank compute with what the optimizers of all ranks have made."""
        if self.cuts_parameters:
            for cut in self.cut:
                cut.let_go()
            self.transport.settle()
            return
        if self.transport.size == 1:
            return
        under_way: list[tuple[Bucket, Any]] = []
        for bucket in (bucket for bucket in self.buckets if bucket.trained):
            if len(under_way) == 2:
                self._receive(*under_way.pop(0))
            under_way.append((bucket, self._pass_on(bucket)))
        for bucket, wait in under_way:
            self._receive(bucket, wait)

    def _pass_on(self, bucket: Bucket) -> Any:
        rank = self.transport.rank

        def fill(section_S: torch.Tensor) -> None:
            mine = bucket.of_rank([piece.parameter.data for piece in bucket.pieces], rank)
            copy_all(bucket.in_section(section_S, rank), mine)

        return self.transport.start_passing(fill, bucket.size, self._param, self._device)

    def _receive(self, bucket: Bucket, wait: Any) -> None:
        wholes = [piece.parameter.data for piece in bucket.pieces]
        for rank, row_S in enumerate(wait()):
            if rank != self.transport.rank:
                copy_all(bucket.of_rank(wholes, rank), bucket.in_section(row_S, rank))

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float, scale: float) -> torch.Tensor:
        gradients = [t.grad for _, _, t in self.masters.named if t.grad is not None and t.numel()]
        norm = self._norm(gradients) / scale
        if scale != 1.0 and gradients:
            torch._foreach_div_(gradients, scale)
        if not math.isinf(max_norm) and gradients:
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))
        return norm

    def _norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Of the gradients of all ranks that share out one copy; what is not cut counts once."""
        if self.mesh.group is None:
            return norm_of(gradients, self._device)
        square = norm_of(self.gradients.shards, self._device).square()
        dist.all_reduce(square, group=self.mesh.group)
        return torch.sqrt(square + norm_of(self.gradients.alone, self._device).square())

    # --- state -------------------------------------------------------------------------------------------------------

    def state(self, optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
        state = model_state(self.model)
        shapes = {piece.name: piece.shape for bucket in self.buckets for piece in bucket.pieces}
        targets = {name: target for name, _, target in self.masters.named}
        if self.masters.keeps_copies:
            for name, target in targets.items():
                whole = self.mesh.share(target.detach(), shapes[name]) if name in shapes else target.detach()
                state[f"model.{name}"] = whole
        rounds = self.masters.rounds.clone()
        if optimizer is not None:
            for name, target in targets.items():
                state |= self._optimizer_state(optimizer, name, target, shapes.get(name))
        self.masters.rounds.copy_(rounds)  # a step of no length is none
        if not self.masters.keeps_copies:
            state["partitioner.rounds"] = self.masters.rounds
        return state

    def _optimizer_state(
        self, optimizer: torch.optim.Optimizer, name: str, target: nn.Parameter, shape: torch.Size | None
    ) -> dict[str, torch.Tensor]:
        found = optimizer_state(optimizer, [(name, target)])
        if shape is None:
            return found
        whole = {}
        for key, value in found.items():
            if value.shape == target.shape:
                whole[key] = self.mesh.share(value, shape)
            elif value.dim() == 0 or self.mesh.mesh is None:
                whole[key] = value
            else:
                raise StoreError(
                    "what the optimizer keeps has neither the parameter's shape nor none, and can't be put together",
                    where=key,
                    found=tuple(value.shape),
                    allowed=f"{tuple(target.shape)}, ()",
                )
        return whole

    def loaded(self) -> None:
        """Values were written to what :meth:`state` has returned."""
        self.transport.settle()
        if self.masters.keeps_copies:
            self.masters.publish()
            self.publish()


def norm_of(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The 2-norm of all together, in float32."""
    if not tensors:
        return torch.zeros((), device=device)
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)).to(device)


def copy_from_first(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Give every rank the values of rank 0."""
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), group=group, group_src=0)
