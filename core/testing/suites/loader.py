"""What every loader has to do, on a tiny model that the suite writes itself where the format is a known one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import pytest
import torch

from drivetrain.contracts.loader import Checkpoint, Loader, TokenizerData
from drivetrain.contracts.plugin import ProbeContext
from drivetrain.errors import DrivetrainError, LoaderError, MissingTensorError
from drivetrain.testing.suite import Suite, about

_HIDDEN, _INNER, _HEADS, _KV_HEADS, _LAYERS, _CONTEXT = 32, 48, 4, 2, 2, 64
_TEXTS = ("Hello world 123", "def f(x):\n    return x", "Grüße, 世界 🙂", " leading and  double spaces ")
_MERGE = ("h", "e")
_SPECIAL = ("<|start|>", "<|end|>")
_ABSENT = "surely.no.such.tensor"


def byte_alphabet() -> dict[int, str]:
    """Byte -> the character that stands for it in byte-level BPE vocabularies (as GPT-2's): printable bytes stand for
    themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in alphabet]
    return alphabet | {byte: chr(0x100 + index) for index, byte in enumerate(others)}


def example_tokens() -> list[str]:
    """A vocabulary of every byte, one pair of them, and two special tokens."""
    return [*(byte_alphabet()[byte] for byte in range(256)), "".join(_MERGE), *_SPECIAL]


def example_tensors(width: int | None = None) -> dict[str, torch.Tensor]:
    """A tiny Qwen2 under its Hugging Face names, in float32; with ``width``, one whose inputs are multiples of it."""
    generator = torch.Generator().manual_seed(0)
    hidden, inner = (_HIDDEN, _INNER) if width is None else (width, 2 * width)
    size = hidden // _HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (len(example_tokens()), hidden)}
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", _HEADS * size), ("k", _KV_HEADS * size), ("v", _KV_HEADS * size)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
            shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, _HEADS * size)
        shapes[f"{prefix}mlp.gate_proj.weight"] = shapes[f"{prefix}mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (len(example_tokens()), hidden)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_safetensors(folder: Path, context: int = _CONTEXT, width: int | None = None) -> Path:
    """The tiny model as a Hugging Face folder with one safetensors file.

    context: tokens that it is said to take. width: what divides the inputs of its layers.
    """
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = example_tokens()
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": len(tokens),
        "hidden_size": width or _HIDDEN,
        "intermediate_size": 2 * width if width else _INNER,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": len(tokens) - 1,
    }
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [_MERGE]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(_SPECIAL))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    special = dict(zip(("bos_token", "eos_token"), _SPECIAL, strict=True))
    (folder / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")
    backend.save(str(folder / "tokenizer.json"))
    save_file(example_tensors(width), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_gguf(folder: Path) -> Path:
    """The tiny model as one GGUF file, unquantized."""
    import gguf

    folder.mkdir()
    tokens = example_tokens()
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "qwen2")
    writer.add_block_count(_LAYERS)
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(_HIDDEN)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 2) + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges([" ".join(_MERGE)])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, _LAYERS)
    for name, tensor in example_tensors().items():
        stem, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "tiny.gguf"


@dataclass(frozen=True)
class Example:
    """A model on disk. tensors: what it must hold; empty when that is not known."""

    path: Path
    tensors: Mapping[str, torch.Tensor]


