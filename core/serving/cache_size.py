"""How much of the memory the cache of keys and values gets, and how its blocks are shared out.

What steps take beside it is measured before (:mod:`drivetrain.serving.rehearsal`), where the platform can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drivetrain.contracts.attention import AttentionBackend, AttentionSpec, KVGroup
from drivetrain.contracts.platform import MemoryInfo
from drivetrain.contracts.scheduler import Limits
from drivetrain.errors import ConfigError, MemoryBudgetError
from drivetrain.serving.blocks import KVManager, most_blocks

if TYPE_CHECKING:
    from drivetrain.assembly import Parts

_SHARE_BESIDE_STEPS = 0.95
"""Share of the free memory that ``kv_memory: auto`` may take once what steps take is set aside. The rest is for what
no rehearsal shows: kernels that are loaded later, for other sizes; what other programs take of the device meanwhile;
and the cache's own tensors, which an allocator rounds up."""

_STEP_ROOM = 1.5
"""Room that is kept for a step, in parts of what the largest takes alone. Steps of all sizes come one after another,
and what one still holds when the next begins (scores, a sampler's settings) may lie in the piece of memory that the
largest tensor of the next had before. An allocator gives idle pieces back when it finds no room, but not those. The
largest tensor, gate and up of all tokens in most models, is about half of a step."""

_SHARE_UNMEASURED = {"cpu": 0.25}
"""Share of the free memory that ``kv_memory: auto`` may take where no step was measured; 0.9 of a device's own. A CPU's
memory is shared with every other program, and free is what the system could give if it dropped all that it keeps of
files, the weights' own among them. The three quarters that are left there are many times what a step takes."""


@dataclass(frozen=True)
class StepNeeds:
    """What steps take of a device's memory beside weights and cache, as a rehearsal found it.

    limits:       what the scheduler promised then.
    step_bytes:   the most that a step within these limits takes.
    graph_bytes:  what captured steps will keep.
    weight_bytes: of the model; None where its plugin does not tell.
    """

    limits: Limits
    step_bytes: int
    graph_bytes: int
    weight_bytes: int | None

    @property
    def kept_bytes(self) -> int:
        """What is set aside before the cache is made."""
        return int(_STEP_ROOM * self.step_bytes) + self.graph_bytes

    def step_bytes_within(self, limits: Limits) -> int:
        """What a step within other limits would take at most: nothing in it grows faster than they do."""
        tokens = limits.max_batched_tokens / self.limits.max_batched_tokens
        return int(self.step_bytes * max(1.0, tokens, limits.max_running / self.limits.max_running))

    def __str__(self) -> str:
        tokens, running = self.limits.max_batched_tokens, self.limits.max_running
        captured = f", captured steps {_mib(self.graph_bytes)}" if self.graph_bytes else ""
        takes = f"a step of {tokens} tokens of up to {running} requests takes {_mib(self.step_bytes)}{captured}"
        return f"{takes}: {_mib(self.kept_bytes)} are kept for them beside the cache"


def make_kv(
    parts: Parts,
    attention: AttentionBackend,
    num_blocks: Sequence[int],
    limits: Limits,
    max_model_len: int,
    spec: AttentionSpec | None = None,
) -> KVManager:
    """Empty books for a cache of ``attention`` with these numbers of blocks.

    spec: where keys and values are not kept as the parts say.
    """
    assert parts.spec is not None
    spec = spec or parts.spec.attention
    contract = attention.kv_contract(spec)
    return KVManager(
        spec.groups,
        num_blocks,
        contract.block_size,
        max_running=limits.max_running,
        max_tokens=max_model_len,
        prefix_cache=parts.settings.engine.prefix_cache,
        salt=repr(contract),
    )


@dataclass(frozen=True)
class BlockSizes:
    """What a request's keys and values take.

    block_bytes: of a block of each group.
    chunk:       most tokens of a request that are computed at once.
    """

    groups: Sequence[KVGroup]
    block_bytes: Sequence[int]
    block_size: int
    chunk: int

    @classmethod
    def of(cls, attention: AttentionBackend, spec: AttentionSpec, limits: Limits) -> BlockSizes:
        block_bytes = [attention.bytes_per_block(spec, group) for group in spec.groups]
        return cls(spec.groups, block_bytes, attention.kv_contract(spec).block_size, limits.max_batched_tokens)

    def blocks_of_one(self, num_tokens: int) -> list[int]:
        """Most blocks of each group that a request of this length ever holds."""
        return [most_blocks(group, num_tokens, self.chunk, self.block_size) for group in self.groups]

    def bytes_of_one(self, num_tokens: int) -> int:
        """The same in bytes of all groups."""
        return sum(n * size for n, size in zip(self.blocks_of_one(num_tokens), self.block_bytes, strict=True))

    def longest_that_fits(self, wanted: int, budget: int) -> int:
        """The most tokens, up to ``wanted``, that one request can have within ``budget`` bytes (bisection)."""
        low, high = 0, wanted
        while low < high:
            middle = (low + high + 1) // 2
            if self.bytes_of_one(middle) <= budget:
                low = middle
            else:
                high = middle - 1
        return low


