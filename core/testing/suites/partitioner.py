"""What every partitioner has to do: lay the model out, and train it as if it had not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch

from drivetrain.contracts.optimizer import NamedParameters
from drivetrain.contracts.partitioner import PartitionContext, Partitioner
from drivetrain.contracts.precision import Dtypes
from drivetrain.errors import ConfigError
from drivetrain.registry import PluginRef, load
from drivetrain.testing.ranks import spawn_ranks
from drivetrain.testing.suite import Suite, not_run
from drivetrain.testing.tiny import (
    SHARD_UNITS,
    VOCAB_SIZE,
    loss_of,
    make_awkward_net,
    make_batch,
    make_net,
)

Batch = tuple[torch.Tensor, torch.Tensor]

RELATIVE, ABSOLUTE = 1e-4, 1e-5
"""How far a partitioned step in float32 may be from the plain one: sums over ranks are made in another order."""

_FLOAT32 = Dtypes("float32", "float32")
_STEPS = 3
_TRAININGS: Sequence[Mapping[str, Any]] = (
    {},
    {"micro_batches": 2, "max_norm": 0.1},
    {"micro_batches": 2, "max_norm": 0.1, "is_awkward": True},
)
"""What ranks make together; tests name them by their place."""
_ROWS = 8
_RANK_SECONDS = 60.0


@dataclass(frozen=True)
class Run:
    """What a few steps of training came to.

    losses: of each step, before it, averaged over ranks.
    norms:  of the gradients of each step, before clipping.
    logits: on one fixed batch, after the last step.
    """

    losses: list[float]
    norms: list[float]
    logits: torch.Tensor


def adamw(parameters: NamedParameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def sgd(parameters: NamedParameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def batch_of_step(step: int) -> Batch:
    return make_batch(_ROWS, seed=step + 1)


def share(batch: Batch, index: int, count: int) -> Batch:
    """Every ``count``-th row of a batch."""
    return batch[0][index::count], batch[1][index::count]


def train(
    partitioner: Partitioner,
    context: PartitionContext,
    *,
    rank: int = 0,
    ranks: int = 1,
    micro_batches: int = 1,
    max_norm: float = 1e9,
    factory: Callable[[NamedParameters], torch.optim.Optimizer] = adamw,
    is_awkward: bool = False,
) -> Run:
    """A few steps in the order in which a training loop makes them, on this rank's share of each batch."""
    net = partitioner.partition(make_awkward_net() if is_awkward else make_net(), context)
    optimizer = partitioner.make_optimizer(net, factory)
    losses, norms = [], []
    for step in range(_STEPS):
        mine = share(batch_of_step(step), rank, ranks)
        total = 0.0
        for index in range(micro_batches):
            with partitioner.accumulating(net, is_last=index == micro_batches - 1):
                loss = loss_of(net, share(mine, index, micro_batches)) / micro_batches
                loss.backward()
            total += float(loss.detach())
        norms.append(float(partitioner.clip_grad_norm(net, max_norm)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    with torch.no_grad():
        logits = net(make_batch(seed=99)[0])
    return Run(losses, norms, logits.detach().clone())


def train_plainly(
    max_norm: float = 1e9, factory: Callable[..., torch.optim.Optimizer] = adamw, *, is_awkward: bool = False
) -> Run:
    """The same steps on whole batches, with nothing but torch: the meaning that partitioners are held to."""
    net = make_awkward_net().float() if is_awkward else make_net()
    optimizer = factory([(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad])
    losses, norms = [], []
    for step in range(_STEPS):
        loss = loss_of(net, batch_of_step(step))
        loss.backward()
        gradients = [cast(torch.Tensor, p.grad) for p in net.parameters() if p.requires_grad]
        norm = float(torch.cat([gradient.double().reshape(-1) for gradient in gradients]).norm())
        for gradient in gradients:
            gradient.mul_(min(1.0, max_norm / norm))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        norms.append(norm)
    with torch.no_grad():
        return Run(losses, norms, net(make_batch(seed=99)[0]))


def expect_same(found: Run, wanted: Run) -> None:
    """Losses, norms and outputs agree within the published tolerance."""
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(wanted.losses), rtol=RELATIVE, atol=ABSOLUTE)
    torch.testing.assert_close(torch.tensor(found.norms), torch.tensor(wanted.norms), rtol=RELATIVE, atol=ABSOLUTE)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-3, atol=1e-4)


class PartitionerSuite(Suite):
    """A partitioned training step equals the plain one: alone, and over ranks on this machine.

    ranks: sizes of the groups of processes that are tried, over Gloo on the CPU.
    """

    kind = "partitioner"
    ranks: ClassVar[Sequence[int]] = (2,)
    _runs: ClassVar[dict[tuple[PluginRef, str, int], list[list[Run]] | str]] = {}

    @classmethod
    def partitioner(cls) -> Partitioner:
        return cast(Partitioner, cls.make())

    @classmethod
    def context(cls) -> PartitionContext:
        return PartitionContext(None, _FLOAT32, SHARD_UNITS)

    # --- one process -------------------------------------------------------------------------------------------------

    def test_steps_equal_the_plain_ones(self) -> None:
        """Losses, gradient norms and outputs after three steps are those of the unpartitioned model."""
        expect_same(train(self.partitioner(), self.context()), train_plainly())

    @pytest.mark.parametrize("micro_batches", [2, 4])
    def test_accumulating_equals_one_large_batch(self, micro_batches: int) -> None:
        """k micro-batches of b rows make the same step as one batch of k b rows."""
        expect_same(train(self.partitioner(), self.context(), micro_batches=micro_batches), train_plainly())

    def test_clipping_equals_the_plain_one(self) -> None:
        """Gradients are scaled to the wanted norm over all parameters, and the norm before that is returned."""
        found = train(self.partitioner(), self.context(), max_norm=0.1, factory=sgd)
        expect_same(found, train_plainly(max_norm=0.1, factory=sgd))

    def test_small_gradients_are_not_scaled_up(self) -> None:
        """A norm below the bound leaves the gradients as they are."""
        found = train(self.partitioner(), self.context(), max_norm=1e6, factory=sgd)
        expect_same(found, train_plainly(factory=sgd))

    def test_awkward_parameters_train_as_plain_ones(self) -> None:
        """Shared, frozen, without dims, without elements, of another dtype: the steps are the plain ones."""
        found = train(self.partitioner(), self.context(), max_norm=0.1, is_awkward=True)
        expect_same(found, train_plainly(max_norm=0.1, is_awkward=True))

    def test_outputs_stay(self) -> None:
        """Laying the model out changes none of its outputs."""
        ids, _ = make_batch()
        net = self.partitioner().partition(make_net(), self.context())
        with torch.no_grad():
            logits = net(ids)
            assert logits.shape == (*ids.shape, VOCAB_SIZE)
            torch.testing.assert_close(logits, make_net()(ids), rtol=RELATIVE, atol=ABSOLUTE)

    def test_names_of_parameters_stay(self) -> None:
        """State is saved under logical names, so a partitioned model keeps them."""
        wanted = [name for name, _ in make_net().named_parameters()]
        net = self.partitioner().partition(make_net(), self.context())
        assert [name for name, _ in net.named_parameters()] == wanted

    def test_frozen_parameters_stay_as_they_are(self) -> None:
        """A frozen parameter is not trained, and not decayed either."""
        partitioner = self.partitioner()
        net = make_net()
        net.embed.requires_grad_(False)
        frozen = net.embed.weight.detach().clone()
        partitioned = partitioner.partition(net, self.context())
        optimizer = partitioner.make_optimizer(partitioned, adamw)
        with partitioner.accumulating(partitioned, is_last=True):
            loss_of(partitioned, make_batch()).backward()
        optimizer.step()
        ids = torch.arange(VOCAB_SIZE)
        now = dict(partitioned.named_parameters())["embed.weight"]
        torch.testing.assert_close(_whole(now)[ids], frozen[ids], rtol=0.0, atol=0.0)

    def test_every_trainable_parameter_is_trained(self) -> None:
        """One step moves every parameter that is not frozen, and the optimizer holds each only once."""
        partitioner = self.partitioner()
        net = partitioner.partition(make_net(), self.context())
        before = {name: _whole(parameter).clone() for name, parameter in net.named_parameters()}
        optimizer = partitioner.make_optimizer(net, adamw)
        held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        assert len(set(held)) == len(held), "the optimizer holds a parameter twice"
        with partitioner.accumulating(net, is_last=True):
            loss_of(net, make_batch()).backward()
        optimizer.step()
        still = [name for name, parameter in net.named_parameters() if torch.equal(_whole(parameter), before[name])]
        assert not still, f"not trained: {', '.join(still)}"

    # --- several processes -------------------------------------------------------------------------------------------

    def test_ranks_together_equal_the_plain_steps(self, tmp_path: Path) -> None:
        """Ranks that each see their share of a batch make the step that one process makes on all of it."""
        self._expect_same_over_ranks(tmp_path, 0)

    def test_ranks_accumulate_and_clip_together(self, tmp_path: Path) -> None:
        """With accumulation and clipping, ranks still make the plain step, and all of them see the same norm."""
        self._expect_same_over_ranks(tmp_path, 1)

    def test_ranks_share_out_awkward_parameters(self, tmp_path: Path) -> None:
        """Rows that don't divide, or are fewer than ranks, and the rest of what is awkward, over ranks."""
        self._expect_same_over_ranks(tmp_path, 2)

    def _expect_same_over_ranks(self, folder: Path, number: int) -> None:
        for count in self.ranks:
            runs = self._runs_of(folder, count)
            if isinstance(runs, str):
                pytest.skip(f"not claimed: {count} ranks ({runs})")
            training = _TRAININGS[number]
            wanted = train_plainly(training.get("max_norm", 1e9), is_awkward=training.get("is_awkward", False))
            of_ranks = [rank[number] for rank in runs]
            losses = [sum(run.losses[step] for run in of_ranks) / count for step in range(_STEPS)]
            for run in of_ranks:
                expect_same(Run(losses, run.norms, run.logits), wanted)

    def _runs_of(self, folder: Path, count: int) -> list[list[Run]] | str:
        """One group of processes makes all trainings, since starting it takes longest."""
        asked = (self.ref(), repr(sorted(self.options.items())), count)
        if asked not in self._runs:
            self._runs[asked] = run_ranks(self.ref(), self.options, folder / f"ranks{count}", count, _TRAININGS)
        return self._runs[asked]


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's values, gathered where it is sharded."""
    full = getattr(parameter, "full_tensor", None)
    return (full() if full is not None else parameter).detach()


def run_ranks(
    ref: PluginRef, options: Mapping[str, Any], folder: Path, count: int, trainings: Sequence[Mapping[str, Any]]
) -> list[list[Run]] | str:
    """Train in ``count`` processes joined by Gloo; the runs of each, or why the plugin refuses that many ranks."""
    if not torch.distributed.is_available():
        not_run("this build of torch has no torch.distributed")
    folder.mkdir()
    arguments = (ref, dict(options), str(folder), count, list(trainings))
    spawn_ranks(_train_rank, arguments, meet=folder / "store", count=count, seconds=_RANK_SECONDS)
    refusal = folder / "refused"
    if refusal.exists():
        return refusal.read_text(encoding="utf-8")
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(count)]
    return [[Run(**run) for run in of_rank] for of_rank in found]


def _train_rank(
    rank: int,
    ref: PluginRef,
    options: Mapping[str, Any],
    folder: str,
    count: int,
    trainings: Sequence[Mapping[str, Any]],
) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    try:
        mesh = init_device_mesh("cpu", (count,), mesh_dim_names=("data",))
        plugin = load(ref)
        runs = []
        for training in trainings:
            partitioner = cast(Partitioner, plugin(plugin.Config.model_validate(options)))
            context = PartitionContext(mesh, _FLOAT32, SHARD_UNITS)
            runs.append(vars(train(partitioner, context, rank=rank, ranks=count, **training)))
        torch.save(runs, Path(folder, f"rank{rank}.pt"))
    except ConfigError as error:
        # A partitioner for one process says so when it sees the mesh: a refusal, and no failure.
        Path(folder, "refused").write_text(error.what, encoding="utf-8")
