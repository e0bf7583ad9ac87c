"""`table[rows]` on one mapped file: how the published trainers read tables from disk."""

import numpy as np
from numpy.typing import NDArray

from engram_store.bench.peers.protocol import PeerRows, Traits
from engram_store.bench.peers.table import PeerTable

_PAGE_VALUES = 2048
"""uint16 values of a page."""


class NumpyMapped:
    """A `numpy.memmap`, indexed with an array."""

    traits = Traits(
        name="numpy memmap",
        what="table[rows] on one numpy.memmap, read-only",
        module="numpy",
        distribution="numpy",
        every_lookup=True,
    )

    def __init__(self) -> None:
        self._table = np.empty((0, 0), np.uint16)

    def open(self, table: PeerTable) -> int:
        """Map the file and read a value of every page."""
        self._table = table.flat()
        self._table.reshape(-1)[::_PAGE_VALUES].max()
        return table.rows

    def read(self, rows: PeerRows) -> NDArray[np.uint16]:
        """A copy, as indexing with an array makes one."""
        return self._table[rows]

    def close(self) -> None:
        """Unmap."""
        self._table = np.empty((0, 0), np.uint16)
