"""Optimizers against their definitions, in plain arithmetic; schedules and groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from drivetrain.contracts.optimizer import GroupConfig, Optimizer, OptimizerConfig, ScheduleConfig
from drivetrain.errors import ConfigError
from drivetrain.plugins.optimizer.adafactor import Adafactor
from drivetrain.plugins.optimizer.adamw import AdamW
from drivetrain.plugins.optimizer.adamw8bit import AdamW8bit
from drivetrain.plugins.optimizer.lion import Lion
from drivetrain.plugins.optimizer.muon import Muon
from drivetrain.plugins.optimizer.torch_adamw8bit import pack_signed, pack_squares, unpack_signed, unpack_squares
from drivetrain.plugins.optimizer.torch_muon import orthogonal
from drivetrain.testing.tiny import loss_of, make_batch, make_net
from drivetrain.training.groups import parameter_groups
from drivetrain.training.schedule import Schedule


def run(kind: type[Optimizer], steps: int = 5, **options: Any) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """A matrix before and after some steps with fixed gradients, and these gradients."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 5, generator=generator))
    before = weight.detach().clone()
    plugin = kind(kind.Config.model_validate(options))
    optimizer = plugin.make(plugin.groups([("layer.weight", weight)]))
    used = []
    for _ in range(steps):
        weight.grad = torch.randn(8, 5, generator=generator)
        used.append(weight.grad.clone())
        optimizer.step()
    return before, weight.detach(), used


@pytest.mark.parametrize("implementation", ["fused", "foreach", "loop"])
def test_adamw_is_the_papers(implementation: str) -> None:
    """Loshchilov and Hutter 2019, algorithm 2."""
    before, after, used = run(AdamW, lr=0.1, weight_decay=0.3, betas=(0.8, 0.9), implementation=implementation)
    wanted, mean, square = before.double(), 0.0, 0.0
    for step, gradient in enumerate(used, 1):
        mean = 0.8 * mean + 0.2 * gradient.double()
        square = 0.9 * square + 0.1 * gradient.double() ** 2
        update = (mean / (1 - 0.8**step)) / ((square / (1 - 0.9**step)).sqrt() + 1e-8)
        wanted = wanted - 0.1 * (update + 0.3 * wanted)
    torch.testing.assert_close(after.double(), wanted, rtol=1e-5, atol=1e-6)


def test_lion_is_the_papers() -> None:
    """Chen et al. 2023, algorithm 2."""
    before, after, used = run(Lion, lr=0.1, weight_decay=0.3)
    wanted, mean = before.double(), torch.zeros(8, 5, dtype=torch.float64)
    for gradient in used:
        update = (0.9 * mean + 0.1 * gradient.double()).sign()
        wanted = wanted - 0.1 * (update + 0.3 * wanted)
        mean = 0.99 * mean + 0.01 * gradient.double()
    torch.testing.assert_close(after.double(), wanted, rtol=1e-5, atol=1e-6)


def test_muon_makes_momentum_orthogonal() -> None:
    """All singular values come near 1, of wide and of tall matrices; and the step is that matrix, scaled."""
    for shape in ((16, 40), (40, 16)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(1)), 5))
        assert 0.6 < float(values.min()) < float(values.max()) < 1.3
    before, after, used = run(Muon, steps=1, lr=0.1, nesterov=False)
    torch.testing.assert_close(before - after, 0.1 * (8 / 5) ** 0.5 * orthogonal(used[0] * 0.05, 5))


