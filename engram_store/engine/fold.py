"""Folding: segments and a base generation become the next base generation.

Sequential: chunk after chunk is read piece by piece, rows that a segment holds are put over it, and
the result is written as a new file. Every block is compared with its checksum when it is read: a
damaged one ends the fold, and nothing of it gets into a new base with a checksum of its own.
Memtables are not touched, so that the new base is exactly the tables at the step of the newest
segment that went in.
"""

import contextlib
import errno
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.bulk import ChunkWriter
from engram_store.engine.extents import BLOCK_SHIFT, ArrayMemory, Segment
from engram_store.engine.memory import PAGE_BYTES, forget_cached_pages, memory_headroom_bytes
from engram_store.engine.pieces import (
    Pages,
    Throttle,
    piece_rows,
    read_pieces,
    resident_pages,
)
from engram_store.engine.sealed import chunk_file, read_segment, stop_at_damage
from engram_store.engine.table import Table
from engram_store.errors import DiskFullError
from engram_store.failpoints import failpoint
from engram_store.kernels import rows as kernels
from engram_store.layout import checksums
from engram_store.layout.arrays import (
    ArrayLayout,
    BaseDescription,
    chunk_identity,
    write_base_description,
)
from engram_store.layout.disk import Disk
from engram_store.layout.files import (
    disk_errors,
    make_directory,
    remove_file,
    remove_tree,
    replace_file,
    sync_directory,
)
from engram_store.types import RowIds

SYNC_BYTES = 8 << 20
"""Bytes written to a chunk before they are synced, so that they can leave the page cache."""
_DOCUMENT_BYTES = 64 << 10
"""Room for a generation's small files."""
_Piece = tuple[NDArray[np.uint8], Pages]
"""Bytes of a new chunk, and which of their pages somebody will read soon."""


@dataclass(frozen=True, slots=True)
class FoldedBase:
    """A new base generation that no manifest names yet."""

    generation: int
    digest: str
    description: BaseDescription


@dataclass(frozen=True, slots=True)
class FoldPlan:
    """What a fold writes."""

    changed: frozenset[int]
    """Chunks that get a new file; the others are hard links."""
    needed_bytes: int
    """Of disk, until the old generation can go."""


