"""The update rules, compiled: one fused pass from old rows to new slots.

Every rule is specialised for the row length (its loops get a constant trip count) and for the
stored dtype (told by the arrays' types). Old and new rows are different memory on purpose: a
dense pass from one block to another streams, and is faster than the same update in place.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from engram_store.kernels.intrinsics import narrow, narrow_stochastic, sum_squares, widen
from engram_store.kernels.rows import JIT
from engram_store.optimizers.rules import Step
from engram_store.types import OptimizerKind, RowBlock, RowDtype, RowIds, TableSpec

_ROW_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SEED_FACTOR = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)


@njit(inline="always")
def _row_seed(seed, row):
    mixed = seed ^ (np.uint64(row) * _ROW_FACTOR)
    mixed = (mixed ^ (mixed >> _HALF)) * _SEED_FACTOR
    return np.uint32(mixed >> _HALF)


@functools.cache
def _sgd(dim: int, stochastic: bool) -> Any:
    @njit(**JIT)
    def sgd(
        rows, old, _state, gradients, which, scale, rate, _eps, _d1, _d2, seed, new, _new_state
    ):
        for i in range(rows.size):
            source, gradient, target = old[i], gradients[np.uint64(which[i])], new[i]
            base = _row_seed(seed, rows[i])
            for k in range(dim):
                value = widen(source[k]) - rate * (gradient[k] * scale)
                if stochastic:
                    target[k] = narrow_stochastic(value, base, k)
                else:
                    target[k] = narrow(value, target[k])

    return sgd


@functools.cache
def _rowwise_adagrad(dim: int, stochastic: bool) -> Any:
    @njit(**JIT)
    def rowwise_adagrad(
        rows, old, state, gradients, which, scale, rate, eps, _d1, _d2, seed, new, new_state
    ):
        for i in range(rows.size):
            source, gradient, target = old[i], gradients[np.uint64(which[i])], new[i]
            total = state[i, 0] + sum_squares(gradient, scale) / np.float32(dim)
            new_state[i, 0] = total
            row_rate = rate / (np.sqrt(total) + eps)
            base = _row_seed(seed, rows[i])
            for k in range(dim):
                value = widen(source[k]) - row_rate * (gradient[k] * scale)
                if stochastic:
                    target[k] = narrow_stochastic(value, base, k)
                else:
                    target[k] = narrow(value, target[k])

    return rowwise_adagrad


@functools.cache
def _adagrad(dim: int, stochastic: bool) -> Any:
    @njit(**JIT)
    def adagrad(
        rows, old, state, gradients, which, scale, rate, eps, _d1, _d2, seed, new, new_state
    ):
        for i in range(rows.size):
            source, gradient, target = old[i], gradients[np.uint64(which[i])], new[i]
            sums, new_sums = state[i], new_state[i]
            base = _row_seed(seed, rows[i])
            for k in range(dim):
                g = gradient[k] * scale
                total = sums[k] + g * g
                new_sums[k] = total
                value = widen(source[k]) - rate * (g / (np.sqrt(total) + eps))
                if stochastic:
                    target[k] = narrow_stochastic(value, base, k)
                else:
                    target[k] = narrow(value, target[k])

    return adagrad


@functools.cache
def _adam(dim: int, stochastic: bool) -> Any:
    @njit(**JIT)
    def adam(
        rows, old, state, gradients, which, scale, rate, eps, decay1, decay2, seed, new, new_state
    ):
        for i in range(rows.size):
            source, gradient, target = old[i], gradients[np.uint64(which[i])], new[i]
            moments, new_moments = state[i], new_state[i]
            base = _row_seed(seed, rows[i])
            for k in range(dim):
                g = gradient[k] * scale
                first = moments[k] + (g - moments[k]) * decay1
                second = moments[dim + k] + (g * g - moments[dim + k]) * decay2
                new_moments[k] = first
                new_moments[dim + k] = second
                value = widen(source[k]) - rate * (first / (np.sqrt(second) + eps))
                if stochastic:
                    target[k] = narrow_stochastic(value, base, k)
                else:
                    target[k] = narrow(value, target[k])

    return adam


_RULES: dict[OptimizerKind, Callable[[int, bool], Any]] = {
    OptimizerKind.SGD: _sgd,
    OptimizerKind.ROWWISE_ADAGRAD: _rowwise_adagrad,
    OptimizerKind.ADAGRAD: _adagrad,
    OptimizerKind.ADAM: _adam,
}


def kernel_view(rows: RowBlock) -> RowBlock:
    """Rows as the kernels want them: float16 as int16 bits, everything else as it is."""
    return rows.view(np.int16) if rows.dtype == np.float16 else rows


_identity = np.empty(0, np.int32)


def _all_in_order(n: int) -> NDArray[np.int32]:
    """0, 1, ... n - 1, in memory that is used again."""
    global _identity
    identity = _identity
    if identity.size < n:
        _identity = identity = np.arange(2 * n, dtype=np.int32)
    return identity[:n]


def apply_update(
    spec: TableSpec,
    step: Step,
    rows: RowIds,
    old: RowBlock,
    old_state: Any,
    gradients: Any,
    new: RowBlock,
    new_state: Any,
    which: NDArray[np.int32] | None = None,
) -> None:
    """Write the post-images of rows and state to `new` and `new_state`.

    Same arguments and results as `reference.apply_reference`, outputs preallocated and different
    memory from the inputs; all arrays are C-contiguous.

    Args:
        spec, step, rows, old, old_state: as there, of n rows.
        gradients: float32 [m, dim].
        new, new_state: outputs, shaped as `old` and `old_state`.
        which: int32 [n]: the row of `gradients` that belongs to each row; None: the same one.
    """
    stochastic = spec.dtype is RowDtype.BFLOAT16 and spec.stochastic_rounding
    kernel = _RULES[spec.optimizer](spec.dim, stochastic)
    kernel(
        rows,
        kernel_view(old),
        old_state,
        gradients,
        _all_in_order(rows.size) if which is None else which,
        step.scale,
        step.rate,
        step.eps,
        step.decay1,
        step.decay2,
        step.seed,
        kernel_view(new),
        new_state,
    )
