"""GGUF files are used as they are packed: nothing is expanded, heads are in order, tokens are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from drivetrain import LLM, SamplingParams
from drivetrain.assembly import Parts, resolve_parts
from drivetrain.config import load_settings
from drivetrain.contracts.kernels import KernelSpec
from drivetrain.contracts.kinds import KINDS
from drivetrain.contracts.plugin import Probe, Purpose
from drivetrain.errors import ConfigError, LoaderError, PluginRefusedError, UnknownPluginError
from drivetrain.kernels.cpu import CpuKernels
from drivetrain.packed import PackedEmbedding, PackedLinear, decode
from drivetrain.packed.gguf import BLOCK_TYPES
from drivetrain.plugins.loader.gguf import GgufCheckpoint, GgufLoader
from drivetrain.registry import Registry
from support.fake_plugins import ref
from support.gguf_models import KIND, LAYERS, PACKED_KINDS, write_llama
from support.tiny_models import VOCAB_SIZE, save_tiny

torch.set_num_threads(1)

OPTIONS: dict[str, Any] = {
    "engine": {"max_model_len": 96, "master_copy": "none"},
    "platform": {"name": "cpu", "threads": 1},
}
PROMPTS = [[5, 9, 30, 7], [40, 41, 42, 43, 44, 45, 46], [200]]
SAMPLING = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
MIXED = (KIND.Q4_K, KIND.Q5_K, KIND.Q6_K, KIND.Q8_0, KIND.Q4_0, KIND.Q5_1)


def open_file(path: Path) -> GgufCheckpoint:
    return GgufLoader(GgufLoader.Config()).open(path)


def mixed(name: str) -> KIND:
    """Another type for each matrix of a layer, as files of mixed types have."""
    return MIXED[sum(map(ord, name)) % len(MIXED)]


def always(kind: KIND) -> Callable[[str], KIND]:
    return lambda name: kind


def generated(path: Path, quantizer: Any) -> tuple[list[list[int]], dict[str, Any]]:
    with LLM(path, quantizer=quantizer, **OPTIONS) as llm:
        return [list(result.token_ids) for result in llm.generate(PROMPTS, SAMPLING)], llm.selection_dict()


@pytest.mark.parametrize("kind", PACKED_KINDS, ids=lambda kind: kind.name)
def test_packed_blocks_stand_for_what_the_package_dequantizes(kind: KIND, tmp_path: Path) -> None:
    checkpoint = open_file(write_llama(tmp_path / "a.gguf", always(kind), tied=False))
    assert checkpoint.packed_by == "gguf"
    assert checkpoint.packs_exactly
    assert not checkpoint.is_packed_first
    for name in checkpoint.names():
        packed = checkpoint.packed(name)
        if name.endswith("norm.weight"):
            assert packed is None
            continue
        assert packed is not None
        assert packed.operation == "linear_gguf"
        assert packed.params == {"type": int(kind)}
        assert (packed.out_features, packed.in_features) == checkpoint.shape(name)
        assert torch.equal(decode(packed), checkpoint.tensor(name, torch.float32)), name


def test_blocks_are_views_of_the_mapped_file_but_for_permuted_rows(tmp_path: Path) -> None:
    checkpoint = open_file(write_llama(tmp_path / "a.gguf", mixed))
    stored = {name: checkpoint._tensors[name][0] for name in checkpoint.names()}
    for name in checkpoint.names():
        packed = checkpoint.packed(name)
        if packed is not None:
            address = checkpoint._file.data(stored[name]).ctypes.data
            is_view = packed.tensors["blocks"].data_ptr() == address
            assert is_view == (".q_proj." not in name and ".k_proj." not in name), name
            assert packed.num_bytes == stored[name].num_bytes


@pytest.mark.parametrize("tied", [True, False])
def test_packed_use_gives_the_tokens_of_the_dequantized_model(tied: bool, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "a.gguf", mixed, tied=tied)
    wanted, _ = generated(path, "none")
    found, report = generated(path, "gguf")
    assert found == wanted
    assert all(len(set(tokens)) > 4 for tokens in wanted), "the model says the same for ever, and shows nothing"
    assert not report["notes"]
    # The ledger knows of no full weight, and all in all what the file takes is taken.
    assert {row["quantizer"] for row in report["weights"]["rows"]} == {"gguf"}
    assert report["weights"]["total_bytes"] <= open_file(path).stored_bytes() + 4096


@pytest.mark.parametrize("tied", [True, False])
def test_no_matrix_is_expanded(tied: bool, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "a.gguf", mixed, tied=tied)
    parts = resolve_parts(load_settings(None, {"model": str(path), "quantizer": "gguf"}), leave_out=("frontend",))
    from drivetrain.assembly import build_model

    model, _ = build_model(parts, parts.kernels, parts.quantizer)
    assert isinstance(model, torch.nn.Module)
    linears = [part for part in model.modules() if isinstance(part, PackedLinear)]
    assert len(linears) == 7 * LAYERS + 1
    assert not any(isinstance(part, torch.nn.Linear) for part in model.modules())
    assert isinstance(model.get_submodule("model.embed_tokens"), PackedEmbedding)
    assert all(parameter.dim() == 1 for parameter in model.parameters())
    table, head = model.get_submodule("model.embed_tokens"), model.get_submodule("lm_head")
    assert (table.get_buffer("blocks").data_ptr() == head.get_buffer("blocks").data_ptr()) == tied


def test_other_types_are_dequantized_one_by_one_with_a_note(tmp_path: Path) -> None:
    def kind_of(name: str) -> KIND:
        return {"blk.0.ffn_up": KIND.IQ4_XS, "blk.1.attn_v": KIND.F16}.get(name, KIND.Q8_0)

    path = write_llama(tmp_path / "a.gguf", kind_of)
    wanted, _ = generated(path, "none")
    found, report = generated(path, "gguf")
    assert found == wanted
    (note,) = [note for note in report["notes"] if "dequantized" in note]
    # F16 is no packed form to begin with.
    assert "1 of 15 layers" in note
    assert note.endswith("model.layers.0.mlp.up_proj")
    rows = {row["quantizer"]: row["num_layers"] for row in report["weights"]["rows"]}
    assert rows == {"gguf": 13, "none": 2}


def test_integer_activations_are_an_option_and_stay_close(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "a.gguf", mixed)
    settings = {"model": str(path), "quantizer": {"name": "gguf", "activations": "int8"}}
    parts = resolve_parts(load_settings(None, settings), leave_out=("frontend",))
    declared = parts.quantizer.declares()
    assert declared.operations == ("linear_gguf_a8",)
    assert declared.activations is not None
    stored = open_file(path).packed("model.layers.0.mlp.up_proj.weight")
    assert stored is not None
    from drivetrain.contracts.quantizer import TakesStored

    assert isinstance(parts.quantizer, TakesStored)
    layer = parts.quantizer.convert_stored("model.layers.0.mlp.up_proj", stored, None)
    assert isinstance(layer, PackedLinear)
    assert layer.packed.operation == "linear_gguf_a8"
    wanted, _ = generated(path, "none")
    found, report = generated(path, settings["quantizer"])
    assert len(found) == len(wanted)
    assert report["weights"]["rows"][0]["quantizer"] == "gguf"


def resolved(path: Path, purpose: Purpose = Purpose.SERVE, **asked: Any) -> Parts:
    settings = load_settings(None, {"model": str(path), "platform": "cpu", **asked})
    return resolve_parts(settings, purpose=purpose, leave_out=("frontend", "recipe"))


@pytest.mark.parametrize("asked", [{}, {"quantizer": "auto"}])
def test_blocks_are_kept_where_kernels_multiply_by_them(tmp_path: Path, asked: dict[str, str]) -> None:
    path = write_llama(tmp_path / "a.gguf", mixed)
    parts = resolved(path, kernels="cpu", **asked)
    assert parts.report["quantizer"].chosen.name == "gguf"
    assert "the kernels' order of preference (gguf, none)" in parts.report["quantizer"].reason
    assert not parts.notes


@pytest.mark.parametrize(
    ("asked", "chosen", "is_told"),
    [({}, "none", True), ({"quantizer": "none"}, "none", False), ({"quantizer": "gguf"}, "gguf", False)],
)
def test_where_only_plain_torch_multiplies_by_blocks_they_are_dequantized_with_a_note(
    tmp_path: Path, asked: dict[str, str], chosen: str, is_told: bool
) -> None:
    parts = resolved(write_llama(tmp_path / "a.gguf", mixed), kernels="reference", **asked)
    assert parts.report["quantizer"].chosen.name == chosen
    assert [text for text in parts.notes if "only 'reference', in plain torch" in text] == parts.notes
    assert len(parts.notes) == is_told


def test_files_whose_packed_products_differ_are_dequantized_whatever_kernels_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the note gives no reason that is not there."""
    path, whole = write_llama(tmp_path / "a.gguf", mixed), GgufLoader.open

    def opened(loader: GgufLoader, path: Path) -> GgufCheckpoint:
        checkpoint = whole(loader, path)
        checkpoint.packs_exactly = False
        return checkpoint

    monkeypatch.setattr(GgufLoader, "open", opened)
    parts = resolved(path, kernels="cpu")
    assert parts.report["quantizer"].chosen.name == "none"
    (note,) = parts.notes
    assert note.startswith("the weights are dequantized while they are loaded; quantizer: gguf uses them as they are")


