"""Moving rows: find where a row is now, copy it, remove repeats, keep the remap.

A row's place is an int32 from the table's remap: 0 means the base, p > 0 means overlay slot p - 1.
Two short arrays of addresses turn a place into memory: one address per base chunk (equal row
counts, a power of two) and one per overlay block of slots.
"""

from typing import Any

import numpy as np
from numba import njit

from engram_store.kernels.intrinsics import copy2, copy16, copy64, prefetch_read, prefetch_write

JIT: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy", "boundscheck": False}
AHEAD = 32
"""Rows between a prefetch and its use; 16 was 1.1-1.25 times slower, 64 no faster."""
_PROBES_AHEAD = 16
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@njit(inline="always")
def _copy_row(target, source, row_bytes):
    offset = 0
    while offset + 64 <= row_bytes:
        copy64(target + offset, source + offset)
        offset += 64
    while offset + 16 <= row_bytes:
        copy16(target + offset, source + offset)
        offset += 16
    while offset < row_bytes:
        copy2(target + offset, source + offset)
        offset += 2


@njit(inline="always")
def _prefetch_row(address, row_bytes):
    offset = 0
    while offset < row_bytes:
        prefetch_read(address + offset)
        offset += 64


@njit(**JIT)
def deduplicate(lookups, slots, unique, inverse):
    """Unique row ids in order of first look-up, and where each look-up's row is among them.

    Open addressing with linear probing. A slot holds a position in `unique` plus one: half the
    memory of keeping the row there too, and `unique` is in the cache. Indices are uint64: of
    signed ones numba asks whether they count from the end.

    Args:
        lookups: int32 [n], not negative.
        slots: uint32 [power of two, at least 2 n] scratch.
        unique: int32 [>= number of unique ids] output.
        inverse: int32 [n] output.

    Returns:
        The number of unique ids.
    """
    slots[:] = 0
    one, ahead = np.uint64(1), np.uint64(_PROBES_AHEAD)
    mask, shift = np.uint64(slots.size - 1), np.uint64(64)
    while slots.size >> np.int64(np.uint64(64) - shift) > 1:
        shift -= one
    base = slots.ctypes.data
    found = np.int64(0)
    n = np.uint64(lookups.size)
    for i in range(n):
        if i + ahead < n:
            later = (np.uint64(lookups[i + ahead]) * _GOLDEN) >> shift
            prefetch_write(base + np.int64(later) * 4)
        row = lookups[i]
        probe = (np.uint64(row) * _GOLDEN) >> shift
        while True:
            held = slots[probe]
            if held == 0:
                unique[np.uint64(found)] = row
                inverse[i] = np.int32(found)
                found += 1
                slots[probe] = np.uint32(found)
                break
            if unique[np.uint64(held) - one] == row:
                inverse[i] = np.int32(held) - np.int32(1)
                break
            probe = (probe + one) & mask
    return found


@njit(**JIT)
def locate(rows, remap, memtable_slots, places):
    """Places of rows, and how many of them are in memtables and in segments.

    Args:
        rows: int32 [n].
        remap: int32 [table rows].
        memtable_slots: slots below this number belong to memtables.
        places: int32 [>= n] output.

    Returns:
        (rows in memtables, rows in segments).
    """
    base = remap.ctypes.data
    in_memtable = np.int64(0)
    in_segment = np.int64(0)
    n = rows.size
    for i in range(n):
        if i + AHEAD < n:
            prefetch_read(base + np.int64(rows[i + AHEAD]) * 4)
        place = remap[rows[i]]
        places[i] = place
        in_memtable += np.int64((place > 0) & (place <= memtable_slots))
        in_segment += np.int64(place > memtable_slots)
    return in_memtable, in_segment


@njit(**JIT)
def find_addresses(rows, places, chunks, chunk_shift, blocks, block_shift, row_bytes, addresses):
    """Memory address of every row, from its place.

    A pass of its own: mixed into the copy loop the same arithmetic made that three times slower.
    Indices are uint64, or numba would ask of each whether it counts from the end.

    Args:
        rows, places: int32 [n].
        chunks, chunk_shift: int64 address of each base chunk, log2 of its rows.
        blocks, block_shift: int64 address of each overlay block, log2 of its slots.
        row_bytes: bytes of a row.
        addresses: int64 [>= n] output.
    """
    chunk_mask = (np.int64(1) << chunk_shift) - 1
    block_mask = (np.int64(1) << block_shift) - 1
    for i in range(rows.size):
        row, slot = np.int64(rows[i]), np.int64(places[i]) - 1
        if slot < 0:
            addresses[i] = chunks[np.uint64(row >> chunk_shift)] + (row & chunk_mask) * row_bytes
        else:
            addresses[i] = blocks[np.uint64(slot >> block_shift)] + (slot & block_mask) * row_bytes


