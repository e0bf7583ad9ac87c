"""Sealing: a frozen memtable becomes immutable segments, one per table.

Only each row's last slot as of the freeze is written. The memtable serves reads until its rows are
read from the segments; then it is free to be opened again.

Slots keep the order of the log, which is what keeps rows together that are hot together: those of
one phrase, looked up one after the other by the step that had it last, are wanted together again.
Of real text a window finds 2.2 to 2.9 of its rows on each page of a segment that it needs; in the
order of row ids 1.1 to 1.3. Most used rows first, or rows of shorter n-grams first, tears phrases
apart: up to 4 % more pages of segments per window, and a limited page cache misses as many or up to
2 % more (benchmarks/segment_order.py).
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.memtable import Commit, TableSlots
from engram_store.failpoints import failpoint
from engram_store.kernels import rows as kernels
from engram_store.layout.disk import Disk
from engram_store.layout.manifest import SegmentRef
from engram_store.layout.paths import StorePaths
from engram_store.layout.segments import IDS, ROWS, STATE, write_segment
from engram_store.types import TableSpec

PIECE_ROWS = 1 << 15
"""Rows copied at a time: whole checksum blocks, whatever the (even) row length."""
Live = NDArray[np.int32]
"""int32 [n]: the slots of a memtable that a segment holds, in the segment's order: ascending."""


def live_slots(spec: TableSpec, slots: TableSlots, count: int) -> Live:
    """The last slot of every row among the first `count` slots of a memtable."""
    live = np.empty(count, np.int32)
    seen = np.zeros((spec.rows >> 3) + 1, np.uint8)
    found = kernels.last_slots(slots.ids[:count], seen, live)
    return live[:found]


def write_segments(
    paths: StorePaths,
    store_id: str,
    specs: list[TableSpec],
    tables: list[TableSlots],
    number: int,
    commit: Commit,
    disk: Disk,
) -> dict[int, tuple[SegmentRef, Live]]:
    """Write the segments of one frozen memtable; by layer, tables without slots left out.

    Raises:
        DiskFullError: no manifest names anything that was written.
    """
    written = {}
    for spec, slots, count in zip(specs, tables, commit.counts, strict=True):
        if not count:
            continue
        live = live_slots(spec, slots, count)
        parts: dict[str, Iterable[NDArray[Any]]] = {
            IDS: [slots.ids[live]],
            ROWS: _pieces(slots.rows, live),
        }
        if spec.state_bytes:
            parts[STATE] = _pieces(slots.state, live)
        ref = write_segment(paths, store_id, spec, number, live.size, parts, disk)
        failpoint("seal.segment_written")
        written[spec.layer] = ref, live
    return written


def _pieces(source: NDArray[Any], live: Live) -> Iterator[NDArray[np.uint8]]:
    """The live rows of a dense array, a few megabytes at a time in one reused buffer."""
    row_bytes = source.strides[0]
    raw = source.reshape(-1).view(np.uint8)
    buffer = np.empty(min(PIECE_ROWS, live.size) * row_bytes, np.uint8)
    addresses = np.empty(min(PIECE_ROWS, live.size), np.int64)
    for start in range(0, live.size, PIECE_ROWS):
        positions = live[start : start + PIECE_ROWS]
        kernels.slot_addresses(raw, positions, row_bytes, addresses)
        kernels.copy_rows(addresses[: positions.size], row_bytes, buffer)
        yield buffer[: positions.size * row_bytes]
