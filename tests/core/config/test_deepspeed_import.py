"""A DeepSpeed configuration becomes settings of ours: everything is mapped, named as without effect, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from drivetrain.config import load_settings
from drivetrain.config.deepspeed import import_deepspeed, read_deepspeed
from drivetrain.errors import ConfigError

WHOLE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "steps_per_print": 10,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 2e-5, "warmup_num_steps": 10, "total_num_steps": 100}
        | {"warmup_type": "linear"},
    },
    "bf16": {"enabled": True},
    "fp16": {"enabled": False, "loss_scale": 0},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": 5e6,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/scratch", "pin_memory": True},
    },
    "wall_clock_breakdown": False,
}


def imported(config: dict[str, Any]) -> dict[str, Any]:
    return import_deepspeed(config, where="ds.json").settings


def test_what_maps_is_mapped() -> None:
    assert imported(WHOLE) == {
        "trainer": {"micro_batch": 4, "accumulate": 2, "clip_norm": 0.5, "steps": 100},
        "optimizer": {
            "name": "adamw",
            "lr": 2e-5,
            "weight_decay": 0.1,
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "decay_vectors": True,
            "schedule": {"name": "linear", "warmup": 10},
        },
        "precision": {"name": "bf16"},
        "partitioner": {
            "name": "zero3",
            "bucket_bytes": 10_000_000,
            "offload": "disk",
            "offload_what": ["optimizer"],
            "offload_folder": "/scratch",
        },
    }
    load_settings(imported=imported(WHOLE))


def test_every_key_is_accounted_for() -> None:
    found = import_deepspeed(WHOLE, where="ds.json")
    assert {"steps_per_print", "zero_optimization.overlap_comm", "wall_clock_breakdown"} <= set(found.left_out)
    assert ("zero_optimization.stage", 3, 'partitioner.name: "zero3"') in found.mapped


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stages(stage: int) -> None:
    name = imported({"zero_optimization": {"stage": stage}})["partitioner"]["name"]
    assert name == (f"zero{stage}" if stage else "none")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning.enabled"),
        ({"wandb": {"enabled": True}}, "wandb.enabled"),
        ({"optimizer": {"type": "OneBitAdam"}}, "OneBitAdam"),
        ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, "amsgrad"),
        ({"optimizer": {"type": "Adam"}, "scheduler": {"type": "WarmupLR"}}, "warmup_type"),
        ({"scheduler": {"type": "OneCycle"}, "optimizer": {"type": "Adam"}}, "OneCycle"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "fp16.loss_scale"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both true"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio"),
        ({"zero_optimization": {"stage": 4}}, "stage"),
        ({"sparse_gradients": True}, "sparse_gradients"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_map_is_named(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match="no counterpart") as caught:
        imported(config)
    assert told in str(caught.value)


def test_everything_that_is_refused_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        imported({"wandb": {"enabled": True}, "eigenvalue": {"enabled": True}})
    assert "wandb.enabled" in str(caught.value)
    assert "eigenvalue.enabled" in str(caught.value)


def test_auto_leaves_ours() -> None:
    config = {"train_micro_batch_size_per_gpu": "auto", "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    found = imported(config)
    assert "trainer" not in found
    assert found["optimizer"] == {"name": "adamw"}


def test_files_and_options_are_layers(tmp_path: Path) -> None:
    """The DeepSpeed file wins over ours, and an assignment over both."""
    file = tmp_path / "run.yaml"
    file.write_text("model: smollm2-135m\ntrainer: {micro_batch: 9, seed: 5}\npartitioner: zero1\n")
    settings = load_settings(file, assignments=["trainer.accumulate=7"], imported=imported(WHOLE))
    assert (settings.trainer.micro_batch, settings.trainer.seed, settings.trainer.accumulate) == (4, 5, 7)
    assert settings.parts["partitioner"].name == "zero3"


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "ds.json"
    broken.write_text("{")
    for path in (broken, tmp_path / "absent.json"):
        with pytest.raises(ConfigError, match="can't be read"):
            read_deepspeed(path)
    broken.write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="is a table"):
        read_deepspeed(broken)
