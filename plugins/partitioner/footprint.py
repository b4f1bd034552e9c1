"""What a rank holds under the stages of ZeRO, in bytes (Rajbhandari et al. 2020, section 3 and figure 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from drivetrain.contracts.partitioner import Footprint, ParameterFacts, StateFormats, whole_footprint
from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from drivetrain.plugins.partitioner.zero import ZeroConfig


def zero_footprint(
    stage: int, config: ZeroConfig, parameters: Sequence[ParameterFacts], formats: StateFormats, ranks: int
) -> Footprint:
    """Of the first rank, which has the most rows. Raises ConfigError for ranks that can't be grouped as ``shard`` asks.

    What is offloaded to files is on no rank; a file's pages in memory are the system's to keep or drop.
    """
    shard = config.shard or ranks
    if ranks % shard:
        raise ConfigError(
            f"{ranks} ranks can't be put together in groups of {shard}", where="partitioner.shard", found=shard
        )
    whole = whole_footprint(parameters, formats)
    mine = [_share(fact, shard) for fact in parameters]
    own = whole_footprint(mine, formats)
    is_sharded = getattr(config, "accumulate", "whole") == "sharded"
    return Footprint(
        parameters=own.parameters if stage == 3 and shard > 1 else whole.parameters,
        gradients=own.gradients if is_sharded else whole.gradients,
        optimizer=0 if config.offload == "disk" else own.optimizer,
        buffers=_buffers(stage, config, parameters, formats, shard) + (0 if is_sharded else own.gradients),
    )


def _share(fact: ParameterFacts, shard: int) -> ParameterFacts:
    """The rows of the first rank; a parameter without dims is whole on each."""
    if not fact.shape:
        return fact
    return ParameterFacts(fact.name, (-(-fact.shape[0] // shard), *fact.shape[1:]), fact.unit, fact.is_trained)


def _buffers(
    stage: int, config: ZeroConfig, parameters: Sequence[ParameterFacts], formats: StateFormats, shard: int
) -> int:
    """Two buckets on their way to other ranks, sent and received; at stage 3 also what is whole at a time: two units,
    and what belongs to none."""
    if shard == 1:
        return 0
    largest = max((math.prod(fact.shape) * formats.param for fact in parameters), default=0)
    bucket = min(max(config.bucket_bytes, largest), sum(fact.numel for fact in parameters) * formats.param)
    buffers = 4 * bucket
    if stage == 3:
        units: dict[int | None, int] = {}
        for fact in parameters:
            units[fact.unit] = units.get(fact.unit, 0) + fact.numel * formats.param
        buffers += units.pop(None, 0) + 2 * max(units.values(), default=0)
    return buffers
