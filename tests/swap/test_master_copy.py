"""A quantizer swap names the weights it starts from: the files, or a copy of them in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import LLM, SamplingParams
from drivetrain.assembly import resolve_parts
from drivetrain.config import load_settings
from drivetrain.contracts.loader import Checkpoint
from drivetrain.contracts.source import silent
from drivetrain.errors import ConfigError, MemoryBudgetError, SwapError
from drivetrain.hardware import HostMemory
from drivetrain.plugins.source.catalogue import CatalogueSource
from drivetrain.registry import Registry
from drivetrain.serving import master_copy
from drivetrain.serving.master_copy import MasterCopy, Weights, WeightsSource
from support.swap_parts import refs_with_swap_parts
from support.tiny_models import FolderCheckpoint, save_tiny

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[3 + i, 5, 7, 9 + i] for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / "llama3"
    save_tiny("llama3", folder)
    return folder


def opened(folder: Path, master_copy: str, **options: Any) -> LLM:
    engine = {"max_model_len": 96, "master_copy": master_copy}
    llm = LLM(folder, platform={"name": "cpu", "threads": 1}, engine=engine, **options)
    llm._stack.parts.registry = Registry(refs_with_swap_parts())
    return llm


@pytest.fixture
def resident(folder: Path) -> Iterator[LLM]:
    with opened(folder, "resident") as llm:
        yield llm


def answers(llm: LLM) -> list[Any]:
    return [result.token_ids for result in llm.generate(PROMPTS, GREEDY)]


class Gone(FolderCheckpoint):
    """Files that nobody can read any more."""

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        raise OSError(f"the disk with {name} is gone")


def test_with_a_master_copy_no_swap_reads_the_files(resident: LLM, folder: Path) -> None:
    """There and back without the disk, and the answers are what they were."""
    expected = answers(resident)
    copy = resident._stack.parts.checkpoint
    assert isinstance(copy, MasterCopy)
    copy._files = Gone(folder)
    for parts in ({"quantizer": "exact"}, {"kernels": "reference"}, {"quantizer": "none"}):
        report = resident.swap(**parts)
        assert report.weights == Weights(WeightsSource.RESIDENT, copy.num_bytes)
        assert report.to_dict()["weights"]["source"] == "resident"
        assert answers(resident) == expected


def test_a_quantizer_that_fails_or_writes_does_not_reach_the_copy(resident: LLM, folder: Path) -> None:
    """The copy holds the files' weights, whatever was built from it."""
    with pytest.raises(SwapError, match="told to fail"):
        resident.swap(quantizer={"name": "faulty", "phase": "prepare"})
    resident.swap(quantizer="exact")
    with torch.no_grad():
        for parameter in resident._stack.engine.runner.model.parameters():  # type: ignore[attr-defined]
            parameter.add_(1.0)
    copy, files = resident._stack.parts.checkpoint, FolderCheckpoint(folder)
    assert copy is not None
    for name in files.names():
        assert torch.equal(copy.tensor(name, torch.float32), files.tensor(name, torch.float32)), name


def test_its_memory_is_counted_and_shown(resident: LLM, folder: Path) -> None:
    size = sum(tensor.nbytes for tensor in FolderCheckpoint(folder).tensors.values())
    assert resident.swap(dry_run=True, quantizer="exact").weights == Weights(WeightsSource.RESIDENT, size)
    shown = [note for note in resident.selection_dict()["notes"] if "master copy" in note]
    assert shown == [f"a master copy of the weights takes {size / 2**20:.1f} MiB of host memory"]


def test_without_one_the_files_are_read_again(folder: Path) -> None:
    with opened(folder, "none") as llm:
        assert llm.swap(dry_run=True, quantizer="exact").weights == Weights(WeightsSource.RELOAD)
        assert llm.swap(quantizer="exact").weights == Weights(WeightsSource.RELOAD)
        assert llm.swap(dry_run=True, scheduler="priority").weights is None
        assert not any("master copy" in note for note in llm.selection_dict()["notes"])


def test_another_dtype_than_the_copy_s_comes_from_the_files(folder: Path) -> None:
    """A copy in bfloat16 is not passed off as the files' float32."""
    files = FolderCheckpoint(folder)
    copy = MasterCopy(files, torch.bfloat16)
    name = files.names()[0]
    assert copy.tensor(name, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(copy.tensor(name, torch.float32), files.tensor(name, torch.float32))
    assert copy.num_bytes == files.tensor(name, torch.bfloat16).nbytes


def test_no_room_for_it_is_an_error_with_the_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(master_copy, "read_memory", lambda: HostMemory(2**30, 1024, False))
    with pytest.raises(MemoryBudgetError, match=r"engine\.master_copy: .* 0 MiB are free"):
        opened(folder, "resident")


def test_a_model_that_is_built_past_it_is_an_error(folder: Path) -> None:
    """An explicit setting is used or is an error."""
    with pytest.raises(ConfigError, match="model plugin transformers reads the files itself"):
        opened(folder, "resident", architecture="transformers")


class FourBits(Checkpoint):
    """Files with 4 bits a weight, a scale of 16 bits for each 16 of them."""

    def __init__(self) -> None:
        self.path, self.config, self.generation_config = Path("four-bits"), {}, {}

    def names(self) -> list[str]:
        return ["a", "b"]

    def shape(self, name: str) -> tuple[int, ...]:
        return (64, 32)

    def stored_bytes(self) -> int:
        return 2 * 64 * 32 * 5 // 8

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(64, 32, dtype=dtype)

    def tokenizer(self) -> Any:
        raise NotImplementedError


def test_files_that_are_quantized_are_named_as_such() -> None:
    copy = MasterCopy(FourBits(), torch.float32)
    copy.tensor("a", torch.float32)
    assert Weights.of(FourBits()) == Weights(WeightsSource.RELOAD, 0, 5.0)
    assert Weights.of(copy) == Weights(WeightsSource.RESIDENT, 64 * 32 * 4, 5.0)


@pytest.mark.model
def test_a_quantized_gguf_says_how_many_bits_it_has() -> None:
    """smollm2-135m is a Q4_1 file: 4 bits, and a scale and a minimum of 16 bits for each 32 weights, are 5."""
    source = CatalogueSource(CatalogueSource.Config())
    path = source.locate("smollm2-135m") or source.fetch("smollm2-135m", silent)
    parts = resolve_parts(load_settings(None, {"model": str(path)}), leave_out=("frontend",))
    assert parts.checkpoint is not None
    weights = Weights.of(parts.checkpoint)
    assert weights.source is WeightsSource.RELOAD
    assert weights.dequantized_from_bits == pytest.approx(5, abs=0.75)
