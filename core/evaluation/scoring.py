"""Runs windows of text through a serving stack, with the model, cache and kernels that serving would use.

Shapes: T tokens of a step; E hidden size; N rows; V vocabulary.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from drivetrain.assembly import ServingStack, build_engine, resolve_parts
from drivetrain.collecting import collect_as_usual
from drivetrain.config import Settings
from drivetrain.contracts.attention import AttentionBatch
from drivetrain.contracts.kinds import KINDS
from drivetrain.contracts.source import Progress
from drivetrain.errors import ConfigError
from drivetrain.packed.ledger import model_bytes
from drivetrain.registry.selection import PartRequest
from drivetrain.serving.packing import addresses

if TYPE_CHECKING:
    from drivetrain.serving.blocks import SequenceBlocks

DEFAULT_CONTEXT = 1024
TOKENS_PER_STEP = 512
ROWS_OF_LOGITS = 128
"""Rows whose scores over the vocabulary are held at once: 25 MB of float32 for 49,152 tokens."""


def open_stack(settings: Settings, context: int | None, progress: Progress) -> ServingStack:
    """A stack that runs one sequence at a time.

    context: most tokens of it; None takes 1024, or what the model sees. Raises ConfigError when it sees fewer.
    """
    scheduler = PartRequest(
        "scheduler", KINDS["scheduler"].default, {"max_running": 1, "max_batched_tokens": TOKENS_PER_STEP}, "eval"
    )
    settings = dataclasses.replace(settings, parts={**settings.parts, "scheduler": scheduler})
    parts = resolve_parts(settings, progress=progress, leave_out=("frontend",))
    if parts.spec is None:
        raise ConfigError("no model is named", hint="Name one, for example smollm2-135m.")
    longest = parts.spec.max_position
    if context is not None and context > longest:
        raise ConfigError(
            "the model does not see as many tokens", where="--context", found=context, allowed=f"at most {longest}"
        )
    changes = {"max_model_len": context or min(DEFAULT_CONTEXT, longest), "prefix_cache": False, "graphs": "off"}
    engine = settings.engine.model_copy(update={**changes, "master_copy": "none"})
    parts.settings = dataclasses.replace(settings, engine=engine)
    return build_engine(parts, progress=progress)


class Scorer:
    """Gives hidden states and logits for windows of tokens.

    seconds: spent on the model so far.
    """

    def __init__(self, stack: ServingStack) -> None:
        self._stack = stack
        self._runner = stack.engine.runner
        self.seconds = 0.0
        collect_as_usual()

    @property
    def weight_bytes(self) -> int:
        """Bytes of everything that the model keeps; what several of its tensors share counts once, and what an
        allocation is rounded up by does not count."""
        model = self._runner.model
        assert isinstance(model, torch.nn.Module)
        return model_bytes(model)

    @property
    def num_parameters(self) -> int:
        """Weights of the model before any quantizer, tied ones counted once."""
        return self._runner.model.spec.num_parameters

    def hidden(self, window: Sequence[int]) -> torch.Tensor:
        """Final hidden states of a window that starts from nothing, [T, E], in steps of bounded size."""
        kv = self._stack.engine.kv
        blocks = kv.open()
        try:
            steps = range(0, len(window), TOKENS_PER_STEP)
            return torch.cat([self._step(blocks, window[at : at + TOKENS_PER_STEP], at) for at in steps])
        finally:
            kv.close(blocks)

    def logits(self, hidden_NE: torch.Tensor) -> torch.Tensor:
        """Scores over the vocabulary, [N, V]."""
        return self._timed(lambda: self._runner.model.logits(hidden_NE))

    def _step(self, blocks: SequenceBlocks, ids: Sequence[int], begin: int) -> torch.Tensor:
        kv, runner, end = self._stack.engine.kv, self._runner, begin + len(ids)
        assert kv.extend(blocks, begin, len(ids)), "the cache holds one window"
        positions = np.arange(begin, end, dtype=np.int64)
        table_rows, row_of_token = np.array([blocks.row]), np.zeros(len(ids), dtype=np.int64)
        tables, slots = addresses(kv, table_rows, row_of_token, positions, end)
        device = runner.device
        batch = AttentionBatch(
            query_lengths=[len(ids)],
            context_lengths=[begin],
            query_starts=torch.tensor([0, len(ids)], dtype=torch.int32, device=device),
            kv_lengths=torch.tensor([end], dtype=torch.int32, device=device),
            block_tables=tuple(torch.from_numpy(table).to(device) for table in tables),
            slots=tuple(torch.from_numpy(slot).to(device) for slot in slots),
        )
        ids_T = torch.tensor(ids, dtype=torch.int64, device=device)
        positions_T = torch.from_numpy(positions).to(device)

        def run() -> torch.Tensor:
            step = runner.attention.begin(runner.spec, batch, runner.cache)
            return runner.model.forward(ids_T, positions_T, step)

        hidden_TE = self._timed(run)
        kv.computed(blocks, ids, None, begin, end)
        return hidden_TE

    def _timed(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        started = time.perf_counter()
        result = work()
        if result.device.type != "cpu":
            self._stack.parts.platform.synchronize()
        self.seconds += time.perf_counter() - started
        return result
