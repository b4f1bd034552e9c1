"""What goes into a quantizer is checked by the core: no weights without a value, none that are rounded already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drivetrain import LLM
from drivetrain.contracts.loader import Checkpoint
from drivetrain.errors import ConfigError
from drivetrain.packed.conversion import Conversion
from drivetrain.plugins.quantizer.int4 import Int4Quantizer
from drivetrain.plugins.quantizer.int8 import Int8Quantizer
from drivetrain.plugins.quantizer.none import NoQuantizer
from support.tiny_models import save_tiny

QUANTIZERS = ("int8", {"name": "int4", "group": 16}, "w8a8", "fp8")


class Files(Checkpoint):
    """Some tensors, and in how many bits each is stored."""

    def __init__(self, bits: dict[str, float | None], shape: tuple[int, ...] = (8, 64)) -> None:
        self.path, self.config, self.generation_config = Path("files"), {}, {}
        self._bits, self._shape = bits, shape

    def names(self) -> Sequence[str]:
        return list(self._bits)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape

    def stored_bytes(self) -> int:
        raise NotImplementedError

    def stored_bits(self, name: str) -> float | None:
        return self._bits[name]

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        raise NotImplementedError

    def tokenizer(self) -> Any:
        raise NotImplementedError


def int8(**options: Any) -> Int8Quantizer:
    return Int8Quantizer(Int8Quantizer.Config.model_validate(options))


def linear() -> torch.nn.Linear:
    return torch.nn.Linear(64, 8)


def test_weights_that_are_stored_quantized_are_not_quantized_again() -> None:
    """Tensor by tensor: those that are stored in full are taken, the others are named with their bits."""
    conversion = Conversion(int8(), "int8", Files({"a.weight": None, "b.weight": 4.5}))
    conversion.convert("a", linear())
    with pytest.raises(ConfigError, match=r"b\.weight is quantized.* found '4\.50 bits a weight'.*allow_lossy: true"):
        conversion.convert("b", linear())
    assert [one.name for one in conversion.converted] == ["a"]


def test_a_tied_layer_is_stored_where_its_table_is() -> None:
    files = Files({"model.embed_tokens.weight": 8.5})
    with pytest.raises(ConfigError, match=r"model\.embed_tokens\.weight is quantized"):
        Conversion(int8(), "int8", files).convert("lm_head", linear())


def test_it_may_be_allowed() -> None:
    files = Files({"a.weight": 4.5})
    assert Conversion(int8(allow_lossy=True), "int8", files).convert("a", linear()) is not None


def test_what_keeps_full_weights_may_read_quantized_ones() -> None:
    layer = linear()
    none = NoQuantizer(NoQuantizer.Config.model_validate({}))
    assert Conversion(none, "none", Files({"a.weight": 4.5})).convert("a", layer) is layer


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_weights_without_a_value_are_named_and_counted(tmp_path: Path, value: float, quantizer: Any) -> None:
    """Whatever the quantizer; with none, and with a rule, the model starts as it always did."""
    save_tiny("llama3", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5:8] = value
    save_file(tensors, file, metadata={"format": "pt"})
    options: dict[str, Any] = {"platform": {"name": "cpu", "threads": 1}, "engine": {"max_model_len": 64}}
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj: 3 of the 3840 weights are NaN or infinite"):
        LLM(tmp_path / "model", quantizer=quantizer, **options)
    name = quantizer if isinstance(quantizer, str) else quantizer["name"]
    rest = {} if isinstance(quantizer, str) else quantizer
    with LLM(tmp_path / "model", quantizer={"name": name, **rest, "rules": {"layers.1": "none"}}, **options):
        pass


def test_a_group_that_does_not_divide_names_layer_and_sizes(tmp_path: Path) -> None:
    """Hidden size 48 and groups of 32; a rule is the way out, and the error says so."""
    save_tiny("llama3", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj: rows of 48 .* group 32.*rules"):
        LLM(tmp_path / "model", quantizer="int4", platform={"name": "cpu", "threads": 1})


def test_books_are_kept_of_every_layer() -> None:
    config = Int4Quantizer.Config.model_validate({"group": 32})
    conversion = Conversion(Int4Quantizer(config), "int4", Files({"a.weight": None}))
    conversion.convert("a", linear())
    (entry,) = conversion.converted
    assert (entry.label, entry.rule, entry.num_weights, entry.full_bytes) == ("int4", None, 512, 2048)
    assert entry.num_bytes == 512 * 5 // 8
    assert entry.is_packed