def wanted_length(parts: Parts) -> int:
    """How long a request may get if there is memory for it. Raises ConfigError."""
    assert parts.spec is not None
    wanted, most = parts.settings.engine.max_model_len, parts.spec.max_position
    if wanted and wanted > most:
        raise ConfigError(
            "max_model_len is more than the model was made for",
            where="engine.max_model_len",
            found=wanted,
            allowed=f"1..{most}",
        )
    return wanted or most


def size_cache(parts: Parts, limits: Limits, needs: StepNeeds | None = None) -> tuple[int, list[int]]:
    """How long a request may get, and how many blocks each KV group has. Adds to the parts' notes.

    needs: what was measured of steps; None where nothing was. Raises ConfigError and MemoryBudgetError.
    """
    assert parts.spec is not None
    sizes = BlockSizes.of(parts.attention, parts.spec.attention, limits)
    wanted = wanted_length(parts)
    budget = _budget(parts, needs)
    length = sizes.longest_that_fits(wanted, budget)
    if length < wanted:
        if parts.settings.engine.max_model_len or length < 1:
            raise _no_room(parts, sizes, wanted, length, budget, needs)
        parts.notes.append(
            f"max_model_len is {length}, not the model's {wanted}: as fits in {budget / 2**20:.0f} MiB of cache"
        )
    least = sizes.blocks_of_one(length)
    return length, share_blocks(budget, sizes.block_bytes, least, [limits.max_running * count for count in least])


def _budget(parts: Parts, needs: StepNeeds | None) -> int:
    """Bytes that the cache may take."""
    asked = parts.settings.engine.kv_bytes
    if asked is not None:
        return asked
    free = parts.platform.memory().free_bytes
    if needs is not None:
        parts.notes.append(str(needs))
        return max(0, int((free - needs.kept_bytes) * _SHARE_BESIDE_STEPS))
    device_type = parts.platform.device().type
    share = _SHARE_UNMEASURED.get(device_type, 0.9)
    if device_type not in _SHARE_UNMEASURED:
        parts.notes.append(
            f"the platform does not measure what a step takes: {_mib(free * (1 - share))} are kept beside the cache"
        )
    return int(free * share)


def _no_room(
    parts: Parts, sizes: BlockSizes, wanted: int, length: int, budget: int, needs: StepNeeds | None
) -> MemoryBudgetError:
    asked = parts.settings.engine.max_model_len
    needed = f"one request of {wanted} tokens needs {_mib(sizes.bytes_of_one(wanted))} of keys and values"
    shorter = f"Set engine.max_model_len to at most {length}, or " if length else ""
    if needs is None:
        give = "give" if shorter else "Give"
        return MemoryBudgetError(
            f"{needed}, but {_mib(budget)} are there",
            where="engine.kv_memory",
            hint=f"{shorter}{give} more memory with engine.kv_memory.",
        )
    if not asked:
        needed = f"one token needs {_mib(sizes.bytes_of_one(1))} of keys and values"
    stands = memory_told(parts.platform.memory(), needs.weight_bytes)
    return MemoryBudgetError(
        f"{stands}; {needs}; {needed}, but {_mib(budget)} are there",
        where="engine.kv_memory",
        hint=_in_sentence(shorter, ADVICE),
    )


def check_room(parts: Parts, needs: StepNeeds) -> None:
    """Note it where less is free than a step takes, now that the cache is made and steps are captured."""
    free = parts.platform.memory().free_bytes
    if free < needs.step_bytes:
        parts.notes.append(
            f"a step takes up to {_mib(needs.step_bytes)}, and only {_mib(free)} are left beside cache and captured "
            "steps: give a smaller engine.kv_memory"
        )


ADVICE = "Lower scheduler.max_batched_tokens or scheduler.max_running, or choose a quantizer."
"""What leaves more of a device's memory to the cache."""


def _in_sentence(before: str, advice: str) -> str:
    return before + advice[0].lower() + advice[1:] if before else advice


def memory_told(memory: MemoryInfo, weight_bytes: int | None) -> str:
    """How the device's memory stands, for an error."""
    free = f"{_mib(memory.free_bytes)} of the device's {_mib(memory.total_bytes)} are free"
    return free if weight_bytes is None else f"the weights take {_mib(weight_bytes)}, and {free}"


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def share_blocks(budget: int, block_bytes: Sequence[int], least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Blocks for each KV group within ``budget`` bytes: ``least``, and what is left in equal numbers up to ``most``.

    A group that needs less than the equal share leaves the rest to the others.
    """
    counts = list(least)
    budget -= sum(count * size for count, size in zip(counts, block_bytes, strict=True))
    open_groups = [g for g in range(len(most)) if most[g] > counts[g]]
    while open_groups:
        equal = budget // sum(block_bytes[g] for g in open_groups)
        content = [g for g in open_groups if most[g] - counts[g] <= equal]
        for g in content or open_groups:
            more = min(most[g] - counts[g], equal)
            counts[g] += more
            budget -= more * block_bytes[g]
        open_groups = [g for g in open_groups if g not in content] if content else []
    return counts
