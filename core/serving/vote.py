"""The vote: every rank says yes to a swap, or nothing changes on any."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from drivetrain.serving.background import LateError, result_by, start


@dataclass(frozen=True)
class Ballot:
    """What every rank is asked: may these parts be installed between the next two steps?

    changes:     kind -> (old plugin, new plugin).
    epoch:       the engine's epoch that the parts were prepared for.
    plan_digest: of the plan as it will be; a rank that would then run other parts says no.
    """

    changes: Mapping[str, tuple[str, str]]
    epoch: int
    plan_digest: str


class Voter(Protocol):
    """A rank that takes part in a swap."""

    def vote(self, ballot: Ballot) -> str | None:
        """None is yes; a text is no and says why. Changes nothing: another rank may still say no.

        Called in a thread of its own. Whatever it raises is a no, and so is an answer that does not come in time.
        """


def ask_all(voters: Mapping[str, Voter], ballot: Ballot, deadline_seconds: float) -> dict[str, str]:
    """Ask every rank at once, and wait until ``deadline_seconds`` of ``time.monotonic``.

    Returns rank -> why, for each that did not say yes; empty when all did.
    """
    started = time.monotonic()
    asked = {name: start(partial(voter.vote, ballot), f"vote of {name}") for name, voter in voters.items()}
    refusals: dict[str, str] = {}
    for name, future in asked.items():
        try:
            answer = result_by(deadline_seconds, future, f"the vote of {name}")
        except LateError:
            refusals[name] = f"no answer within {max(0.0, deadline_seconds - started):.3g} s"
        except Exception as error:  # the rank's code, or the way to it
            refusals[name] = f"{type(error).__name__}: {error}"
        else:
            if answer is not None:
                refusals[name] = str(answer)
    return refusals