def plan_fold(layouts: Sequence[ArrayLayout], ids: Sequence[RowIds]) -> FoldPlan:
    """Which chunks a fold writes, and what room that takes. Pure.

    Args:
        layouts: of the table's arrays.
        ids: int32 [slots] rows of each segment.
    """
    chunk_rows = layouts[0].chunk_rows
    found = [np.unique(rows // chunk_rows) for rows in ids]
    changed = frozenset(int(chunk) for chunks in found for chunk in chunks)
    sums = sum(
        8 * -(-array.chunk_bytes // checksums.BLOCK_BYTES) * array.chunks for array in layouts
    )
    content = len(changed) * sum(layout.chunk_bytes for layout in layouts)
    return FoldPlan(changed, content + sums + _DOCUMENT_BYTES)


def check_room(directory: Path, what: str, needed: int, reserve: int) -> None:
    """Refuse to begin what would fill the disk.

    Args:
        directory: on the disk.
        what: is to be written, for people.
        needed: bytes of it.
        reserve: bytes to leave for what training itself writes.

    Raises:
        DiskFullError: it would not fit.
    """
    free = shutil.disk_usage(directory).free
    if free < needed + reserve:
        raise DiskFullError(
            errno.ENOSPC,
            f"{what} needs {needed:,} bytes and leaves {reserve:,} for sealing, the disk of "
            f"{directory} has {free:,} free; it was not begun. Free space on that disk, or drop "
            "old snapshots, which hold segments and base generations",
        )


class Fold:
    """One fold of one table. Neither the table nor any manifest changes.

    Args:
        table: what to fold; its base and the segments that it has now stay mapped meanwhile.
        disk: where the new generation is written.
        throttle: limits the speed.
    """

    def __init__(self, table: Table, disk: Disk, throttle: Throttle) -> None:
        self._table, self._disk, self._throttle = table, disk, throttle
        with table.lock:
            self.segments = list(table.segments)
        self._ids: list[RowIds] = []
        self._resident: list[_ResidentSlots] = []

    @property
    def folded(self) -> list[tuple[Segment, RowIds]]:
        """The segments that go into the base, each with the rows of its slots."""
        return list(zip(self.segments, self._ids, strict=True))

    def prepare(self) -> FoldPlan:
        """Check the segments block by block, and plan.

        Raises:
            ChecksumError, StoreFileError: one is damaged.
        """
        table, size = self._table, 0
        for segment in self.segments:
            size += sum(segment.files.lengths().values())
        # Looked at before they are read, which makes all of them resident.
        self._resident = [
            _ResidentSlots(self.segments, array, memory.layout.row_bytes)
            for array, memory in enumerate(table.arrays)
        ]
        keep = memory_headroom_bytes() > 2 * size
        self._ids = [read_segment(table, s, self._throttle, keep=keep) for s in self.segments]
        return plan_fold([memory.layout for memory in table.arrays], self._ids)

    def write(self, plan: FoldPlan) -> FoldedBase:
        """Write the next generation.

        Raises:
            ChecksumError: a block of the base is damaged.
            DiskFullError: in either case the partial generation is removed again.
        """
        paths, layer = self._table.paths, self._table.spec.layer
        new = paths.base(layer, self._table.generation + 1)
        remove_tree(new, self._disk)  # of a fold that did not finish
        try:
            return self._write(plan, new)
        except Exception:
            with contextlib.suppress(OSError):
                remove_tree(new, self._disk)
            raise

    def _write(self, plan: FoldPlan, new: Path) -> FoldedBase:
        table, disk = self._table, self._disk
        spec, generation = table.spec, table.generation + 1
        self._copy_documents(new)
        sums: dict[str, dict[int, checksums.Checksums]] = {}
        for memory in table.arrays:
            sums[memory.layout.name] = {}
        places = np.empty(table.arrays[0].layout.chunk_rows, np.int32)
        for chunk in range(table.arrays[0].layout.chunks):
            changed = chunk in plan.changed
            if changed:
                self._find_changes(chunk * places.size, places)
            for index, memory in enumerate(table.arrays):
                name, known = memory.layout.name, chunk_file(table, index, chunk)
                target = memory.layout.chunk_file(new, chunk)
                if changed:
                    make_directory(target.parent, disk)
                    identity = chunk_identity(table.store_id, spec.layer, name, chunk)
                    pieces = self._folded(index, chunk, places)
                    sums[name][chunk] = self._write_chunk(target, pieces, identity)
                    sync_directory(target.parent, disk)
                elif known is not None:
                    make_directory(target.parent, disk)
                    with disk_errors(target):
                        disk.link(known.path, target)
                    sync_directory(target.parent, disk)
                    sums[name][chunk] = known.sums
                failpoint("fold.chunk_written")
        # Damage that the scrubber found meanwhile may have been copied.
        if table.damages:
            raise table.damages[0].error()
        description = BaseDescription(checksums=sums)
        digest = write_base_description(table.paths, spec, generation, description, disk)
        sync_directory(new.parent, disk)
        return FoldedBase(generation, digest, description)

    def _copy_documents(self, new: Path) -> None:
        old = self._table.paths.base(self._table.spec.layer, self._table.generation)
        for memory in self._table.arrays:
            name = memory.layout.name
            make_directory(new / name / "c", self._disk)
            for document in _group_documents(name):
                source = old / document
                if source.exists():
                    replace_file(new / document, source.read_bytes(), self._disk)

    def _find_changes(self, first_row: int, places: NDArray[np.int32]) -> None:
        """For each row of a chunk, the place of its newest version in the segments, or 0."""
        places[:] = 0
        for segment, rows in self.folded:
            kernels.newest_in_chunk(rows, segment.first_slot, first_row, places)

    def _folded(self, index: int, chunk: int, places: NDArray[np.int32]) -> Iterator[_Piece]:
        """Bytes of one chunk of the new base; rows beyond the table's end are carried along.

        No lock: base chunks and the segments of a fold stay mapped until the fold itself drops
        them.
        """
        memory = self._table.arrays[index]
        row_bytes = memory.layout.row_bytes
        count = piece_rows(row_bytes, memory.layout.chunk_rows)
        base = self._base_pieces(index, chunk, count * row_bytes)
        for first, (data, keep) in zip(range(0, places.size, count), base, strict=True):
            changed = np.flatnonzero(places[first : first + count]).astype(np.int32)
            if changed.size:
                newest = places[first : first + count][changed]
                _put_over(memory, changed, newest, data)
                read = changed[self._resident[index].of(newest)].astype(np.int64) * row_bytes
                keep[read // PAGE_BYTES] = True
                keep[(read + row_bytes - 1) // PAGE_BYTES] = True
            yield data, keep

    def _base_pieces(self, index: int, chunk: int, size: int) -> Iterator[_Piece]:
        """The chunk as it is, checked, and which of its pages are in the page cache."""
        file = chunk_file(self._table, index, chunk)
        if file is not None:
            for piece in read_pieces(file, self._throttle, size):
                stop_at_damage(self._table, piece.damages)
                yield piece.data, piece.cached.copy()
            return
        data = np.empty(size, np.uint8)
        for _ in range(0, self._table.arrays[index].layout.chunk_bytes, size):
            data[:] = 0
            yield data, np.zeros(-(-size // PAGE_BYTES), np.bool_)

    def _write_chunk(
        self, path: Path, pieces: Iterator[_Piece], identity: int
    ) -> checksums.Checksums:
        """Write a chunk durably, a piece at a time; returns its block checksums.

        A page stays in the page cache where what it was made of was there.
        """
        disk, sums, block = self._disk, [], 0
        remove_file(path, disk)
        with disk_errors(path):
            fd = disk.create(path)
            try:
                writer = ChunkWriter(disk, fd)
                for data, keep in pieces:
                    sums.append(checksums.block_checksums(data, identity, block))
                    block += sums[-1].size
                    writer.add(data, keep)
                    self._throttle.take(data.size)
                    if writer.unsynced_bytes >= SYNC_BYTES:
                        writer.sync()
                writer.finish()
            finally:
                disk.close(fd)
        return np.concatenate(sums)


class _ResidentSlots:
    """Which slots of a fold's segments are in memory: those that training reads.

    Args:
        segments: of the fold.
        array: index of the table's array.
        row_bytes: of one slot in it.
    """

    def __init__(self, segments: Sequence[Segment], array: int, row_bytes: int) -> None:
        ordered = sorted(segments, key=lambda segment: segment.first_slot)
        pages = [
            resident_pages(s.mappings[array], 0, s.mappings[array].bytes.size) for s in ordered
        ]
        self._row_bytes = row_bytes
        self._first_slots = np.array([s.first_slot for s in ordered], np.int64)
        self._first_pages = np.cumsum([0, *(found.size for found in pages)])
        self._pages = np.concatenate([*pages, np.zeros(0, np.bool_)])

    def of(self, places: NDArray[np.int32]) -> Pages:
        """Bool [n]: whether the first page of the slot at each place was resident."""
        slots = places.astype(np.int64) - 1
        segment = np.searchsorted(self._first_slots, slots, "right") - 1
        page = (slots - self._first_slots[segment]) * self._row_bytes // PAGE_BYTES
        found: Pages = self._pages[self._first_pages[segment] + page]
        return found


def _put_over(
    memory: ArrayMemory, rows: RowIds, places: NDArray[np.int32], data: NDArray[np.uint8]
) -> None:
    """Copy the rows of segments at `places` over rows of a piece, int32 [n] each."""
    row_bytes = memory.layout.row_bytes
    addresses = np.empty(rows.size, np.int64)
    kernels.find_addresses(
        rows,
        places,
        memory.chunks,
        memory.shift,
        memory.blocks,
        BLOCK_SHIFT,
        row_bytes,
        addresses,
    )
    new = np.empty(rows.size * row_bytes, np.uint8)
    kernels.copy_rows(addresses, row_bytes, new)
    data.reshape(-1, row_bytes)[rows] = new.reshape(-1, row_bytes)


def forget_old_files(fold: Fold, plan: FoldPlan, table: Table, generation: int) -> None:
    """Nobody reads what went into a fold any more; snapshots may keep it on the disk."""
    directory = table.paths.base(table.spec.layer, generation)
    for memory in table.arrays:
        for chunk in plan.changed:
            forget_cached_pages(memory.layout.chunk_file(directory, chunk))
    for segment in fold.segments:
        for name in segment.files.lengths():
            forget_cached_pages(segment.files.directory / name)


def _group_documents(array: str) -> list[str]:
    """Zarr documents from a generation's directory down to an array."""
    parts = array.split("/")
    return ["zarr.json", *("/".join([*parts[: i + 1], "zarr.json"]) for i in range(len(parts)))]
