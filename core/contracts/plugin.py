"""What every plugin has, whatever its kind: a name, a Config, and a probe that answers "yes" or "no, because".

The life of a plugin: *discover* (metadata only) -> *load* (import the one target) -> *probe* -> *create* (the class is
called with its validated ``Config``) -> the kind's own methods. Until created, a plugin may not open a device context,
start a thread or process, or change global state or the environment.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

if TYPE_CHECKING:
    from drivetrain.contracts.loader import Checkpoint
    from drivetrain.contracts.model import ModelSpec
    from drivetrain.contracts.platform import PlatformFacts


class PluginConfig(BaseModel):
    """Base of every plugin's ``Config``: frozen, and an unknown key is an error.

    Give each field a description with its meaning, unit and special values; ``plugins info`` prints it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads yes and on as true, which pydantic would take for the number 1.
        if isinstance(value, bool) and info.field_name:
            annotation = cls.model_fields[info.field_name].annotation
            if bool not in (annotation, *get_args(annotation)) and annotation is not Any:
                raise ValueError("must not be true or false")
        return value


class Purpose(StrEnum):
    """What the parts are resolved for."""

    SERVE = "serve"
    TRAIN = "train"
    QUANTIZE = "quantize"
    """Only quantizers are asked with it: whether they make packed weights of the model's full ones."""


class Tier(IntEnum):
    """How an implementation came to be; ``auto`` prefers the higher tier when nothing better decides."""

    REFERENCE = 0
    PORTABLE = 1
    TUNED = 2
    VENDOR = 3


@dataclass(frozen=True)
class Probe:
    """A plugin's answer to "could you work here?".

    ok:      True for yes.
    code:    a stable word for the reason: ``ok``, ``no_device``, ``missing_dependency``, ``unsupported_dtype``, ...
    reason:  the sentence a person reads.
    wanted:  what the plugin needs; empty when yes.
    offered: what it found instead; empty when yes.
    """

    ok: bool
    code: str
    reason: str
    wanted: str = ""
    offered: str = ""

    @classmethod
    def yes(cls, reason: str = "no objection") -> Probe:
        return cls(True, "ok", reason)

    @classmethod
    def no(cls, code: str, reason: str, *, wanted: str = "", offered: str = "") -> Probe:
        return cls(False, code, reason, wanted, offered)


@dataclass(frozen=True)
class ProbeContext:
    """What is already decided when a probe runs. Kinds are resolved in the order of ``KINDS``; later ones are None.

    purpose:     serve or train.
    model_name:  the model as the user wrote it; None when no model is named.
    platform:    the chosen platform's facts.
    dtype:       parameter dtype of the chosen precision, by its torch name: ``"float32"``.
    path:        the model's folder or file on this machine, once the source has located it.
    checkpoint:  the opened weight files.
    model:       the model's shape.
    chosen:      kind -> plugin name, for everything resolved so far.
    kv:          format of keys and values that the chosen quantizer asks for; ``"auto"`` is the parameters' dtype.
    """

    purpose: Purpose = Purpose.SERVE
    model_name: str | None = None
    platform: PlatformFacts | None = None
    dtype: str | None = None
    path: str | None = None
    checkpoint: Checkpoint | None = None
    model: ModelSpec | None = None
    chosen: Mapping[str, str] = field(default_factory=dict)
    kv: str = "auto"


class Plugin(ABC):
    """Base of every contract class.

    A concrete plugin sets ``summary`` through the first line of its class docstring, may replace ``Config``, and
    overrides :meth:`probe` when it can't work everywhere.
    """

    kind: ClassVar[str]
    contract_version: ClassVar[str] = "1.0"
    tier: ClassVar[Tier] = Tier.PORTABLE

    Config: ClassVar[type[PluginConfig]] = PluginConfig

    def __init__(self, config: PluginConfig) -> None:
        self.config = config

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        """Say whether this plugin can work with what is already chosen.

        Changes no state and opens no device. Anything the plugin is not told (a None in the context) must not be
        taken as a refusal. Raises nothing: an exception counts as a broken plugin.
        """
        return Probe.yes()

    @classmethod
    def abilities(cls) -> frozenset[str]:
        """Names of the optional abilities this plugin claims; the kind's contract module lists them."""
        return frozenset()
