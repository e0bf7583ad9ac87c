"""What a crash at any moment of a recorded workload may leave, from plain numpy.

A call that returned happened, one under way happened or did not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from engram_store.layout.manifest import Mark
from engram_store.layout.metadata import StoreMetadata
from engram_store.testing import Operation
from engram_store.testing.crash import FileSystem

Contents = Mapping[int, tuple[NDArray[Any], NDArray[np.float32]]]
"""Rows and state of every row, by layer."""


@dataclass(frozen=True, eq=False, slots=True)
class State:
    """The store after a whole number of steps."""

    step: int
    marks: tuple[Mark, ...]
    contents: Contents
    digest: int


def make_state(step: int, marks: tuple[Mark, ...], contents: Contents) -> State:
    total = xxhash.xxh3_64(repr((step, marks)).encode())
    for rows, state in contents.values():
        total.update(rows.tobytes())
        total.update(state.tobytes())
    return State(step, marks, contents, total.intdigest())


@dataclass(frozen=True, slots=True)
class Call:
    """A call of the trainer, and the operations that were recorded while it ran."""

    kind: str
    begin: int
    end: int
    after: State
    """What the store is when it has returned."""
    published: int = -1
    """Of a commit: the operation that makes it real."""
    kept: int = 0
    """Of 'keep': how many snapshots stay, beside the pinned ones."""
    pin: str = ""
    """Of 'pin' and 'unpin': the name."""
    pinned: int = 0
    """Of 'pin': the step."""


@dataclass(frozen=True, slots=True)
class Truth:
    """What recovery must find at one moment."""

    states: tuple[State, ...]
    """One of these."""
    required: Mapping[int, int]
    """Snapshots that must be there unless the store went back before them: digests by step."""
    possible: Mapping[int, frozenset[int]]
    """Those that may be there."""
    pins: tuple[Mapping[str, int], ...] = ({},)
    """One of these: pinned steps by name."""


@dataclass(slots=True)
class Recording:
    """A workload that ran."""

    name: str
    metadata: StoreMetadata
    start: FileSystem
    """The files before it."""
    operations: list[Operation]
    calls: list[Call]
    floors: list[tuple[int, int]]
    """(operations, durable step announced by then); empty without a journal."""
    initial: State

    def truth(self, operations: int, *, lost: bool) -> Truth:
        """After so many operations; `lost`: with the host."""
        line, snapshots, now = {0: self.initial}, {0: self.initial}, self.initial
        pins: dict[str, int] = {}
        under_way: Call | None = None
        for call in self.calls:
            if call.end > operations:
                under_way = call if call.begin < operations else None
                break
            line, snapshots, now = _advance(call, line, snapshots, pins)
            pins = _pins_after(call, pins)
        if lost and self.floors:
            floor = [step for begin, step in self.floors if begin <= operations][-1]
            states = [line[step] for step in range(floor, now.step + 1)]
        else:
            states = [snapshots[max(snapshots)] if lost else now]
        required, possible = dict(snapshots), {k: {v.digest} for k, v in snapshots.items()}
        names = [pins]
        if under_way is not None:
            _, later, after = _advance(under_way, line, snapshots, pins)
            names.append(_pins_after(under_way, pins))
            required = {k: v for k, v in required.items() if k in later}
            for step, state in later.items():
                possible.setdefault(step, set()).add(state.digest)
            if lost and not self.floors:
                states.append(later[max(later)])
            elif lost or under_way.kind in _BACKWARDS:
                states.append(after)
            elif operations > under_way.published:
                states = [after]
        return Truth(
            tuple(states),
            {step: state.digest for step, state in required.items()},
            {step: frozenset(digests) for step, digests in possible.items()},
            tuple(names),
        )


_BACKWARDS = ("restore", "rewind")


def _advance(
    call: Call,
    line: Mapping[int, State],
    snapshots: Mapping[int, State],
    pins: Mapping[str, int],
) -> tuple[dict[int, State], dict[int, State], State]:
    """The states of this lineage, the snapshots and the state, after a call."""
    line, snapshots, after = dict(line), dict(snapshots), call.after
    match call.kind:
        case "commit":
            line[after.step] = after
        case "snapshot" | "close" | "recover":
            snapshots.setdefault(after.step, after)
        case "restore" | "rewind":
            line = {k: v for k, v in line.items() if k <= after.step}
            snapshots = {k: v for k, v in snapshots.items() if k <= after.step}
        case "keep":
            kept = {*sorted(snapshots)[-call.kept :], *pins.values()}
            snapshots = {k: v for k, v in snapshots.items() if k in kept}
    return line, snapshots, after


def _pins_after(call: Call, pins: Mapping[str, int]) -> dict[str, int]:
    """Pinned steps by name."""
    others = {name: step for name, step in pins.items() if name != call.pin}
    return {**others, call.pin: call.pinned} if call.kind == "pin" else others
