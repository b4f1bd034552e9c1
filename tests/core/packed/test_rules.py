"""Rules give layers to quantizers by patterns over their names; a rule that decides nothing is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import LLM
from drivetrain.assembly import resolve_parts
from drivetrain.config import load_settings
from drivetrain.errors import ConfigError, DrivetrainError, UnknownPluginError
from drivetrain.packed import packed_layers
from drivetrain.packed.rules import matches
from support.tiny_models import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / "llama3"
    save_tiny("llama3", folder)
    return folder


def opened(folder: Path, quantizer: Any, **options: Any) -> LLM:
    engine = {"max_model_len": 96}
    return LLM(folder, quantizer=quantizer, platform={"name": "cpu", "threads": 1}, engine=engine, **options)


def operations(llm: LLM) -> dict[str, str]:
    """Layer -> operation of its packed weight."""
    model: Any = llm._stack.engine.runner.model
    return {name: layer.packed.operation for name, layer in packed_layers(model)}


@pytest.mark.parametrize(
    ("pattern", "name", "is_one"),
    [
        ("lm_head", "lm_head", True),
        ("layers.0", "model.layers.0.mlp.down_proj", True),
        ("layers.0", "model.layers.10.mlp.down_proj", False),
        ("layers.1", "model.layers.10.mlp.down_proj", False),
        ("mlp.down_proj", "model.layers.10.mlp.down_proj", True),
        ("layers.*.mlp", "model.layers.10.mlp.down_proj", True),
        ("layers.down_proj", "model.layers.10.mlp.down_proj", False),
        ("*_proj", "model.layers.10.mlp.down_proj", True),
        ("proj", "model.layers.10.mlp.down_proj", False),
        ("model.layers.10.mlp.down_proj.weight", "model.layers.10.mlp.down_proj", False),
    ],
)
def test_a_pattern_is_parts_side_by_side(pattern: str, name: str, is_one: bool) -> None:
    assert matches(pattern, name) is is_one


def test_the_first_rule_that_matches_decides(folder: Path) -> None:
    """Three quantizers in one model, and layers that none has."""
    rules = {"lm_head": "none", "layers.0.mlp": {"name": "int4", "group": 16}, "layers.0": "none", "layers.1": "w8a8"}
    with opened(folder, {"name": "int8", "rules": rules}) as llm:
        found = operations(llm)
        weights = llm.selection_dict()["weights"]
    assert "lm_head" not in found
    assert {name for name in found if name.startswith("model.layers.0.")} == {
        f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")
    }
    for name, operation in found.items():
        layer = name.split(".")[2]
        assert operation == {"0": "linear_int4", "1": "linear_w8a8", "2": "linear_int8"}[layer], name
    rows = {(row["quantizer"], row["rule"]): row["num_layers"] for row in weights["rows"]}
    assert rows == {
        ("none", "lm_head"): 1,
        ("int4", "layers.0.mlp"): 3,
        ("none", "layers.0"): 4,
        ("w8a8", "layers.1"): 7,
        ("int8", None): 7,
    }


def test_rules_are_part_of_the_plan_and_of_a_swap(folder: Path) -> None:
    """The report shows them, two sets of rules have two digests, and a swap takes them as a start does."""
    with opened(folder, {"name": "int8", "rules": {"lm_head": "none"}}) as llm:
        digest = llm.selection_dict()["plan_digest"]
        assert llm.explain()["quantizer"].options == {"rules": {"lm_head": "none"}}
        llm.swap(quantizer={"name": "int8", "rules": {"layers.2": "none"}})
        assert llm.selection_dict()["plan_digest"] != digest
        assert "lm_head" in operations(llm)
        assert not [name for name in operations(llm) if name.startswith("model.layers.2.")]
        llm.swap(quantizer={"name": "int8", "rules": {"lm_head": "none"}})
        assert llm.selection_dict()["plan_digest"] == digest


def test_rules_are_set_on_the_command_line() -> None:
    settings = load_settings(
        None, {"quantizer": "int4"}, ["quantizer.rules.lm_head=int8", "quantizer.allow_lossy=true"]
    )
    assert settings.parts["quantizer"].options == {"rules": {"lm_head": "int8"}, "allow_lossy": True}
    settings = load_settings(None, {}, ["quantizer={name: int4, rules: {layers.0: none}}"])
    assert settings.parts["quantizer"].options == {"rules": {"layers.0": "none"}}


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ({"lm_head": "int9"}, UnknownPluginError, r"command line: quantizer\.rules\[lm_head\]: .*'int9'.*Did you mean"),
        ({"lm_head": {"group": 16}}, ConfigError, r"rules\[lm_head\]: a rule names a quantizer"),
        ({"lm_head": "auto"}, ConfigError, r"rules\[lm_head\]: a rule names a quantizer"),
        ({"layers..0": "none"}, ConfigError, r"rules\[layers\.\.0\]: a pattern is parts"),
        ({"lm_head": {"name": "int4", "gruop": 16}}, ConfigError, r"rules\[lm_head\]\.gruop: .*Did you mean 'group'"),
        ({"lm_head": {"name": "int4", "kv": "int8"}}, ConfigError, r"rules\[lm_head\]: kv holds for the whole model"),
        ({"lm_head": 8}, ConfigError, r"quantizer\.rules\.lm_head"),
    ],
)
def test_a_rule_that_makes_no_sense_is_an_error_at_once(
    folder: Path, rules: Any, error: type[DrivetrainError], message: str
) -> None:
    settings = load_settings(None, {"model": str(folder), "quantizer": {"name": "int8", "rules": rules}})
    with pytest.raises(error, match=message):
        resolve_parts(settings, leave_out=("frontend",))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"lm_haed": "none"}, r"rules\[lm_haed\]: the pattern matches no layer.*Did you mean 'lm_head'"),
        ({"layers.3": "none"}, r"rules\[layers\.3\]: the pattern matches no layer"),
        ({"layers": "none", "layers.0": "int8"}, r"rules\[layers\.0\]: .* an earlier one has model\.layers\.0\."),
        ({"embed_tokens": "none"}, r"rules\[embed_tokens\]: the pattern matches no layer"),
    ],
)
def test_a_rule_without_a_layer_is_an_error(folder: Path, rules: Any, message: str) -> None:
    """When the model is built, and before anything is made by a swap, a dry run too."""
    part = {"name": "int8", "rules": rules}
    with pytest.raises(ConfigError, match=message):
        opened(folder, part)
    with opened(folder, "none") as llm:
        for dry_run in (True, False):
            with pytest.raises(ConfigError, match=message):
                llm.swap(dry_run=dry_run, quantizer=part)
        assert llm._loop.engine.epoch == 0