class LoaderSuite(Suite):
    """A whole model, a damaged one, and files of another format.

    tolerance: absolute distance of a read tensor from :meth:`expected_tensors`, for formats that round.
    """

    kind = "loader"
    tolerance: ClassVar[float] = 0.0

    @classmethod
    def make_example(cls, folder: Path) -> Path | None:
        """Write a small model of this format into ``folder``; return what is to be opened.

        The suite writes safetensors and GGUF itself. A loader of another format overrides this and, so that the values
        can be checked too, :meth:`expected_tensors`.
        """
        for write, name in ((write_safetensors, "safetensors"), (write_gguf, "gguf")):
            path = write(folder / name)
            if cls.loader_class().recognizes(path):
                return path
        return None

    @classmethod
    def expected_tensors(cls) -> Mapping[str, torch.Tensor]:
        """What the example holds, by Hugging Face name."""
        return example_tensors()

    @classmethod
    def loader_class(cls) -> type[Loader]:
        return cast(type[Loader], cls.plugin_class())

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = self.make_example(tmp_path)
        if path is None:
            pytest.skip("not claimed: the suite knows no example of this format; override make_example")
        return path

    @pytest.fixture
    def checkpoint(self, path: Path) -> Checkpoint:
        checkpoint = cast(Loader, self.make()).open(path)
        assert isinstance(checkpoint, Checkpoint)
        return checkpoint

    # --- which files -------------------------------------------------------------------------------------------------

    def test_recognizes_its_format_and_no_other(self, path: Path, tmp_path: Path) -> None:
        """Its own files are recognized, twice alike; an empty folder, a text file and nothing at all are not."""
        loader = self.loader_class()
        assert loader.recognizes(path)
        assert loader.recognizes(path)
        empty, text = tmp_path / "empty", tmp_path / "notes.txt"
        empty.mkdir()
        text.write_text("no weights here\n", encoding="utf-8")
        for other in (empty, text, tmp_path / "nothing"):
            assert not loader.recognizes(other), f"recognizes {other.name}"

    def test_probe_agrees_with_recognizes(self, path: Path, tmp_path: Path) -> None:
        """The probe says yes to files of this format, no to others, and does not refuse what it is not told."""
        loader = self.loader_class()
        empty = tmp_path / "empty"
        empty.mkdir()
        assert loader.probe(ProbeContext()).ok
        assert loader.probe(ProbeContext(path=str(path))).ok
        assert not loader.probe(ProbeContext(path=str(empty))).ok

    def test_foreign_files_are_an_error_of_the_tree(self, tmp_path: Path) -> None:
        """Opening files of no format raises LoaderError, and no error of a library."""
        with pytest.raises(LoaderError):
            self.make().open(tmp_path)

    # --- a whole model -----------------------------------------------------------------------------------------------

    def test_names_are_those_of_the_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Every tensor has one name, the Hugging Face one, and is in the checkpoint by it."""
        names = list(checkpoint.names())
        assert names, "no tensor at all"
        assert len(set(names)) == len(names), "a name comes twice"
        assert all(name in checkpoint for name in names)
        assert set(names) == set(self.expected_tensors())

    def test_tensors_are_what_was_stored(self, checkpoint: Checkpoint) -> None:
        """Values and shapes are those that were written, in the checkpoint's row order."""
        for name, wanted in self.expected_tensors().items():
            assert checkpoint.shape(name) == tuple(wanted.shape), name
            found = checkpoint.tensor(name, torch.float32)
            torch.testing.assert_close(found, wanted, rtol=0.0, atol=self.tolerance, msg=about(name))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_tensors_come_in_the_dtype_asked_for(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """A tensor arrives on the CPU in the wanted dtype with the shape that was told, rounded once."""
        for name in checkpoint.names():
            tensor = checkpoint.tensor(name, dtype)
            assert tensor.dtype == dtype
            assert tensor.device.type == "cpu"
            assert tuple(tensor.shape) == checkpoint.shape(name)
            assert torch.equal(tensor, checkpoint.tensor(name, torch.float32).to(dtype)), name

    def test_a_missing_tensor_is_named(self, checkpoint: Checkpoint) -> None:
        """Shape and tensor of a name that is not there raise MissingTensorError with that name."""
        assert _ABSENT not in checkpoint
        with pytest.raises(MissingTensorError, match=_ABSENT):
            checkpoint.shape(_ABSENT)
        with pytest.raises(MissingTensorError, match=_ABSENT):
            checkpoint.tensor(_ABSENT, torch.float32)

    def test_stored_bytes_are_those_of_the_tensors(self, checkpoint: Checkpoint, path: Path) -> None:
        """The stored size is more than nothing and no more than the files."""
        assert 0 < checkpoint.stored_bytes() <= sum(file.stat().st_size for file in _files(path))

    def test_configuration_names_an_architecture(self, checkpoint: Checkpoint) -> None:
        """The configuration has Hugging Face's keys: an architecture, and token ids that end an answer as numbers."""
        assert checkpoint.config.get("architectures"), "the configuration names no architecture"
        assert checkpoint.architecture != "unknown"
        assert all(isinstance(token, int) for token in checkpoint.eos_token_ids)

    def test_reading_leaves_the_files_unchanged(self, path: Path) -> None:
        """Opening and reading write nothing."""
        before = {file: file.read_bytes() for file in _files(path)}
        checkpoint = self.make().open(path)
        for name in checkpoint.names():
            checkpoint.tensor(name, torch.float32)
        assert {file: file.read_bytes() for file in _files(path)} == before

    def test_tokenizer_gives_text_back(self, checkpoint: Checkpoint) -> None:
        """Text that is encoded and decoded is the same text, and special tokens have ids."""
        data = checkpoint.tokenizer()
        assert isinstance(data, TokenizerData)
        for text in _TEXTS:
            ids = data.backend.encode(text, add_special_tokens=False).ids
            assert data.backend.decode(ids, skip_special_tokens=False).strip() == text.strip()
        for role, token in data.special.items():
            assert data.backend.token_to_id(token) is not None, f"{role} {token!r} is not in the vocabulary"

    # --- damaged files -----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("part", [0.0, 0.01, 0.6, 0.999])
    def test_a_file_cut_short_is_an_error_on_opening(self, path: Path, tmp_path: Path, part: float) -> None:
        """Weights cut short raise LoaderError when they are opened, not when the last tensor is read."""
        damaged = _copy(path, tmp_path / "cut")
        largest = max(_files(damaged), key=lambda file: file.stat().st_size)
        whole = largest.read_bytes()
        largest.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(LoaderError) as raised:
            self.make().open(damaged)
        assert largest.name in str(raised.value), f"the error does not name the file: {raised.value}"

    def test_a_damaged_header_is_an_error_of_the_tree(self, path: Path, tmp_path: Path) -> None:
        """Weights whose first bytes are overwritten raise an error that says so, and no error of a library."""
        damaged = _copy(path, tmp_path / "damaged")
        largest = max(_files(damaged), key=lambda file: file.stat().st_size)
        whole = largest.read_bytes()
        for junk in (b"\x00" * 64, b"\xff" * 64, b"not weights " * 6):
            largest.write_bytes(junk + whole[len(junk) :])
            with pytest.raises(DrivetrainError):
                self.make().open(damaged)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _copy(path: Path, to: Path) -> Path:
    """A copy of the example, under its own name."""
    to.mkdir()
    if path.is_dir():
        return Path(shutil.copytree(path, to / path.name))
    return Path(shutil.copy(path, to / path.name))