class NoQ6(CpuKernels):
    """Multiplies by every block but Q6_K."""

    def supports(self, spec: KernelSpec) -> Probe:
        is_q6 = spec.params.get("type") == int(KIND.Q6_K)
        return Probe.no("not_covered", "no Q6_K") if is_q6 else super().supports(spec)


@pytest.mark.parametrize(("kind", "chosen"), [(KIND.Q8_0, "gguf"), (KIND.Q6_K, "none")])
def test_every_type_of_block_in_the_file_has_to_be_covered(tmp_path: Path, kind: KIND, chosen: str) -> None:
    path = write_llama(tmp_path / "a.gguf", lambda name: kind if name == "blk.1.ffn_up" else KIND.Q4_0)
    others = [one for kind in KINDS for one in Registry().candidates(kind)]
    kept = [one for one in others if one.kind != "kernels" or one.name == "reference"]
    registry = Registry([*kept, ref("kernels", "no-q6", NoQ6)])
    settings = load_settings(None, {"model": str(path), "platform": "cpu"})
    parts = resolve_parts(settings, registry=registry, leave_out=("frontend",))
    assert parts.report["kernels"].chosen.name == "no-q6"
    assert parts.report["quantizer"].chosen.name == chosen


def test_training_has_full_weights(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "a.gguf", mixed)
    assert resolved(path, Purpose.TRAIN, kernels="cpu").report["quantizer"].chosen.name == "none"


