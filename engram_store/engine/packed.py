"""A table that is only read, some of whose rows are packed in memory, one after the other."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.cold import Paging
from engram_store.engine.damage import refuse_damaged
from engram_store.engine.extents import as_bytes
from engram_store.engine.memory import Mapping
from engram_store.engine.table import Table
from engram_store.errors import StoreClosedError
from engram_store.kernels import rows as kernels
from engram_store.layout.paths import StorePaths
from engram_store.types import RowIds, TableSpec

_BATCH_ROWS = 1 << 15
"""Remap entries patched under one hold of the lock: well below a millisecond."""


@dataclass(frozen=True, slots=True)
class _Packed:
    """Some rows in memory, and the overlay slots that they occupy."""

    rows: RowIds
    origins: NDArray[np.int32]
    """int32 [n]: their places in the files."""
    first_slot: int
    memory: Mapping

    def to_files(self, places: NDArray[np.int32]) -> None:
        """Replace places in this block by those in the files."""
        slots = places - np.int32(self.first_slot + 1)
        here = (slots >= 0) & (slots < self.rows.size)
        places[here] = self.origins[slots[here]]


class PackableTable(Table):
    """A table of a snapshot. Nothing moves but rows that are packed, and back.

    Their optimiser state stays where it is: who only reads rows does not need it.
    """

    def __init__(
        self, paths: StorePaths, store_id: str, spec: TableSpec, paging: Paging | None = None
    ) -> None:
        super().__init__(paths, store_id, spec, 0, paging)
        self._packed: list[_Packed] = []
        """At most one; two while one takes the place of the other."""

    def gather(self, rows: RowIds, out: list[NDArray[Any]]) -> tuple[int, int]:
        """See `Table.gather`. Packed rows count as found in segments."""
        if len(out) == 1:
            return super().gather(rows, out)
        # State is in the files alone: as if nothing were packed.
        places = np.empty(rows.size, np.int32)
        with self.lock:
            self._locate_in_files(rows, places)
            self._refuse_damaged(rows, places)
            found = [
                array.find(rows, places, np.empty(rows.size, np.int64)) for array in self.arrays
            ]
            epoch = self.enter()
        try:
            for array, addresses, target in zip(self.arrays, found, out, strict=False):
                kernels.copy_rows(addresses, array.layout.row_bytes, as_bytes(target))
        finally:
            self.leave(epoch)
        return 0, int(np.count_nonzero(places))

    def locate(self, rows: RowIds, places: NDArray[np.int32]) -> tuple[int, int]:
        """See `Table.locate`. Damages are of the files: as if nothing were packed."""
        self._check_open()
        if self.damages:
            self._locate_in_files(rows, places)
            self._refuse_damaged(rows, places)
        counts = kernels.locate(rows, self.remap, 0, places)
        return int(counts[0]), int(counts[1])

    def _locate_in_files(self, rows: RowIds, places: NDArray[np.int32]) -> None:
        """Hold the lock. Raises: StoreClosedError."""
        self._check_open()
        kernels.locate(rows, self.remap, 0, places)
        for packed in self._packed:
            packed.to_files(places)

    def _refuse_damaged(self, rows: RowIds, places: NDArray[np.int32]) -> None:
        """Of rows and their places in the files. Hold the lock. Raises: ChecksumError."""
        if self.damages:
            first_slots = {s.ref.number: s.first_slot for s in self.segments}
            refuse_damaged(self.damages, first_slots, rows, places)

    def _check_open(self) -> None:
        if self.closed:
            raise StoreClosedError("the store was closed; open it again")

    def pack(self, rows: RowIds, memory: Mapping) -> None:
        """Read rows from memory from now on, and no others; one thread at a time.

        Args:
            rows: int32 [n], each once; 0 is fine.
            memory: their bytes, in this order. It is closed once something else is packed.

        Raises:
            StoreClosedError: the memory is the caller's to close.
        """
        origins = np.empty(rows.size, np.int32)
        with self.lock:
            self._locate_in_files(rows, origins)
            new = _Packed(rows, origins, self._space.take(max(rows.size, 1)), memory)
            self.map_rows(new.first_slot, rows.size, memory)
            old, self._packed = self._packed, [*self._packed, new]
        for batch in self._locked_batches(rows.size):
            kernels.point_at_slots(rows[batch], new.first_slot + batch.start, self.remap)
        for packed in old:
            self._leave(packed)

    def unpack(self) -> None:
        """Read all rows from the files again. Raises: StoreClosedError."""
        with self.lock:
            old = list(self._packed)
        for packed in old:
            self._leave(packed)

    def _leave(self, packed: _Packed) -> None:
        """Read rows that are still in a block from the files, and close it."""
        rows = packed.rows
        places = np.arange(rows.size, dtype=np.int32) + np.int32(packed.first_slot + 1)
        for batch in self._locked_batches(rows.size):
            kernels.move_places(rows[batch], places[batch], packed.origins[batch], self.remap)
        with self.lock:
            self._check_open()
            self._space.give_back(packed.first_slot)
            self._packed = [other for other in self._packed if other is not packed]
            self.clock += 1
        self.unmap([packed.memory])

    def _locked_batches(self, count: int) -> Iterator[slice]:
        """Pieces of so many rows, the lock held for each. Raises: StoreClosedError."""
        for start in range(0, count, _BATCH_ROWS):
            with self.lock:
                self._check_open()
                yield slice(start, min(start + _BATCH_ROWS, count))

    def close(self) -> None:
        """Unmap everything."""
        super().close()
        # Whoever packs meanwhile finds the table closed before it uses an address.
        self.unmap([packed.memory for packed in self._packed])
