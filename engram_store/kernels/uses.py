"""Counting how often rows are used, and finding those used most."""

import numpy as np
from numba import njit

from engram_store.kernels.intrinsics import prefetch_write
from engram_store.kernels.rows import AHEAD, JIT

MOST_USES = (1 << 16) - 1
"""Where a count stays."""


@njit(**JIT)
def count_uses(rows, uses):
    """Add one to the count of every row asked for, up to `MOST_USES`.

    Args:
        rows: int32 [n]; repeats count each.
        uses: uint16 [table rows], in and out.
    """
    base = uses.ctypes.data
    n = rows.size
    for i in range(n):
        if i + AHEAD < n:
            prefetch_write(base + np.int64(rows[i + AHEAD]) * 2)
        count = np.int64(uses[rows[i]])
        uses[rows[i]] = np.uint16(count + np.int64(count < MOST_USES))


@njit(**JIT)
def rows_by_count(uses, found):
    """How many rows have each count: uint16 [table rows] into int64 [MOST_USES + 1], zero before.

    Not `numpy.bincount`, which makes eight bytes of every two first.
    """
    for i in range(uses.size):
        found[np.int64(uses[np.uint64(i)])] += 1


@njit(**JIT)
def most_used(uses, starts, out):
    """The rows used most, most used first, rows used equally often by their ids.

    Args:
        uses: uint16 [table rows].
        starts: int64 [MOST_USES + 1], scratch: for each count, how many rows have a larger one.
        out: int32 [n] output, n at most the rows there are.
    """
    for i in range(uses.size):
        count = np.int64(uses[np.uint64(i)])
        position = starts[count]
        # Of the rows with the least count that gets in, some may be too many.
        if position < out.size:
            out[position] = i
            starts[count] = position + 1
