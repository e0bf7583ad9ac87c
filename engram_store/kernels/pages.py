"""Rows and the pages under them: which have to be read first, and which changed meanwhile.

Every extent (a base chunk, a block of overlay slots) may have a residency vector: one byte per
4 KiB, whatever a page is on this machine, of which 1 says "believed to be in memory". The extent's
entry in `chunk_pages` or `block_pages` is the address of its first byte; 0 instead says that it is
always in memory (`paging.residency` keeps the vectors). Bytes are loaded and stored without a lock
while others change them. One that is out of date costs a needless read or a page fault; which bytes
a row has never depends on it.
"""

import mmap

import numpy as np
from numba import njit, types

from engram_store.kernels.intrinsics import (
    choose,
    load1,
    load8,
    prefetch_read,
    store1,
)
from engram_store.kernels.rows import AHEAD, JIT, _copy_row, _prefetch_row

ABSENT, RESIDENT, READING = np.uint8(0), np.uint8(1), np.uint8(2)
"""A page is not in memory, is believed to be, or is about to be read."""
UNIT_BYTES = 4096
"""What one byte of a residency vector stands for: a page, or part of a larger one."""
_UNIT_SHIFT = 12
PAGE_BYTES = mmap.PAGESIZE
"""What is read at least."""
_PAGE_SHIFT = PAGE_BYTES.bit_length() - 1
_ALWAYS = np.array([RESIDENT])
"""Stands for the residency of extents that have none."""
_WILLNEED = np.int32(3)
"""Of madvise and posix_fadvise alike."""
_madvise = types.ExternalFunction("madvise", types.int32(types.int64, types.int64, types.int32))
_posix_fadvise = types.ExternalFunction(
    "posix_fadvise", types.int32(types.int32, types.int64, types.int64, types.int32)
)


@njit(inline="always")
def _all_resident(first, last):
    """Whether the bytes at addresses first..last say so. Most rows lie in one page or two."""
    resident = load1(last) == RESIDENT
    for page in range(first, last):
        resident &= load1(page) == RESIDENT
    return resident


@njit(**JIT)
def split_cold(
    rows,
    places,
    chunks,
    chunk_pages,
    chunk_shift,
    blocks,
    block_pages,
    block_shift,
    row_bytes,
    addresses,
    warm,
    cold,
):
    """Address of every row, and whether all its pages are believed to be in memory.

    Absent pages of cold rows count as being read from now on. Base or overlay is chosen without a
    branch: which it is is random, and mispredicted branches cost more than all the rest here.

    Args:
        rows, places: int32 [n].
        chunks, chunk_pages, chunk_shift: int64 address of each base chunk and of its residency,
            log2 of its rows.
        blocks, block_pages, block_shift: the same of the overlay blocks, log2 of their slots.
        row_bytes: bytes of a row.
        addresses: int64 [>= n] output, as of `rows.find_addresses`.
        warm: int32 [>= n] output: positions of the rows in memory, ascending.
        cold: int32 [>= n] output: positions of the others, ascending.

    Returns:
        How many rows are cold; the other rows are warm.
    """
    chunk_mask = (np.int64(1) << chunk_shift) - 1
    block_mask = (np.int64(1) << block_shift) - 1
    chunk_starts, chunk_bytes = chunks.ctypes.data, chunk_pages.ctypes.data
    block_starts, block_bytes = blocks.ctypes.data, block_pages.ctypes.data
    always = _ALWAYS.ctypes.data
    in_one_page = UNIT_BYTES % row_bytes == 0
    warm_count = np.int64(0)
    cold_count = np.int64(0)
    for i in range(rows.size):
        place = np.int64(places[i])
        overlay = place != 0
        index = choose(overlay, place - 1, np.int64(rows[i]))
        offset = (index & choose(overlay, block_mask, chunk_mask)) * row_bytes
        extent = (index >> choose(overlay, block_shift, chunk_shift)) << 3
        addresses[i] = load8(choose(overlay, block_starts, chunk_starts) + extent) + offset
        pages = load8(choose(overlay, block_bytes, chunk_bytes) + extent)
        first = choose(pages == 0, always, pages + (offset >> _UNIT_SHIFT))
        last = first
        if not in_one_page and pages:
            last = pages + ((offset + row_bytes - 1) >> _UNIT_SHIFT)
        if load1(first) == RESIDENT and (in_one_page or _all_resident(first, last)):
            warm[np.uint64(warm_count)] = np.int32(i)
            warm_count += 1
        else:
            cold[np.uint64(cold_count)] = np.int32(i)
            cold_count += 1
            for page in range(first, last + 1):
                if load1(page) == ABSENT:
                    store1(page, READING)
    return cold_count


@njit(**JIT)
def mark_resident(
    rows, places, positions, chunk_pages, chunk_shift, block_pages, block_shift, row_bytes
):
    """Pages of rows that were just copied are in memory.

    Give it the arrays of addresses as they are now, whatever they were when the rows were split:
    an extent that took another's place gets a few wrong marks, which the next refresh removes,
    while the vector of one that is gone may be gone too.

    Args:
        rows, places: int32, as given to `split_cold`.
        positions: int32 [n], which of them.
        chunk_pages, chunk_shift, block_pages, block_shift: see `split_cold`.
        row_bytes: bytes of a row.
    """
    chunk_mask = (np.int64(1) << chunk_shift) - 1
    block_mask = (np.int64(1) << block_shift) - 1
    for i in range(positions.size):
        at = np.uint64(positions[i])
        row, slot = np.int64(rows[at]), np.int64(places[at]) - 1
        if slot < 0:
            offset = (row & chunk_mask) * row_bytes
            pages = chunk_pages[np.uint64(row >> chunk_shift)]
        else:
            offset = (slot & block_mask) * row_bytes
            pages = block_pages[np.uint64(slot >> block_shift)]
        if pages:
            first = offset >> _UNIT_SHIFT
            last = (offset + row_bytes - 1) >> _UNIT_SHIFT
            for page in range(pages + first, pages + last + 1):
                store1(page, RESIDENT)