def test_muon_leaves_embeddings_and_vectors_to_adam() -> None:
    net = make_net()
    plugin = Muon(Muon.Config())
    optimizer = plugin.make(plugin.groups(net.named_parameters()))
    names = {name: group["is_matrix"] for group in optimizer.param_groups for name in group["param_names"]}
    assert names["layers.0.up.weight"]
    assert not names["embed.weight"]
    assert not names["layers.0.up.bias"]
    rates = {group["is_matrix"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {True: pytest.approx(2e-2), False: pytest.approx(3e-4)}


def test_eight_bits_keep_what_matters() -> None:
    """Errors of a few percent over orders of magnitude in one block, and no square that is not 0 becomes 0."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=generator) * 10 ** (-3 * torch.rand(1000, generator=generator))
    back = unpack_signed(*pack_signed(values, 256), 256)
    large = values.abs() > 1e-2 * values.abs().max()
    assert float(((back - values).abs() / values.abs())[large].max()) < 0.06
    assert torch.equal(back[values == 0], values[values == 0])
    squares = values**2
    kept = unpack_squares(*pack_squares(squares, 256), 256)
    assert bool(((kept > 0) == (squares > 0)).all())
    ratios = (kept / squares)[squares > 1e-5 * squares.max()]
    assert 0.8 < float(ratios.min()) < float(ratios.max()) < 1.25
    assert float(ratios.mean()) == pytest.approx(1.0, abs=0.02)


def test_eight_bits_train_as_thirty_two_do() -> None:
    """A net that is large enough to be kept in 8 bits comes to the same loss, within a percent of the way there."""
    losses = {}
    for kind in (AdamW, AdamW8bit):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        inputs = torch.randn(64, 64)
        plugin = kind(kind.Config(lr=3e-3))
        optimizer = plugin.make(plugin.groups(net.named_parameters()))
        for _ in range(60):
            loss = (net(inputs) - inputs.roll(1, 1)).pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[kind] = float(loss.detach())
    assert losses[AdamW] < 0.05
    assert losses[AdamW8bit] == pytest.approx(losses[AdamW], abs=0.01)


def test_adafactor_trains() -> None:
    net = make_net()
    plugin = Adafactor(Adafactor.Config(lr=0.05))
    optimizer = plugin.make(plugin.groups(net.named_parameters()))
    losses = []
    for _ in range(20):
        loss = loss_of(net, make_batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


# --- groups and schedules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", [AdamW, AdamW8bit, Lion, Muon])
def test_a_mean_that_never_begins_is_refused(plugin: type[Optimizer]) -> None:
    for betas in ([1, 0.9], [0.9, -0.1], [0.9, 2]):
        with pytest.raises(ValueError, match="must be numbers from 0 on, below 1"):
            plugin.Config.model_validate({"betas": betas})


def test_groups_take_parameters_by_name() -> None:
    """The first pattern that fits decides; without one a matrix decays and a vector does not."""
    config = OptimizerConfig(
        lr=0.1,
        weight_decay=0.5,
        groups=(GroupConfig(match="*.up.*", lr=0.2), GroupConfig(match="*.bias", weight_decay=0.25)),
    )
    groups = parameter_groups(config, make_net().named_parameters())
    settings = {name: (group["lr"], group["weight_decay"]) for group in groups for name, _ in group["params"]}
    assert settings["layers.0.up.weight"] == (0.2, 0.5)
    assert settings["layers.0.up.bias"] == (0.2, 0.0)
    assert settings["layers.0.down.bias"] == (0.1, 0.25)
    assert settings["layers.0.norm.weight"] == (0.1, 0.0)
    assert settings["layers.0.gate.weight"] == (0.1, 0.5)
    with pytest.raises(ConfigError, match=r"groups\[0\]\.match.*no trainable parameter"):
        parameter_groups(OptimizerConfig(groups=(GroupConfig(match="*.moe.*"),)), make_net().named_parameters())


def curve(steps: int, **options: Any) -> list[float]:
    schedule = Schedule(ScheduleConfig(**options), steps)
    return [round(schedule.factor(step), 4) for step in range(steps)]


def test_schedules_follow_their_curves() -> None:
    assert curve(4, name="constant") == [1.0] * 4
    assert curve(6, name="linear", warmup=1) == [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert curve(5, name="cosine", floor=0.2) == [1.0, 0.8828, 0.6, 0.3172, 0.2]
    assert curve(8, name="wsd", warmup=1, decay=0.5) == [0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert Schedule(ScheduleConfig(name="linear"), 5).factor(99) == 0.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "cosine", "decay": 5}, "cosine has no decay, a setting of wsd"),
        ({"floor": 0.1}, "constant has no floor, a setting of cosine and linear and wsd"),
        ({"name": "linear", "floor": 0.1, "decay": 0.2}, "linear has no decay"),
    ],
)
def test_settings_of_another_curve_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ScheduleConfig(**options)


def test_phases_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"4 \+ 8 steps"):
        Schedule(ScheduleConfig(name="wsd", warmup=4, decay=8), 10)
