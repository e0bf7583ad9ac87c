"""Merging: several segments that follow each other become one, without what nobody reads any more.

A row that a newer segment has is left out. What is left is ordered by how many of the merged
segments had it, so that rows that every few steps change lie side by side in few pages.

The new segment stands where the old ones stood, between older and newer ones. Its number is none
of a memtable: those are below `MERGED`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.extents import BLOCK_SHIFT, ArrayMemory, Segment
from engram_store.engine.memory import memory_headroom_bytes
from engram_store.engine.pieces import Throttle
from engram_store.engine.seal import PIECE_ROWS
from engram_store.engine.sealed import read_ids, read_segment
from engram_store.engine.table import Table
from engram_store.kernels import rows as kernels
from engram_store.layout.disk import Disk
from engram_store.layout.manifest import SegmentRef
from engram_store.layout.segments import IDS, ROWS, STATE, write_segment
from engram_store.types import RowIds

MERGED = 10**15
"""Numbers from here on are of merged segments: how often merged x `MERGED` + the newest memtable
in it. So no two that a manifest names are the same, and the order can be read off them. They have
16 digits and more, by which `rewind` tells them from numbers of memtables."""
FAN_IN = 8
"""Segments of similar size that are worth merging."""
MAX_FAN_IN = 16
_TIER_BITS = 2
"""Of similar size: within a factor of four."""
_WRITTEN_PER_UPDATED = 1.05
"""Bytes that seals and merges may write for each byte of updated rows."""


def merged_number(numbers: Sequence[int]) -> int:
    """Number of the segment that takes the place of some, given oldest first."""
    times = max(number // MERGED for number in numbers) + 1
    return times * MERGED + numbers[-1] % MERGED


def plan_merge(slots: Sequence[int]) -> range | None:
    """Which segments to merge, if any. Pure.

    Sizes fall into tiers; a run of at least `FAN_IN` neighbours, none above some tier, is merged
    from the lowest tier up. None may outweigh the others of its run: it would be written again for
    the sake of a few. So how often a row is written grows with the logarithm of the segments.

    Args:
        slots: of each segment, oldest first.

    Returns:
        Positions, at least `FAN_IN` and at most `MAX_FAN_IN`.
    """
    tiers = [(count.bit_length() - 1) // _TIER_BITS for count in slots]
    for tier in sorted(set(tiers)):
        start = 0
        for end in range(len(tiers) + 1):
            if end < len(tiers) and tiers[end] <= tier:
                continue
            run = range(max(start, end - MAX_FAN_IN), end)
            sizes = [slots[i] for i in run]
            if len(run) >= FAN_IN and 2 * max(sizes) <= sum(sizes):
                return run
            start = end + 1
    return None


class WriteBudget:
    """What merges may write, so that all that is written stays near the rows updated.

    A seal writes a row once that was updated often since the last one; merges may spend what that
    saves, and a twentieth more.
    """

    def __init__(self) -> None:
        self._updated = self._written = 0

    def sealed(self, updated: int, written: int) -> None:
        """A memtable with so many bytes of updates was sealed into so many bytes."""
        self._updated += updated
        self._written += written

    def merged(self, written: int) -> None:
        """A merge wrote so many bytes."""
        self._written += written

    @property
    def left(self) -> int:
        """Bytes that a merge may write now; negative: none."""
        return int(_WRITTEN_PER_UPDATED * self._updated) - self._written


@dataclass(frozen=True, slots=True)
class LiveRows:
    """What a merge keeps."""

    rows: RowIds
    """int32 [n] in the order in which they are written."""
    places: NDArray[np.int32]
    """int32 [n] where they are now."""
    touches: NDArray[np.int64]
    """int64 [n] how many of the merged segments have the row."""


def live_rows(
    merged: Sequence[RowIds], first_slots: Sequence[int], newer: Sequence[RowIds]
) -> LiveRows:
    """The newest version of every row that no newer segment has, most often touched first. Pure.

    Memtables do not count as newer: after the host was lost their rows may be gone.

    Args:
        merged: int32 [slots] rows of each segment, oldest first.
        first_slots: first overlay slot of each of them.
        newer: rows of the segments after them.
    """
    ids = np.concatenate(merged)
    places = np.concatenate(
        [
            np.arange(first + 1, first + 1 + rows.size, dtype=np.int32)
            for rows, first in zip(merged, first_slots, strict=True)
        ]
    )
    rows, last, touches = np.unique(ids[::-1], return_index=True, return_counts=True)
    position = ids.size - 1 - last
    if newer:
        live = ~np.isin(rows, np.concatenate(newer))
        rows, position, touches = rows[live], position[live], touches[live]
    # Of rows touched equally often the newest come first, in the order of their last step.
    order = np.lexsort((-position, -touches))
    return LiveRows(rows[order], places[position[order]], touches[order])


class Merge:
    """One merge of one table. Neither the table nor any manifest changes.

    Args:
        table: whose segments they are.
        merged: segments that follow each other, oldest first; they stay mapped meanwhile.
        throttle: limits the speed.
    """

    def __init__(self, table: Table, merged: Sequence[Segment], throttle: Throttle) -> None:
        self._table, self._throttle = table, throttle
        self.merged = list(merged)
        self.number = merged_number([segment.ref.number for segment in merged])
        with table.lock:
            at = table.segments.index(merged[-1])
            self._newer = table.segments[at + 1 :]

    def find_live(self) -> LiveRows:
        """Find what is to be kept, by the row ids alone.

        Raises:
            ChecksumError, StoreFileError: one of the lists of row ids is damaged.
        """
        merged = [read_ids(self._table, segment, self._throttle) for segment in self.merged]
        newer = [read_ids(self._table, segment, self._throttle) for segment in self._newer]
        return live_rows(merged, [segment.first_slot for segment in self.merged], newer)

    def check(self) -> None:
        """Check the segments block by block.

        Raises:
            ChecksumError, StoreFileError: one is damaged.
        """
        size = sum(sum(segment.files.lengths().values()) for segment in self.merged)
        keep = memory_headroom_bytes() > 2 * size
        for segment in self.merged:
            read_segment(self._table, segment, self._throttle, keep=keep)

    def bytes_of(self, live: LiveRows) -> int:
        """What writing them takes."""
        spec = self._table.spec
        return live.rows.size * (4 + spec.row_bytes + spec.state_bytes)

    def write(self, live: LiveRows, disk: Disk) -> SegmentRef:
        """Write the new segment.

        Args:
            live: of `find_live`, at least one row.
            disk: where it is written.

        Raises:
            ChecksumError: a block was found damaged meanwhile.
            DiskFullError: in either case nothing names what was written.
        """
        table = self._table
        parts: dict[str, Iterable[NDArray[Any]]] = {IDS: [live.rows]}
        for memory, name in zip(table.arrays, (ROWS, STATE), strict=False):
            parts[name] = self._pieces(memory, live)
        ref = write_segment(
            table.paths, table.store_id, table.spec, self.number, live.rows.size, parts, disk
        )
        # Damage that the scrubber found meanwhile may have been copied.
        if table.damages:
            raise table.damages[0].error()
        return ref

    def _pieces(self, memory: ArrayMemory, live: LiveRows) -> Iterator[NDArray[np.uint8]]:
        """One array's values of the live rows, a few megabytes at a time in one reused buffer."""
        row_bytes = memory.layout.row_bytes
        count = min(PIECE_ROWS, live.rows.size)
        buffer, addresses = np.empty(count * row_bytes, np.uint8), np.empty(count, np.int64)
        for start in range(0, live.rows.size, PIECE_ROWS):
            places = live.places[start : start + PIECE_ROWS]
            kernels.find_addresses(
                live.rows[start : start + PIECE_ROWS],
                places,
                memory.chunks,
                memory.shift,
                memory.blocks,
                BLOCK_SHIFT,
                row_bytes,
                addresses,
            )
            kernels.copy_rows(addresses[: places.size], row_bytes, buffer)
            yield buffer[: places.size * row_bytes]
            self._throttle.take(places.size * row_bytes)
