"""The safetensors loader reads what transformers writes, and refuses what is damaged or dangerous, saying why."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from drivetrain.errors import LoaderError, MissingTensorError
from drivetrain.plugins.loader.safetensors import SafetensorsCheckpoint, SafetensorsLoader

torch.set_num_threads(1)


def open_folder(path: Path) -> SafetensorsCheckpoint:
    return SafetensorsLoader(SafetensorsLoader.Config()).open(path)


def save_tokenizer(folder: Path, **config: Any) -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "hello": 2, "world": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.enable_truncation(1)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=3,
    )
    return transformers.Qwen3ForCausalLM(config)


@pytest.fixture(params=["whole", "sharded"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, model: Any) -> Path:
    model.generation_config.eos_token_id = [3, 5]
    model.save_pretrained(tmp_path, max_shard_size="20KB" if request.param == "sharded" else "1GB")
    save_tokenizer(tmp_path)
    return tmp_path


def test_reads_what_transformers_writes(folder: Path, model: Any) -> None:
    checkpoint = open_folder(folder)
    state = model.state_dict()
    assert checkpoint.architecture == "Qwen3ForCausalLM"
    assert checkpoint.eos_token_ids == (3, 5)
    assert set(checkpoint.names()) == set(state)
    assert checkpoint.stored_bytes() == sum(tensor.numel() * 4 for tensor in state.values())
    for name, tensor in state.items():
        assert name in checkpoint
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(checkpoint.tensor(name, torch.float32), tensor)
        assert checkpoint.tensor(name, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("value", ["3", 3.0, True, ["3"]])
def test_an_end_token_that_is_none_is_refused(tmp_path: Path, model: Any, value: Any) -> None:
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"eos_token_id": value}))
    with pytest.raises(LoaderError, match="eos_token_id is no token id"):
        _ = open_folder(tmp_path).eos_token_ids


def test_missing_tensor_is_named_with_the_nearest(folder: Path) -> None:
    with pytest.raises(MissingTensorError, match=r"'model\.norm\.weights'.*'model\.norm\.weight'"):
        open_folder(folder).tensor("model.norm.weights", torch.float32)


def test_every_shard_cut_short_is_found_on_opening(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        whole = file.read_bytes()
        for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:length])
            with pytest.raises(LoaderError, match=file.name):
                open_folder(folder)
        file.write_bytes(whole[:-1])
        with pytest.raises(LoaderError, match=rf"cut short.*{len(whole) - 1} bytes.*{len(whole)}"):
            open_folder(folder)
        file.write_bytes(whole + b"x")
        with pytest.raises(LoaderError, match="longer"):
            open_folder(folder)
        file.write_bytes(whole)
    open_folder(folder)


@pytest.mark.parametrize("folder", ["sharded"], indirect=True)
def test_index_and_shards_must_agree(folder: Path) -> None:
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = index["weight_map"]["model.norm.weight"]
    tensors = load_file(folder / shard)
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, folder / shard)
    with pytest.raises(MissingTensorError, match=rf"'model\.norm\.weight' in {shard}"):
        open_folder(folder)
    (folder / shard).unlink()
    with pytest.raises(LoaderError, match=f"{shard}, which is not there"):
        open_folder(folder)
    index_path.write_text(json.dumps({"weight_map": {"a": "../../etc/model.safetensors"}}))
    with pytest.raises(LoaderError, match="outside of its folder"):
        open_folder(folder)
    index_path.write_text("{}")
    with pytest.raises(LoaderError, match="weight_map"):
        open_folder(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": {}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
    ],
)
def test_a_damaged_header_is_told(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(LoaderError, match=r"model\.safetensors.*header is damaged"):
        open_folder(tmp_path)


def test_a_type_that_the_library_does_not_know_is_told(tmp_path: Path) -> None:
    """Also when it is the type of another tensor than the one that is read."""
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
    header += b'"b": {"dtype": "F31", "shape": [1], "data_offsets": [4, 8]}}'
    (tmp_path / "config.json").write_text('{"architectures": "LlamaForCausalLM"}')
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    checkpoint = open_folder(tmp_path)
    with pytest.raises(LoaderError, match=r"model\.safetensors.*header is damaged.*F31"):
        checkpoint.tensor("a", torch.float32)
    with pytest.raises(LoaderError, match="architectures must be a list"):
        _ = checkpoint.architecture


def test_no_or_corrupt_config_is_told(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(LoaderError, match=r"no config\.json"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(LoaderError, match=r"config\.json.*not valid JSON"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(LoaderError, match=r"config\.json.*JSON object.*'list'"):
        open_folder(tmp_path)


def test_pickles_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert SafetensorsLoader.recognizes(tmp_path)
    with pytest.raises(LoaderError, match=r"pickle.*pytorch_model\.bin.*safetensors"):
        open_folder(tmp_path)


def test_other_single_files_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoaderError, match=r"neither.*adapter_model\.safetensors"):
        open_folder(tmp_path)


def test_checkpoints_quantized_in_an_unknown_way_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptk"}}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(LoaderError, match=r"'gptk'.*Did you mean 'gptq'"):
        open_folder(tmp_path)


def test_float8_without_its_scales_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(LoaderError, match=r"'a'.*F8_E4M3"):
        open_folder(tmp_path).tensor("a", torch.float32)


def test_recognizes_only_folders_with_weights_of_this_format(tmp_path: Path) -> None:
    assert not SafetensorsLoader.recognizes(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "old.bin").write_bytes(b"")
    assert not SafetensorsLoader.recognizes(tmp_path)
    assert not SafetensorsLoader.recognizes(tmp_path / "model.gguf")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert SafetensorsLoader.recognizes(tmp_path)


# --- tokenizer -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    return tmp_path


def test_tokenizer_sees_the_whole_text_unpadded(bare: Path) -> None:
    save_tokenizer(bare)
    assert open_folder(bare).tokenizer().backend.encode("hello world").ids == [2, 3]


def test_special_tokens_as_text_as_table_and_in_the_older_file(bare: Path) -> None:
    save_tokenizer(bare, bos_token="<s>", eos_token={"content": "</s>", "lstrip": False}, pad_token=None)
    (bare / "special_tokens_map.json").write_text(json.dumps({"unk_token": "<unk>", "bos_token": "old"}))
    assert open_folder(bare).tokenizer().special == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_chat_template_from_each_of_its_places(bare: Path) -> None:
    save_tokenizer(bare)
    assert open_folder(bare).tokenizer().chat_template is None
    save_tokenizer(bare, chat_template="one")
    assert open_folder(bare).tokenizer().chat_template == "one"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "two"}]
    save_tokenizer(bare, chat_template=named)
    assert open_folder(bare).tokenizer().chat_template == "two"
    (bare / "chat_template.json").write_text(json.dumps({"chat_template": "three"}))
    assert open_folder(bare).tokenizer().chat_template == "three"
    (bare / "chat_template.jinja").write_text("four")
    assert open_folder(bare).tokenizer().chat_template == "four"


def test_no_tokenizer_json_says_how_to_make_one(bare: Path) -> None:
    (bare / "tokenizer.model").write_bytes(b"")
    with pytest.raises(LoaderError, match=r"no tokenizer\.json.*tokenizer\.model.*save_pretrained"):
        open_folder(bare).tokenizer()


def test_a_corrupt_tokenizer_json_is_told(bare: Path) -> None:
    (bare / "tokenizer.json").write_text("{")
    with pytest.raises(LoaderError, match=r"tokenizer\.json.*can't be read"):
        open_folder(bare).tokenizer()
