"""What the killed trainer and its oracle both do: a deterministic run, action by action."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engram_store import snapshots
from engram_store.engine import Engine
from engram_store.session import Session
from engram_store.store import Store


class Action(NamedTuple):
    """One thing a trainer does."""

    kind: str
    """'step', 'snapshot', 'pin', 'unpin', 'merge', 'fold' or 'restore'."""
    number: int = 0
    """Of the step, or of the snapshot to pin, to unpin, or to go back to."""
    seed: int = 0
    """Of a step's tokens and gradients: another one after going back, so that steps differ."""


def steps(first: int, last: int, seed: int = 0) -> list[Action]:
    """Steps first..last-1."""
    return [Action("step", number, seed) for number in range(first, last)]


RUN = [
    *steps(0, 5),
    Action("snapshot", 5),
    Action("pin", 5),
    *steps(5, 9),
    Action("merge"),
    Action("fold"),
    *steps(9, 11),
    Action("restore", 5),
    *steps(5, 9, seed=1),
    Action("snapshot", 9),
    Action("pin", 9),
    Action("merge"),
    Action("unpin", 5),
    Action("fold"),
    *steps(9, 11, seed=1),
]
"""With the least overlay every third step seals; folds and merges are explicit."""


def pin_name(number: int) -> str:
    """Of the pin of a snapshot."""
    return f"at-{number}"


def pins_after(actions: Sequence[Action]) -> dict[str, int]:
    """Pinned steps by name."""
    pins: dict[str, int] = {}
    for action in actions:
        if action.kind == "pin":
            pins[pin_name(action.number)] = action.number
        elif action.kind == "unpin":
            del pins[pin_name(action.number)]
    return pins


def pins_of(store: Store) -> dict[str, int]:
    """Pinned steps by name, of snapshots that are there."""
    return {name: info.step for info in snapshots.describe(store.path) for name in info.pins}


def do(session: Session, action: Action) -> None:
    """Do one action; the oracle has nothing to fold or merge, and no pins (see `pins_after`).

    What was under way when a trainer was killed may be done: then it may be done again.
    """
    match action.kind:
        case "step":
            _train(session, action)
        case "snapshot":
            session.snapshot()
        case "pin":
            if isinstance(session, Store):
                snapshots.pin(session.path, action.number, pin_name(action.number))
        case "unpin":
            if isinstance(session, Store) and pin_name(action.number) in pins_of(session):
                snapshots.unpin(session.path, pin_name(action.number))
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
