"""The update rules in plain numpy: the oracle of the compiled ones, equal bit for bit."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.optimizers.rules import Step, row_seeds
from engram_store.types import OptimizerKind, RowBlock, RowDtype, RowIds, TableSpec

_LANES = 16
Float32 = NDArray[np.float32]


def widen(rows: RowBlock) -> Float32:
    """float32 values of rows in storage dtype (uint16 holds bfloat16 bits)."""
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return rows.astype(np.float32)


def _bf16_bits(values: Float32, addend: NDArray[np.uint32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    rounded = (bits + addend) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def narrow(values: Float32, dtype: RowDtype) -> RowBlock:
    """Values in storage dtype, rounded to nearest, ties to even."""
    if dtype is RowDtype.BFLOAT16:
        odd = (values.view(np.uint32) >> np.uint32(16)) & np.uint32(1)
        return _bf16_bits(values, odd + np.uint32(0x7FFF))
    with np.errstate(over="ignore"):
        return values.astype(dtype.storage)


def narrow_stochastic(values: Float32, seeds: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """bfloat16 bits of [n, dim], rounded at random from the row's seed and the element number."""
    elements = np.arange(values.shape[1], dtype=np.uint32)
    mixed = seeds[:, None] + elements * np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed ^= mixed >> np.uint32(shift)
        mixed *= np.uint32(factor)
    mixed ^= mixed >> np.uint32(16)
    return _bf16_bits(values, mixed & np.uint32(0xFFFF))


def sum_squares(values: Float32) -> Float32:
    """float32 [n] sums of squares of [n, dim]: 16 lanes, then halves."""
    n, dim = values.shape
    padded = np.zeros((n, -(-dim // _LANES) * _LANES), np.float32)
    padded[:, :dim] = values
    squares = padded * padded
    lanes = np.zeros((n, _LANES), np.float32)
    for start in range(0, padded.shape[1], _LANES):
        lanes = lanes + squares[:, start : start + _LANES]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def _divisor(squares: Float32, step: Step) -> Float32:
    divisor: Float32 = np.sqrt(squares) + step.eps
    return divisor


def _update(
    spec: TableSpec, step: Step, weights: Float32, state: Float32, gradients: Float32
) -> tuple[Float32, Float32]:
    """New float32 weights and state."""
    match spec.optimizer:
        case OptimizerKind.SGD:
            return weights - step.rate * gradients, state
        case OptimizerKind.ROWWISE_ADAGRAD:
            total: Float32 = state + (sum_squares(gradients) / np.float32(spec.dim))[:, None]
            rate = step.rate / _divisor(total, step)
            return weights - rate * gradients, total
        case OptimizerKind.ADAGRAD:
            total = state + gradients * gradients
            return weights - step.rate * (gradients / _divisor(total, step)), total
        case OptimizerKind.ADAM:
            first, second = state[:, : spec.dim], state[:, spec.dim :]
            first = first + (gradients - first) * step.decay1
            second = second + (gradients * gradients - second) * step.decay2
            change = step.rate * (first / _divisor(second, step))
            return weights - change, np.concatenate([first, second], axis=1)


def apply_reference(
    spec: TableSpec,
    step: Step,
    rows: RowIds,
    weights: RowBlock,
    state: NDArray[Any],
    gradients: Float32,
) -> tuple[RowBlock, Float32]:
    """Post-images of rows and state under one optimiser step.

    Args:
        spec: dtype, optimiser and rounding of the table.
        step: the step's scalars.
        rows: int32 [n] row ids, distinct; they seed stochastic rounding.
        weights: storage dtype [n, dim].
        state: float32 [n, spec.state_width].
        gradients: float32 [n, dim], summed per row.

    Returns:
        Storage dtype [n, dim] and float32 [n, spec.state_width].
    """
    with np.errstate(all="ignore"):
        values, new_state = _update(spec, step, widen(weights), state, gradients * step.scale)
        if spec.dtype is RowDtype.BFLOAT16 and spec.stochastic_rounding:
            return narrow_stochastic(values, row_seeds(step.seed, rows)), new_state
        return narrow(values, spec.dtype), new_state
