"""A step's inputs, packed flat.

Python's work is a few operations a request. Nothing here grows with a sequence's length but the width of its block
table.

Shapes: T tokens of the step; S sequences; N rows whose logits are wanted; B blocks of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple

import numpy as np
import torch

from drivetrain.contracts.attention import AttentionBatch
from drivetrain.serving.blocks import KVManager, SequenceBlocks
from drivetrain.serving.request import Request

_ALIGNMENT = 64


class Scheduled(NamedTuple):
    """A request and how many of its pending tokens a step computes, as things stood when it was planned.

    begin:       tokens that were computed before.
    gives_token: whether the step reaches the end of what there is, so that the next token can be chosen.
    blocks:      what the request held; when it holds something else afterwards, it has given way or ended.
    """

    request: Request
    num_tokens: int
    begin: int
    gives_token: bool
    blocks: SequenceBlocks

    @classmethod
    def of(cls, request: Request, num_tokens: int) -> Scheduled:
        blocks, begin = request.blocks, request.num_computed
        assert blocks is not None, f"{request.name} runs without blocks"
        gives_token = begin + num_tokens == len(request.tokens) + request.num_expected
        return cls(request, num_tokens, begin, gives_token, blocks)


@dataclass(frozen=True, eq=False)
class StepInputs:
    """One step, packed.

    sampling:       requests that get a token, in the order of their rows among the logits.
    prompt_rows:    (request, first row, first position, count): rows that score the prompt tokens after each position.
    unknown:        int64 [2, U] or None: tokens that the step before has yet to choose. Row 0 says where they belong
                    among this step's tokens, row 1 in which place of that step's choice they are.
    """

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    attention: AttentionBatch
    rows_N: torch.Tensor
    sampling: list[Request]
    prompt_rows: list[tuple[Request, int, int, int]]
    unknown: torch.Tensor | None = None


class StepBuffers:
    """Takes one step's arrays to the device.

    To a device of its own, through one pinned buffer and in one copy; both ends are made once and grow only when the
    scheduler's limits do. On a CPU the model reads the arrays themselves: copying them took longer than making them.
    A step that chooses no token is never waited for, so the copy before may still be reading the host's buffer.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_host = device.type == "cpu"
        self._host = torch.empty(0, dtype=torch.uint8)
        self._there = self._host
        self._was_read: torch.Event | None = None

    def reserve(self, num_bytes: int) -> None:
        """Have room for this many bytes at least."""
        if not self._is_host and num_bytes > len(self._host):
            self._host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            self._there = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def fill(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """These arrays as tensors on the device, good until the next call. Contiguous, int32 or int64."""
        if self._is_host:
            return [torch.from_numpy(array) for array in arrays]
        offsets = [0]
        for array in arrays:
            offsets.append(offsets[-1] + -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT)
        self.reserve(offsets[-1])
        if self._was_read is not None:
            self._was_read.synchronize()
        host = self._host.numpy()
        for array, offset in zip(arrays, offsets, strict=False):
            host[offset : offset + array.nbytes].view(array.dtype)[:] = array.reshape(-1)
        self._there[: offsets[-1]].copy_(self._host[: offsets[-1]], non_blocking=True)
        self._was_read = torch.Event(self._device)
        self._was_read.record()
        return [
            self._there[offset : offset + array.nbytes].view(_TORCH_TYPES[array.dtype.str]).view(array.shape)
            for array, offset in zip(arrays, offsets, strict=False)
        ]


_TORCH_TYPES = {np.dtype(np.int64).str: torch.int64, np.dtype(np.int32).str: torch.int32}


def bytes_of_step(kv: KVManager, max_batched_tokens: int, max_running: int) -> int:
    """Most bytes that a step within these limits packs."""
    groups = len(kv.groups)
    tokens, sequences = 8 * max_batched_tokens, 8 * (max_running + 1)
    tables = sum(4 * max_running * table.shape[1] for table in kv.tables)
    return tokens * (3 + groups) + 4 * sequences + tables + (8 + 2 * groups) * _ALIGNMENT


def pack(scheduled: Sequence[Scheduled], kv: KVManager, buffers: StepBuffers, before: Sequence[Request]) -> StepInputs:
    """Pack a step. Python's work is a few operations a request, whatever its length.

    before: the requests for which a step that still runs chooses tokens, in the order of its rows.
    """
    count = len(scheduled)
    requests, query_lengths, context_lengths, gives_token, blocks = map(list, zip(*scheduled, strict=True))
    lengths, contexts = np.array(query_lengths, dtype=np.int64), np.array(context_lengths, dtype=np.int64)
    starts = np.zeros(count + 1, dtype=np.int64)
    lengths.cumsum(out=starts[1:])
    table_rows = np.array([own.row for own in blocks], dtype=np.int64)
    ends = contexts + lengths
    if int(starts[-1]) == count:  # every sequence has one token: no need to spread anything over tokens
        positions, row_of_token = contexts, np.arange(count)
    else:
        row_of_token = np.repeat(np.arange(count), lengths)
        # Where a token's sequence stands, plus how far into this step's share it is.
        positions = np.arange(starts[-1]) + np.repeat(contexts - starts[:-1], lengths)
    ids, unknown = _ids(scheduled, starts, before)
    tables, slots = addresses(kv, table_rows, row_of_token, positions, int(ends.max()))
    rows, sampling, prompt_rows = _wanted_rows(scheduled, requests, gives_token, starts)
    packed = buffers.fill(
        [
            np.array(ids, dtype=np.int64),
            positions,
            np.array(rows, dtype=np.int64),
            *slots,
            *([] if unknown is None else [unknown]),
            starts.astype(np.int32),
            ends.astype(np.int32),
            *tables,
        ]
    )
    groups = len(tables)
    ids_T, positions_T, rows_N, *rest = packed
    attention = AttentionBatch(
        query_lengths=query_lengths,
        context_lengths=context_lengths,
        query_starts=rest[-groups - 2],
        kv_lengths=rest[-groups - 1],
        block_tables=tuple(rest[-groups:]),
        slots=tuple(rest[:groups]),
        ends_only=not prompt_rows,
    )
    pieces = rest[groups] if unknown is not None else None
    return StepInputs(ids_T, positions_T, attention, rows_N, sampling, prompt_rows, pieces)


def _ids(
    scheduled: Sequence[Scheduled], starts: np.ndarray, before: Sequence[Request]
) -> tuple[list[int], np.ndarray | None]:
    """The step's token ids, 0 for those that are not chosen yet, and where these are to come from."""
    ids: list[int] = []
    places: list[int] = []
    waiting: list[Request] = []
    for index, (request, num_tokens, begin, _, _) in enumerate(scheduled):
        tokens = request.tokens
        if num_tokens == 1 and begin < len(tokens):
            ids.append(tokens[begin])
            continue
        ids += tokens[begin : begin + num_tokens]
        if begin + num_tokens > len(tokens):
            ids.append(0)
            places.append(index)
            waiting.append(request)
    if not places:
        return ids, None
    if waiting == before:  # as in most steps of a steady batch
        sources: Sequence[int] = range(len(waiting))
    else:
        row_of = {request: row for row, request in enumerate(before)}
        sources = [row_of[request] for request in waiting]
    return ids, np.array([starts[1:][places] - 1, sources], dtype=np.int64)


def addresses(
    kv: KVManager, table_rows: np.ndarray, row_of_token: np.ndarray, positions: np.ndarray, longest: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Block tables, and the slot each new token is written to, for each KV group."""
    widest = -(-longest // kv.block_size)
    block_of_token, offsets = np.divmod(positions, kv.block_size)
    tables, slots = [], []
    for table in kv.tables:
        table_SB = table[table_rows, :widest]
        tables.append(table_SB)
        slots.append(table_SB[row_of_token, block_of_token].astype(np.int64) * kv.block_size + offsets)
    return tables, slots


def _wanted_rows(
    scheduled: Sequence[Scheduled], requests: list[Request], gives_token: Sequence[bool], starts: np.ndarray
) -> tuple[list[int], list[Request], list[tuple[Request, int, int, int]]]:
    """Rows of the flat batch whose logits are wanted: those that give a token first, then those that score prompts."""
    lasts: list[int] = (starts[1:] - 1).tolist()
    rows, sampling = list(compress(lasts, gives_token)), list(compress(requests, gives_token))
    prompt_rows: list[tuple[Request, int, int, int]] = []
    if all(request.params.prompt_logprobs is None for request in requests):
        return rows, sampling, prompt_rows
    for index, item in enumerate(scheduled):
        request = item.request
        if request.wants_prompt_logprobs:
            # Position p scores token p + 1, so the prompt's last position scores nothing of the prompt.
            count = min(item.num_tokens, request.num_prompt_tokens - 1 - item.begin)
            if count > 0:
                first = lasts[index] + 1 - item.num_tokens
                prompt_rows.append((request, len(rows), item.begin, count))
                rows += range(first, first + count)
    return rows, sampling, prompt_rows
