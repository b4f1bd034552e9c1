"""What stands for a platform that captures steps, and an attention backend whose steps can be captured."""

from __future__ import annotations

from collections.abc import Callable

import torch

from drivetrain.contracts.attention import AttentionBatch, AttentionSpec, AttentionStep
from drivetrain.serving.engine import Engine
from support.fake_model import FakeAttention, _FakeStep, add, finish, greedy, prompts


class GraphSafeAttention(FakeAttention):
    """Reads of a batch only what lies on the device, at the time when it attends."""

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"graph_safe"})

    def begin(self, spec: AttentionSpec, batch: AttentionBatch, cache: list[torch.Tensor] | None) -> AttentionStep:
        assert cache is not None
        lengths = batch.query_starts.diff().tolist()
        contexts = [length - own for length, own in zip(batch.kv_lengths.tolist(), lengths, strict=True)]
        on_device = AttentionBatch(
            lengths, contexts, batch.query_starts, batch.kv_lengths, batch.block_tables, batch.slots
        )
        return _FakeStep(spec, on_device, cache)


class PromptSafeAttention(GraphSafeAttention):
    """The same of steps with prompts. batches: those that were open."""

    def __init__(self, block_size: int) -> None:
        super().__init__(block_size)
        self.batches: list[AttentionBatch] = []

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return super().abilities() | {"graph_safe_prompts"}

    def begin(self, spec: AttentionSpec, batch: AttentionBatch, cache: list[torch.Tensor] | None) -> AttentionStep:
        if batch.is_open:
            self.batches.append(batch)
        return super().begin(spec, batch, cache)


class Recorder:
    """A platform's capture: keeps what was recorded, and runs it again when it is replayed."""

    def __init__(self, error: Exception | None = None) -> None:
        self.num_captured = 0
        self.num_replayed = 0
        self._error = error

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        if self._error is not None:
            raise self._error
        self.num_captured += 1
        function()

        def replay() -> None:
            self.num_replayed += 1
            function()

        return replay


def outputs_of_many(engine: Engine, count: int = 12) -> dict[tuple[str, int], list[int]]:
    """What requests with prompts and answers of different lengths give; the engine is closed."""
    for number, prompt in enumerate(prompts(count, length=7)):
        add(engine, f"r{number}", prompt * (1 + number % 3), greedy(5 + 3 * (number % 4)))
    tokens = finish(engine).tokens
    engine.close()
    return tokens


def expect_the_same_blocks(capturing: Engine, plain: Engine, num_blocks: int) -> None:
    """Every block that a sequence can get is as a plain run leaves it; there is one more, which is nobody's."""
    caches = []
    for engine, more in ((capturing, 1), (plain, 0)):
        for number, prompt in enumerate(prompts(3)):
            add(engine, f"r{number}", prompt, greedy(9))
        finish(engine)
        caches.append(engine.runner.cache)
        assert [len(layer) for layer in engine.runner.cache] == [num_blocks + more] * 2
    for mine, theirs in zip(*caches, strict=True):
        assert torch.equal(mine[:num_blocks].nan_to_num(-1), theirs.nan_to_num(-1))
