"""Gradients where the optimizer works on them: added up over micro-batches, averaged over ranks while backward runs.

Parameters are taken in the order in which backward usually reaches them, the last first, and put into buckets. When all
gradients of a bucket are there, and every earlier bucket is on its way, its sum over ranks starts; backward goes on
meanwhile (Li et al. 2020, "PyTorch Distributed", section 3.2.3). Buckets start in one order on every rank, whatever
order their gradients come in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from drivetrain.plugins.partitioner.masters import Masters

BUCKET_BYTES = 16 * 2**20
"""Bytes of one sum over ranks: large enough that starting it costs little beside it, small enough to begin early."""


class _Bucket:
    """Some gradients, one after the other in one buffer. A parameter's gradient is a view of it.

    members: number of each parameter, in the order of the buffer.
    """

    def __init__(self, members: Sequence[int], targets: Sequence[torch.nn.Parameter]) -> None:
        self.members = tuple(members)
        first = targets[self.members[0]]
        self.buffer = torch.zeros(
            sum(targets[index].numel() for index in self.members), dtype=first.dtype, device=first.device
        )
        pieces = self.buffer.split([targets[index].numel() for index in self.members])
        self.views = {
            index: piece.view(targets[index].shape) for index, piece in zip(self.members, pieces, strict=True)
        }
        self.missing: set[int] = set(self.members)
        self.work: Any = None


class Gradients:
    """Collects the gradients of a model's parameters on what the optimizer works on.

    group: the ranks whose mean is taken; None in a process of its own.
    """

    def __init__(self, masters: Masters, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._parameters = [parameter for _, parameter, _ in masters.named]
        self._targets = [target for _, _, target in masters.named]
        self._buckets = [] if group is None else _make_buckets(self._targets)
        self._bucket_of = {index: bucket for bucket in self._buckets for index in bucket.members}
        self._is_last = False
        self._has_begun = False
        self._num_started = 0
        self._untrained: list[torch.nn.Parameter] = []
        self._used = [False] * len(self._parameters)
        for index, parameter in enumerate(self._parameters):
            if self._bucket_of or self._targets[index] is not parameter:
                parameter.register_post_accumulate_grad_hook(self._hook(index))

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """What ``optimizer`` does not hold is cleared with the beginning of each step: nobody else does."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._untrained = [target for target in self._targets if id(target) not in held]

    @contextmanager
    def accumulating(self, *, is_last: bool) -> Iterator[None]:
        """One micro-batch: gradients add up; at the end of the last one they are the mean over ranks."""
        if not self._has_begun:
            self._has_begun = True
            for target in self._untrained:
                target.grad = None
            self._used = [False] * len(self._parameters)
            self._num_started = 0
            for bucket in self._buckets:
                bucket.missing, bucket.work = set(bucket.members), None
        self._is_last = is_last
        try:
            yield
            if is_last and self._buckets:
                self._finish()
        finally:
            if is_last:
                self._has_begun = self._is_last = False

    def _hook(self, index: int) -> Any:
        def take(parameter: torch.nn.Parameter) -> None:
            self._take(index, parameter)
            if self._is_last and self._buckets:
                self._bucket_of[index].missing.discard(index)
                self._start_complete()

        return take

    @torch.no_grad()
    def _take(self, index: int, parameter: torch.nn.Parameter) -> None:
        """Add what backward has left to the gradient of the optimizer's parameter."""
        target, found = self._targets[index], parameter.grad
        assert found is not None
        bucket = self._bucket_of.get(index)
        if bucket is not None:
            view = bucket.views[index]
            if target is parameter and found is view:
                pass  # backward has added to it in place
            elif target is parameter or not self._used[index]:
                view.copy_(found)
            else:
                view.add_(found)
            target.grad = view
        elif target.grad is None:
            target.grad = found.to(target.dtype)
        else:
            target.grad.add_(found)
        if target is not parameter:
            parameter.grad = None
        self._used[index] = True

    def _start_complete(self) -> None:
        """Start the sums that can start, in the order of buckets."""
        while self._num_started < len(self._buckets) and not self._buckets[self._num_started].missing:
            bucket = self._buckets[self._num_started]
            bucket.work = dist.all_reduce(bucket.buffer, group=self._group, async_op=True)
            self._num_started += 1

    @torch.no_grad()
    def _finish(self) -> None:
        """Wait for all sums. A parameter that no rank has used keeps no gradient, as without ranks; one that some
        rank has used counts as zero on the others."""
        everyone_used_all = self._num_started == len(self._buckets)
        for bucket in self._buckets[self._num_started :]:
            for index in bucket.missing:
                if not self._used[index]:
                    bucket.views[index].zero_()
            bucket.missing.clear()
        self._start_complete()
        device = self._buckets[0].buffer.device
        # A rank that has used everything can't know of the others, so all of them tell; it is a few bytes.
        used = torch.tensor([float(used or everyone_used_all) for used in self._used], device=device)
        dist.all_reduce(used, group=self._group)
        size = dist.get_world_size(self._group)
        for bucket in self._buckets:
            bucket.work.wait()
            bucket.buffer.div_(size)
        for index, count in enumerate(used.tolist()):
            self._targets[index].grad = self._bucket_of[index].views[index] if count else None


def _make_buckets(targets: Sequence[torch.nn.Parameter]) -> list[_Bucket]:
    """Buckets of one dtype and device each, the last parameters first."""
    buckets: list[list[int]] = []
    open_buckets: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index in reversed(range(len(targets))):
        target = targets[index]
        members = open_buckets.get((target.dtype, target.device))
        num_bytes = target.numel() * target.element_size()
        if members is None or num_bytes + sum(targets[i].numel() * targets[i].element_size() for i in members) > (
            BUCKET_BYTES
        ):
            members = open_buckets[target.dtype, target.device] = []
            buckets.append(members)
        members.append(index)
    return [_Bucket(members, targets) for members in buckets]
