"""Checking and summing gradients of unique rows.

Gradients are float32, or uint16 holding bfloat16 bits; sums are float32 in the order of the calls.
"""

import numpy as np
from numba import njit

from engram_store.kernels.intrinsics import prefetch_write, widen
from engram_store.kernels.rows import JIT


@njit(**JIT)
def nonfinite_rows(bits, exponent, bad):
    """Mark the rows that hold NaN or infinity.

    Args:
        bits: uint32 or uint16 [n, dim], the gradients' bits.
        exponent: the bits of an all-ones exponent in the same dtype.
        bad: bool [>= n] output.

    Returns:
        The number of marked rows.
    """
    count = 0
    for i in range(bits.shape[0]):
        largest = bits[i, 0] & exponent
        for k in range(1, bits.shape[1]):
            largest = max(largest, bits[i, k] & exponent)
        bad[i] = largest == exponent
        count += bad[i]
    return count


@njit(**JIT)
def add_rows(gradients, positions, sums):
    """Add row i of `gradients` [n, dim] to row `positions[i]` (int32 [n]) of `sums` (float32)."""
    n, dim = gradients.shape
    base = sums.ctypes.data
    for i in range(n):
        if i + 8 < n:
            ahead = base + np.int64(positions[i + 8]) * dim * 4
            for offset in range(0, dim * 4, 64):
                prefetch_write(ahead + offset)
        total = sums[positions[i]]
        row = gradients[i]
        for k in range(dim):
            total[k] += widen(row[k])


@njit(**JIT)
def sum_of_squares(gradients):
    """float64 sum of squares of float32 [n, dim], row by row."""
    total = np.float64(0)
    for i in range(gradients.shape[0]):
        row = np.float64(0)
        for k in range(gradients.shape[1]):
            row += np.float64(gradients[i, k]) * np.float64(gradients[i, k])
        total += row
    return total
