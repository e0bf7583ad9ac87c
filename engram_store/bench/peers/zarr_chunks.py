"""A Zarr array, read through zarr-python."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.bench.peers.protocol import PeerRows, Traits
from engram_store.bench.peers.table import BLOCK_ROWS, PeerTable

CHUNK_ROWS = 4096
"""Half a MiB of 128-byte rows: of 512 to 16,384 rows none was much faster."""
MOST_ROWS = 1 << 22


class ZarrChunks:
    """Format 3, no compression, one file per chunk."""

    traits = Traits(
        name="zarr-python",
        what=f"Zarr 3, chunks of {CHUNK_ROWS:,} rows, no codec; get_orthogonal_selection",
        module="zarr",
        distribution="zarr",
        most_rows=MOST_ROWS,
        most_batch_rows=1024,
        most_rounds=5,
    )

    def __init__(self) -> None:
        self._array: Any = None

    def open(self, table: PeerTable) -> int:
        """Write the array unless it is there, then read all of it."""
        import zarr

        held = min(table.rows, MOST_ROWS)
        self._array = zarr.open_array(str(zarr_files(table, held)), mode="r")
        for first in range(0, held, BLOCK_ROWS):
            self._array[first : first + BLOCK_ROWS]
        return held

    def read(self, rows: PeerRows) -> NDArray[np.uint16]:
        """Chunks that rows are in are read whole."""
        answer: NDArray[np.uint16] = self._array.get_orthogonal_selection((rows, slice(None)))
        return answer

    def close(self) -> None:
        """Nothing is held open."""
        self._array = None


def zarr_files(table: PeerTable, held: int) -> Path:
    """Directory of a Zarr array of the first `held` rows; made unless an earlier run did."""

    def write(path: Path) -> None:
        import zarr

        flat = table.flat()
        shape, chunks = (held, table.dim), (min(CHUNK_ROWS, held), table.dim)
        array = zarr.create_array(
            str(path), shape=shape, chunks=chunks, dtype="uint16", compressors=None, overwrite=True
        )
        for first in range(0, held, BLOCK_ROWS):
            block = flat[first : min(first + BLOCK_ROWS, held)]
            array[first : first + len(block)] = np.asarray(block)

    return table.kept("zarr", held, write)
