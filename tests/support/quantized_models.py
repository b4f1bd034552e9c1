"""Tiny models whose layers are quantized by plain rounding, to be written to disk in any format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from drivetrain import LLM, SamplingParams
from drivetrain.contracts.loader import Checkpoint
from drivetrain.plugins.loader.safetensors import SafetensorsLoader
from drivetrain.plugins.quantizer.formats import IntegerGrid
from support.tiny_models import COMMON, save_tiny_tokenizer, tiny_model

SIZES: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
"""Every layer's inputs and outputs are multiples of 32, as the word formats need."""


def save_round_sizes(folder: Path, **changes: Any) -> Any:
    """Write a whole Llama folder with sizes that are multiples of 32, and return the library's model."""
    config = transformers.LlamaConfig(**{**COMMON, **SIZES, **changes}, architectures=["LlamaForCausalLM"])
    model = tiny_model(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return model


def open_folder(folder: Path) -> Checkpoint:
    return SafetensorsLoader(SafetensorsLoader.Config()).open(folder)


def rounded(weight_OI: torch.Tensor, bits: int, group: int | None, *, symmetric: bool = True) -> IntegerGrid:
    """The nearest grid with float16 scales and whole zero points."""
    top = (1 << bits) - 1
    groups = weight_OI.float().unflatten(1, (-1, group or weight_OI.shape[1]))
    if symmetric:
        scales_ON = (groups.abs().amax(2) / (top // 2)).half()
        zeros_ON = torch.full_like(scales_ON, 1 << bits - 1)
    else:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scales_ON = ((high - low) / top).half()
        zeros_ON = (-low / scales_ON.float()).round().clamp(0, top)
    values = (groups / scales_ON.float().unsqueeze(2)).round() + zeros_ON.float().unsqueeze(2)
    return IntegerGrid(bits, values.clamp(0, top).to(torch.uint8).flatten(1), scales_ON, zeros_ON.to(torch.uint8))


def layer_names(checkpoint: Checkpoint) -> list[str]:
    """Linear layers of the model's blocks."""
    return [name.removesuffix(".weight") for name in checkpoint.names() if "_proj.weight" in name]


def rounded_layers(
    checkpoint: Checkpoint, bits: int, group: int | None, *, symmetric: bool = True
) -> dict[str, IntegerGrid]:
    """Every linear layer of the blocks on its grid."""
    return {
        name: rounded(checkpoint.tensor(f"{name}.weight", torch.float32), bits, group, symmetric=symmetric)
        for name in layer_names(checkpoint)
    }


PROMPTS = [[5, 9, 30, 7], [40, 41, 42, 43, 44, 45, 46], [200]]
NEW_TOKENS = 16


@torch.inference_mode()
def continued(model: Any) -> list[list[int]]:
    """Greedy continuations of transformers' own model, without any cache."""
    results = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(NEW_TOKENS):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        results.append(tokens[len(prompt) :])
    return results


def generated(folder: Path, **options: Any) -> tuple[list[list[int]], dict[str, Any]]:
    """Our greedy continuations of the same prompts, and what was chosen."""
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with LLM(folder, engine={"max_model_len": 96}, platform={"name": "cpu", "threads": 1}, **options) as llm:
        return [list(result.token_ids) for result in llm.generate(PROMPTS, params)], llm.selection_dict()
