"""``drivetrain.prepare``: a plain module in a plain loop, with the precision, policy and layout that were asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import drivetrain
from drivetrain.contracts.precision import Dtypes, LossScaling
from drivetrain.errors import ConfigError, NonFiniteError, StoreError, TrainingError
from drivetrain.testing.tiny import loss_of, make_batch, make_net
from drivetrain.training.loss_scale import LossScale
from drivetrain.training.nonfinite import find_offender
from drivetrain.training.own_loop import OwnLoop

ONE_THREAD = {"platform": {"name": "cpu", "threads": 1}}
STEPS = 4


def plain(dtype: torch.dtype = torch.float32, clip: float = 1.0) -> list[float]:
    net = make_net().to(dtype)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for step in range(STEPS):
        loss = loss_of(net, make_batch(seed=step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def loop(run: OwnLoop, steps: range = range(STEPS)) -> list[float]:
    losses = []
    for step in steps:
        with run.accumulating():
            loss = loss_of(run.model, make_batch(seed=step))
            run.backward(loss)
        run.step()
        losses.append(float(loss.detach()))
    return losses


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)


def test_a_users_loop_makes_the_plain_steps_to_the_last_bit() -> None:
    net = make_net()
    assert loop(drivetrain.prepare(net, adamw(net), ONE_THREAD)) == plain()


def test_a_script_that_is_done_may_be_started_again(tmp_path: Path) -> None:
    """It goes on from its last state, makes no step, and comes to the same save. Other numbers are refused."""

    def script(name: str) -> int:
        net = make_net()
        run = drivetrain.prepare(net, adamw(net), {**ONE_THREAD, "store": {"folder": str(tmp_path)}})
        done = run.resume() or {"steps": 0}
        made = len(loop(run, range(done["steps"], STEPS)))
        run.save(steps=STEPS, name=name)
        run.close()
        return made

    assert [script("first"), script("first")] == [STEPS, 0]
    with pytest.raises(StoreError, match="there is a state of step 4 already"):
        script("second")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_the_optimizer_does_not_hold_keeps_no_gradient(precision: str) -> None:
    """It would add up over steps, and all gradients be clipped by a norm that only grows."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(net[0].parameters(), lr=1e-9)
    run = drivetrain.prepare(net, optimizer, {**ONE_THREAD, "precision": precision})
    norms = []
    for _ in range(3):
        for is_last in (False, True):
            with run.accumulating(is_last=is_last):
                run.backward(run.model(torch.ones(3, 4)).float().pow(2).mean())
        norms.append(run.step().grad_norm)
    assert norms == pytest.approx(norms[:1] * 3)


def test_gradients_that_would_reach_no_other_rank_are_refused() -> None:
    """One process would not notice; with several, each would go its own way, or none would learn."""
    net = make_net()
    run = drivetrain.prepare(net, adamw(net), ONE_THREAD)
    with run.accumulating():
        loss = loss_of(run.model, make_batch())
    with pytest.raises(TrainingError, match=r"backward pass outside of a micro-batch.*with run\.accumulating\(\)"):
        run.backward(loss)
    run.step()
    with run.accumulating(is_last=False):
        run.backward(loss_of(run.model, make_batch()))
    with pytest.raises(TrainingError, match=r"a step without its last micro-batch.*is_last=False for all but the last"):
        run.step()
    with run.accumulating():
        run.backward(loss_of(run.model, make_batch()))
    assert run.step().grad_norm > 0
    with pytest.raises(TrainingError, match="a step without its last micro-batch"):
        run.step()


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit", "adafactor", "muon", "lion"])
def test_a_save_before_the_first_step_changes_no_step(tmp_path: Path, name: str) -> None:
    """What an optimizer keeps is made for the save by a step of no length, which must not count as one."""
    config = {**ONE_THREAD, "optimizer": {"name": name}, "store": {"folder": str(tmp_path)}}
    run = drivetrain.prepare(make_net(), None, config)
    run.save()
    assert loop(run) == loop(drivetrain.prepare(make_net(), None, config))
    run.close()


