"""What a table in ordinary memory would cost: our kernels without remap, memtable or files.

Rows are addressed by their number in one array and updated where they are. This is the price list
that durability is compared with, so it is as fast as we can make it.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from engram_store.kernels.intrinsics import (
    copy64,
    narrow_stochastic,
    prefetch_read,
    prefetch_write,
    sum_squares,
    widen,
)
from engram_store.kernels.rows import AHEAD, JIT
from engram_store.optimizers.kernels import _row_seed

_AHEAD_OF_UPDATE = 8
"""Rows between a prefetch and its update; 16 and 32 were 1.1-1.3 times slower."""


def _gather(table: Any, rows: Any, out: Any) -> None:
    """Copy rows (int32 [n]) of `table` to `out`; both uint8 [.., a multiple of 64 bytes]."""
    source, target = table.ctypes.data, out.ctypes.data
    row_bytes = table.shape[1]
    n = rows.size
    for i in range(n):
        if i + AHEAD < n:
            ahead = source + np.int64(rows[i + AHEAD]) * row_bytes
            for offset in range(0, row_bytes, 64):
                prefetch_read(ahead + offset)
        here = source + np.int64(rows[i]) * row_bytes
        for offset in range(0, row_bytes, 64):
            copy64(target + i * row_bytes + offset, here + offset)


gather = njit(**JIT)(_gather)


@cache
def rowwise_adagrad(dim: int) -> Any:
    """One step in place, with stochastic rounding: the engine's rule, bit for bit.

    The compiled function takes:
        table: uint16 [table rows, dim], bfloat16 bits.
        sums: float32 [table rows].
        rows: int32 [n], distinct.
        gradients: float32 [n, dim].
        rate, eps: float32.
        seed: uint64, `optimizers.commit_seed`.
    """
    row_bytes = 2 * dim

    def update(
        table: Any, sums: Any, rows: Any, gradients: Any, rate: Any, eps: Any, seed: Any
    ) -> None:
        weights, state = table.ctypes.data, sums.ctypes.data
        n = rows.size
        for i in range(n):
            if i + _AHEAD_OF_UPDATE < n:
                ahead = np.int64(rows[i + _AHEAD_OF_UPDATE])
                prefetch_write(state + ahead * 4)
                for offset in range(0, row_bytes, 64):
                    prefetch_write(weights + ahead * row_bytes + offset)
            row = rows[i]
            gradient, values = gradients[i], table[row]
            total = sums[row] + sum_squares(gradient, np.float32(1)) / np.float32(dim)
            sums[row] = total
            row_rate = rate / (np.sqrt(total) + eps)
            base = _row_seed(seed, row)
            for k in range(dim):
                values[k] = narrow_stochastic(widen(values[k]) - row_rate * gradient[k], base, k)

    return njit(**JIT)(update)
