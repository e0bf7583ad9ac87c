"""What to do when a lost store is back: decided from step numbers alone."""

import enum
import random
from collections.abc import Iterator

from engram_store.errors import ProtocolError

_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.05, 2.0


class Verdict(enum.Enum):
    """What became of the requests that the store had not answered."""

    RESEND = enum.auto()
    """None of them took effect."""
    APPLIED = enum.auto()
    """The commit did; its step is not sent again."""


def judge(store_step: int, session_step: int, *, committing: bool, restoring: bool) -> Verdict:
    """Compare the store that came back with what the session knows. Pure.

    Args:
        store_step: steps that the store has applied.
        session_step: steps that the store had acknowledged.
        committing: a commit was not answered.
        restoring: a restore was not answered. Restoring again is harmless, so whether it took
            effect does not matter.

    Raises:
        ProtocolError: steps are missing, or somebody else trained the store.
    """
    if restoring or store_step == session_step:
        return Verdict.RESEND
    if committing and store_step == session_step + 1:
        return Verdict.APPLIED
    if store_step < session_step:
        raise ProtocolError(
            f"the store came back at step {store_step}, but it had applied {session_step} steps: "
            "its host lost what was not in a snapshot. Connect again and restore the checkpoint "
            "of your last snapshot"
        )
    raise ProtocolError(
        f"the store came back at step {store_step}, this session is at step {session_step}: "
        "somebody else has trained it. Connect again and restore your checkpoint"
    )


def delays() -> Iterator[float]:
    """Seconds to wait between attempts: doubling, and random so that trainers spread out."""
    delay = _FIRST_DELAY_SECONDS
    while True:
        yield delay * random.uniform(0.5, 1.5)
        delay = min(2 * delay, _LONGEST_DELAY_SECONDS)
