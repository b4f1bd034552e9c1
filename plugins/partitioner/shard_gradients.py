"""Gradients by shards: summed over ranks while backward runs, each rank keeping its own rows.

Buckets are reduced in one order on every rank, whatever order gradients come in; one starts when all its gradients are
there and every earlier one has started.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from drivetrain.plugins.partitioner.layout import Bucket, Piece
from drivetrain.plugins.partitioner.transport import Transport

_OUTSTANDING = 2
"""Reductions under way at a time, as transports allow."""


class _Shard:
    """The gradients of one bucket.

    targets: what the optimizer works on, for each piece.
    sum_S:   of this rank's rows, over ranks and micro-batches; its views are the targets' gradients. None before the
             first reduction.
    held:    whole gradients that wait for the last micro-batch, where the parameter's own dtype is too coarse.
    """

    def __init__(self, bucket: Bucket, targets: Sequence[torch.nn.Parameter], rank: int) -> None:
        self.bucket = bucket
        self.targets = list(targets)
        self.dtype = targets[0].dtype
        self.device = bucket.pieces[0].parameter.device
        self.sum_S: torch.Tensor | None = None
        self.views: list[torch.Tensor] = []
        self.held: list[torch.Tensor | None] = [None] * len(targets)
        self.missing = set(range(len(targets)))
        self._rank = rank

    def clear(self) -> None:
        """Start sums of a step."""
        if self.sum_S is None:
            self.sum_S = torch.zeros(self.bucket.size, dtype=self.dtype, device=self.device)
            self.views = self.bucket.in_section(self.sum_S, self._rank)
        else:
            self.sum_S.zero_()

    def write(self, rank: int, section_S: torch.Tensor) -> None:
        """The rows for one rank, of the gradients that this rank has found."""
        into, found = [], []
        for index, view in enumerate(self.bucket.in_section(section_S, rank)):
            gradient = self._found(index)
            if gradient is None:
                view.zero_()
            elif view.numel():
                into.append(view)
                found.append(self.bucket.pieces[index].of_rank(gradient, rank))
        if into:
            torch._foreach_copy_(into, found)

    def _found(self, index: int) -> torch.Tensor | None:
        held = self.held[index]
        return held if held is not None else self.bucket.pieces[index].parameter.grad

    def drop_wholes(self) -> None:
        for index, piece in enumerate(self.bucket.pieces):
            piece.parameter.grad = self.held[index] = None


class ShardGradients:
    """Collects the gradients of trained parameters on this rank's shards.

    world:        all ranks, whose mean is taken; None in a process of its own.
    replicas:     the ranks that have the same shard as this one; None where there are no others.
    alone:        parameters that are not cut, with what the optimizer works on.
    every_time:   reduce in every micro-batch, so that no whole gradients stay; else only in the last.
    after_bucket: told of a bucket whose gradients are taken.
    """

    def __init__(
        self,
        buckets: Sequence[tuple[Bucket, Sequence[torch.nn.Parameter]]],
        alone: Sequence[tuple[Piece, torch.nn.Parameter]],
        transport: Transport,
        reduce_dtype: torch.dtype,
        *,
        world: dist.ProcessGroup | None,
        replicas: dist.ProcessGroup | None,
        every_time: bool,
        after_bucket: Callable[[Bucket], None],
    ) -> None:
        self._transport, self._reduce_dtype = transport, reduce_dtype
        self._world, self._replicas = world, replicas
        self._every_time = every_time
        self._after_bucket = after_bucket
        self._shards = [_Shard(bucket, targets, transport.rank) for bucket, targets in buckets]
        self._alone = list(alone)
        self._alone_sums: list[torch.Tensor | None] = [None] * len(self._alone)
        self._used = [[False] * len(shard.targets) for shard in self._shards]
        self._has_begun = self._reduces = False
        self._num_started = 0
        self._under_way: deque[tuple[_Shard, Any]] = deque()
        for number, shard in enumerate(self._shards):
            for index, piece in enumerate(shard.bucket.pieces):
                piece.parameter.register_post_accumulate_grad_hook(self._hook(number, index))
        for index, (piece, _) in enumerate(self._alone):
            piece.parameter.register_post_accumulate_grad_hook(self._hook_alone(index))

    @property
    def shards(self) -> list[torch.Tensor]:
        """The gradients of this rank's rows, of what was used and has rows here."""
        targets = (target for shard in self._shards for target in shard.targets)
        return [target.grad for target in targets if target.grad is not None and target.numel()]

    @property
    def alone(self) -> list[torch.Tensor]:
        """The gradients of what every rank has."""
        return [target.grad for _, target in self._alone if target.grad is not None]

    @contextmanager
    def accumulating(self, *, is_last: bool) -> Iterator[None]:
        """One micro-batch: gradients add up; at the end of the last one they are the mean over ranks."""
        if not self._has_begun:
            self._begin_step()
        self._reduces = is_last or self._every_time
        self._num_started = 0
        for shard in self._shards:
            shard.missing = set(range(len(shard.targets)))
        try:
            yield
            if self._reduces:
                self._finish(is_last)
        finally:
            self._has_begun, self._reduces = not is_last, False
            self._under_way.clear()

    @torch.no_grad()
    def _begin_step(self) -> None:
        for shard, used in zip(self._shards, self._used, strict=True):
            shard.clear()
            shard.drop_wholes()
            used[:] = [False] * len(used)
        self._alone_sums = [None] * len(self._alone)

    def _hook(self, number: int, index: int) -> Callable[[torch.Tensor], None]:
        def take(parameter: torch.Tensor) -> None:
            self._take(number, index, parameter)

        return take

    @torch.no_grad()
    def _take(self, number: int, index: int, parameter: torch.Tensor) -> None:
        shard = self._shards[number]
        self._used[number][index] = True
        found = parameter.grad
        assert found is not None
        held = shard.held[index]
        if held is not None:
            held.add_(found)
            parameter.grad = None
        elif not self._reduces and found.dtype != shard.dtype:
            shard.held[index] = found.to(shard.dtype)
            parameter.grad = None
        if self._reduces:
            shard.missing.discard(index)
            while self._num_started < len(self._shards) and not self._shards[self._num_started].missing:
                self._start_next()

    def _hook_alone(self, index: int) -> Callable[[torch.Tensor], None]:
        @torch.no_grad()
        def take(parameter: torch.Tensor) -> None:
            target, found, held = self._alone[index][1], parameter.grad, self._alone_sums[index]
            assert found is not None
            self._alone_sums[index] = found.to(target.dtype) if held is None else held + found
            parameter.grad = None

        return take

    def _start_next(self) -> None:
        """Start the reduction of the next bucket in order; what this rank did not find counts as zero."""
        while len(self._under_way) >= _OUTSTANDING:
            self._take_in()
        shard = self._shards[self._num_started]
        self._num_started += 1
        wait = self._transport.start_reduce(shard.write, shard.bucket.size, self._reduce_dtype, shard.device)
        self._under_way.append((shard, wait))
        shard.drop_wholes()
        self._after_bucket(shard.bucket)

    def _take_in(self) -> None:
        shard, wait = self._under_way.popleft()
        wait(shard.sum_S)

    @torch.no_grad()
    def _finish(self, is_last: bool) -> None:
        """Reduce what is left. A parameter that no rank has used keeps no gradient, as without ranks; one that some
        rank has used counts as zero on the others."""
        while self._num_started < len(self._shards):
            self._start_next()
        while self._under_way:
            self._take_in()
        if not is_last:
            return
        self._mean_of_alone()
        used = self._used_by_any()
        size = 1 if self._world is None else dist.get_world_size(self._world)
        for shard in self._shards:
            assert shard.sum_S is not None
            if self._replicas is not None:
                dist.all_reduce(shard.sum_S, group=self._replicas)
            if size > 1:
                shard.sum_S.div_(size)
            for target, view in zip(shard.targets, shard.views, strict=True):
                target.grad = view.to(target.device) if used.pop(0) else None

    def _used_by_any(self) -> list[float]:
        """Of each parameter, whether some rank has found a gradient. Ranks have made their backward when they meet
        here."""
        flags = [float(used) for used_of_shard in self._used for used in used_of_shard]
        if self._world is None:
            return flags
        told = torch.tensor([*flags, 0.0], device=self._device)
        dist.all_reduce(told, group=self._world)
        return told.tolist()[:-1]

    @property
    def _device(self) -> torch.device:
        """Where the model computes, and ranks exchange tensors."""
        if self._shards:
            return self._shards[0].device
        return self._alone[0][0].parameter.device if self._alone else torch.device("cpu")

    def _mean_of_alone(self) -> None:
        """The mean over ranks of the gradients of what is not cut: a few numbers in one message."""
        if not self._alone:
            return
        device = self._alone[0][0].parameter.device
        sums = [s if s is not None else torch.zeros((), device=device) for s in self._alone_sums]
        flags = torch.tensor([float(s is not None) for s in self._alone_sums], dtype=torch.float64, device=device)
        told = torch.cat([torch.stack([s.to(torch.float64) for s in sums]), flags])
        size = 1
        if self._world is not None:
            dist.all_reduce(told, group=self._world)
            size = dist.get_world_size(self._world)
        for index, (_, target) in enumerate(self._alone):
            is_used = bool(told[len(sums) + index])
            target.grad = (told[index] / size).to(target.dtype).to(target.device) if is_used else None
