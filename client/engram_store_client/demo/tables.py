"""Looks at a store's tables from outside, as they are on disk."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.reader import Reader
from engram_store.layout.metadata import read_metadata
from engram_store.layout.paths import StorePaths
from engram_store.types import RowBlock

_BLOCK_ROWS = 1 << 17

Block = tuple[int, RowBlock, NDArray[np.float32]]
"""A layer, some of its rows, and their optimiser state."""


def table_blocks(path: Path, step: int | None = None) -> Iterator[Block]:
    """All rows of all tables at a snapshot; of None, the newest."""
    paths = StorePaths(path)
    metadata = read_metadata(paths)
    reader = Reader(paths, metadata, step)
    try:
        for layer, spec in metadata.tables.items():
            for first in range(0, spec.rows, _BLOCK_ROWS):
                count = min(_BLOCK_ROWS, spec.rows - first)
                yield layer, *reader.tables[layer].read_range(first, count)
    finally:
        reader.close()


@dataclass(frozen=True, slots=True)
class RowCount:
    """How much of a store was trained."""

    changed: int
    """Rows that differ from those the store was created with."""
    total: int


def changed_rows(path: Path) -> RowCount:
    """Compare a store's newest snapshot with its first."""
    changed = total = 0
    for (_, then, _), (_, now, _) in zip(table_blocks(path, 0), table_blocks(path), strict=True):
        changed += int((then != now).any(axis=1).sum())
        total += len(now)
    return RowCount(changed, total)
