"""Fill a step's token budget: running requests first, then waiting ones, both by key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from drivetrain.contracts.scheduler import Candidate, Grant, Limits


def fill(running: Sequence[Candidate], waiting: Iterator[Candidate], limits: Limits) -> list[Grant]:
    """Grants that keep ``limits``: one token to each decode, and chunks of prompts with what is left.

    Running requests come first because they hold blocks; within them, decodes come before prefill chunks, so that a
    long prompt never stops the streams that are under way.
    """
    decoding = [candidate for candidate in running if candidate.pending_tokens == 1]
    grants = [candidate.whole_grant for candidate in decoding[: limits.max_batched_tokens]]
    budget = limits.max_batched_tokens - len(grants)
    prefilling = [] if len(decoding) == len(running) else [c for c in running if c.pending_tokens > 1]
    for candidate in prefilling:
        if budget == 0:
            break
        grants.append(Grant(candidate.request_id, min(candidate.pending_tokens, budget)))
        budget -= grants[-1].num_tokens
    room = limits.max_running - len(running)
    while budget > 0 and room > 0:
        newcomer = next(waiting, None)
        if newcomer is None:
            break
        grants.append(Grant(newcomer.request_id, min(newcomer.pending_tokens, budget)))
        budget -= grants[-1].num_tokens
        room -= 1
    return grants