@pytest.mark.parametrize("policy", ["full", {"name": "selective", "every": 2}])
def test_with_a_checkpoint_policy_too(policy: Any) -> None:
    net = make_net()
    assert loop(drivetrain.prepare(net, adamw(net), {**ONE_THREAD, "checkpoint": policy})) == plain()


def test_the_configurations_optimizer_is_used_where_none_is_given() -> None:
    options = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1, "decay_vectors": True, "implementation": "loop"}
    assert loop(drivetrain.prepare(make_net(), None, {**ONE_THREAD, "optimizer": options})) == plain()


def test_bf16_casts_inputs_and_keeps_float32_masters() -> None:
    """Inputs in float32 go into a bfloat16 model, and its state is what the optimizer works on."""
    net = nn.Linear(4, 2)
    before = net.weight.detach().clone()
    run = drivetrain.prepare(net, torch.optim.SGD(net.parameters(), lr=1e-3), {**ONE_THREAD, "precision": "bf16"})
    with run.accumulating():
        run.backward(run.model(torch.ones(3, 4)).float().pow(2).mean())
    run.step()
    master = run.state()["model.weight"]
    assert run.model.weight.dtype == torch.bfloat16
    assert master.dtype == torch.float32
    assert not torch.equal(master, before)
    assert torch.equal(run.model.weight, master.bfloat16())


def test_a_saved_loop_goes_on(tmp_path: Path) -> None:
    config = {**ONE_THREAD, "store": {"name": "dcp", "folder": str(tmp_path)}}
    net = make_net()
    first = drivetrain.prepare(net, adamw(net), config)
    assert first.resume() is None
    begun = loop(first, range(2))
    first.save(epoch=3)
    first.close()
    other = make_net(seed=7)
    second = drivetrain.prepare(other, adamw(other), config)
    assert second.resume() == {"epoch": 3}
    assert second.step_number == 2
    assert begun + loop(second, range(2, STEPS)) == plain()


class SometimesUsed(nn.Module):
    """A layer whose second half takes part from the fourth step on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.later = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, *, uses_both: bool) -> torch.Tensor:
        return self.later(self.always(x)) if uses_both else self.always(x)


@pytest.mark.parametrize("partitioner", ["none", "zero1", "zero3"])
def test_a_parameter_that_no_loss_has_reached_is_saved_and_goes_on(tmp_path: Path, partitioner: str) -> None:
    def made(folder: str) -> OwnLoop:
        store = {"name": "dcp", "folder": str(tmp_path / folder)}
        net = SometimesUsed()
        return drivetrain.prepare(net, adamw, {**ONE_THREAD, "partitioner": partitioner, "store": store})

    def adamw(named: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([parameter for _, parameter in named], lr=1e-2)

    def steps(run: OwnLoop, numbers: range) -> list[float]:
        losses = []
        for number in numbers:
            with run.accumulating():
                x = torch.full((3, 4), 1.0 + number)
                loss = run.model(x, uses_both=number >= 3).square().mean()
                run.backward(loss)
            run.step()
            losses.append(float(loss.detach()))
        return losses

    wanted = steps(made("whole"), range(6))
    first = made("cut")
    begun = steps(first, range(2))
    first.save()
    first.close()
    second = made("cut")
    assert second.resume() is not None
    assert begun + steps(second, range(2, 6)) == wanted


def test_a_rate_that_the_user_schedules_is_left_alone() -> None:
    net = make_net()
    run = drivetrain.prepare(net, adamw(net), ONE_THREAD)
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, step_size=1, gamma=0.5)
    rates = []
    for step in range(3):
        loop(run, range(step, step + 1))
        scheduler.step()
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == [5e-3, 2.5e-3, 1.25e-3]


def test_what_can_not_be_prepared_is_said() -> None:
    net, other = make_net(), make_net()
    used = adamw(net)
    loss_of(net, make_batch()).backward()
    used.step()
    with pytest.raises(ConfigError, match="has made steps already"):
        drivetrain.prepare(net, used, ONE_THREAD)
    with pytest.raises(ConfigError, match="parameters that the model does not have"):
        drivetrain.prepare(net, adamw(other), ONE_THREAD)
    with pytest.raises(ConfigError, match="needs to know how long the run is"):
        drivetrain.prepare(net, None, {**ONE_THREAD, "optimizer": {"schedule": {"name": "cosine"}}})
    with pytest.raises(ConfigError, match="no trainable parameter"):
        drivetrain.prepare(nn.Linear(2, 2).requires_grad_(False), None, ONE_THREAD)


# --- what is not finite ----------------------------------------------------------------------------------------------


def test_gradients_that_are_not_finite_change_nothing() -> None:
    net = make_net()
    run = drivetrain.prepare(net, adamw(net), ONE_THREAD)
    before = {name: tensor.clone() for name, tensor in run.state().items()}
    with run.accumulating():
        loss = loss_of(run.model, make_batch())
        run.backward(loss * float("inf"))
    with pytest.raises(NonFiniteError, match=r"head\.bias: the gradients are not finite"):
        run.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.state().items() if "model." in name)


class Breaking(nn.Module):
    """A log whose argument may be 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.log(torch.zeros_like(x))


