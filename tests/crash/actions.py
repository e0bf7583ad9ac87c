"""What the killed trainer and its oracle both do: a deterministic run, action by action."""

from typing import NamedTuple

import numpy as np

from engram_store.engine import Engine
from engram_store.session import Session
from engram_store.store import Store


class Action(NamedTuple):
    """One thing a trainer does."""

    kind: str
    """'step', 'snapshot', 'merge', 'fold' or 'restore'."""
    number: int = 0
    """Of the step, or of the snapshot to go back to."""
    seed: int = 0
    """Of a step's tokens and gradients: another one after going back, so that steps differ."""


def steps(first: int, last: int, seed: int = 0) -> list[Action]:
    """Steps first..last-1."""
    return [Action("step", number, seed) for number in range(first, last)]


RUN = [
    *steps(0, 5),
    Action("snapshot", 5),
    *steps(5, 9),
    Action("merge"),
    Action("fold"),
    *steps(9, 11),
    Action("restore", 5),
    *steps(5, 9, seed=1),
    Action("snapshot", 9),
    Action("merge"),
    Action("fold"),
    *steps(9, 11, seed=1),
]
"""With the least overlay every third step seals; folds and merges are explicit."""


def do(session: Session, action: Action) -> None:
    """Do one action; the oracle has nothing to fold or merge."""
    match action.kind:
        case "step":
            _train(session, action)
        case "snapshot":
            session.snapshot()
        case "merge":
            if isinstance(session, Store):
                assert isinstance(session._engine, Engine)
                session._engine.merge()
        case "fold":
            if isinstance(session, Store):
                session.fold()
        case "restore":
            session.restore(action.number)
        case kind:
            raise ValueError(kind)


def _train(session: Session, action: Action) -> None:
    rng = np.random.default_rng([action.number, action.seed])
    windows = [session.announce(rng.integers(0, 500, (2, 50)), action.number) for _ in range(2)]
    for window in windows:
        for layer in session.tables:
            shape = window.rows(layer)[0].shape
            window.push(layer, rng.standard_normal(shape).astype(np.float32))
    session.commit(action.number, 0.1)
