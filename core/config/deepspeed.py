"""A DeepSpeed configuration, read as settings of ours. Nothing is dropped in silence: a key is mapped, or named as one
that changes no result, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drivetrain.errors import ConfigError

Table = Mapping[str, Any]

_TUNING = frozenset(
    {
        "steps_per_print",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization.allgather_bucket_size",
        "zero_optimization.allgather_partitions",
        "zero_optimization.contiguous_gradients",
        "zero_optimization.overlap_comm",
        "zero_optimization.reduce_scatter",
        "zero_optimization.round_robin_gradients",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "zero_optimization.stage3_max_live_parameters",
        "zero_optimization.stage3_max_reuse_distance",
        "zero_optimization.stage3_param_persistence_threshold",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.sub_group_size",
        "zero_optimization.offload_optimizer.pin_memory",
        "zero_optimization.offload_optimizer.buffer_count",
        "zero_optimization.offload_optimizer.fast_init",
        "zero_optimization.offload_param.pin_memory",
        "zero_optimization.offload_param.buffer_count",
        "zero_optimization.offload_param.buffer_size",
        "zero_optimization.offload_param.max_in_cpu",
        "fp16.auto_cast",
        "optimizer.params.torch_adam",
        "aio",
    }
)
"""Keys that tune how DeepSpeed works and change no result: ours has its own ways."""

_OFF = frozenset(
    {
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "prescale_gradients",
        "sparse_gradients",
        "amp.enabled",
        "wandb.enabled",
        "csv_monitor.enabled",
        "comet.enabled",
        "flops_profiler.enabled",
        "activation_checkpointing.partition_activations",
        "activation_checkpointing.contiguous_memory_optimization",
        "activation_checkpointing.synchronize_checkpoint_boundary",
        "activation_checkpointing.profile",
        "zero_optimization.zero_quantized_weights",
        "zero_optimization.zero_quantized_gradients",
    }
)
"""Keys that ask for something only when they are true; then it is refused."""

_OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "lion": "lion"}
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


@dataclass
class Imported:
    """What became of a configuration.

    settings: top-level keys of ours.
    mapped:   (their key, their value, ours) of everything that is kept.
    left_out: their keys that change no result.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    mapped: list[tuple[str, Any, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def read_deepspeed(path: Path) -> Imported:
    """Raises ConfigError that names everything that has no counterpart."""
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the DeepSpeed configuration can't be read: {error}", where=str(path)) from error
    if not isinstance(config, dict):
        raise ConfigError("a DeepSpeed configuration is a table", where=str(path), found=type(config).__name__)
    return import_deepspeed(config, where=str(path))


def import_deepspeed(config: Table, *, where: str) -> Imported:
    """As :func:`read_deepspeed`, of what was read."""
    reader = _Reader(dict(_flat(config)))
    for take in (_batch, _optimizer, _schedule, _precision, _partitioner, _activations, _trackers):
        take(reader)
    for key in reader.left():
        value = reader.take(key)
        if key in _TUNING or key.split(".")[0] in _TUNING or value == "auto" or (key in _OFF and not value):
            reader.result.left_out.append(key)
        else:
            reader.refused.append(f"{key} = {json.dumps(value)}")
    if reader.refused:
        raise ConfigError(
            f"{len(reader.refused)} of the DeepSpeed settings have no counterpart here",
            where=where,
            found="; ".join(reader.refused),
            hint="Take them out of the file, and set what you need by our own names.",
        )
    return reader.result


def _flat(table: Table, prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in table.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


class _Reader:
    """Keys that are not taken yet, and what has come of the others."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values
        self.result = Imported()
        self.refused: list[str] = []

    def left(self) -> list[str]:
        return list(self._values)

    def take(self, key: str, default: Any = None) -> Any:
        return self._values.pop(key, default)

    def given(self, key: str) -> bool:
        """Whether it has a value: DeepSpeed's integrations write "auto" where they fill one in."""
        return self._values.get(key, "auto") != "auto"

    def set(self, key: str, ours: str, value: Any, theirs: Any = None) -> None:
        """Keep ``value`` under our dotted path."""
        table = self.result.settings
        *parents, last = ours.split(".")
        for parent in parents:
            table = table.setdefault(parent, {})
        table[last] = value
        self.result.mapped.append((key, value if theirs is None else theirs, f"{ours}: {json.dumps(value)}"))

    def move(self, key: str, ours: str, change: Callable[[Any], Any] = lambda value: value) -> None:
        if self.given(key):
            value = self.take(key)
            self.set(key, ours, change(value), value)

    def refuse(self, key: str, why: str) -> None:
        self.refused.append(f"{key} = {json.dumps(self.take(key))} ({why})")


def _batch(reader: _Reader) -> None:
    reader.move("train_micro_batch_size_per_gpu", "trainer.micro_batch")
    if reader.given("train_batch_size"):
        reader.move("train_batch_size", "trainer.batch")
        if reader.given("gradient_accumulation_steps"):
            reader.take("gradient_accumulation_steps")  # it follows from the other two and the number of ranks
            reader.result.left_out.append("gradient_accumulation_steps")
    else:
        reader.move("gradient_accumulation_steps", "trainer.accumulate")
    reader.move("gradient_clipping", "trainer.clip_norm", lambda value: value or None)
    if reader.given("gradient_predivide_factor") and reader.take("gradient_predivide_factor") != 1.0:
        reader.refused.append("gradient_predivide_factor (gradients are summed and then divided)")


def _optimizer(reader: _Reader) -> None:
    kind = reader.take("optimizer.type")
    if kind is None:
        return
    name = _OPTIMIZERS.get(str(kind).lower())
    if name is None:
        reader.refused.append(f"optimizer.type = {json.dumps(kind)}")
        return
    reader.set("optimizer.type", "optimizer.name", name, kind)
    for key in ("lr", "weight_decay", *(("betas", "eps") if name == "adamw" else ("betas",))):
        reader.move(f"optimizer.params.{key}", f"optimizer.{key}")
    # DeepSpeed decays vectors too.
    if reader.result.settings["optimizer"].get("weight_decay"):
        reader.set("optimizer.params.weight_decay", "optimizer.decay_vectors", True)
    mode = "optimizer.params.adam_w_mode"
    if reader.given(mode) and not reader.take(mode) and reader.result.settings["optimizer"].get("weight_decay"):
        reader.refused.append(f"{mode} = false (decay is decoupled)")


def _schedule(reader: _Reader) -> None:
    kind = reader.take("scheduler.type")
    if kind is None:
        return
    if kind not in _SCHEDULES:
        reader.refused.append(f"scheduler.type = {json.dumps(kind)}")
        return
    reader.set("scheduler.type", "optimizer.schedule.name", _SCHEDULES[kind], kind)
    reader.move("scheduler.params.warmup_num_steps", "optimizer.schedule.warmup")
    reader.move("scheduler.params.total_num_steps", "trainer.steps")
    reader.move("scheduler.params.cos_min_ratio", "optimizer.schedule.floor")
    reader.move("scheduler.params.warmup_max_lr", "optimizer.lr")
    for key in ("warmup_min_lr", "warmup_min_ratio"):
        if reader.given(f"scheduler.params.{key}") and reader.take(f"scheduler.params.{key}") != 0:
            reader.refused.append(f"scheduler.params.{key} (the warm-up starts at 0)")
    has_warmup = reader.result.settings["optimizer"]["schedule"].get("warmup", 1)
    if has_warmup and reader.take("scheduler.params.warmup_type", "log") != "linear":
        reader.refused.append('scheduler.params.warmup_type: DeepSpeed\'s default "log" (the warm-up is "linear")')


def _precision(reader: _Reader) -> None:
    half, brain = reader.take("fp16.enabled", False), reader.take("bf16.enabled", False)
    if "auto" in (half, brain):
        reader.result.left_out.append("fp16.enabled" if half == "auto" else "bf16.enabled")
        half, brain = half is True, brain is True
    if half and brain:
        reader.refused.append("fp16.enabled and bf16.enabled, both true")
    elif half:
        reader.set("fp16.enabled", "precision.name", "fp16", True)
        _loss_scale(reader)
    else:
        key, name = ("bf16.enabled", "bf16") if brain else ("fp16.enabled, bf16.enabled", "fp32")
        reader.set(key, "precision.name", name, brain)
    if not half:
        for key in [key for key in reader.left() if key.startswith(("fp16.", "bf16."))]:
            reader.take(key)
            reader.result.left_out.append(key)


def _loss_scale(reader: _Reader) -> None:
    reader.move("fp16.initial_scale_power", "precision.initial_scale", lambda power: 2.0**power)
    reader.move("fp16.loss_scale_window", "precision.growth_steps")
    if reader.given("fp16.loss_scale") and reader.take("fp16.loss_scale") != 0:
        reader.refused.append("fp16.loss_scale (the scale is dynamic: 0)")
    if reader.given("fp16.hysteresis") and reader.take("fp16.hysteresis") != 1:
        reader.refused.append("fp16.hysteresis (the scale is lowered at each overflow: 1)")
    if reader.given("fp16.consecutive_hysteresis") and reader.take("fp16.consecutive_hysteresis"):
        reader.refused.append("fp16.consecutive_hysteresis (the scale is lowered at each overflow)")
    if reader.given("fp16.min_loss_scale"):
        reader.take("fp16.min_loss_scale")
        reader.result.left_out.append("fp16.min_loss_scale")


def _partitioner(reader: _Reader) -> None:
    zero = "zero_optimization"
    stage = reader.take(f"{zero}.stage", 0)
    if stage not in (0, 1, 2, 3):
        reader.refused.append(f"{zero}.stage = {json.dumps(stage)}")
        return
    reader.set(f"{zero}.stage", "partitioner.name", f"zero{stage}" if stage else "none", stage)
    if stage == 0:
        for key in [key for key in reader.left() if key.startswith(f"{zero}.")]:
            reader.take(key)
            reader.result.left_out.append(key)
        return
    if stage == 3:
        reader.move(f"{zero}.mics_shard_size", "partitioner.shard")
    itemsize = 4 if reader.result.settings["precision"]["name"] == "fp32" else 2
    reader.move(f"{zero}.reduce_bucket_size", "partitioner.bucket_bytes", lambda count: int(count) * itemsize)
    _offload(reader, f"{zero}.offload_optimizer", "optimizer")
    if stage == 3:
        _offload(reader, f"{zero}.offload_param", "parameters")


def _offload(reader: _Reader, key: str, what: str) -> None:
    device = reader.take(f"{key}.device", "none")
    places = {"none": "none", None: "none", "cpu": "cpu", "nvme": "disk"}
    if device not in places:
        reader.refused.append(f"{key}.device = {json.dumps(device)}")
        return
    if reader.given(f"{key}.ratio") and reader.take(f"{key}.ratio") != 1.0:
        reader.refused.append(f"{key}.ratio (all of it is offloaded)")
    to = places[device]
    table = reader.result.settings["partitioner"]
    if to == "none":
        return
    if table.get("offload", to) != to:
        reader.refused.append(f"{key}.device = {json.dumps(device)} (one place for all that is offloaded)")
        return
    moved = [*table.get("offload_what", ()), what]
    reader.set(f"{key}.device", "partitioner.offload", to, device)
    if moved != ["optimizer"]:
        reader.set(f"{key}.device", "partitioner.offload_what", moved, device)
    elif reader.result.settings["partitioner"]["name"] == "zero3":
        table["offload_what"] = moved
    if to == "disk":
        reader.move(f"{key}.nvme_path", "partitioner.offload_folder")
    else:
        reader.take(f"{key}.nvme_path")


def _activations(reader: _Reader) -> None:
    if reader.take("activation_checkpointing.cpu_checkpointing", False):
        reader.set("activation_checkpointing.cpu_checkpointing", "checkpoint.name", "offload", True)
    if reader.given("activation_checkpointing.number_checkpoints"):
        reader.refuse("activation_checkpointing.number_checkpoints", "set checkpoint: selective, and its every")


def _trackers(reader: _Reader) -> None:
    if reader.take("tensorboard.enabled", False):
        reader.set("tensorboard.enabled", "tracker.name", "jsonl", True)
        reader.set("tensorboard.enabled", "tracker.also", ["tensorboard"], True)
    for key in ("tensorboard.output_path", "tensorboard.job_name"):
        if reader.given(key):
            reader.take(key)
            reader.result.left_out.append(key)
