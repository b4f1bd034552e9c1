"""What every checkpoint policy has to do: save memory, and change no number."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from drivetrain.contracts.checkpoint import CheckpointPolicy
from drivetrain.testing.suite import Suite
from drivetrain.testing.tiny import SHARD_UNITS, loss_of, make_batch, make_net


class CheckpointSuite(Suite):
    """A tiny model with the policy against the same model without it."""

    kind = "checkpoint"

    @classmethod
    def wrapped(cls, dropout: float = 0.0) -> nn.Module:
        """A tiny net with the policy applied to its blocks."""
        return cast(CheckpointPolicy, cls.make()).apply(make_net(dropout), SHARD_UNITS)

    @staticmethod
    def step(net: nn.Module, seed: int = 3) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Loss and gradients of one batch. Dropout draws from ``seed``."""
        torch.manual_seed(seed)
        loss = loss_of(net, make_batch())
        # Whatever a policy recomputes must draw the same numbers again, though the generator has moved on.
        torch.rand(7)
        loss.backward()
        return loss.detach(), [cast(torch.Tensor, parameter.grad) for parameter in net.parameters()]

    def _expect_same_step(self, dropout: float) -> None:
        plain_loss, plain = self.step(make_net(dropout))
        loss, gradients = self.step(self.wrapped(dropout))
        torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=1e-7)
        assert len(gradients) == len(plain), "the policy changed the number of parameters"
        for found, wanted in zip(gradients, plain, strict=True):
            assert found is not None, "a parameter got no gradient"
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)

    def test_gradients_equal_those_without_the_policy(self) -> None:
        """Loss and every gradient are those of the plain model."""
        self._expect_same_step(dropout=0.0)

    def test_dropout_draws_the_same_numbers_again(self) -> None:
        """With dropout, what is recomputed drops the same elements as the first time."""
        self._expect_same_step(dropout=0.4)

    def test_outputs_are_the_same_without_gradients(self) -> None:
        """Evaluating gives the plain model's outputs."""
        ids, _ = make_batch()
        with torch.no_grad():
            torch.testing.assert_close(self.wrapped().eval()(ids), make_net().eval()(ids), rtol=0.0, atol=0.0)

    def test_gradients_accumulate(self) -> None:
        """Two backward passes add up."""
        plain, net = make_net(), self.wrapped()
        for seed in (1, 2):
            loss_of(plain, make_batch(seed=seed)).backward()
            loss_of(net, make_batch(seed=seed)).backward()
        for found, wanted in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-5, atol=1e-7)

    def test_frozen_parameters_stay_without_gradient(self) -> None:
        """Frozen parameters get no gradient, and those around them still do."""
        net = make_net()
        net.embed.requires_grad_(False)
        net = cast(CheckpointPolicy, self.make()).apply(net, SHARD_UNITS)  # type: ignore[assignment]
        loss_of(net, make_batch()).backward()
        for name, parameter in net.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name

    def test_names_and_saved_state_stay(self) -> None:
        """The state dict keeps its names and values: what is saved does not tell of the policy."""
        plain, wrapped = make_net().state_dict(), self.wrapped().state_dict()
        assert list(wrapped) == list(plain)
        assert all(torch.equal(wrapped[name], plain[name]) for name in plain)

    def test_a_plain_state_can_be_loaded(self) -> None:
        """A state saved without the policy loads into a model with it, and changes its outputs."""
        ids, _ = make_batch()
        net, other = self.wrapped(), make_net(seed=5)
        net.load_state_dict(other.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(net(ids), other(ids), rtol=0.0, atol=0.0)

    def test_modules_that_are_not_named_are_left_alone(self) -> None:
        """Only the named units are wrapped."""
        net = make_net()
        embed, head = net.embed, net.head
        wrapped = cast(CheckpointPolicy, self.make()).apply(net, SHARD_UNITS)
        assert isinstance(wrapped, nn.Module)
        modules = list(wrapped.modules())
        for module in (embed, head):
            assert any(module is other for other in modules)

    def test_no_more_is_kept_than_without_the_policy(self) -> None:
        """Between forward and backward no more activation bytes are kept on the device than without the policy."""
        assert self._kept_bytes(self.wrapped()) <= self._kept_bytes(make_net())

    @staticmethod
    def _kept_bytes(net: nn.Module) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(net, make_batch())
        held = sum(kept.values())
        loss.backward()
        return held
