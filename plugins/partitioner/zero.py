"""The ZeRO stages as plugins: optimizer state, gradients and parameters cut over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from drivetrain.contracts.partitioner import PartitionContext, Partitioner
from drivetrain.contracts.plugin import PluginConfig, Probe, ProbeContext

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    import torch

    from drivetrain.contracts.partitioner import Footprint, OptimizerFactory, ParameterFacts, StateFormats
    from drivetrain.plugins.partitioner.engines import Engine


class ZeroConfig(PluginConfig):
    """Options of all stages."""

    shard: int | None = Field(
        None, ge=1, description="ranks that one copy of the state is cut for; others hold copies; null: all ranks"
    )
    transport: Literal["auto", "shared", "collective"] = Field(
        "auto",
        description="how bytes get from rank to rank: memory that the processes of one machine share, for those on its "
        "CPU, or torch.distributed's collectives; auto: shared where it can be",
    )
    bucket_bytes: int = Field(
        8 * 2**20, ge=1, description="bytes of parameters that travel together; a larger parameter travels alone"
    )
    offload: Literal["none", "cpu", "disk"] = Field(
        "none", description="where optimizer state lives: on the device, in the host's memory, or in mapped files"
    )
    offload_folder: str = Field(
        "offload", description="disk: folder of the files, which are scratch and vanish with the process"
    )

    @field_validator("offload_folder")
    @classmethod
    def _check_folder(cls, value: str) -> str:
        if not value.strip() or "\0" in value:
            raise ValueError("must be the path of a folder")
        return value


class ReducingConfig(ZeroConfig):
    """Options of the stages that cut gradients."""

    accumulate: Literal["sharded", "whole"] = Field(
        "sharded",
        description="sharded: reduce gradients in every micro-batch, and keep this rank's rows; whole: keep whole "
        "gradients, and reduce once a step",
    )


class _Zero(Partitioner):
    """What the stages have in common."""

    stage: ClassVar[int]
    config: ZeroConfig

    def __init__(self, config: PluginConfig) -> None:
        super().__init__(config)
        self._engine: Engine | None = None

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"cuts_parameters"})

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        import torch.distributed

        if not torch.distributed.is_available():
            return Probe.no("missing_dependency", "this build of torch has no torch.distributed")
        return Probe.yes("torch.distributed is there")

    def partition(self, model: torch.nn.Module, context: PartitionContext) -> torch.nn.Module:
        """As in the contract. Raises ConfigError for ranks that can't be grouped as ``shard`` asks, and for a
        transport that can't be had."""
        from drivetrain.plugins.partitioner.engines import make_engine

        self._engine = make_engine(model, context, self.stage, self.config)
        return model

    def make_optimizer(self, model: torch.nn.Module, factory: OptimizerFactory) -> torch.optim.Optimizer:
        return self._partitioned.make_optimizer(factory)

    def accumulating(self, model: torch.nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        return self._partitioned.accumulating(is_last=is_last)

    def clip_grad_norm(self, model: torch.nn.Module, max_norm: float, *, scale: float = 1.0) -> torch.Tensor:
        return self._partitioned.clip_grad_norm(max_norm, scale)

    def state(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
        return self._partitioned.state(optimizer)

    def load_state(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, state: dict[str, torch.Tensor]
    ) -> None:
        self._partitioned.loaded()

    def footprint(self, parameters: Sequence[ParameterFacts], formats: StateFormats, ranks: int) -> Footprint:
        from drivetrain.plugins.partitioner.footprint import zero_footprint

        return zero_footprint(self.stage, self.config, parameters, formats, ranks)

    @property
    def notes(self) -> tuple[str, ...]:
        return self._partitioned.notes

    @property
    def _partitioned(self) -> Engine:
        assert self._engine is not None, "partition comes first"
        return self._engine


class Zero1Partitioner(_Zero):
    """Each rank keeps and steps its share of the optimizer state; gradients are reduced once a step (ZeRO stage 1)."""

    stage = 1

    class Config(ZeroConfig):
        pass

    config: Config


class Zero2Partitioner(_Zero):
    """Gradients and optimizer state are cut over ranks; parameters are whole on each (ZeRO stage 2)."""

    stage = 2

    class Config(ReducingConfig):
        pass

    config: Config


class Zero3Partitioner(_Zero):
    """Parameters, gradients and optimizer state are cut over ranks; layers are gathered in turn (ZeRO stage 3)."""

    stage = 3

    class Config(ReducingConfig):
        engine: Literal["auto", "direct", "fsdp2"] = Field(
            "auto",
            description="what does it: torch's FSDP2, or collectives directly; auto: fsdp2 on CUDA, else direct",
        )
        offload_what: tuple[Literal["optimizer", "parameters"], ...] = Field(
            ("optimizer",), min_length=1, description="what offload moves"
        )

    config: Config
