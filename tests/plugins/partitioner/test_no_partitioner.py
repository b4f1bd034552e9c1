"""The partitioner ``none``: a step under it is the plain one, over any number of ranks, and in any precision."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from drivetrain.contracts.partitioner import PartitionContext
from drivetrain.contracts.precision import Dtypes
from drivetrain.errors import ConfigError
from drivetrain.plugins.partitioner.none import NoPartitioner

FP32 = Dtypes("float32", "float32")
BF16 = Dtypes("bfloat16", "float32", "float32")


def partitioned(partitioner: NoPartitioner, model: torch.nn.Module, dtypes: Dtypes = FP32) -> torch.nn.Module:
    return partitioner.partition(model, PartitionContext(None, dtypes, ()))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def partitioner() -> NoPartitioner:
    return NoPartitioner(NoPartitioner.Config())


def make_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(dtype)


def set_gradients(model: torch.nn.Module, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)


def test_an_accumulated_step_equals_the_plain_one(partitioner: NoPartitioner) -> None:
    plain, ours = make_model(), make_model()
    inputs, targets = torch.randn(8, 6), torch.randn(8, 3)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    torch.nn.functional.mse_loss(plain(inputs), targets).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    optimizer.step()

    model = partitioner.partition(ours, PartitionContext(None, FP32, ("0", "2")))
    optimizer = partitioner.make_optimizer(model, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    for micro in range(4):
        with partitioner.accumulating(model, is_last=micro == 3):
            rows = slice(2 * micro, 2 * micro + 2)
            (torch.nn.functional.mse_loss(model(inputs[rows]), targets[rows]) / 4).backward()
    partitioner.clip_grad_norm(model, 0.5)
    optimizer.step()
    for expected, found in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_the_model_and_its_parameters_stay_the_same_objects(partitioner: NoPartitioner) -> None:
    model = make_model()
    assert partitioner.partition(model, PartitionContext(None, FP32, ())) is model


def test_frozen_parameters_are_not_optimized(partitioner: NoPartitioner) -> None:
    model = make_model()
    model[0].requires_grad_(False)
    partitioned(partitioner, model)
    optimizer = partitioner.make_optimizer(model, torch.optim.SGD)
    assert [p is q for p, q in zip(optimizer.param_groups[0]["params"], model[2].parameters(), strict=True)] == [
        True
    ] * 2
    model.requires_grad_(False)
    partitioned(partitioner, model)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        partitioner.make_optimizer(model, torch.optim.SGD)


@pytest.mark.parametrize("scale", [0.001, 10.0])
def test_clipping_gives_the_norm_before_and_bounds_the_norm_after(partitioner: NoPartitioner, scale: float) -> None:
    model = partitioned(partitioner, make_model())
    set_gradients(model, scale)
    expected = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
    kept = copy.deepcopy([p.grad for p in model.parameters()])
    norm = partitioner.clip_grad_norm(model, 1.0)
    assert norm.shape == ()
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm, expected)
    after = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
    if expected <= 1.0:
        assert all(torch.equal(p.grad, was) for p, was in zip(model.parameters(), kept, strict=True))
    else:
        torch.testing.assert_close(after, torch.tensor(1.0), rtol=1e-5, atol=0)


def test_low_precision_gradients_add_up_in_float32(partitioner: NoPartitioner) -> None:
    """300 micro-batches whose gradients would stop growing in bfloat16, and the master weight moves by their sum."""
    model = partitioned(partitioner, torch.nn.Linear(1, 1, bias=False), BF16)
    optimizer = partitioner.make_optimizer(model, lambda named: torch.optim.SGD(named, lr=2.0**-16))
    assert model.weight.dtype == torch.bfloat16
    start = partitioner.state(model, optimizer)["model.weight"].clone()
    assert start.dtype == torch.float32
    for micro in range(300):
        with partitioner.accumulating(model, is_last=micro == 299):
            model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    assert float(partitioner.clip_grad_norm(model, float("inf"))) == 300.0
    optimizer.step()
    moved = start - partitioner.state(model, optimizer)["model.weight"]
    torch.testing.assert_close(moved, torch.full((1, 1), 300 * 2.0**-16), rtol=1e-3, atol=0)


def test_the_scale_is_taken_out_before_clipping(partitioner: NoPartitioner) -> None:
    model = partitioned(partitioner, make_model())
    set_gradients(model)
    wanted = [p.grad.clone() for p in model.parameters()]
    norm = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in wanted]))
    for parameter in model.parameters():
        parameter.grad.mul_(1024.0)
    torch.testing.assert_close(partitioner.clip_grad_norm(model, float("inf"), scale=1024.0), norm)
    assert all(torch.equal(p.grad, was) for p, was in zip(model.parameters(), wanted, strict=True))


def test_stochastic_rounding_keeps_small_updates_on_average(partitioner: NoPartitioner) -> None:
    """Updates far below a bfloat16 step are lost when rounding to the nearest, and add up when rounding at random."""
    moved = {}
    for rounding in ("nearest", "stochastic"):
        part = NoPartitioner(NoPartitioner.Config())
        model = torch.nn.Linear(64, 64, bias=False)
        torch.nn.init.ones_(model.weight)
        dtypes = Dtypes("bfloat16", "float32", None, None, rounding)  # type: ignore[arg-type]
        part.partition(model, PartitionContext(None, dtypes, ()))
        optimizer = part.make_optimizer(model, lambda named: torch.optim.SGD(named, lr=2.0**-12))
        for _ in range(32):
            with part.accumulating(model, is_last=True):
                model.weight.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved[rounding] = float((1 - model.weight.detach().float()).mean())
    assert moved["nearest"] == 0.0
    assert moved["stochastic"] == pytest.approx(32 * 2.0**-12, rel=0.05)


def test_random_rounding_goes_on_from_a_saved_state() -> None:
    """The seed of the next rounding is part of the state."""
    part = NoPartitioner(NoPartitioner.Config())
    model = torch.nn.Linear(2, 2)
    part.partition(model, PartitionContext(None, Dtypes("bfloat16", "float32", None, None, "stochastic"), ()))
    optimizer = part.make_optimizer(model, lambda named: torch.optim.SGD(named, lr=0.1))
    for _ in range(3):
        with part.accumulating(model, is_last=True):
            model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    assert int(part.state(model, optimizer)["partitioner.rounds"]) == 3


def test_without_gradients_the_norm_is_zero(partitioner: NoPartitioner) -> None:
    assert partitioner.clip_grad_norm(partitioned(partitioner, make_model()), 1.0).item() == 0.0
