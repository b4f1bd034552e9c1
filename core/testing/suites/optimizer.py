"""What every optimizer has to do: train, keep what it says it keeps, and go on from what was saved."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from drivetrain.contracts.optimizer import Optimizer
from drivetrain.testing.suite import Suite
from drivetrain.testing.tiny import loss_of, make_batch, make_net
from drivetrain.training.state import make_state, optimizer_state

Named = list[tuple[str, nn.Parameter]]
_STEPS = 40


def named_of(net: nn.Module) -> Named:
    return list(net.named_parameters())


class OptimizerSuite(Suite):
    """A tiny model is trained with it."""

    kind = "optimizer"

    @classmethod
    def made(cls, named: Named, **options: Any) -> torch.optim.Optimizer:
        """The optimizer over these parameters, by the configuration's own groups."""
        plugin = cast(Optimizer, cls.make(**options))
        return plugin.make(plugin.groups(named))

    @staticmethod
    def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 1) -> float:
        loss = loss_of(net, make_batch(seed=seed))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def test_the_loss_falls(self) -> None:
        """Some steps on one batch lower its loss, by a rate that is right for a model of this size."""
        net = make_net()
        optimizer = self.made(named_of(net), lr=2e-3)
        losses = [self.step(net, optimizer) for _ in range(_STEPS)]
        assert losses[-1] < losses[0] - 0.02, f"from {losses[0]:.4f} to {losses[-1]:.4f} in {_STEPS} steps"

    def test_state_is_what_was_told(self) -> None:
        """After a step, what is kept for each parameter has the names, shapes and dtypes that state_of tells."""
        net = make_net()
        named = [*named_of(net), ("large.weight", nn.Parameter(torch.randn(80, 70)))]
        named[-1][1].grad = torch.randn(80, 70)
        optimizer = self.made(named)
        self.step(net, optimizer)
        plugin = cast(Optimizer, self.make())
        for name, parameter in named:
            told = {
                key: (stored.shape, stored.dtype)
                for key, stored in plugin.state_of(name, tuple(parameter.shape), "float32").items()
            }
            kept = {
                key: (tuple(value.shape), str(value.dtype).removeprefix("torch."))
                for key, value in optimizer.state[parameter].items()
            }
            assert kept == told, name

    def test_a_step_of_no_length_changes_nothing(self) -> None:
        """With gradients of zero and a rate of 0, parameters stay to the last bit: state is made so."""
        net = make_net()
        before = [parameter.detach().clone() for parameter in net.parameters()]
        make_state(self.made(named_of(net), weight_decay=0.1))
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))

    def test_a_saved_state_goes_on(self) -> None:
        """Parameters and state that are put into a new optimizer make the next steps of the old one, bit for bit."""
        first, second = make_net(), make_net()
        old = self.made(named_of(first), lr=1e-3)
        for seed in (1, 2, 3):
            self.step(first, old, seed)
        second.load_state_dict(first.state_dict())
        new = self.made(named_of(second), lr=1e-3)
        saved = {name: value.clone() for name, value in optimizer_state(old, named_of(first)).items()}
        fresh = optimizer_state(new, named_of(second))
        assert fresh.keys() == saved.keys(), "a new optimizer has another state"
        for name, value in fresh.items():
            value.copy_(saved[name])
        for seed in (4, 5):
            assert self.step(first, old, seed) == self.step(second, new, seed)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))

    def test_the_rate_is_read_at_every_step(self) -> None:
        """What is written to a group's rate holds from the next step on: schedules do so."""
        net = make_net()
        optimizer = self.made(named_of(net))
        self.step(net, optimizer)
        before = [parameter.detach().clone() for parameter in net.parameters()]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self.step(net, optimizer)
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)), "a rate of 0 moved it"

    def test_groups_have_their_own_rate(self) -> None:
        """A group whose rate is 0 stays, and the others are trained."""
        net = make_net()
        optimizer = self.made(named_of(net), groups=[{"match": "layers.0.*", "lr": 0.0}])
        before = {name: parameter.detach().clone() for name, parameter in named_of(net)}
        self.step(net, optimizer)
        for name, parameter in named_of(net):
            assert torch.equal(parameter, before[name]) == name.startswith("layers.0."), name

    def test_weight_decay_is_decoupled(self) -> None:
        """Without a gradient, a step shrinks a decayed parameter by rate times decay, and leaves the others."""
        net = make_net()
        optimizer = self.made(named_of(net), weight_decay=0.5)
        before = {name: parameter.detach().clone() for name, parameter in named_of(net)}
        rates = {
            id(p): group["lr"] * group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
        }
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for name, parameter in named_of(net):
            wanted = before[name] * (1 - rates[id(parameter)])
            torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-5, atol=1e-7)
            assert (rates[id(parameter)] > 0) == (parameter.dim() >= 2), name

    def test_parameters_without_gradient_stay(self) -> None:
        """What backward did not reach is not moved, decay included, and has no state."""
        net = make_net()
        idle = nn.Parameter(torch.ones(3, 3))
        optimizer = self.made([*named_of(net), ("idle.weight", idle)], weight_decay=0.1)
        self.step(net, optimizer)
        assert torch.equal(idle, torch.ones(3, 3))
        assert not optimizer.state.get(idle)

    def test_a_parameter_without_elements_is_no_trouble(self) -> None:
        """Zero elements are stepped like any others."""
        empty = nn.Parameter(torch.empty(0, 4))
        empty.grad = torch.empty(0, 4)
        net = make_net()
        optimizer = self.made([*named_of(net), ("empty.weight", empty)])
        self.step(net, optimizer)
        assert all(bool(torch.isfinite(parameter).all()) for parameter in net.parameters())

    def test_elements_go_their_own_way(self) -> None:
        """Where it claims elementwise, pieces of a parameter are stepped as the whole is."""
        self.require_claim("elementwise")
        whole = nn.Parameter(torch.randn(6, 10, generator=torch.Generator().manual_seed(0)))
        pieces = [nn.Parameter(piece.clone()) for piece in whole.detach().reshape(-1).split([7, 30, 23])]
        one = self.made([("w.weight", whole)], lr=1e-2, weight_decay=0.1, decay_vectors=True)
        many = self.made(
            [(f"w{i}.weight", piece) for i, piece in enumerate(pieces)], lr=1e-2, weight_decay=0.1, decay_vectors=True
        )
        for seed in range(3):
            gradient = torch.randn(6, 10, generator=torch.Generator().manual_seed(seed))
            whole.grad = gradient.clone()
            for piece, part in zip(pieces, gradient.reshape(-1).split([7, 30, 23]), strict=True):
                piece.grad = part.clone()
            one.step()
            many.step()
        joined = torch.cat([piece.detach() for piece in pieces]).view(6, 10)
        torch.testing.assert_close(joined, whole.detach(), rtol=1e-6, atol=1e-7)