def test_an_unusable_name_of_kernels_is_told_as_such(tmp_path: Path) -> None:
    """It is asked for early, to choose the quantizer; the error is that of its own turn."""
    with pytest.raises(UnknownPluginError, match=r"kernels.*'cpuu'"):
        resolved(write_llama(tmp_path / "a.gguf", mixed), kernels="cpuu")


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_a_swap_to_auto_chooses_by_the_kernels_that_run(kernels: str, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "a.gguf", mixed)
    with LLM(path, quantizer="none", kernels=kernels, **OPTIONS) as llm:
        llm.swap(quantizer="auto")
        chosen = {one["kind"]: one["chosen"]["name"] for one in llm.selection_dict()["selections"]}
        assert chosen["quantizer"] == ("none" if kernels == "reference" else "gguf")


def test_files_without_packed_blocks_are_refused_with_the_reason(tmp_path: Path) -> None:
    full = write_llama(tmp_path / "full.gguf", always(KIND.F16))
    save_tiny("llama", tmp_path / "folder")
    for model in (full, tmp_path / "folder"):
        settings = load_settings(None, {"model": str(model), "quantizer": "gguf"})
        with pytest.raises(PluginRefusedError, match=r"holds no layers packed as GGUF blocks.*quantized GGUF file"):
            resolve_parts(settings, leave_out=("frontend",))


