"""Training cases for partitioners: one group of processes makes all of them, and leaves the outcomes in a folder."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from drivetrain.contracts.partitioner import PartitionContext, Partitioner
from drivetrain.contracts.precision import Dtypes
from drivetrain.errors import ConfigError
from drivetrain.plugins.checkpoint.full import FullCheckpointing
from drivetrain.plugins.checkpoint.moving import Mover
from drivetrain.plugins.checkpoint.recomputing import change_call
from drivetrain.plugins.checkpoint.selective import SelectiveCheckpointing
from drivetrain.plugins.partitioner.none import NoPartitioner
from drivetrain.plugins.partitioner.zero import Zero1Partitioner, Zero2Partitioner, Zero3Partitioner
from drivetrain.plugins.store.dcp import DcpStore
from drivetrain.testing.ranks import spawn_ranks
from drivetrain.testing.tiny import HIDDEN_SIZE, VOCAB_SIZE, Block, loss_of, make_batch, make_net

PARTITIONERS: dict[str, type[Partitioner]] = {
    "none": NoPartitioner,
    "zero1": Zero1Partitioner,
    "zero2": Zero2Partitioner,
    "zero3": Zero3Partitioner,
}
DTYPES = {"fp32": Dtypes("float32", "float32"), "bf16": Dtypes("bfloat16", "float32", "float32")}
UNITS = ("layers.0", "layers.1", "layers.2")
STEPS, ROWS, MAX_NORM = 3, 8, 0.5
_RANK_SECONDS = 240.0


class OddNet(nn.Module):
    """Everything that is awkward to cut: a shared matrix, a frozen layer and a frozen bias, a number, a parameter
    without elements, one that nothing uses, one that rank 0 alone uses, dtypes that differ, and rows that don't divide.

    uses_all: the last two are used by all ranks.
    """

    def __init__(self, uses_all: bool) -> None:
        super().__init__()
        self.uses_all = uses_all
        self.embed = nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)
        self.layers = nn.ModuleList(Block(0.0) for _ in range(3))
        self.squeeze = nn.Linear(HIDDEN_SIZE, 7, bias=False)
        self.few = nn.Linear(7, 3)
        self.widen = nn.Linear(3, HIDDEN_SIZE)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.spare = nn.Parameter(torch.ones(5))
        self.sometimes = nn.Parameter(torch.ones(3, 2))
        self.head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=False)
        self.head.weight = self.embed.weight
        self.layers[1].requires_grad_(False)
        self.layers[0].up.bias.requires_grad_(False)
        self.few.bfloat16()
        self.widen.double()
        self.share = 0.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = hidden * self.gain + self.widen(self.few(self.squeeze(hidden))) + self.nothing.sum()
        if self.uses_all:
            hidden = hidden + self.sometimes.sum() + self.spare.sum()
        elif self.share:
            hidden = hidden + self.share * self.sometimes.sum()
        logits: torch.Tensor = self.head(hidden)
        return logits


def make_odd_net(*, uses_all: bool) -> OddNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OddNet(uses_all)


@dataclass(frozen=True)
class Case:
    """One training. ``model`` is plain, odd or used; ``overflow`` makes the last rank's gradients infinite."""

    partitioner: str
    options: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    checkpoint: str = "none"
    model: str = "plain"
    micro_batches: int = 2
    scale: float = 1.0
    overflow: bool = False

    @property
    def name(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        parts = (self.partitioner, options, self.precision, self.checkpoint, self.model, f"x{self.micro_batches}")
        extra = f"s{self.scale:g}" if self.scale != 1 else ""
        return "-".join(part for part in (*parts, extra, "overflow" if self.overflow else "") if part)


@dataclass(frozen=True)
class Outcome:
    """Losses are this rank's; state is whole."""

    losses: list[float]
    norms: list[float]
    state: dict[str, torch.Tensor]


def adamw(named: Any) -> torch.optim.Optimizer:
    named = list(named)
    assert all(parameter.dim() == 2 for name, parameter in named if name == "squeeze.weight")
    return torch.optim.AdamW(named, lr=1e-2, weight_decay=0.1, eps=1e-5, fused=True)


class CopyingLane:
    """Stands for the way between a device and the host: a copy each way."""

    def out(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone()

    def back(self, host: torch.Tensor) -> tuple[torch.Tensor, None]:
        return host.clone(), None

    def wait(self, tensor: torch.Tensor, arrival: None) -> None:
        pass


def _offload(net: nn.Module) -> nn.Module:
    """The policy ``offload``, which has nowhere to take anything from a processor, with another lane."""
    mover = Mover(net, smallest=0, ahead=2, make_lane=lambda device: CopyingLane())
    for name in UNITS:
        change_call(net.get_submodule(name), mover.run)
    return net


def _selective(**options: Any) -> Callable[[nn.Module], nn.Module]:
    config = SelectiveCheckpointing.Config.model_validate(options)
    return lambda net: SelectiveCheckpointing(config).apply(net, UNITS)


POLICIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda net: net,
    "full": lambda net: FullCheckpointing(FullCheckpointing.Config()).apply(net, UNITS),
    "costs": _selective(),
    "kinds": _selective(modules=["*norm", "down"]),
    "layers": _selective(every=2),
    "offload": _offload,
}
"""What a case's ``checkpoint`` stands for: ``selective`` in its three forms, and each other policy."""


def net_of(case: Case) -> nn.Module:
    net: nn.Module = make_net() if case.model == "plain" else make_odd_net(uses_all=case.model == "used")
    return POLICIES[case.checkpoint](net)


def partitioner_of(case: Case) -> Partitioner:
    plugin = PARTITIONERS[case.partitioner]
    return plugin(plugin.Config.model_validate(dict(case.options)))


class Trained:
    """A case under way."""

    def __init__(self, case: Case, mesh: Any, rank: int, ranks: int) -> None:
        self.case, self.rank, self.ranks = case, rank, ranks
        self.partitioner = partitioner_of(case)
        net = net_of(case)
        if isinstance(net, OddNet):
            net.share = 1.0 if rank == 0 else 0.0
        self.net = self.partitioner.partition(net, PartitionContext(mesh, DTYPES[case.precision], UNITS))
        self.optimizer = self.partitioner.make_optimizer(self.net, adamw)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def step(self, number: int) -> None:
        case = self.case
        ids, targets = make_batch(ROWS, seed=number + 1)
        mine = ids[self.rank :: self.ranks], targets[self.rank :: self.ranks]
        total = 0.0
        count = case.micro_batches
        for index in range(count):
            with self.partitioner.accumulating(self.net, is_last=index == count - 1):
                loss = loss_of(self.net, (mine[0][index::count], mine[1][index::count])) / count
                factor = float("inf") if case.overflow and self.rank == self.ranks - 1 else case.scale
                (loss * factor).backward()
            total += float(loss.detach())
        norm = float(self.partitioner.clip_grad_norm(self.net, MAX_NORM, scale=case.scale))
        self.losses.append(total)
        self.norms.append(norm)
        if torch.isfinite(torch.tensor(norm)):
            self.optimizer.step()
        self.optimizer.zero_grad()

    def whole_state(self) -> dict[str, torch.Tensor]:
        state = self.partitioner.state(self.net, self.optimizer)
        return {name: _whole(tensor).clone() for name, tensor in sorted(state.items())}

    def outcome(self) -> Outcome:
        return Outcome(self.losses, self.norms, self.whole_state())


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    whole = getattr(tensor, "full_tensor", None)
    return (whole() if whole is not None else tensor).detach()


def train(case: Case, mesh: Any = None, rank: int = 0, ranks: int = 1) -> Outcome:
    trained = Trained(case, mesh, rank, ranks)
    for number in range(STEPS):
        trained.step(number)
    return trained.outcome()


def train_plainly(case: Case, ranks: int) -> Outcome:
    """The same steps with nothing but torch, on whole batches; the odd net's rare parameter counts for its share."""
    net = net_of(case)
    masters = {name: nn.Parameter(p.detach().float()) for name, p in net.named_parameters() if p.requires_grad}
    net.to(getattr(torch, DTYPES[case.precision].param))
    if isinstance(net, OddNet):
        net.share = 1.0 if ranks == 1 else 0.0
    optimizer = adamw(masters.items())
    losses, norms = [], []
    for number in range(STEPS):
        ids, targets = make_batch(ROWS, seed=number + 1)
        parts = [loss_of(net, (ids[rank::ranks], targets[rank::ranks])) for rank in range(ranks)]
        if isinstance(net, OddNet) and ranks > 1:
            net.share = 1.0
            parts[0] = loss_of(net, (ids[0::ranks], targets[0::ranks]))
            net.share = 0.0
        loss = torch.stack(parts).mean()
        loss.backward()
        for name, parameter in net.named_parameters():
            if parameter.grad is not None:
                masters[name].grad = parameter.grad.float()
            parameter.grad = None
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.values(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name in masters:
                    parameter.copy_(masters[name])
        losses.append(float(loss.detach()))
    state = {f"model.{name}": parameter.detach() for name, parameter in net.named_parameters()}
    return Outcome(losses, norms, {**state, **{f"model.{name}": p.detach() for name, p in masters.items()}})


# --- in processes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What a group of processes does.

    save: case whose state after two steps goes to a store in that folder.
    load: cases that take such a state over, and go on with the third step.
    measure: cases whose bytes are counted between two micro-batches of the second step.
    """

    cases: Sequence[Case] = ()
    save: tuple[Case, str] | None = None
    load: tuple[Sequence[Case], str] | None = None
    measure: Sequence[Case] = ()


def run_work(work: Work, mesh: Any, rank: int, ranks: int) -> dict[str, Outcome | str]:
    """Name of each case -> its outcome, or the error that it ended with."""
    outcomes: dict[str, Outcome | str] = {}
    for case in work.cases:
        try:
            outcomes[case.name] = train(case, mesh, rank, ranks)
        except ConfigError as error:
            outcomes[case.name] = error.what
    if work.save is not None:
        case, folder = work.save
        trained = Trained(case, mesh, rank, ranks)
        for number in range(2):
            trained.step(number)
        state = trained.partitioner.state(trained.net, trained.optimizer)
        DcpStore(DcpStore.Config(folder=folder)).save(2, state, {}).wait()
        outcomes["saved"] = trained.outcome()
        trained.step(2)
        outcomes["went on"] = trained.outcome()
    if work.load is not None:
        for case in work.load[0]:
            outcomes.update(_load(case, work.load[1], mesh, rank, ranks))
    for case in work.measure:
        outcomes[f"measured {case.name}"] = measure_state(case, mesh, rank, ranks)
    return outcomes


def make_stack() -> nn.Sequential:
    """Large enough that what a few numbers take does not count."""
    return nn.Sequential(*(nn.Linear(96, 96) for _ in range(6)))


def measure_state(case: Case, mesh: Any, rank: int, ranks: int) -> str:
    """Bytes of all tensors that have come to be, as a text, after the first of two micro-batches of the second step."""
    before = _storages()
    gc.freeze()  # what is older is not looked at again and again
    try:
        return str(_held_in_second_step(case, mesh, before))
    finally:
        gc.unfreeze()


def _held_in_second_step(case: Case, mesh: Any, before: Mapping[int, torch.UntypedStorage]) -> int:
    partitioner = partitioner_of(case)
    dtypes = DTYPES[case.precision]
    units = tuple(str(number) for number in range(6))
    net = partitioner.partition(make_stack(), PartitionContext(mesh, dtypes, units))
    optimizer = partitioner.make_optimizer(net, adamw)
    inputs = torch.ones(2, 96, dtype=getattr(torch, dtypes.param))
    counted = 0
    for step in range(2):
        for is_last in (False, True):
            with partitioner.accumulating(net, is_last=is_last):
                net(inputs).float().square().mean().backward()
            if step == 1 and not is_last:
                counted = _newly_held(before)
        partitioner.clip_grad_norm(net, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return counted


def _newly_held(before: Mapping[int, torch.UntypedStorage]) -> int:
    """Bytes that are held beside ``before``, once threads of Gloo have let go of what they sent."""
    counted = []
    for _ in range(4):
        counted.append(sum(storage.nbytes() for place, storage in _storages().items() if place not in before))
        time.sleep(0.03)
    return min(counted)


def _storages() -> dict[int, torch.UntypedStorage]:
    """Address -> every storage that a tensor of this process holds, frozen ones left out. As long as the table is there
    none of them goes, so that no later one can come to lie at the address of one that was."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.layout == torch.strided:
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                local = getattr(tensor, "_local_tensor", tensor)
                if local is not None and local.device.type == "cpu" and local.untyped_storage().nbytes():
                    found[local.untyped_storage().data_ptr()] = local.untyped_storage()
    return found


def _load(case: Case, folder: str, mesh: Any, rank: int, ranks: int) -> dict[str, Outcome | str]:
    trained = Trained(case, mesh, rank, ranks)
    state = trained.partitioner.state(trained.net, trained.optimizer)
    DcpStore(DcpStore.Config(folder=folder)).load(2, state)
    trained.partitioner.load_state(trained.net, trained.optimizer, state)
    loaded = trained.outcome()
    trained.step(2)
    return {f"loaded {case.name}": loaded, f"loaded, went on {case.name}": trained.outcome()}


def run_ranks(work: Work, ranks: int, folder: Path) -> list[dict[str, Outcome | str]]:
    """Outcomes of each rank."""
    folder.mkdir(parents=True, exist_ok=True)
    if ranks == 1:
        return [run_work(work, None, 0, 1)]
    spawn_ranks(_main, (work, ranks, str(folder)), meet=folder / "store", count=ranks, seconds=_RANK_SECONDS)
    return [
        cast("dict[str, Outcome | str]", torch.load(folder / f"rank{rank}.pt", weights_only=False))
        for rank in range(ranks)
    ]


def _main(rank: int, work: Work, ranks: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    try:
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",))
        torch.save(run_work(work, mesh, rank, ranks), Path(folder, f"rank{rank}.pt"))
    except BaseException:
        traceback.print_exc()
        raise
