"""Policies: the same gradients to the last bit, in less memory; what is recomputed is what was named."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import nn

from drivetrain.contracts.checkpoint import CheckpointPolicy
from drivetrain.contracts.platform import PlatformFacts
from drivetrain.contracts.plugin import ProbeContext
from drivetrain.errors import ConfigError
from drivetrain.plugins.checkpoint.full import FullCheckpointing
from drivetrain.plugins.checkpoint.moving import Mover
from drivetrain.plugins.checkpoint.none import NoCheckpointing
from drivetrain.plugins.checkpoint.offload import OffloadedActivations
from drivetrain.plugins.checkpoint.recomputing import change_call
from drivetrain.plugins.checkpoint.selective import SelectiveCheckpointing
from drivetrain.testing.tiny import NUM_BLOCKS, SHARD_UNITS, Block, loss_of, make_batch, make_net
from drivetrain.training.activations import compared, measure_pass, measure_policy


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(kind: type[CheckpointPolicy], **options: Any) -> CheckpointPolicy:
    return kind(kind.Config.model_validate(options))


POLICIES = [
    made(FullCheckpointing),
    made(SelectiveCheckpointing),
    made(SelectiveCheckpointing, modules=["LayerNorm", "up"]),
    made(SelectiveCheckpointing, layers=[0, 2]),
    made(SelectiveCheckpointing, every=2),
]


def gradients(net: nn.Module, seed: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    loss_of(net, make_batch()).backward()
    return [cast(torch.Tensor, parameter.grad) for parameter in net.parameters()]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: str(policy.config))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_equal_to_the_last_bit(policy: CheckpointPolicy, dropout: float) -> None:
    wanted = gradients(make_net(dropout))
    state_after = torch.get_rng_state()
    found = gradients(policy.apply(make_net(dropout), SHARD_UNITS))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(torch.get_rng_state(), state_after), "the random state is not where it would be"


def forwards(policy: CheckpointPolicy, watched: str) -> int:
    """How often the modules of a name are called in one forward and backward."""
    net = make_net()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    policy.apply(net, SHARD_UNITS)
    for name, module in net.named_modules():
        if name.endswith(watched):
            module.register_forward_hook(count)
    gradients(net)
    return calls


@pytest.mark.parametrize(
    ("options", "watched", "calls"),
    [
        ({"every": 1}, "up", 2 * NUM_BLOCKS),
        ({"every": 2}, "up", NUM_BLOCKS + 2),
        ({"layers": [1]}, "up", NUM_BLOCKS + 1),
        ({"layers": [1]}, "head", 1),
    ],
)
def test_the_layers_that_are_named_are_computed_again(options: dict[str, Any], watched: str, calls: int) -> None:
    assert forwards(made(SelectiveCheckpointing, **options), watched) == calls


def test_what_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no module in the layers is of this kind"):
        made(SelectiveCheckpointing, modules=["attention"]).apply(make_net(), SHARD_UNITS)
    with pytest.raises(ConfigError, match="no such layer"):
        made(SelectiveCheckpointing, layers=[7]).apply(make_net(), SHARD_UNITS)
    with pytest.raises(ConfigError, match="no such unit"):
        made(FullCheckpointing).apply(make_net(), ("layers.9",))
    with pytest.raises(ValueError, match="give one of them"):
        SelectiveCheckpointing.Config(modules=("mlp",), every=2)


def test_what_is_kept_falls_in_the_order_of_the_policies() -> None:
    """Measured: full keeps less than what keeps products, and that less than everything; nothing is left behind."""
    kept = {}
    for name, policy in (("none", made(NoCheckpointing)), ("selective", POLICIES[1]), ("full", POLICIES[0])):
        net = make_net()
        cost = measure_policy(policy, net, lambda net=net: loss_of(net, make_batch(32, 16)), lambda: None, SHARD_UNITS)
        kept[name] = cost[0].kept_bytes
        assert cost[1] is not None
        assert cost[0].peak_bytes >= cost[0].kept_bytes
        assert all(parameter.grad is None for parameter in net.parameters())
        assert all("forward" not in module.__dict__ for module in net.modules())
    assert kept["full"] < 0.6 * kept["selective"] < 0.6 * kept["none"]


def test_measuring_leaves_gradients_and_random_states() -> None:
    net = make_net(0.5)
    wanted = gradients(net)
    before, state = [gradient.clone() for gradient in wanted], torch.get_rng_state()
    cost = measure_pass(net, lambda: loss_of(net, make_batch()), lambda: None)
    assert all(torch.equal(cast(torch.Tensor, p.grad), g) for p, g in zip(net.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert "in place of" in compared("full", cost, cost)
    assert "does not fit" in compared("full", cost, None)


# --- offload ---------------------------------------------------------------------------------------------------------


class NotedLane:
    """Stands for a device's copies: everything is copied at once, and written down."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.hosts: list[weakref.ref[torch.Tensor]] = []
        self._numbers: dict[int, int] = {}

    def out(self, tensor: torch.Tensor) -> torch.Tensor:
        host = tensor.detach().clone()
        self._numbers[id(host)] = len(self.hosts)
        self.hosts.append(weakref.ref(host))
        self.events.append(("out", self._numbers[id(host)]))
        return host

    def back(self, host: torch.Tensor) -> tuple[torch.Tensor, int]:
        number = self._numbers[id(host)]
        self.events.append(("back", number))
        return host.clone(), number

    def wait(self, tensor: torch.Tensor, arrival: int) -> None:
        self.events.append(("wait", arrival))


def test_what_travels_comes_back_ahead_of_need_and_is_freed() -> None:
    """Gradients are equal, each tensor travels once, the way back begins before it is asked for, nothing stays."""
    wanted = gradients(make_net(0.3))
    net, lane = make_net(0.3), NotedLane()
    mover = Mover(net, smallest=0, ahead=2, make_lane=lambda device: lane)
    for name in SHARD_UNITS:
        change_call(net.get_submodule(name), mover.run)
    found = gradients(net)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    begun = {number: place for place, (what, number) in enumerate(lane.events) if what == "back"}
    needed = {number: place for place, (what, number) in reversed(list(enumerate(lane.events))) if what == "wait"}
    assert needed
    early = [number for number in needed if needed[number] - begun[number] > 1]
    assert len(early) > len(needed) // 2, "hardly anything is sent back before it is needed"
    assert [what for what, _ in lane.events].count("back") == len(begun), "a tensor came back twice"
    gc.collect()
    assert not [host for host in lane.hosts if host() is not None]


def test_small_tensors_and_parameters_stay() -> None:
    net, lane = make_net(), NotedLane()
    mover = Mover(net, smallest=10**9, ahead=1, make_lane=lambda device: lane)
    change_call(net.get_submodule(SHARD_UNITS[0]), mover.run)
    gradients(net)
    assert lane.events == []
    block = Block(0.0)
    plain = Mover(block, smallest=0, ahead=1)
    assert plain.run(block.forward, torch.ones(1, 2, 12)).shape == (1, 2, 12)


def test_a_processor_has_nothing_to_offload_to() -> None:
    facts = PlatformFacts("cpu", "cpu", "a processor", 1, frozenset({"float32"}), "avx2", "gloo")
    probe = OffloadedActivations.probe(ProbeContext(platform=facts))
    assert (probe.ok, probe.code) == (False, "nothing_to_offload")
