"""Packed models, ours and the library's, give the tokens of the full model that their weights stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drivetrain import LLM, SamplingParams
from drivetrain.packed import PackedEmbedding, PackedLinear, decode, packed_layers
from support.tiny_models import save_tiny

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
PROMPTS = [[3 + i, 5, 7, 9 + i] for i in range(3)]
INT4 = {"name": "int4", "group": 16}
OURS = ("llama3", "qwen3", "phi3", "gemma2", "granite")
THEIRS = ("phi", "cohere2", "qwen3-moe")


def opened(folder: Path, quantizer: Any) -> LLM:
    engine = {"max_model_len": 64}
    return LLM(folder, quantizer=quantizer, platform={"name": "cpu", "threads": 1}, precision="fp32", engine=engine)


def answers(llm: LLM) -> list[Any]:
    return [result.token_ids for result in llm.generate(PROMPTS, GREEDY)]


def body(llm: LLM) -> Any:
    return llm._stack.engine.runner.model


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    save_tiny(request.param, tmp_path / request.param)
    return tmp_path / request.param


def write_decoded(folder: Path, llm: LLM, target: Path) -> Path:
    """The same folder with the weights that the packed layers of ``llm`` stand for, tables of tied ones included."""
    file = "model.safetensors"
    tensors = load_file(folder / file)
    for name, layer in packed_layers(body(llm)):
        known = name.removeprefix("body.").removeprefix("head.")
        stored = next(
            n for n in (f"{known}.weight", f"model.{known}.weight", "model.embed_tokens.weight") if n in tensors
        )
        tensors[stored] = decode(layer.packed).contiguous()
    target.mkdir()
    for other in folder.iterdir():
        if other.name != file:
            (target / other.name).write_bytes(other.read_bytes())
    save_file(tensors, target / file, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("folder", [*OURS, *THEIRS], indirect=True)
def test_tokens_are_those_of_the_decoded_weights(folder: Path, tmp_path: Path) -> None:
    """Greedy tokens equal those of a full model whose files hold the decoded weights."""
    quantizer: Any = (
        {"name": "int8", "rules": {"self_attn.v_proj": INT4}} if folder.name in ("llama3", "phi") else "int8"
    )
    with opened(folder, quantizer) as llm:
        found = answers(llm)
        decoded = write_decoded(folder, llm, tmp_path / "decoded")
    with opened(decoded, "none") as llm:
        assert found == answers(llm)


@pytest.mark.parametrize("folder", ["smollm2", "granite", "cohere2"], indirect=True)
def test_a_tied_table_is_looked_up_in_the_packed_head(folder: Path) -> None:
    """It shares the head's memory, and no table in full is left; rules keep the table, or both, in full."""
    vocabulary = 288

    def full_tables(llm: LLM) -> int:
        return sum(p.shape[0] == vocabulary for p in body(llm).parameters())

    def parts(llm: LLM) -> tuple[list[PackedEmbedding], list[PackedLinear]]:
        modules = list(body(llm).modules())
        tables = [module for module in modules if isinstance(module, PackedEmbedding)]
        heads = [m for m in modules if isinstance(m, PackedLinear) and m.out_features == vocabulary]
        return tables, heads

    with opened(folder, "int8") as llm:
        (table,), (head,) = parts(llm)
        for mine, its in zip(table.packed.tensors.values(), head.packed.tensors.values(), strict=True):
            assert mine.data_ptr() == its.data_ptr()
        assert full_tables(llm) == 0
        ids = torch.tensor([[3, 5, 3]])
        assert torch.equal(table(ids), decode(head.packed)[ids] * table.scale)
    with opened(folder, {"name": "int8", "rules": {"embed_tokens": "none"}}) as llm:
        tables, heads = parts(llm)
        assert (len(tables), len(heads), full_tables(llm)) == (0, 1, 1)
    with opened(folder, {"name": "int8", "rules": {"lm_head": "none"}}) as llm:
        tables, heads = parts(llm)
        assert (len(tables), len(heads), full_tables(llm)) == (0, 0, 1)


@pytest.mark.parametrize("folder", ["gemma3"], indirect=True)
def test_an_embedding_of_the_library_s_own_kind_stays_in_full(folder: Path) -> None:
    """Gemma's scales what it looks up; the head is packed beside it."""
    engine = {"max_model_len": 64}
    platform = {"name": "cpu", "threads": 1}
    with LLM(folder, quantizer="int8", architecture="transformers", platform=platform, engine=engine) as llm:
        kinds = [type(module).__name__ for module in body(llm).modules()]
        assert "PackedEmbedding" not in kinds
        assert answers(llm)