@njit(**JIT)
def copy_rows(addresses, row_bytes, out):
    """Copy the rows at `addresses` (int64 [n]), an even number of bytes each, to `out` in order."""
    target = out.ctypes.data
    n = addresses.size
    for i in range(n):
        if i + AHEAD < n:
            _prefetch_row(addresses[i + AHEAD], row_bytes)
        _copy_row(target + i * row_bytes, addresses[i], row_bytes)


@njit(**JIT)
def scatter_rows(addresses, positions, row_bytes, out):
    """Copy the row at `addresses[i]` (int64 [n]) to row `positions[i]` (int32 [n]) of `out`."""
    target = out.ctypes.data
    n = addresses.size
    for i in range(n):
        if i + AHEAD < n:
            _prefetch_row(addresses[i + AHEAD], row_bytes)
        _copy_row(target + np.int64(positions[i]) * row_bytes, addresses[i], row_bytes)


@njit(**JIT)
def point_at_slots(rows, first_slot, remap):
    """Make the remap point row i of `rows` (int32 [n]) at slot `first_slot + i`."""
    base = remap.ctypes.data
    n = rows.size
    for i in range(n):
        if i + AHEAD < n:
            prefetch_write(base + np.int64(rows[i + AHEAD]) * 4)
        remap[rows[i]] = np.int32(first_slot + i + 1)


@njit(**JIT)
def move_places(rows, old_places, new_places, remap):
    """Where the remap of `rows[i]` is still `old_places[i]`, make it `new_places[i]`.

    A later commit may have moved the row on; its entry is then left alone.
    """
    base = remap.ctypes.data
    n = rows.size
    for i in range(n):
        if i + AHEAD < n:
            prefetch_write(base + np.int64(rows[i + AHEAD]) * 4)
        if remap[rows[i]] == old_places[i]:
            remap[rows[i]] = new_places[i]


@njit(**JIT)
def forget_slots(rows, first_slot, remap):
    """Where the remap of `rows[i]` is still slot `first_slot + i`, send it back to the base."""
    base = remap.ctypes.data
    n = rows.size
    for i in range(n):
        if i + AHEAD < n:
            prefetch_write(base + np.int64(rows[i + AHEAD]) * 4)
        if remap[rows[i]] == np.int32(first_slot + i + 1):
            remap[rows[i]] = 0


@njit(**JIT)
def last_slots(rows, seen, live):
    """Positions at which each row of a log occurs for the last time, ascending.

    Args:
        rows: int32 [n], the row ids of n slots in the order of writing.
        seen: uint8 [table rows / 8 + 1] scratch, zero before and after.
        live: int32 [n] output.

    Returns:
        The number of live positions, written to the front of `live`.
    """
    n = rows.size
    base = seen.ctypes.data
    first = n
    for i in range(n - 1, -1, -1):
        if i >= AHEAD:
            prefetch_write(base + (np.int64(rows[i - AHEAD]) >> 3))
        row = np.int64(rows[i])
        bit = np.uint8(1 << (row & 7))
        if not seen[row >> 3] & bit:
            seen[row >> 3] |= bit
            first -= 1
            live[first] = i
    count = n - first
    for i in range(count):
        live[i] = live[first + i]
        seen[np.int64(rows[live[i]]) >> 3] = 0
    return count


@njit(**JIT)
def slot_addresses(block, positions, row_bytes, addresses):
    """Addresses of the rows at `positions` (int32 [n]) of a dense block."""
    for i in range(positions.size):
        addresses[i] = block.ctypes.data + np.int64(positions[i]) * row_bytes


@njit(**JIT)
def newest_in_chunk(rows, first_slot, first_row, places):
    """Note which slots of one segment hold rows of one base chunk.

    Called with the segments of a fold from oldest to newest, so that the newest slot stays.

    Args:
        rows: int32 [n] row ids of the segment's slots.
        first_slot: the segment's first overlay slot.
        first_row: the chunk's first row.
        places: int32 [rows of the chunk], in and out.
    """
    last_row = first_row + places.size
    for i in range(rows.size):
        row = np.int64(rows[i])
        if first_row <= row < last_row:
            places[row - first_row] = np.int32(first_slot + i + 1)
