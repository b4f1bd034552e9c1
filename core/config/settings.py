"""What a run is told: the model, one part a kind, and the engine's own limits."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from drivetrain.config.trainer import TrainerSettings
from drivetrain.contracts.kinds import KINDS
from drivetrain.registry.selection import PartRequest

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(text: str | int) -> int:
    """``"2GiB"`` -> bytes, rounded down.

    Raises ValueError for anything else than a number with B, KiB, MiB, GiB, KB, MB or GB.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is no size; write a number with B, KiB, MiB, GiB, KB, MB or GB, such as 2GiB")
    return int(Fraction(match[1]) * _UNITS[match[2].upper()])


class EngineSettings(BaseModel):
    """The serving loop's own limits, which no plugin decides."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_model_len: int | None = Field(
        default=None,
        ge=1,
        description="most tokens of prompt and output together; default: what the model was made for",
    )
    kv_memory: str = Field(
        default="auto",
        description="bytes for keys and values, such as 2GiB; auto: what max_running requests can use, beside a step",
    )
    prefix_cache: bool = Field(
        default=True, description="reuse keys and values of a prefix that an earlier request had too"
    )
    max_waiting: int = Field(default=1024, ge=1, description="requests that may wait; one more is refused")
    timeout_seconds: float | None = Field(
        default=None, gt=0, description="time limit of every request; a shorter one of its own wins"
    )
    fuse: bool | Literal["auto"] = Field(
        default="auto",
        description="replace operations of the model by fewer bound ones: true, false, or auto, which goes on without "
        "where the fused model's outputs are not the same",
    )
    stall_seconds: float = Field(
        default=60.0,
        gt=0,
        le=threading.TIMEOUT_MAX,
        description="a step that takes longer counts as stalled in /health",
    )
    swap_timeout_seconds: float = Field(
        default=300.0,
        gt=0,
        le=threading.TIMEOUT_MAX,
        description="time limit of a swap, from preparing to the end of its probation",
    )

    master_copy: Literal["none", "resident"] = Field(
        default="none",
        description="resident: keep the weights, unquantized, in host memory, for quantizer swaps to start from; "
        "none: those read the files again",
    )

    overlap: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="prepare the next step while one runs; auto: on devices that queue their work, not on a CPU",
    )

    screen_output: bool = Field(
        default=True,
        description="find most likely tokens by the output layer in int8, and compute in full only scores that may be "
        "the best, where kernels can; the tokens are the same, and a byte a weight of that layer is kept beside it",
    )

    graphs: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="replay captured steps; auto: where the platform and the attention backend can",
    )

    @field_validator("overlap", "graphs", mode="before")
    @classmethod
    def _read_switch(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @field_validator(
        "max_model_len", "max_waiting", "timeout_seconds", "stall_seconds", "swap_timeout_seconds", mode="before"
    )
    @classmethod
    def _refuse_bool(cls, value: Any) -> Any:
        # YAML reads yes and on as true, which pydantic would take for the number 1.
        if isinstance(value, bool):
            raise ValueError("must be a number")
        return value

    @field_validator("kv_memory", mode="before")
    @classmethod
    def _check_kv_memory(cls, value: Any) -> str:
        if value != "auto":
            parse_bytes(value)
        return str(value)

    @property
    def kv_bytes(self) -> int | None:
        """Bytes asked for; None for auto."""
        return None if self.kv_memory == "auto" else parse_bytes(self.kv_memory)


@dataclass(frozen=True)
class Settings:
    """A checked configuration. Built by :func:`drivetrain.config.load_settings`; never changed afterwards.

    model:   name of the weights; None where a command needs none.
    parts:   kind -> what was asked for; kinds that nobody named are absent and take their default.
    engine:  limits of the serving loop.
    allow:   distributions whose plugins may be chosen; None allows all that are installed.
    lock:    lock file that what is installed must equal; None checks nothing.
    trainer: length, size of steps and folder of a training run.
    """

    model: str | None = None
    parts: Mapping[str, PartRequest] = field(default_factory=dict)
    engine: EngineSettings = field(default_factory=EngineSettings)
    allow: tuple[str, ...] | None = None
    lock: str | None = None
    trainer: TrainerSettings = field(default_factory=lambda: TrainerSettings.model_validate({}))


PART_KEYS = tuple(kind.key for kind in KINDS.values())
"""Every key of a configuration file that names a part."""

TOP_LEVEL_KEYS = ("model", *PART_KEYS, "engine", "trainer", "plugins")
"""Every key that a configuration file may have at its top."""