def test_a_packed_file_cut_short_is_refused_with_the_tensor_and_the_numbers(tmp_path: Path) -> None:
    whole = write_llama(tmp_path / "whole.gguf", mixed).read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:-1000])
    with pytest.raises(
        LoaderError, match=rf"cut short: tensor 'blk\.\d.\w+.weight' ends at byte \d+.*{len(whole) - 1000}"
    ):
        open_file(cut)


def test_scales_in_blocks_that_are_no_numbers_are_told_with_their_layer(tmp_path: Path) -> None:
    """Whatever else is in the blocks; without the quantizer the model is read as it always was."""
    for kind in (KIND.Q8_0, KIND.Q4_1, KIND.Q6_K):
        path = write_llama(tmp_path / f"{kind.name}.gguf", always(kind))
        name = "model.layers.1.mlp.up_proj"
        stored = open_file(path).packed(f"{name}.weight")
        assert stored is not None
        at = BLOCK_TYPES[int(stored.params["type"])].halves[0]
        place = path.read_bytes().index(stored.tensors["blocks"].numpy().tobytes()) + at
        with path.open("r+b") as file:
            file.seek(place)
            file.write(np.array([np.nan], dtype=np.float16).tobytes())
        with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj: 1 of the \d+ scales and minima .* are NaN"):
            LLM(path, quantizer="gguf", **OPTIONS)


def test_the_gguf_package_s_own_blocks_are_used_packed(tmp_path: Path) -> None:
    """A file that somebody else's quantizer made: values rounded by the gguf package."""
    values = np.random.default_rng(0).standard_normal((VOCAB_SIZE, 256), dtype=np.float32)
    for kind in (KIND.Q4_0, KIND.Q4_1, KIND.Q5_0, KIND.Q5_1, KIND.Q8_0):
        blocks = torch.from_numpy(gguf.quantize(values, kind))
        from drivetrain.contracts.packed import PackedWeight

        packed = PackedWeight("linear_gguf", {"blocks": blocks}, VOCAB_SIZE, 256, {"type": int(kind)})
        wanted = torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind))
        assert torch.equal(decode(packed), wanted)


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_packed_gives_the_tokens_of_the_dequantized_model() -> None:
    from drivetrain.contracts.source import silent
    from drivetrain.plugins.source.catalogue import CatalogueSource

    source = CatalogueSource(CatalogueSource.Config())
    path = source.locate("smollm2-135m") or source.fetch("smollm2-135m", silent)
    prompts = ["The capital of France is", "def fibonacci(n):", "Once upon a time, there was a"]
    params = SamplingParams(temperature=0, max_tokens=32)
    tokens = {}
    for quantizer in ("none", "gguf"):
        with LLM(
            path, quantizer=quantizer, engine={"max_model_len": 128}, platform={"name": "cpu", "threads": 1}
        ) as llm:
            tokens[quantizer] = [list(result.token_ids) for result in llm.generate(prompts, params)]
            bits = [row["bits_per_weight"] for row in llm.selection_dict()["weights"]["rows"]]
    assert all(len(one) >= 24 for one in tokens["none"])
    assert tokens["gguf"] == tokens["none"]
    assert max(bits) < 9