@njit(**JIT)
def refresh_resident(pages, told):
    """Take over what the kernel said; a page being read stays so until it is in memory.

    Args:
        pages: uint8 [n] of a residency vector, in and out.
        told: uint8 [n] from mincore: bit 0 of each byte.

    Returns:
        How many pages are not in memory.
    """
    missing = np.int64(0)
    for i in range(pages.size):
        in_memory = told[i] & RESIDENT
        reading = pages[i] & READING
        pages[i] = RESIDENT if in_memory else reading
        missing += np.int64(in_memory == 0)
    return missing


@njit(**JIT)
def page_ranges(sorted_addresses, row_bytes, ranges):
    """The distinct pages under rows, neighbours joined.

    They are `ranges[:count, 1].sum() // PAGE_BYTES` pages.

    Args:
        sorted_addresses: int64 [n], ascending.
        row_bytes: bytes of a row.
        ranges: int64 [>= n, 2] output: address and length in bytes, ascending and disjoint.

    Returns:
        How many ranges there are.
    """
    count = np.int64(0)
    start, end = np.int64(0), np.int64(-1)
    for i in range(sorted_addresses.size):
        address = sorted_addresses[i]
        first = (address >> _PAGE_SHIFT) << _PAGE_SHIFT
        after = ((address + row_bytes - 1) >> _PAGE_SHIFT << _PAGE_SHIFT) + PAGE_BYTES
        if first > end:
            if end >= 0:
                ranges[count, 0], ranges[count, 1] = start, end - start
                count += 1
            start = first
        end = after
    if end >= 0:
        ranges[count, 0], ranges[count, 1] = start, end - start
        count += 1
    return count


@njit(**JIT)
def copy_rows_at(addresses, positions, row_bytes, out):
    """Copy some rows to their places in a block.

    Args:
        addresses: int64 [n] of all rows.
        positions: int32 [m]: row i lies at `addresses[positions[i]]` and goes to that row of `out`.
        row_bytes: bytes of a row, an even number.
        out: uint8 [>= n * row_bytes]; other rows are left alone.
    """
    target = out.ctypes.data
    n = positions.size
    for i in range(n):
        if i + AHEAD < n:
            _prefetch_row(addresses[np.uint64(positions[i + AHEAD])], row_bytes)
        at = np.uint64(positions[i])
        _copy_row(target + np.int64(at) * row_bytes, addresses[at], row_bytes)


@njit(**JIT)
def changed_places(rows, remap, places, block_clocks, block_shift, base_clock, clock, positions):
    """Which rows are no longer what they were when they were copied.

    A row changed if the remap sends it elsewhere now, or if its extent got other contents since.

    Args:
        rows: int32 [n].
        remap: int32 [table rows].
        places: int32 [n], in and out: where they were copied from; where they are now.
        block_clocks: int64 [blocks]: when each block of overlay slots was last assigned.
        block_shift: log2 of the slots of a block.
        base_clock: when the base was last assigned.
        clock: when the rows were copied.
        positions: int32 [>= n] output: which rows changed, ascending.

    Returns:
        How many did.
    """
    base = remap.ctypes.data
    count = np.int64(0)
    base_is_newer = base_clock > clock
    n = rows.size
    for i in range(n):
        if i + AHEAD < n:
            prefetch_read(base + np.int64(rows[i + AHEAD]) * 4)
        place = remap[rows[i]]
        changed = place != places[i]
        if place == 0:
            changed |= base_is_newer
        else:
            changed |= block_clocks[np.uint64((np.int64(place) - 1) >> block_shift)] > clock
        places[i] = place
        positions[np.uint64(count)] = np.int32(i)
        count += np.int64(changed)
    return count


@njit(**JIT)
def advise(ranges):
    """madvise(WILLNEED) for each range (int64 [n, 2]: address, length); returns how many failed."""
    failed = np.int64(0)
    for i in range(ranges.shape[0]):
        failed += np.int64(_madvise(ranges[i, 0], ranges[i, 1], _WILLNEED) != 0)
    return failed


@njit(**JIT)
def advise_files(ranges, starts, lengths, descriptors):
    """posix_fadvise(WILLNEED) for the file under each range.

    Args:
        ranges: int64 [n, 2]: address, length in bytes.
        starts, lengths: int64 [files]: where each file is mapped, from its first byte; ascending.
        descriptors: int32 [files].

    Returns:
        How many ranges failed, or lie under no file.
    """
    failed = np.int64(0)
    for i in range(ranges.shape[0]):
        address, end = ranges[i, 0], ranges[i, 0] + ranges[i, 1]
        at = np.searchsorted(starts, address, side="right") - 1
        done = np.int64(0)
        # Files that are mapped one behind the other may share a range.
        while at >= 0 and at < starts.size and address < end and starts[at] <= address:
            mapped_end = starts[at] + lengths[at]
            if address >= mapped_end:
                break
            length = min(end, mapped_end) - address
            error = _posix_fadvise(descriptors[at], address - starts[at], length, _WILLNEED)
            if error != 0:
                break
            done += length
            address += length
            at += 1
        failed += np.int64(done < ranges[i, 1])
    return failed
