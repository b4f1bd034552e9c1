"""Tiny Llama models in GGUF files, with random blocks of any type: the gguf package makes only some of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from drivetrain.packed.gguf import BLOCK_TYPES
from support.tiny_models import VOCAB_SIZE, tiny_tokenizer

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 256, 512, 2, 4, 2
KIND = gguf.GGMLQuantizationType

PACKED_KINDS = tuple(KIND(number) for number in BLOCK_TYPES)
"""The types that an operation multiplies by."""

KindOf = Callable[[str], KIND]


_SPREAD = {
    "Q4_0": 4.6,
    "Q4_1": 4.6,
    "Q5_0": 9.2,
    "Q5_1": 9.2,
    "Q8_0": 74.0,
    "Q4_K": 200.0,
    "Q5_K": 400.0,
    "Q6_K": 1400.0,
}
"""Standard deviation of random blocks whose scale is 1."""

_CENTRE = {"Q4_1": -7.5, "Q5_1": -15.5, "Q4_K": 7.5, "Q5_K": 15.5}
"""The second half of a block, in scales, with which random blocks have a mean of 0."""


def random_blocks(kind: KIND, rows: int, columns: int, seed: int, size: float = 1.0) -> np.ndarray:
    """Blocks of random bytes, whose scales are such that a row of weights has a norm of about ``size``."""
    generator = np.random.default_rng(seed)
    if kind in (KIND.F32, KIND.F16, KIND.BF16):
        values = generator.standard_normal((rows, columns), dtype=np.float32)
        return gguf.quantize(values * (size * columns**-0.5), kind)
    block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (rows, columns // block, num_bytes), dtype=np.uint8)
    layout = BLOCK_TYPES.get(int(kind))
    scales = generator.uniform(0.5, 1.5, blocks.shape[:2]) * size * columns**-0.5 / _SPREAD.get(kind.name, 2000.0)
    for place, factor in zip(layout.halves if layout else (0,), (1.0, _CENTRE.get(kind.name, 0.0)), strict=False):
        halves = (scales * factor).astype(np.float16)
        blocks[..., place : place + 2] = halves[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def write_llama(path: Path, kind_of: KindOf, *, tied: bool = True, vocab: int = VOCAB_SIZE) -> Path:
    """A whole file with a tokenizer. ``kind_of`` says how each matrix is stored, by its GGUF name."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    _add_tokenizer(writer)
    shapes = {"token_embd": (vocab, HIDDEN), **({} if tied else {"output": (vocab, HIDDEN)})}
    kv_rows = HIDDEN // HEADS * KV_HEADS
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        shapes |= {f"{block}.attn_q": (HIDDEN, HIDDEN), f"{block}.attn_k": (kv_rows, HIDDEN)}
        shapes |= {f"{block}.attn_v": (kv_rows, HIDDEN), f"{block}.attn_output": (HIDDEN, HIDDEN)}
        shapes |= {f"{block}.ffn_{name}": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"{block}.ffn_down"] = (HIDDEN, INNER)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}.{norm}.weight", np.ones(HIDDEN, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for seed, (name, (rows, columns)) in enumerate(shapes.items()):
        kind = kind_of(name)
        # Small vectors of tokens beside strong layers, or a tied model repeats each token that it reads.
        data = random_blocks(kind, rows, columns, seed, 0.3 if name == "token_embd" else 2.0)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = tiny_tokenizer()
    tokens = [tokenizer.id_to_token(token) for token in range(VOCAB_SIZE)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (VOCAB_SIZE - 2)])
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
