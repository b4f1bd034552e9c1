"""The trivial partitioner: a step under it is the plain single-process step, and it refuses a mesh of many."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from drivetrain.contracts.partitioner import PartitionContext
from drivetrain.contracts.precision import Dtypes
from drivetrain.errors import ConfigError
from drivetrain.plugins.partitioner.none import NoPartitioner

FP32 = Dtypes("float32", "float32")


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
    optimizer = partitioner.make_optimizer(model, torch.optim.SGD)
    assert [p is q for p, q in zip(optimizer.param_groups[0]["params"], model[2].parameters(), strict=True)] == [
        True
    ] * 2
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        partitioner.make_optimizer(model, torch.optim.SGD)


@pytest.mark.parametrize("scale", [0.001, 10.0])
def test_clipping_gives_the_norm_before_and_bounds_the_norm_after(partitioner: NoPartitioner, scale: float) -> None:
    model = make_model()
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


def test_the_norm_of_bfloat16_gradients_is_computed_in_float32(partitioner: NoPartitioner) -> None:
    model = make_model(torch.bfloat16)
    set_gradients(model)
    exact = torch.linalg.vector_norm(torch.cat([p.grad.flatten().double() for p in model.parameters()]))
    norm = partitioner.clip_grad_norm(model, 1e9)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)


def test_without_gradients_the_norm_is_zero(partitioner: NoPartitioner) -> None:
    assert partitioner.clip_grad_norm(make_model(), 1.0).item() == 0.0


_RANK = """
import sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from drivetrain.contracts.partitioner import PartitionContext
from drivetrain.contracts.precision import Dtypes
from drivetrain.errors import ConfigError
from drivetrain.plugins.partitioner.none import NoPartitioner
rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
context = PartitionContext(init_device_mesh("cpu", (size,)), Dtypes("float32", "float32"), ())
try:
    NoPartitioner(NoPartitioner.Config()).partition(torch.nn.Linear(2, 2), context)
    print("accepted")
except ConfigError as error:
    print(error)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("size", [1, 2])
def test_only_a_mesh_of_one_rank_is_accepted(tmp_path: Path, size: int) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", _RANK, str(rank), str(size), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    for process in ranks:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        if size == 1:
            assert said.strip() == "accepted"
        else:
            assert "found 'a mesh of 2 ranks'; allowed: one rank" in said
            assert "plugins list --kind partitioner" in said
