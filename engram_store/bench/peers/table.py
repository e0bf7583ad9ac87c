"""The table that peers are given, and files of theirs that are kept from run to run."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.memory import memory_headroom_bytes

_SHARE_OF_MEMORY = 2
"""A peer takes this part of free memory at most: the others' rows have to stay cached."""
BLOCK_ROWS = 1 << 18
"""Rows that are copied at once when a peer's files are made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerTable:
    """A table of bfloat16 rows in one file, and where peers may keep copies of it."""

    rows_file: Path
    """uint16 bits [rows, dim], one row after the other."""
    rows: int
    dim: int
    directory: Path
    """Exists, or is made by the first peer that keeps something."""
    training: bool = False
    """Rows will be trained, so that the optimiser's state needs room, too."""

    def flat(self) -> NDArray[np.uint16]:
        """The file, mapped for reading: uint16 [rows, dim]."""
        return np.memmap(self.rows_file, np.uint16, "r").reshape(-1, self.dim)[: self.rows]

    def fitting_rows(self, bytes_per_row: int) -> int:
        """Rows of the table that fit into memory, one at least."""
        fitting = memory_headroom_bytes() // (_SHARE_OF_MEMORY * bytes_per_row)
        return min(self.rows, max(fitting, 1))

    def kept(self, name: str, rows: int, make: Callable[[Path], None]) -> Path:
        """A peer's directory: as an earlier run made it of the same rows, or made now.

        Args:
            name: of the directory.
            rows: how many rows it holds.
            make: fills the empty directory.

        Raises:
            OSError: no room, or a directory that cannot be written.
            Exception: whatever `make` raises. What it made is made again next time.
        """
        place, marker = self.directory / name, self.directory / f"{name}.json"
        source = self.rows_file.stat()
        wanted = json.dumps([rows, self.dim, source.st_size, source.st_mtime_ns])
        if marker.is_file() and marker.read_text() == wanted:
            return place
        marker.unlink(missing_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        make(place)
        marker.write_text(wanted)
        return place