class BreakingBackward(nn.Module):
    """A root that is finite at 0, and whose slope is not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 0).sqrt() + x


@pytest.mark.parametrize(
    ("broken", "offender", "how"),
    [(Breaking, "1", "its output"), (BreakingBackward, "1", "backward"), (nn.Identity, None, "")],
)
def test_the_first_module_that_is_not_finite_is_named(broken: type[nn.Module], offender: str | None, how: str) -> None:
    net = nn.Sequential(nn.Linear(3, 3), broken(), nn.Linear(3, 3), nn.Tanh())

    def run() -> torch.Tensor:
        loss = net(torch.ones(2, 3)).sum()
        loss.backward()
        return loss

    found = find_offender(net, run)
    assert (found and found[0]) == offender
    assert how in (found or ("", ""))[1]


# --- the loss scale --------------------------------------------------------------------------------------------------


def test_the_scale_halves_on_overflow_and_grows_again() -> None:
    scale = LossScale(LossScaling(initial=8.0, growth_steps=3))
    scale.overflowed()
    assert scale.value == 4.0
    for _ in range(3):
        scale.held()
    assert scale.value == 8.0
    other = LossScale(LossScaling())
    other.restore(scale.to_dict())
    assert other.value == 8.0
    scale.value = scale.config.minimum
    with pytest.raises(NonFiniteError, match="lowered to its minimum"):
        scale.overflowed()


def test_an_overflow_skips_the_step_and_lowers_the_scale() -> None:
    """With float16 on this machine: the first scales are far too large, and then the loss falls."""
    from drivetrain.plugins.checkpoint.none import NoCheckpointing
    from drivetrain.plugins.partitioner.none import NoPartitioner
    from drivetrain.training.prepared import Prepared
    from drivetrain.training.ranks import Ranks

    torch.manual_seed(0)
    prepared = Prepared(
        nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)),
        lambda named: torch.optim.Adam(named, lr=1e-2),
        partitioner=NoPartitioner(NoPartitioner.Config()),
        checkpoint=NoCheckpointing(NoCheckpointing.Config()),
        dtypes=Dtypes("float16", "float32", "float32", LossScaling(initial=2.0**24, growth_steps=4)),
        ranks=Ranks(),
    )
    inputs, targets = torch.randn(16, 8).half(), torch.randint(4, (16,))
    skipped, losses, scales = [], [], []
    for _ in range(24):
        before = prepared.model[0].weight.detach().clone()
        with prepared.accumulating():
            loss = functional.cross_entropy(prepared.model(inputs).float(), targets)
            prepared.backward(loss)
        outcome = prepared.step()
        assert outcome.is_skipped == torch.equal(before, prepared.model[0].weight)
        skipped.append(outcome.is_skipped)
        losses.append(float(loss.detach()))
        assert prepared.loss_scale is not None
        scales.append(prepared.loss_scale.value)
    assert skipped[0]
    assert not all(skipped)
    assert scales[0] == 2.0**23
    assert max(scales[i + 1] / scales[i] for i in range(len(scales) - 1)) == 2.0
    assert losses[-1] < 0.7 * losses[0]
