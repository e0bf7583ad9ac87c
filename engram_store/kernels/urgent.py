"""Which rows of a commit the next window waits for: small hash tables of row ids."""

import numpy as np
from numba import njit

from engram_store.kernels.intrinsics import prefetch_read, prefetch_write
from engram_store.kernels.rows import JIT

_AHEAD = 16
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@njit(inline="always")
def _shift_of(slots):
    """64 - log2 of the slots: the top bits of a product are the best mixed."""
    shift = np.uint64(64)
    while slots.size >> np.int64(np.uint64(64) - shift) > 1:
        shift -= np.uint64(1)
    return shift


@njit(**JIT)
def index_rows(rows, slots):
    """Make row ids findable. Open addressing with linear probing.

    Args:
        rows: int32 [n], distinct, not negative.
        slots: uint32 [power of two, at least 2 n] output: position in `rows` plus one, or 0.
    """
    slots[:] = 0
    one, ahead = np.uint64(1), np.uint64(_AHEAD)
    mask, shift = np.uint64(slots.size - 1), _shift_of(slots)
    base, n = slots.ctypes.data, np.uint64(rows.size)
    for i in range(n):
        if i + ahead < n:
            later = (np.uint64(rows[i + ahead]) * _GOLDEN) >> shift
            prefetch_write(base + np.int64(later) * 4)
        probe = (np.uint64(rows[i]) * _GOLDEN) >> shift
        while slots[probe] != 0:
            probe = (probe + one) & mask
        slots[probe] = np.uint32(i + one)


@njit(**JIT)
def wanted_first(rows, wanted, slots, order, targets):
    """Order the rows of a commit: those that a window wants before all others.

    Args:
        rows: int32 [n], distinct.
        wanted: int32 [m]: the window's rows, in `slots` by `index_rows`.
        slots: uint32 [power of two].
        order: int32 [n] output: positions in `rows`, the wanted ones first, each part ascending.
        targets: int32 [min(n, m)] output: position in `wanted` of each row that comes first.

    Returns:
        How many rows are wanted.
    """
    one, ahead = np.uint64(1), np.uint64(_AHEAD)
    mask, shift = np.uint64(slots.size - 1), _shift_of(slots)
    base, n = slots.ctypes.data, np.uint64(rows.size)
    found, left = np.uint64(0), n
    for i in range(n):
        if i + ahead < n:
            later = (np.uint64(rows[i + ahead]) * _GOLDEN) >> shift
            prefetch_read(base + np.int64(later) * 4)
        row = rows[i]
        probe = (np.uint64(row) * _GOLDEN) >> shift
        position = np.uint64(0)
        while True:
            held = np.uint64(slots[probe])
            if held == 0:
                break
            if wanted[held - one] == row:
                position = held
                break
            probe = (probe + one) & mask
        if position:
            order[found] = np.int32(i)
            targets[found] = np.int32(position - one)
            found += one
        else:
            # From the end, and turned round below.
            left -= one
            order[left] = np.int32(i)
    first, last = left, n
    while first + one < last:
        last -= one
        order[first], order[last] = order[last], order[first]
        first += one
    return np.int64(found)
