"""What a training run is told beside its parts: how long it is, how large its steps are, where it writes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator


class TrainerSettings(BaseModel):
    """The training loop's own settings, which no plugin decides."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int | None = Field(None, ge=1, description="steps of the run; null: as many as epochs take")
    epochs: float | None = Field(None, gt=0, description="passes over the data; null: 1, unless steps are given")
    micro_batch: int = Field(1, ge=1, description="samples that one forward and backward of one rank handles")
    accumulate: int | None = Field(None, ge=1, description="micro-batches of each rank in a step; null: 1, or by batch")
    batch: int | None = Field(
        None, ge=1, description="samples of a step over all ranks, however many these are; null: by accumulate"
    )
    clip_norm: float | None = Field(1.0, gt=0, description="bound on the global norm of gradients; null: none")
    seed: int = Field(0, ge=0, lt=2**32, description="of the order of samples and of all random draws")
    shuffle: bool = Field(True, description="draw another order of samples for each epoch")
    folder: str = Field("run", description="where the run writes its figures, its plan, and the trained model")
    resume: Literal["auto", "never", "must"] = Field(
        "auto", description="go on from the newest saved state: auto, where there is one; must; never"
    )
    export: bool = Field(True, description="write the trained model as a folder that can be served, at the end")
    measure_checkpoint: bool = Field(
        True, description="tell at the start what the checkpoint policy saves and costs, in a run of one process"
    )
    timeout_seconds: float = Field(
        600.0, gt=0, description="how long a rank may make no step, or keep others waiting, before it is lost"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads yes and on as true, which pydantic would take for the number 1.
        if isinstance(value, bool) and info.field_name not in ("shuffle", "export", "measure_checkpoint"):
            raise ValueError("must not be true or false")
        return value

    @model_validator(mode="after")
    def _check_lengths(self) -> TrainerSettings:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs both say how long the run is; give one of them")
        if self.batch is not None and self.accumulate is not None:
            raise ValueError("batch and accumulate both say how large a step is; give one of them")
        if not self.folder.strip() or "\0" in self.folder:
            raise ValueError("folder must be the path of a folder")
        return self
