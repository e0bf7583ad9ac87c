"""One table's part of a window: find its rows, copy them, note where they were."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.fetch import Fetched, Fetcher
from engram_store.engine.lookup import LookupScratch, SlotPool, buffer_bytes, slot_count
from engram_store.kernels.urgent import index_rows
from engram_store.types import RowBlock, TableSpec

if TYPE_CHECKING:
    from engram_store.engine.table import Table
    from engram_store.recipes import Recipe
    from engram_store.window import LayerLookup, StoreWindow


@dataclass(slots=True)
class Kept:
    """Rows and their state of a window whose pages are cold, for the commit of its step.

    They are read once: by the time of the commit their pages may be gone again. The block that the
    trainer gets is another one, which it may write to.
    """

    rows: RowBlock
    """Storage dtype [n, dim]."""
    state: NDArray[np.float32]
    """[n, state width]."""
    _pool: SlotPool
    _buffers: list[NDArray[np.uint8]]

    @classmethod
    def taken(cls, pool: SlotPool, spec: TableSpec, rows: int) -> "Kept":
        """Room for so many rows."""
        sizes = rows * spec.row_bytes, rows * spec.state_bytes
        buffers = [pool.take(size) for size in sizes]
        block, state = (buffer[:size] for buffer, size in zip(buffers, sizes, strict=True))
        return cls(
            block.view(spec.dtype.storage).reshape(rows, spec.dim),
            state.view(np.float32).reshape(rows, spec.state_width),
            pool,
            buffers,
        )

    @property
    def size(self) -> int:
        """Bytes of its buffers."""
        return sum(buffer.size for buffer in self._buffers)

    def give_back(self) -> None:
        """The window is done with."""
        while self._buffers:
            self._pool.give_back(self._buffers.pop())


class KeptRows:
    """What the windows of a step have kept of one table, as a commit wants it.

    Args:
        gatherer: of the thread that computes the commit.
        lookups: of windows in the order of their gradients, each with rows that were kept.
        positions: int32 [n] of each, in the commit's rows; None: there is one, and they are its.
        rows: of the commit.
    """

    def __init__(
        self,
        gatherer: "Gatherer",
        lookups: "list[LayerLookup]",
        positions: list[NDArray[np.int32]] | None,
        rows: int,
    ) -> None:
        self._gatherer, self._lookups = gatherer, lookups
        self._positions, self._rows = positions, rows

    def read(self) -> tuple[RowBlock, NDArray[np.float32]]:
        """Rows and state before the commit, in the order of its rows.

        Raises: as `Fetcher.begin`.
        """
        found = []
        for lookup in self._lookups:
            self._gatherer.refresh(lookup)
            assert lookup.kept is not None
            found.append(lookup.kept)
        if self._positions is None:
            return found[0].rows, found[0].state
        rows = np.empty((self._rows, found[0].rows.shape[1]), found[0].rows.dtype)
        state = np.empty((self._rows, found[0].state.shape[1]), np.float32)
        for kept, where in zip(found, self._positions, strict=True):
            rows[where], state[where] = kept.rows, kept.state
        return rows, state


class Gatherer:
    """Works on windows for one table; belongs to one thread.

    Args:
        recipe: how tokens become rows.
        table: whose rows.
    """

    def __init__(self, recipe: "Recipe", table: "Table") -> None:
        self._recipe, self._spec = recipe, table.spec
        self.scratch = LookupScratch()
        self.fetcher = Fetcher(table)
        self._pool = SlotPool()

    def most_bytes(self, tokens: int, *, indexed: bool, keep: bool) -> int:
        """What the buffers of a window of so many tokens take when no row occurs twice."""
        lookups = tokens * self._recipe.columns
        widths = [8, 4, self._spec.row_bytes]
        if keep:
            widths += [self._spec.row_bytes, self._spec.state_bytes]
        size = sum(buffer_bytes(lookups * width) for width in widths)
        return size + (buffer_bytes(4 * slot_count(lookups)) if indexed else 0)

    def find(self, window: "StoreWindow", lookup: "LayerLookup") -> None:
        """Hash the tokens and remove repeats; the result, or the error, goes to `found`."""
        n = window.tokens.size * self._recipe.columns
        try:
            inverse, ids = _take(window, lookup, 8 * n).view(np.int32).reshape(2, n)
            found = self.scratch.look_up(
                self._recipe,
                self._spec.layer,
                window.tokens,
                window.context,
                window.attention_mask,
                out=(ids, inverse),
            )
        except BaseException as error:
            lookup.found.set_exception(error)
        else:
            lookup.found.set_result(found)

    def stage(
        self, window: "StoreWindow", lookup: "LayerLookup", *, index: bool, keep: bool
    ) -> None:
        """Copy the rows while commits may go on; `gather` makes them those of its step.

        Args:
            window, lookup: whose rows.
            index: make them findable among the rows of a commit.
            keep: a copy, and their state, for the commit of the window's step.

        Raises: as `Fetcher.begin`.
        """
        rows, _ = lookup.found.result()
        out = self._out(window, lookup, keep=keep)
        fetched = self.fetcher.begin(rows, out, _take_places(window, lookup, rows.size))
        if index:
            size = slot_count(rows.size)
            lookup.index = _take(window, lookup, 4 * size).view(np.uint32)
            index_rows(rows, lookup.index)
        lookup.fetched = fetched

    def refresh(self, lookup: "LayerLookup") -> int:
        """Copy rows again that changed since they were staged; returns how many.

        Raises: as `Fetcher.begin`.
        """
        assert lookup.fetched is not None
        assert lookup.block is not None
        kept = lookup.kept
        out = [lookup.block] if kept is None else [kept.rows, kept.state]
        return self.fetcher.refresh(lookup.fetched, out)

    def complete(self, lookup: "LayerLookup") -> int:
        """Have staged rows as they are now in the block; returns how many were copied again.

        Raises: as `Fetcher.begin`.
        """
        again = self.refresh(lookup)
        if lookup.kept is not None:
            assert lookup.block is not None
            np.copyto(lookup.block, lookup.kept.rows)
        return again

    def gather(
        self, window: "StoreWindow", lookup: "LayerLookup", *, keep_places: bool, keep: bool
    ) -> tuple[Fetched, int]:
        """Have the rows as they are now in the block; what they were, and how many came again.

        Args:
            window, lookup: whose rows.
            keep_places: to count later what changed since.
            keep: see `stage`.

        Raises: as `Fetcher.fetch`.
        """
        if lookup.fetched is not None:
            return lookup.fetched, self.complete(lookup)
        rows, _ = lookup.found.result()
        places = _take_places(window, lookup, rows.size) if keep_places or keep else None
        fetched = self.fetcher.fetch(rows, self._out(window, lookup, keep=keep), places)
        if places is not None:
            lookup.fetched = fetched
        if lookup.kept is not None:
            assert lookup.block is not None
            np.copyto(lookup.block, lookup.kept.rows)
        return fetched, 0

    def _out(
        self, window: "StoreWindow", lookup: "LayerLookup", *, keep: bool
    ) -> list[NDArray[Any]]:
        """Where rows are copied to, and their state if both are kept."""
        block = self._block(window, lookup)
        if keep and lookup.kept is None:
            lookup.kept = Kept.taken(self._pool, self._spec, len(block))
        return [block] if lookup.kept is None else [lookup.kept.rows, lookup.kept.state]

    def _block(self, window: "StoreWindow", lookup: "LayerLookup") -> RowBlock:
        if lookup.block is None:
            rows = lookup.found.result()[0].size
            buffer = _take(window, lookup, rows * self._spec.row_bytes)
            block: NDArray[Any] = buffer.view(self._spec.dtype.storage)
            lookup.block = block.reshape(rows, self._spec.dim)
        return lookup.block


def _take(window: "StoreWindow", lookup: "LayerLookup", size: int) -> NDArray[np.uint8]:
    """So many bytes, given back when the window is closed."""
    buffer = window.slots.take(size)
    lookup.buffers.append(buffer)
    return buffer[:size]


def _take_places(window: "StoreWindow", lookup: "LayerLookup", rows: int) -> NDArray[np.int32]:
    return _take(window, lookup, 4 * rows).view(np.int32)
