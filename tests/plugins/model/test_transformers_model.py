"""Rules of the transformers plugin: architectures it accepts score as the library does, packed and paged; all others
are refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from drivetrain.contracts.model import BuildContext
from drivetrain.contracts.plugin import ProbeContext
from drivetrain.contracts.quantizer import Quantizer
from drivetrain.contracts.source import silent
from drivetrain.errors import LoaderError, MissingTensorError, UnknownArchitectureError
from drivetrain.kernels.reference import ReferenceKernels
from drivetrain.plugins.attention.sdpa import SdpaAttention
from drivetrain.plugins.model.transformers import TransformersModel
from support.paging import Pages, whole_batch
from support.tiny_models import VOCAB_SIZE, FolderCheckpoint, other_tiny_configs, save_tiny

torch.set_num_threads(1)

CPU = torch.device("cpu")
ATOL = 1e-4
NAMES = [*sorted(other_tiny_configs()), "llama", "gemma2", "qwen2-window"]


def build(checkpoint: FolderCheckpoint, quantizer: Quantizer | None = None) -> Any:
    bind = ReferenceKernels(ReferenceKernels.Config()).make
    context = BuildContext(CPU, torch.float32, bind, quantizer, silent)
    return TransformersModel(TransformersModel.Config()).build(checkpoint, context)


def describe(config: Any, architecture: str) -> Any:
    keys = {**config.to_dict(), "architectures": [architecture], "model_type": config.model_type}
    return TransformersModel(TransformersModel.Config()).describe(keys, "float32")


def some_ids(length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    return save_tiny(request.param, folder), build(FolderCheckpoint(folder))


@torch.inference_mode()
def test_packed_scores_equal_the_librarys(pair: tuple[Any, Any]) -> None:
    reference, module = pair
    ids, other = some_ids(20, 1), some_ids(9, 2)
    step = SdpaAttention(SdpaAttention.Config()).begin(module.spec.attention, whole_batch([20, 9]), None)
    positions = torch.cat((torch.arange(20), torch.arange(9)))
    found = module.logits(module(torch.cat((ids, other)), positions, step))
    expected = torch.cat([reference(own[None], use_cache=False).logits[0] for own in (ids, other)])
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


@torch.inference_mode()
def test_paged_scores_equal_the_librarys(pair: tuple[Any, Any]) -> None:
    reference, module = pair
    ids, spec = (some_ids(20, 3), some_ids(13, 4)), module.spec.attention
    attention, pages = SdpaAttention(SdpaAttention.Config(block_size=4)), Pages(spec, 4, 30)
    cache = attention.allocate(spec, pages.num_blocks, CPU)
    parts: list[list[torch.Tensor]] = [[], []]
    for new_tokens in ({0: 9}, {0: 1, 1: 6}, {0: 1, 1: 1}, {1: 5, 0: 8}, {0: 1, 1: 1}):
        done = [pages.lengths.get(s, 0) for s in range(2)]
        batch = pages.batch(new_tokens)
        flat = torch.cat([ids[s][done[s] : done[s] + new] for s, new in new_tokens.items()])
        scores = module.logits(module(flat, pages.positions(batch), attention.begin(spec, batch, cache)))
        for s, part in zip(new_tokens, scores.split(list(new_tokens.values())), strict=True):
            parts[s].append(part)
    for own, part in zip(ids, parts, strict=True):
        expected = reference(own[None], use_cache=False).logits[0]
        torch.testing.assert_close(torch.cat(part), expected, rtol=0, atol=ATOL)


def test_gradients_reach_every_parameter_that_the_library_reaches(pair: tuple[Any, Any]) -> None:
    reference, module = pair
    ids = some_ids(12, 5)
    step = SdpaAttention(SdpaAttention.Config()).begin(module.spec.attention, whole_batch([12]), None)
    loss = torch.nn.functional.cross_entropy
    loss(module.logits(module(ids, torch.arange(12), step))[:-1], ids[1:]).backward()
    loss(reference(ids[None], use_cache=False).logits[0][:-1], ids[1:]).backward()
    prefix = reference.base_model_prefix + "."
    found = {name.removeprefix("head.").replace("body.", prefix, 1): p for name, p in module.named_parameters()}
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("config", "architecture", "reason"),
    [
        (transformers.MambaConfig(num_hidden_layers=2), "MambaForCausalLM", "recurrent state"),
        (transformers.BloomConfig(n_layer=2), "BloomForCausalLM", "mask itself"),
        (transformers.GptOssConfig(num_hidden_layers=2), "GptOssForCausalLM", "s_aux"),
        (transformers.DeepseekV3Config(num_hidden_layers=2), "DeepseekV3ForCausalLM", "differ in size"),
        (transformers.BertConfig(num_hidden_layers=2), "BertLMHeadModel", "not causal"),
        (transformers.OpenAIGPTConfig(n_layer=2), "OpenAIGPTLMHeadModel", "attend once each"),
        (transformers.Lfm2Config(num_hidden_layers=2), "Lfm2ForCausalLM", "meta device"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_plain_attention_is_refused_with_the_reason(config: Any, architecture: str, reason: str) -> None:
    with pytest.raises(UnknownArchitectureError, match=reason):
        describe(config, architecture)


def test_an_architecture_that_is_no_causal_model_of_the_library_is_refused() -> None:
    config = other_tiny_configs()["stablelm"]
    with pytest.raises(UnknownArchitectureError, match="StableLmForSequenceClassification"):
        describe(config, "StableLmForSequenceClassification")


def test_a_model_that_does_not_score_as_the_library_is_refused(tmp_path: Path) -> None:
    """Nothing the trace sees tells that this model ignores its positions; the check with real tokens does."""
    save_tiny("stablelm", tmp_path)
    rotary = transformers.models.stablelm.modeling_stablelm.StableLmRotaryEmbedding
    original = rotary.forward

    def ignores_positions(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return original(self, x, torch.arange(x.shape[1], device=x.device)[None])

    rotary.forward = ignores_positions
    try:
        with pytest.raises(UnknownArchitectureError, match="packed tokens differ"):
            build(FolderCheckpoint(tmp_path))
    finally:
        rotary.forward = original


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save_tiny("stablelm", tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingTensorError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        build(FolderCheckpoint(tmp_path))


def test_a_single_file_is_refused(tmp_path: Path) -> None:
    save_tiny("stablelm", tmp_path)
    checkpoint = FolderCheckpoint(tmp_path)
    checkpoint.path = tmp_path / "model.safetensors"
    with pytest.raises(LoaderError, match="folders"):
        build(checkpoint)
    assert TransformersModel.probe(ProbeContext(path=str(checkpoint.path))).code == "other_format"


def test_the_probe_answers_by_name_without_importing_the_library(tmp_path: Path) -> None:
    save_tiny("stablelm", tmp_path)
    checkpoint = FolderCheckpoint(tmp_path)
    assert TransformersModel.probe(ProbeContext(checkpoint=checkpoint)).ok
    assert TransformersModel.probe(ProbeContext()).ok
    checkpoint.config = {"architectures": ["StableLmForSequenceClassification"]}
    assert TransformersModel.probe(ProbeContext(checkpoint=checkpoint)).code == "unsupported_architecture"


def test_a_quantizer_gets_every_linear_layer_under_its_own_name(tmp_path: Path) -> None:
    class Recorder(Quantizer):
        names: list[str] = []

        def bits_per_weight(self) -> float | None:
            return None

        def convert(self, name: str, linear: torch.nn.Linear) -> torch.nn.Module:
            self.names.append(name)
            return linear

    save_tiny("stablelm", tmp_path)
    quantizer = Recorder(Recorder.Config())
    build(FolderCheckpoint(tmp_path), quantizer)
    assert {"lm_head", "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"} <= set(quantizer.names)
    assert len(quantizer.names) == 3 * 7 + 1
