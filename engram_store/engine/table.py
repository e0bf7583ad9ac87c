"""One table at work: where each of its rows is right now, and how to read it.

A row is in its base chunk, in a sealed segment or in a memtable. The remap says which; arrays of
addresses, one per base chunk and one per block of overlay slots, turn that into memory
(`extents`). Rows are copied without the lock (`fetch`), because some of them may have to come from
the disk first.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.cold import Paging
from engram_store.engine.damage import BlockDamage, refuse_damaged
from engram_store.engine.extents import (
    BLOCK_SHIFT,
    BLOCK_SLOTS,
    ArrayMemory,
    OpenedBase,
    Segment,
    SlotSpace,
)
from engram_store.engine.fetch import Fetcher, Reads
from engram_store.engine.memory import Mapping
from engram_store.errors import StoreClosedError
from engram_store.kernels import rows as kernels
from engram_store.layout.arrays import BaseDescription, table_arrays
from engram_store.layout.manifest import SegmentRef
from engram_store.layout.paths import StorePaths
from engram_store.layout.segments import ROWS, STATE, SegmentFiles
from engram_store.types import RowBlock, RowIds, TableSpec

_BATCH_ROWS = 1 << 15
"""Remap entries patched under one hold of the lock: well below a millisecond."""


class Table:
    """Remap, addresses and segments of one table.

    `lock` protects all of them, and nobody waits for the disk while holding it. Who copies rows
    finds their addresses under the lock, says `enter`, copies, says `leave`. Memory is unmapped,
    and a memtable is used again, only after other addresses were put in its place and everybody
    who had entered before that has left (`wait_for_readers`).

    Args:
        paths, store_id, spec: whose table it is.
        capacity: slots of each of the two memtables, 0 for a store that is only read.
        paging: how cold pages are read, and who knows which are cold; None: each is faulted in
            when a row in it is copied.
    """

    def __init__(
        self,
        paths: StorePaths,
        store_id: str,
        spec: TableSpec,
        capacity: int,
        paging: Paging | None = None,
    ) -> None:
        self.paths, self.store_id, self.spec = paths, store_id, spec
        self.lock = threading.Lock()
        self.paging = paging
        self._left = threading.Condition(self.lock)
        self._epoch = 0
        self._inside: dict[int, int] = {}
        """How many readers entered in each epoch and have not left."""
        self.capacity = capacity
        self.closed = False
        self._remap_memory = Mapping.of_zeros(4 * spec.rows, writable=True)
        self.remap: NDArray[np.int32] = self._remap_memory.view("<i4", 0, (spec.rows,))
        blocks = max(2 * capacity >> BLOCK_SHIFT, 1)
        self.arrays = [ArrayMemory.of(layout, blocks) for layout in table_arrays(spec)]
        self.version = 0
        """Grows whenever rows change."""
        self.clock = 0
        """Grows whenever addresses change their content or go away."""
        self.base_clock = 0
        """When the base was mapped."""
        self.block_clocks: NDArray[np.int64] = np.zeros(blocks, np.int64)
        """int64 [blocks]: when each block of slots was given its content."""
        self.segments: list[Segment] = []
        """Oldest first: the newest that has a row has its newest version."""
        self.generation = 0
        self.base = BaseDescription(checksums={})
        self.damages: list[BlockDamage] = []
        """Blocks in use that are known to be damaged; see `sealed.report`."""
        self._space = SlotSpace(2 * capacity)
        self.reads = Reads()
        self._fetcher = Fetcher(self)
        self._fetching = threading.Lock()

    # ------------------------------------------------------------------ what it is made of

    def map_base(self, generation: int, base: BaseDescription) -> list[Mapping]:
        """Read a base generation from now on; returns what to `unmap`. Hold the lock."""
        return self._use_base(self.open_base(generation, base))

    def open_base(self, generation: int, base: BaseDescription) -> OpenedBase:
        """Map the chunk files of a generation, for `fold_into_base`."""
        directory = self.paths.base(self.spec.layer, generation)
        files = []
        for layout in (array.layout for array in self.arrays):
            chunks = base.checksums[layout.name]
            files.append({c: Mapping.of_file(layout.chunk_file(directory, c)) for c in chunks})
        return OpenedBase(generation, base, files)

    def _use_base(self, opened: OpenedBase) -> list[Mapping]:
        """Point at mapped chunks; returns what to `unmap`. Hold the lock."""
        old = [mapping for array in self.arrays for mapping in array.mappings]
        self.clock += 1
        self.base_clock = self.clock
        for array, files in zip(self.arrays, opened.files, strict=True):
            array.mappings = list(files.values())
            zeros = None
            if len(files) < array.layout.chunks:
                zeros = Mapping.of_zeros(array.layout.chunk_bytes)
                array.mappings.append(zeros)
            for chunk in range(array.layout.chunks):
                file = files.get(chunk)
                mapping = file or zeros
                assert mapping is not None
                array.chunks[chunk] = mapping.address
                # Zeros that were never written need no reading.
                array.chunk_pages[chunk] = self._watch(file) if file else 0
        self.generation, self.base = opened.generation, opened.description
        return old

    def _watch(self, file: Mapping) -> int:
        return 0 if self.paging is None else self.paging.watch(file)

    def map_memtable(self, index: int, addresses: tuple[int, int]) -> None:
        """Give the memtable with this index (0 or 1) its place in the overlay."""
        first, count = self.first_slot(index) >> BLOCK_SHIFT, self.capacity >> BLOCK_SHIFT
        for array, address in zip(self.arrays, addresses, strict=False):
            array.map_blocks(first, count, address, residency=0)
        self._start_clock(first, count)

    def use_memtable_again(self, index: int) -> None:
        """Other rows are going to be written to a memtable's slots, in which no row is now."""
        with self.lock:
            first = self.first_slot(index) >> BLOCK_SHIFT
            self._start_clock(first, self.capacity >> BLOCK_SHIFT)

    def _start_clock(self, first_block: int, count: int) -> None:
        self.clock += 1
        have, needed = self.block_clocks.size, first_block + count
        if have < needed:
            more = np.zeros(max(have, needed - have), np.int64)
            self.block_clocks = np.concatenate([self.block_clocks, more])
        self.block_clocks[first_block:needed] = self.clock

    def map_rows(self, first_slot: int, slots: int, memory: Mapping) -> None:
        """Slots from `first_slot` on are rows, without state, in memory. Hold the lock."""
        first, count = first_slot >> BLOCK_SHIFT, -(-slots // BLOCK_SLOTS)
        self.arrays[0].grow(first + count)
        self.arrays[0].map_blocks(first, count, memory.address, residency=0)
        self._start_clock(first, count)

    def first_slot(self, memtable_index: int) -> int:
        """First overlay slot of a memtable."""
        return memtable_index * self.capacity

    def map_segment(self, ref: SegmentRef, files: SegmentFiles) -> Segment:
        """Map the newest segment; its rows are not pointed at yet. Hold the lock."""
        segment = self._map_segment(ref, files)
        self.segments.append(segment)
        return segment

    def _map_segment(self, ref: SegmentRef, files: SegmentFiles) -> Segment:
        mappings = tuple(
            Mapping.of_file(files.directory / name) for name in (ROWS, STATE)[: len(self.arrays)]
        )
        first_slot = self._space.take(files.slots)
        first, count = first_slot >> BLOCK_SHIFT, -(-files.slots // BLOCK_SLOTS)
        for array, mapping in zip(self.arrays, mappings, strict=True):
            array.grow(first + count)
            array.map_blocks(first, count, mapping.address, self._watch(mapping))
        self._start_clock(first, count)
        return Segment(ref, files, first_slot, mappings)

    def point_at_segment(self, segment: Segment) -> None:
        """Recovery: the rows of a segment are newer than everything mapped before it."""
        kernels.point_at_slots(segment.files.read_ids(), segment.first_slot, self.remap)

    def forget(self) -> list[Mapping]:
        """Forget the overlay and where rows were; returns what to `unmap`. Hold the lock."""
        self.remap[:] = 0
        self.version += 1
        self.damages = []
        return self._drop(self.segments)

    def _drop(self, segments: Sequence[Segment]) -> list[Mapping]:
        """Do without segments that no row is read from; returns the mappings to close.

        Hold the lock.
        """
        self.clock += 1
        numbers = {segment.ref.number for segment in segments}
        self.segments = [s for s in self.segments if s.ref.number not in numbers]
        self.damages = [d for d in self.damages if d.segment not in numbers]
        for segment in segments:
            self._space.give_back(segment.first_slot)
        return [mapping for segment in segments for mapping in segment.mappings]

    # ------------------------------------------------------------------ reading rows

    def enter(self) -> int:
        """Memory found under the lock, which is held, stays until `leave`; returns an epoch."""
        self._inside[self._epoch] = self._inside.get(self._epoch, 0) + 1
        return self._epoch

    def leave(self, epoch: int) -> None:
        """Who entered in this epoch has copied its rows. Call without the lock."""
        with self.lock:
            self._inside[epoch] -= 1
            if not self._inside[epoch]:
                del self._inside[epoch]
                self._left.notify_all()

    def wait_for_readers(self) -> None:
        """Wait for everybody who entered before now. Call without the lock."""
        with self.lock:
            before, self._epoch = self._epoch, self._epoch + 1
            self._left.wait_for(lambda: all(epoch > before for epoch in self._inside))

    def unmap(self, mappings: Sequence[Mapping]) -> None:
        """Unmap what no address leads to any more. Call without the lock: it takes its time."""
        if mappings:
            self.wait_for_readers()
        for mapping in mappings:
            if self.paging is not None:
                self.paging.forget(mapping)
            mapping.close()

    def locate(self, rows: RowIds, places: NDArray[np.int32]) -> tuple[int, int]:
        """Where rows are; (rows in memtables, rows in segments). Hold the lock.

        Raises:
            StoreClosedError.
            ChecksumError: a row's block is known to be damaged.
        """
        if self.closed:
            raise StoreClosedError("the store was closed; open it again")
        counts = kernels.locate(rows, self.remap, 2 * self.capacity, places)
        if self.damages:
            first_slots = {s.ref.number: s.first_slot for s in self.segments}
            refuse_damaged(self.damages, first_slots, rows, places)
        return int(counts[0]), int(counts[1])

    def gather(self, rows: RowIds, out: list[NDArray[Any]]) -> tuple[int, int]:
        """Copy rows, and their state if `out` has a second array, in request order.

        Args:
            rows: int32 [n], in range.
            out: rows in storage dtype [n, dim]; optionally state float32 [n, width].

        Returns:
            (rows found in memtables, rows found in segments).

        Raises:
            StoreClosedError.
            ChecksumError: a row's block is known to be damaged; `out` is undefined.
        """
        with self._fetching:
            fetched = self._fetcher.fetch(rows, out)
        return fetched.in_memtables, fetched.in_segments

    def read_range(self, first: int, count: int) -> tuple[RowBlock, NDArray[np.float32]]:
        """Rows first..first+count-1 and their state, as they are now."""
        rows = np.arange(first, first + count, dtype=np.int32)
        block = np.empty((count, self.spec.dim), self.spec.dtype.storage)
        state = np.empty((count, self.spec.state_width), np.float32)
        self.gather(rows, [block, state])
        return block, state

    # ------------------------------------------------------------------ moving rows

    def point_at_memtable(self, index: int, first: int, rows: RowIds) -> None:
        """Rows were committed to slots first.. of a memtable."""
        with self.lock:
            kernels.point_at_slots(rows, self.first_slot(index) + first, self.remap)
            self.version += 1

    def move_to_segment(self, index: int, live: NDArray[np.int32], segment: Segment) -> None:
        """Rows that are still in a frozen memtable are read from its segment from now on.

        Args:
            index: the memtable's.
            live: int32 [slots of the segment] position of each segment slot in the memtable.
            segment: mapped before.
        """
        ids = segment.files.read_ids()
        new = np.arange(ids.size, dtype=np.int32) + np.int32(segment.first_slot + 1)
        old = live + np.int32(self.first_slot(index) + 1)
        for batch in _batches(ids.size):
            with self.lock:
                kernels.move_places(ids[batch], old[batch], new[batch], self.remap)
        # Who found a row in the memtable looks again, or is done, before it is used again.
        with self.lock:
            self.clock += 1
        self.wait_for_readers()

    def fold_into_base(self, folded: Sequence[tuple[Segment, RowIds]], opened: OpenedBase) -> None:
        """Read a new base generation instead of the segments that went into it.

        Rows of those segments have the same bytes in the new base, so they may be read from
        either while the remap is patched.

        Args:
            folded: the segments, each with the rows of its slots.
            opened: the new base.
        """
        with self.lock:
            replaced = self._use_base(opened)
        self.unmap(replaced)
        self.look_at_files()
        for segment, ids in folded:
            for batch in _batches(ids.size):
                with self.lock:
                    kernels.forget_slots(ids[batch], segment.first_slot + batch.start, self.remap)
        self._let_go([segment for segment, _ in folded])

    def open_segment(self, ref: SegmentRef, files: SegmentFiles) -> Segment:
        """Map a segment that takes the place of others, for `replace_segments`."""
        with self.lock:
            return self._map_segment(ref, files)

    def close_segment(self, segment: Segment) -> None:
        """One that was only opened is not needed after all."""
        self._let_go([segment])

    def replace_segments(
        self,
        merged: Sequence[Segment],
        new: Segment | None,
        rows: RowIds,
        old_places: NDArray[np.int32],
    ) -> None:
        """Read one new segment instead of some that follow each other.

        Args:
            merged: the old segments.
            new: the new one, opened; None: no row was left.
            rows: int32 [slots of the new segment] its rows.
            old_places: int32 [same] where they are in the old segments.
        """
        if new is not None:
            with self.lock:
                at = self.segments.index(merged[0])
                self.segments[at:at] = [new]
            places = np.arange(rows.size, dtype=np.int32) + np.int32(new.first_slot + 1)
            for batch in _batches(rows.size):
                with self.lock:
                    kernels.move_places(rows[batch], old_places[batch], places[batch], self.remap)
        self._let_go(merged)

    def _let_go(self, segments: Sequence[Segment]) -> None:
        """Nothing is read from these segments any more."""
        with self.lock:
            mappings = self._drop(segments)
        self.unmap(mappings)

    def mapped_files(self) -> list[Mapping]:
        """Every mapped file of the table, for residency gauges. Hold the lock."""
        base = [m for array in self.arrays for m in array.mappings if m.path is not None]
        return base + [m for segment in self.segments for m in segment.mappings]

    def look_at_files(self) -> None:
        """Know now which pages are in memory, instead of asking for all of them at first.

        Call without the lock, and where no file is unmapped meanwhile.
        """
        if self.paging is not None:
            with self.lock:
                mappings = self.mapped_files()
            self.paging.look_at(mappings)

    def close(self) -> None:
        """Unmap everything."""
        with self.lock:
            self.closed = True
            overlay = self.forget()
        base = [mapping for array in self.arrays for mapping in array.mappings]
        self.unmap([*base, *overlay])
        for array in self.arrays:
            array.mappings = []
        self.remap = np.empty(0, np.int32)
        self._remap_memory.close()


def _batches(count: int) -> Iterator[slice]:
    for start in range(0, count, _BATCH_ROWS):
        yield slice(start, min(start + _BATCH_ROWS, count))
