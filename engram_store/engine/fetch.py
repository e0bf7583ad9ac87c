"""Copying rows out of a table: those in memory at once, the others as the disk delivers them.

Hashing scatters rows one to a page, so a window that is cold waits for tens of thousands of reads
of 4 KiB. Faulted in one after the other they take a second or more. Here all of a slice is asked
for together, in address order, one slice before it is copied: the device's queue is full, and what
was read is used before memory runs short.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.extents import BLOCK_SHIFT, ArrayMemory, Split, as_bytes
from engram_store.engine.memory import PAGE_BYTES
from engram_store.kernels import pages as page_kernels
from engram_store.kernels import rows as kernels
from engram_store.paging import major_faults
from engram_store.types import RowIds

if TYPE_CHECKING:
    from engram_store.engine.table import Table

SLICE_ROWS = 8192
"""Rows asked for together. Larger slices are reclaimed before use when memory is short."""


class Reads:
    """What was read from the files of one table, for whomever. Any thread counts."""

    def __init__(self) -> None:
        self.pages = 0
        """Asked for."""
        self.faults = 0
        """Pages that were thought to be in memory and had to be waited for."""
        self.seconds = 0.0
        """That threads spent on it."""
        self.longest_seconds = 0.0
        self._lock = threading.Lock()

    def count(self, pages: int, faults: int, began: float) -> None:
        """Something was read, if anything was, since `began` (of `time.perf_counter`)."""
        if not pages and not faults:
            return
        seconds = time.perf_counter() - began
        with self._lock:
            self.pages += pages
            self.faults += faults
            self.seconds += seconds
            self.longest_seconds = max(self.longest_seconds, seconds)


@dataclass(slots=True)
class Fetched:
    """Rows that were copied, and what tells later whether they have changed."""

    rows: RowIds
    places: NDArray[np.int32]
    """int32 [n]: where each row was when its copying began."""
    version: int
    """Of the table."""
    clock: int
    """Of the table."""
    in_memtables: int
    in_segments: int
    cold_rows: int = 0
    """Rows that had to be read; those whose state alone was cold are not among them."""
    cold_bytes: int = 0
    """Bytes of rows, and of their state, that had to be read."""
    pages_read: int = 0
    """4 KiB pages that were asked for."""
    faults: int = 0
    """Pages that were thought to be in memory, or read just before, and had to be waited for."""
    cold: NDArray[np.int32] | None = None
    """int32 [cold rows]: their positions, kept until they are counted."""

    @property
    def waited(self) -> bool:
        """Whether the disk had to be waited for."""
        return self.pages_read > 0 or self.faults > 0


class Fetcher:
    """Copies rows of one table; belongs to one thread at a time.

    Args:
        table: whose rows.
    """

    def __init__(self, table: "Table") -> None:
        self._table = table
        self._splits = [Split() for _ in table.arrays]
        self._places = np.empty(0, np.int32)
        self._part = Split()
        self._ranges = np.empty((0, 2), np.int64)
        self._changed = np.empty(0, np.int32)

    def fetch(
        self,
        rows: RowIds,
        out: Sequence[NDArray[Any]],
        places: NDArray[np.int32] | None = None,
    ) -> Fetched:
        """Copy rows, all as they are at one moment before this returns.

        Args:
            rows: int32 [n], in range.
            out: rows in storage dtype [n, dim]; optionally state float32 [n, width].
            places: int32 [n], kept for a later look at what changed; None: used again by the next
                call.

        Raises:
            StoreClosedError.
            ChecksumError: a row's block is known to be damaged; `out` is undefined.
        """
        if places is None:
            if self._places.size < rows.size:
                self._places = np.empty(rows.size + rows.size // 4, np.int32)
            places = self._places[: rows.size]
        fetched = self.begin(rows, out, places)
        self.refresh(fetched, out)
        return fetched

    def begin(
        self, rows: RowIds, out: Sequence[NDArray[Any]], places: NDArray[np.int32]
    ) -> Fetched:
        """Copy rows while commits may go on; `refresh` makes them those of one moment.

        Args:
            rows, out: as for `fetch`.
            places: int32 [n], kept and filled for `refresh`.

        Raises: as `fetch`.
        """
        table, n = self._table, rows.size
        with table.lock:
            fetched = Fetched(rows, places, table.version, table.clock, *table.locate(rows, places))
            wanted = list(zip(table.arrays, self._splits, out, strict=False))
            for array, split, _ in wanted:
                array.split(rows, places, split)
            epoch = table.enter()
        faults, began = major_faults(), time.perf_counter()
        try:
            for array, split, target in wanted:
                if table.paging is not None and table.paging.forgetful:
                    self._ask_for_lost(array, split, places)
                _copy_warm(array, split, n, target)
        finally:
            table.leave(epoch)
        fetched.faults = major_faults() - faults
        if not fetched.faults:
            began = time.perf_counter()  # what was copied so far was in memory
        for index, (array, split, target) in enumerate(wanted):
            if split.cold_rows:
                fetched.cold_bytes += split.cold_rows * array.layout.row_bytes
                cold = split.cold[: split.cold_rows].copy()
                if not index:
                    fetched.cold_rows, fetched.cold = split.cold_rows, cold
                fetched.pages_read += self._read(rows, cold, index, target)
        # Also those that were read and gone again before they were copied.
        fetched.faults = major_faults() - faults
        table.reads.count(fetched.pages_read, fetched.faults, began)
        if table.paging is not None:
            table.paging.saw(rows.size, fetched.pages_read, fetched.faults)
        return fetched

    def refresh(self, fetched: Fetched, out: Sequence[NDArray[Any]]) -> int:
        """Copy rows again that changed since they were copied; then all are as they are now.

        Args:
            fetched: of `begin`; brought up to date.
            out: as there.

        Returns:
            How many rows were copied again. Some of them only moved.

        Raises: as `fetch`.
        """
        table, copied = self._table, 0
        while True:
            with table.lock:
                if fetched.version == table.version:
                    return copied
                changed = self._find_changed(fetched)
                copied += changed.size
                rows, places = fetched.rows[changed], fetched.places[changed]
                table.locate(rows, places)
                if not self._must_read(rows, places, len(out)):
                    for array, target in zip(table.arrays, out, strict=False):
                        self._copy_again(array, rows, places, changed, target)
                    fetched.version, fetched.clock = table.version, table.clock
                    return copied
                # Rows that moved to files which memory had no room for: not under the lock. What
                # is copied now may change meanwhile, which the next round finds by its place.
                fetched.version = table.version - 1
            began, pages = time.perf_counter(), 0
            for index, target in enumerate(out[: len(table.arrays)]):
                pages += self._read(fetched.rows, changed, index, target)
            table.reads.count(pages, 0, began)
            fetched.pages_read += pages

    def count_changed(self, fetched: Fetched) -> int:
        """How many rows have changed, or moved, since they were copied.

        Raises: as `fetch`.
        """
        with self._table.lock:
            if fetched.version == self._table.version:
                return 0
            # They stay as they are for a later `refresh`.
            return self._find_changed(replace(fetched, places=fetched.places.copy())).size

    # ------------------------------------------------------------------ rows that changed

    def _find_changed(self, fetched: Fetched) -> NDArray[np.int32]:
        """Positions whose rows may have changed; notes where they are now. Hold the lock."""
        table, n = self._table, fetched.rows.size
        if self._changed.size < n:
            self._changed = np.empty(n + n // 4, np.int32)
        count = page_kernels.changed_places(
            fetched.rows,
            table.remap,
            fetched.places,
            table.block_clocks,
            BLOCK_SHIFT,
            table.base_clock,
            fetched.clock,
            self._changed,
        )
        return self._changed[:count]

    def _must_read(self, rows: RowIds, places: NDArray[np.int32], arrays: int) -> bool:
        cold = 0
        for array in self._table.arrays[:arrays]:
            array.split(rows, places, self._part)
            cold += self._part.cold_rows
        return cold > 0

    def _copy_again(
        self,
        array: ArrayMemory,
        rows: RowIds,
        places: NDArray[np.int32],
        positions: NDArray[np.int32],
        target: NDArray[Any],
    ) -> None:
        self._part.grow(rows.size)
        addresses = array.find(rows, places, self._part.addresses)
        kernels.scatter_rows(addresses, positions, array.layout.row_bytes, as_bytes(target))

    # ------------------------------------------------------------------ rows to be read

    def _read(
        self, rows: RowIds, positions: NDArray[np.int32], index: int, target: NDArray[Any]
    ) -> int:
        """Copy the rows at some positions, slice by slice in address order.

        Files may come and go between two slices; then the rest is looked for again.

        Returns:
            Pages asked for.
        """
        table, asked = self._table, 0
        array = table.arrays[index]
        size = self._slice_rows(array)
        while positions.size:
            part = rows[positions]
            places = np.empty(part.size, np.int32)
            with table.lock:
                clock = table.clock
                table.locate(part, places)
                self._part.grow(part.size)
                found = array.find(part, places, self._part.addresses).copy()
            order = np.argsort(found).astype(np.int32)
            positions, found = positions[order], found[order]
            asked += self._ask(array, found[:size])
            done = 0
            while done < positions.size:
                this = slice(done, done + size)
                asked += self._ask(array, found[this.stop : this.stop + size])
                with table.lock:
                    if table.clock != clock:
                        break
                    epoch = table.enter()
                try:
                    width, to = array.layout.row_bytes, as_bytes(target)
                    kernels.scatter_rows(found[this], positions[this], width, to)
                    array.mark_resident(part, places, order[this])
                finally:
                    table.leave(epoch)
                done = this.stop
            positions = positions[done:]
        return asked

    def _ask_for_lost(self, array: ArrayMemory, split: Split, places: NDArray[np.int32]) -> None:
        """Pages that are thought to be in memory may be gone: not one by one, when memory is short.

        Advice on a page that is there costs 0.4 us, a page fault on one that is not 100 us.
        """
        warm = split.warm[: places.size - split.cold_rows]
        at = places[warm]
        in_files = warm[(at == 0) | (at > 2 * self._table.capacity)]
        addresses = np.sort(split.addresses[in_files])
        for start in range(0, addresses.size, SLICE_ROWS):
            self._ask(array, addresses[start : start + SLICE_ROWS])

    def _slice_rows(self, array: ArrayMemory) -> int:
        paging = self._table.paging
        return (
            SLICE_ROWS if paging is None else paging.slice_rows(array.layout.row_bytes, SLICE_ROWS)
        )

    def _ask(self, array: ArrayMemory, addresses: NDArray[np.int64]) -> int:
        """Begin to read the pages of rows at ascending addresses; returns how many pages."""
        if not addresses.size:
            return 0
        row_bytes = array.layout.row_bytes
        most = SLICE_ROWS * (1 + -(-row_bytes // PAGE_BYTES))
        if len(self._ranges) < most:
            self._ranges = np.empty((most, 2), np.int64)
        ranges = self._ranges[: page_kernels.page_ranges(addresses, row_bytes, self._ranges)]
        assert self._table.paging is not None  # nothing is known to be cold without
        self._table.paging.reader.start(ranges)
        return int(ranges[:, 1].sum()) // PAGE_BYTES


def _copy_warm(array: ArrayMemory, split: Split, n: int, target: NDArray[Any]) -> None:
    row_bytes, out = array.layout.row_bytes, as_bytes(target)
    if not split.cold_rows:
        kernels.copy_rows(split.addresses[:n], row_bytes, out)
    else:
        warm = split.warm[: n - split.cold_rows]
        page_kernels.copy_rows_at(split.addresses[:n], warm, row_bytes, out)
