"""The gradients of one step and table: checked when pushed, summed per row when committed."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.lookup import LookupScratch
from engram_store.errors import DtypeError, NonFiniteGradientError, ShapeError
from engram_store.kernels import gradients as kernels
from engram_store.kernels.convert import widen_rows
from engram_store.types import GradientBlock, NonFinitePolicy, RowIds, TableSpec


@dataclass(frozen=True, slots=True)
class GradientPart:
    """What one window pushed for one table."""

    rows: RowIds
    gradients: GradientBlock
    bad: NDArray[np.bool_] | None
    """Rows with NaN or infinity that are to be skipped; None: there are none."""


@dataclass(frozen=True, slots=True)
class SummedGradients:
    """One table's gradients of a whole step."""

    rows: RowIds
    """int32 [n], distinct."""
    sums: NDArray[np.float32]
    """[n, dim]."""
    skipped: int
    """Rows left out because of NaN or infinity."""
    positions: list[NDArray[np.int32]] | None = None
    """int32 [n] of each part: where its rows are among `rows`, if none is left out; None: there is
    one part, and they are the same."""


def check_part(spec: TableSpec, step: int, rows: RowIds, gradients: GradientBlock) -> GradientPart:
    """Check what a window pushes.

    Raises:
        ShapeError, DtypeError, NonFiniteGradientError.
    """
    if gradients.dtype not in (np.float32, np.uint16):
        raise DtypeError("the gradient", gradients.dtype, "float32, or uint16 (bfloat16 bits)")
    if gradients.shape != (rows.size, spec.dim):
        raise ShapeError("the gradient", gradients.shape, f"({rows.size}, {spec.dim})")
    if not gradients.flags.c_contiguous:
        raise ShapeError("the gradient", gradients.shape, "C-contiguous memory")
    if spec.on_nonfinite is NonFinitePolicy.ACCEPT:
        return GradientPart(rows, gradients, None)
    bad = np.empty(rows.size, np.bool_)
    if gradients.dtype == np.float32:
        count = kernels.nonfinite_rows(gradients.view(np.uint32), np.uint32(0x7F800000), bad)
    else:
        count = kernels.nonfinite_rows(gradients, np.uint16(0x7F80), bad)
    if not count:
        return GradientPart(rows, gradients, None)
    if spec.on_nonfinite is NonFinitePolicy.REJECT:
        raise NonFiniteGradientError(spec.layer, step, int(count), int(rows[np.argmax(bad)]))
    return GradientPart(rows, gradients, bad)


class GradientSummer:
    """Sums the parts of a step in their order; reuses its memory, belongs to one stream."""

    def __init__(self, spec: TableSpec) -> None:
        self._spec = spec
        self._room = np.empty((0, spec.dim), np.float32)

    def _sums(self, n: int) -> NDArray[np.float32]:
        if len(self._room) < n:
            self._room = np.empty((n + n // 4, self._spec.dim), np.float32)
        return self._room[:n]

    def sum_parts(self, parts: list[GradientPart], scratch: LookupScratch) -> SummedGradients:
        """fp32 sums per row. A single float32 part is passed on without a copy."""
        if not parts:
            nothing = np.empty((0, self._spec.dim), np.float32)
            return SummedGradients(np.empty(0, np.int32), nothing, 0)
        if len(parts) == 1:
            rows, sums, positions = parts[0].rows, self._widened(parts[0].gradients), None
        else:
            rows, positions = scratch.merge([part.rows for part in parts])
            sums = self._sums(rows.size)
            sums[:] = 0
            for part, where in zip(parts, positions, strict=True):
                kernels.add_rows(part.gradients, where, sums)
        if all(part.bad is None for part in parts):
            return SummedGradients(rows, sums, 0, positions)
        return _without_bad_rows(rows, sums, parts, positions)

    def _widened(self, gradients: GradientBlock) -> NDArray[np.float32]:
        if gradients.dtype == np.float32:
            return gradients
        sums = self._sums(len(gradients))
        widen_rows(gradients, sums)
        return sums


def _without_bad_rows(
    rows: RowIds,
    sums: NDArray[np.float32],
    parts: list[GradientPart],
    positions: list[NDArray[np.int32]] | None,
) -> SummedGradients:
    """A row that is bad in one part is left out of the whole step."""
    bad = np.zeros(rows.size, np.bool_)
    for index, part in enumerate(parts):
        if part.bad is not None:
            where = np.arange(rows.size) if positions is None else positions[index]
            bad[where] |= part.bad
    return SummedGradients(rows[~bad], sums[~bad], int(bad.sum()))
