"""One table's part of a commit: what it may be, and the rows and state that come of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.memtable import TableSlots, slot_bytes
from engram_store.engine.table import Table
from engram_store.errors import RowRangeError, StepTooLargeError
from engram_store.optimizers import Step
from engram_store.optimizers.kernels import apply_update
from engram_store.types import RowBlock, RowIds, TableSpec


class EarlyRows(Protocol):
    """Somebody who is given some of a commit's rows before the others are computed."""

    def sort(self, rows: RowIds) -> tuple[NDArray[np.int32], int]:
        """Positions in `rows` (int32 [n]) in the order of updating, and how many are wanted."""
        ...

    def hand_over(self, new: RowBlock) -> None:
        """The wanted rows are computed: storage dtype [count, dim], in that order."""
        ...


class OldRows(Protocol):
    """Somebody who has the rows of a commit, as they are before it, at hand."""

    def read(self) -> tuple[RowBlock, NDArray[np.float32]]:
        """Rows and state in the order of the commit's rows; called on the table's stream."""
        ...


@dataclass(frozen=True, slots=True)
class TableUpdate:
    """One table's part of a commit."""

    layer: int
    rows: RowIds
    """int32 [n], distinct."""
    gradients: NDArray[np.float32]
    """[n, dim], summed per row."""
    step: Step
    early: EarlyRows | None = None
    """Who waits for some of the rows."""
    old: OldRows | None = None
    """Who has the rows at hand; None: they are read from the table."""


def check_updates(
    updates: Sequence[TableUpdate], specs: Mapping[int, TableSpec], capacity: int
) -> None:
    """Refuse what cannot be committed, before anything is written.

    Args:
        updates: of one step.
        specs: of all tables, by layer.
        capacity: slots of a memtable.

    Raises:
        RowRangeError: a row is outside its table.
        StepTooLargeError: a table's rows do not fit into an empty memtable.
    """
    for update in updates:
        spec = specs[update.layer]
        if not update.rows.size:
            continue
        for row in (int(update.rows.min()), int(update.rows.max())):
            if not 0 <= row < spec.rows:
                raise RowRangeError(spec.name, row, spec.rows)
        if update.rows.size > capacity:
            needed = 2 * slot_bytes(list(specs.values())) * (update.rows.size + 4096)
            raise StepTooLargeError(update.layer, update.rows.size, capacity, needed)


class PostImages:
    """Computes rows and state after an update. One thread per table."""

    def __init__(self) -> None:
        self._scratch: dict[int, list[NDArray[Any]]] = {}

    def write(self, table: Table, update: TableUpdate, slots: TableSlots, first: int) -> RowIds:
        """Write ids, rows and state straight into slots first.. of a memtable, which are free.

        Returns:
            int32 [n]: the rows in the order of their slots.
        """
        # Rows that were read before their block was found damaged are not built upon.
        kept = update.old.read() if update.old is not None and not table.damages else None
        if update.early is None:
            self._write(table, update, kept, slots, first, update.rows, None)
            return update.rows
        order, wanted = update.early.sort(update.rows)
        rows = update.rows[order]
        self._write(table, update, kept, slots, first, rows[:wanted], order[:wanted])
        update.early.hand_over(slots.rows[first : first + wanted])
        self._write(table, update, kept, slots, first + wanted, rows[wanted:], order[wanted:])
        return rows

    def _write(
        self,
        table: Table,
        update: TableUpdate,
        kept: tuple[RowBlock, NDArray[np.float32]] | None,
        slots: TableSlots,
        first: int,
        rows: RowIds,
        which: NDArray[np.int32] | None,
    ) -> None:
        """Some of the update's rows; `which` are their positions in it, None: all in order."""
        n = rows.size
        if kept is not None and which is None:
            old, old_state = kept
        else:
            old, old_state = (block[:n] for block in self._blocks(table.spec, n))
            if kept is None:
                table.gather(rows, [old, old_state])
            else:
                assert which is not None
                for part, out in zip(kept, (old, old_state), strict=True):
                    np.take(part, which, axis=0, out=out, mode="clip")
        new, new_state = slots.rows[first : first + n], slots.state[first : first + n]
        gradients = update.gradients
        apply_update(
            table.spec, update.step, rows, old, old_state, gradients, new, new_state, which
        )
        slots.ids[first : first + n] = rows

    def _blocks(self, spec: TableSpec, n: int) -> list[NDArray[Any]]:
        """Reused room for n rows and their state."""
        have = self._scratch.get(spec.layer)
        if have is None or len(have[0]) < n:
            have = [
                np.empty((n + n // 4, spec.dim), spec.dtype.storage),
                np.empty((n + n // 4, spec.state_width), np.float32),
            ]
            self._scratch[spec.layer] = have
        return have
