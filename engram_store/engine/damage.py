"""Which blocks of a table's files are known to be damaged, and whose rows they hold.

A row of a damaged block is refused, never served: its reader gets a `ChecksumError` that names
file, block and rows, whether values, state or row ids are damaged. Rows that have a newer version
elsewhere are none of its rows.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_store.errors import ChecksumError
from engram_store.types import RowIds

_NAMED_ROWS = 8


@dataclass(frozen=True, slots=True)
class BlockDamage:
    """One damaged block of a base chunk or of a segment's file."""

    layer: int
    path: Path
    block: int
    problem: str
    """To be read after the block's number."""
    first: int
    """First row of a base chunk's block, first slot of a segment's."""
    stop: int
    """Behind the last one; equal to `first` where only padding is concerned."""
    segment: int | None
    """The segment's number; None: the file is a base chunk."""
    source: object = field(compare=False, repr=False)
    """The description that the file was read for."""
    array: str
    """Array of the base, or name of the segment's file."""
    chunk: int = 0

    @property
    def key(self) -> tuple[int | None, str, int, int]:
        """Which block it is, in whatever generation of the base."""
        return self.segment, self.array, self.chunk, self.block

    @property
    def where(self) -> str:
        """Its rows, for people."""
        if self.first >= self.stop:
            return "padding after the last row"
        what = "rows" if self.segment is None else "slots"
        return f"{what} {self.first:,} to {self.stop - 1:,}"

    def __str__(self) -> str:
        return f"{self.path}: {self._what}"

    @property
    def _what(self) -> str:
        return f"block {self.block:,} (layer {self.layer}, {self.where}) {self.problem}"

    def error(self, rows: RowIds | None = None) -> ChecksumError:
        """The error for who needs the block; `rows` are those that were asked for."""
        text = self._what
        if rows is not None:
            named = ", ".join(f"{row:,}" for row in rows[:_NAMED_ROWS].tolist())
            more = f" and {rows.size - _NAMED_ROWS:,} more" if rows.size > _NAMED_ROWS else ""
            text += f"; row{'s' * (rows.size > 1)} {named}{more} asked for cannot be served"
        return ChecksumError(
            self.path,
            f"{text}. Restore a snapshot without this block (`engram-store verify` tells which "
            "are sound), or close the store and restore the file from a backup",
        )


def refuse_damaged(
    damages: list[BlockDamage],
    first_slots: dict[int, int],
    rows: RowIds,
    places: NDArray[np.int32],
) -> None:
    """Refuse rows whose place is in a damaged block.

    Args:
        damages: known ones of the table.
        first_slots: first overlay slot of each segment, by number.
        rows, places: int32 [n], see `kernels.rows.locate`.

    Raises:
        ChecksumError: naming file, block and rows.
    """
    for damage in damages:
        if damage.segment is None:
            hit = (places == 0) & (rows >= damage.first) & (rows < damage.stop)
        else:
            # A place is its slot plus one.
            first = first_slots[damage.segment] + 1
            hit = (places >= first + damage.first) & (places < first + damage.stop)
        if hit.any():
            raise damage.error(rows[hit])
