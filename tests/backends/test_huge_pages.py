"""Rule: moving weights into large pages changes nothing but where they lie, and what is not torch's own stays."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from drivetrain.backends.cpu import CpuPlatform
from drivetrain.backends.huge_pages import PAGE_BYTES, move, why_no_huge_pages

needs_huge_pages = pytest.mark.skipif(why_no_huge_pages() is not None, reason=str(why_no_huge_pages()))
LARGE = (1100, 1024)  # float32: more than two large pages


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(*reversed(LARGE)), torch.nn.Linear(1100, 3, dtype=torch.bfloat16))
    tied = torch.nn.Linear(1024, 1100, bias=False)
    tied.weight = module[0].weight
    module.append(tied)
    module.register_buffer("lower", module[0].weight.data[550:])  # a view of a parameter
    module.register_buffer("count", torch.tensor(7))
    return module


def tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


@needs_huge_pages
def test_values_shapes_and_sharing_stay(model: torch.nn.Module) -> None:
    wanted = [tensor.detach().clone() for tensor in tensors(model)]
    strides = [tensor.stride() for tensor in tensors(model)]
    moved = move(tensors(model))
    assert moved == sum(t.numel() * t.element_size() for t in [*model.parameters(), model.get_buffer("count")])
    for tensor, value, stride in zip(tensors(model), wanted, strides, strict=True):
        assert torch.equal(tensor, value)
        assert tensor.stride() == stride
    with torch.no_grad():
        model[0].weight[600] = 5.0
    assert model[2].weight[600, 0] == 5
    assert model.get_buffer("lower")[50, 0] == 5
    assert all(parameter.requires_grad for parameter in model.parameters())


@needs_huge_pages
def test_the_system_gives_large_pages(model: torch.nn.Module) -> None:
    move(tensors(model))
    address = model[0].weight.data_ptr()
    assert address % PAGE_BYTES == 0
    for block in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE):
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", block)
        if span and int(span[1], 16) <= address < int(span[2], 16):
            flags = re.search(r"^VmFlags: (.*)$", block, re.MULTILINE)
            assert flags
            assert "hg" in flags[1].split()
            return
    pytest.fail("the weights lie nowhere")


def test_a_mapped_file_stays_unless_all_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (3 * PAGE_BYTES // 256))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensor = torch.from_numpy(np.frombuffer(mapped, dtype=np.uint8))
    before = tensor.data_ptr()
    assert move([tensor]) == 0
    assert tensor.data_ptr() == before
    if why_no_huge_pages() is not None:
        return
    assert "6.0 MiB" in CpuPlatform(CpuPlatform.Config(huge_pages="all")).place_weights([tensor])
    assert tensor.data_ptr() != before
    assert tensor.numpy().tobytes() == path.read_bytes()


def test_a_small_model_stays() -> None:
    tensor = torch.ones(8)
    before = tensor.data_ptr()
    assert move([tensor]) == 0
    assert tensor.data_ptr() == before


def test_the_memory_lives_as_long_as_a_tensor_in_it() -> None:
    kept = torch.ones(LARGE)
    move([kept, torch.zeros(LARGE)])
    assert kept.sum() == 1100 * 1024


def test_it_is_an_option(model: torch.nn.Module) -> None:
    before = model[0].weight.data_ptr()
    said = CpuPlatform(CpuPlatform.Config(huge_pages="off")).place_weights(tensors(model))
    assert "switched off in the settings" in said
    assert model[0].weight.data_ptr() == before
