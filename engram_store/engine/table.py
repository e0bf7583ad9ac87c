"""One table at work: where each of its rows is right now, and how to read it.

A row is in its base chunk, in a sealed segment or in a memtable. The remap says which; arrays of
addresses, one per base chunk and one per block of overlay slots, turn that into memory.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.damage import BlockDamage, refuse_damaged
from engram_store.engine.memory import Mapping
from engram_store.errors import StoreClosedError
from engram_store.kernels import rows as kernels
from engram_store.layout.arrays import ArrayLayout, BaseDescription, table_arrays
from engram_store.layout.manifest import SegmentRef
from engram_store.layout.paths import StorePaths
from engram_store.layout.segments import ROWS, STATE, SegmentFiles
from engram_store.types import RowBlock, RowIds, TableSpec

BLOCK_SHIFT = 12
BLOCK_SLOTS = 1 << BLOCK_SHIFT
_BATCH_ROWS = 1 << 15
"""Remap entries patched under one hold of the lock: well below a millisecond."""


@dataclass(slots=True)
class ArrayMemory:
    """Addresses of one array of the table: its rows, or its optimiser state."""

    layout: ArrayLayout
    chunks: NDArray[np.int64]
    blocks: NDArray[np.int64]
    mappings: list[Mapping]
    """Of the base generation."""

    @property
    def shift(self) -> int:
        """log2 of the rows per chunk."""
        return self.layout.chunk_rows.bit_length() - 1

    def copy(
        self,
        rows: RowIds,
        places: NDArray[np.int32],
        addresses: NDArray[np.int64],
        out: NDArray[Any],
        *,
        first_chunk: int = 0,
    ) -> None:
        """Copy this array's values of rows at known places into `out`, in order.

        Args:
            rows: int32 [n], counted from the first row of `first_chunk`.
            places: int32 [n] from `kernels.rows.locate`.
            addresses: int64 [n] scratch.
            out: [n, width], C-contiguous.
            first_chunk: see `rows`.
        """
        row_bytes = self.layout.row_bytes
        chunks = self.chunks[first_chunk:]
        kernels.find_addresses(
            rows, places, chunks, self.shift, self.blocks, BLOCK_SHIFT, row_bytes, addresses
        )
        kernels.copy_rows(addresses, row_bytes, out.reshape(-1).view(np.uint8))


@dataclass(frozen=True, slots=True)
class OpenedBase:
    """A base generation whose chunk files are mapped, and not read from yet."""

    generation: int
    description: BaseDescription
    files: list[dict[int, Mapping]]
    """Of every array, by chunk."""

    def close(self) -> None:
        """It is not needed after all."""
        for mapping in (mapping for files in self.files for mapping in files.values()):
            mapping.close()


@dataclass(frozen=True, slots=True)
class Segment:
    """A mapped segment and the overlay slots it occupies."""

    ref: SegmentRef
    files: SegmentFiles
    first_slot: int
    mappings: tuple[Mapping, ...]


class SlotSpace:
    """Hands out runs of overlay blocks, first fit."""

    def __init__(self, reserved_slots: int) -> None:
        self._reserved = reserved_slots >> BLOCK_SHIFT
        self._used: dict[int, int] = {}

    def take(self, slots: int) -> int:
        """First slot of a free run; raises OverflowError beyond 2^31 slots."""
        needed = -(-slots // BLOCK_SLOTS)
        start = self._reserved
        for first, length in sorted(self._used.items()):
            if first - start >= needed:
                break
            start = first + length
        if (start + needed) << BLOCK_SHIFT >= 2**31:
            raise OverflowError("more than 2^31 overlay slots; fold more often")
        self._used[start] = needed
        return start << BLOCK_SHIFT

    def give_back(self, first_slot: int) -> None:
        """Free a run taken before."""
        del self._used[first_slot >> BLOCK_SHIFT]


class Table:
    """Remap, addresses and segments of one table.

    `lock` protects all of them. Whoever holds it may use addresses; a mapping is closed only
    after somebody who held it has put other addresses in their place. Closing needs no lock then,
    and takes none: unmapping gigabytes takes longer than a commit should wait.
    """

    def __init__(self, paths: StorePaths, store_id: str, spec: TableSpec, capacity: int) -> None:
        """`capacity`: slots of each of the two memtables, 0 for a store that is only read."""
        self.paths, self.store_id, self.spec = paths, store_id, spec
        self.lock = threading.Lock()
        self.capacity = capacity
        self.closed = False
        self._remap_memory = Mapping.of_zeros(4 * spec.rows, writable=True)
        self.remap: NDArray[np.int32] = self._remap_memory.view("<i4", 0, (spec.rows,))
        blocks = np.zeros(max(2 * capacity >> BLOCK_SHIFT, 1), np.int64)
        self.arrays = [
            ArrayMemory(layout, np.zeros(layout.chunks, np.int64), blocks.copy(), [])
            for layout in table_arrays(spec)
        ]
        self.segments: list[Segment] = []
        """Oldest first: the newest that has a row has its newest version."""
        self.generation = 0
        self.base = BaseDescription(checksums={})
        self.damages: list[BlockDamage] = []
        """Blocks in use that are known to be damaged; see `sealed.report`."""
        self._space = SlotSpace(2 * capacity)
        self._places = np.empty(0, np.int32)
        self._addresses = np.empty(0, np.int64)

    # ------------------------------------------------------------------ what it is made of

    def map_base(self, generation: int, base: BaseDescription) -> None:
        """Read a base generation from now on. Hold the lock, or be alone.

        The mappings it replaces are closed: the caller knows that no row is read from them.
        """
        for mapping in self._use_base(self.open_base(generation, base)):
            mapping.close()

    def open_base(self, generation: int, base: BaseDescription) -> OpenedBase:
        """Map the chunk files of a generation, for `fold_into_base`."""
        directory = self.paths.base(self.spec.layer, generation)
        files = []
        for layout in (array.layout for array in self.arrays):
            chunks = base.checksums[layout.name]
            files.append({c: Mapping.of_file(layout.chunk_file(directory, c)) for c in chunks})
        return OpenedBase(generation, base, files)

    def _use_base(self, opened: OpenedBase) -> list[Mapping]:
        """Point at mapped chunks; returns the mappings to close. Hold the lock, or be alone."""
        old = [mapping for array in self.arrays for mapping in array.mappings]
        for array, files in zip(self.arrays, opened.files, strict=True):
            array.mappings = list(files.values())
            zeros = None
            if len(files) < array.layout.chunks:
                zeros = Mapping.of_zeros(array.layout.chunk_bytes)
                array.mappings.append(zeros)
            for chunk in range(array.layout.chunks):
                mapping = files.get(chunk, zeros)
                assert mapping is not None
                array.chunks[chunk] = mapping.address
        self.generation, self.base = opened.generation, opened.description
        return old

    def map_memtable(self, index: int, addresses: tuple[int, int]) -> None:
        """Give the memtable with this index (0 or 1) its place in the overlay."""
        first = index * self.capacity >> BLOCK_SHIFT
        steps = np.arange(self.capacity >> BLOCK_SHIFT, dtype=np.int64)
        for array, address in zip(self.arrays, addresses, strict=False):
            size = array.layout.row_bytes << BLOCK_SHIFT
            array.blocks[first : first + steps.size] = address + steps * size

    def first_slot(self, memtable_index: int) -> int:
        """First overlay slot of a memtable."""
        return memtable_index * self.capacity

    def map_segment(self, ref: SegmentRef, files: SegmentFiles) -> Segment:
        """Map the newest segment; its rows are not pointed at yet. Hold the lock, or be alone."""
        segment = self._map_segment(ref, files)
        self.segments.append(segment)
        return segment

    def _map_segment(self, ref: SegmentRef, files: SegmentFiles) -> Segment:
        mappings = tuple(
            Mapping.of_file(files.directory / name) for name in (ROWS, STATE)[: len(self.arrays)]
        )
        first_slot = self._space.take(files.slots)
        first, count = first_slot >> BLOCK_SHIFT, -(-files.slots // BLOCK_SLOTS)
        steps = np.arange(count, dtype=np.int64)
        for array, mapping in zip(self.arrays, mappings, strict=True):
            if array.blocks.size < first + count:
                grown = np.zeros(max(2 * array.blocks.size, first + count), np.int64)
                grown[: array.blocks.size] = array.blocks
                array.blocks = grown
            size = array.layout.row_bytes << BLOCK_SHIFT
            array.blocks[first : first + count] = mapping.address + steps * size
        return Segment(ref, files, first_slot, mappings)

    def point_at_segment(self, segment: Segment) -> None:
        """Recovery: the rows of a segment are newer than everything mapped before it."""
        kernels.point_at_slots(segment.files.read_ids(), segment.first_slot, self.remap)

    def forget(self) -> None:
        """Unmap everything and forget where rows were. Hold the lock, or be alone."""
        self.remap[:] = 0
        for mapping in self._drop(self.segments):
            mapping.close()
        self.damages = []

    def _drop(self, segments: Sequence[Segment]) -> list[Mapping]:
        """Do without segments that no row is read from; returns the mappings to close.

        Hold the lock, or be alone.
        """
        numbers = {segment.ref.number for segment in segments}
        self.segments = [s for s in self.segments if s.ref.number not in numbers]
        self.damages = [d for d in self.damages if d.segment not in numbers]
        for segment in segments:
            self._space.give_back(segment.first_slot)
        return [mapping for segment in segments for mapping in segment.mappings]

    # ------------------------------------------------------------------ reading rows

    def gather(self, rows: RowIds, out: list[NDArray[Any]]) -> tuple[int, int]:
        """Copy rows, and their state if `out` has a second array, in request order.

        Args:
            rows: int32 [n], in range.
            out: rows in storage dtype [n, dim]; optionally state float32 [n, width].

        Returns:
            (rows found in memtables, rows found in segments).

        Raises:
            StoreClosedError.
            ChecksumError: a row's block is known to be damaged; `out` is untouched.
        """
        with self.lock:
            if self.closed:
                raise StoreClosedError("the store was closed; open it again")
            if self._places.size < rows.size:
                self._places = np.empty(2 * rows.size, np.int32)
                self._addresses = np.empty(2 * rows.size, np.int64)
            places = self._places[: rows.size]
            counts = kernels.locate(rows, self.remap, 2 * self.capacity, places)
            if self.damages:
                first_slots = {s.ref.number: s.first_slot for s in self.segments}
                refuse_damaged(self.damages, first_slots, rows, places)
            for array, target in zip(self.arrays, out, strict=False):
                array.copy(rows, places, self._addresses[: rows.size], target)
        return int(counts[0]), int(counts[1])

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
        for mapping in replaced:
            mapping.close()
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
        for mapping in mappings:
            mapping.close()

    def mapped_files(self) -> list[Mapping]:
        """Every mapped file of the table, for residency gauges. Hold the lock."""
        base = [m for array in self.arrays for m in array.mappings if m.path is not None]
        return base + [m for segment in self.segments for m in segment.mappings]

    def close(self) -> None:
        """Unmap everything."""
        with self.lock:
            self.closed = True
            self.forget()
            for array in self.arrays:
                for mapping in array.mappings:
                    mapping.close()
                array.mappings = []
            self.remap = np.empty(0, np.int32)
            self._remap_memory.close()


def _batches(count: int) -> Iterator[slice]:
    for start in range(0, count, _BATCH_ROWS):
        yield slice(start, min(start + _BATCH_ROWS, count))
