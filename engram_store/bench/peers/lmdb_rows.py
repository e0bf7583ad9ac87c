"""A key-value store: one LMDB entry per row."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.bench.peers.protocol import PeerRows, Traits
from engram_store.bench.peers.table import BLOCK_ROWS, PeerTable

_KEY = np.dtype(">u8")
"""Big-endian, so that the order of keys is the order of rows."""
_KEY_BYTES = _KEY.itemsize
_MAP_BYTES_PER_ROW_BYTE = 4
"""Address space that the database may grow into."""


class LmdbRows:
    """All rows of a request are looked up in one read transaction."""

    traits = Traits(
        name="LMDB",
        what="one entry per row, all rows of a request in one read transaction",
        module="lmdb",
        distribution="lmdb",
        most_rows=1 << 22,
        most_rounds=10,
    )

    def __init__(self) -> None:
        self._environment: Any = None
        self._dim = 0

    def open(self, table: PeerTable) -> int:
        """Write the entries unless they are there, then walk over them once."""
        lmdb: Any = importlib.import_module("lmdb")
        held = min(table.rows, self.traits.most_rows or table.rows)
        map_bytes = (64 << 20) + _MAP_BYTES_PER_ROW_BYTE * held * 2 * table.dim
        place = table.kept("lmdb", held, lambda path: _write(lmdb, path, table, held, map_bytes))
        self._environment = lmdb.open(
            str(place), map_size=map_bytes, readonly=True, lock=False, readahead=False
        )
        self._dim = table.dim
        with self._environment.begin(buffers=True) as transaction:
            found = sum(1 for _ in transaction.cursor().iternext(keys=False, values=True))
        if found != held:
            raise ValueError(f"the database has {found:,} entries, not {held:,}")
        return held

    def read(self, rows: PeerRows) -> NDArray[np.uint16]:
        """One `get` per row: `getmulti` was slower."""
        keys = rows.astype(_KEY).tobytes()
        # Copies of values, not `buffers=True`: so short ones are faster copied than wrapped.
        with self._environment.begin() as transaction:
            get = transaction.get
            values = [get(keys[at : at + _KEY_BYTES]) for at in range(0, len(keys), _KEY_BYTES)]
        together = b"".join(values)
        return np.frombuffer(together, np.uint16).reshape(-1, self._dim)

    def close(self) -> None:
        """Close the environment."""
        if self._environment is not None:
            self._environment.close()
            self._environment = None


def _write(lmdb: Any, path: Path, table: PeerTable, held: int, map_bytes: int) -> None:
    flat = table.flat()
    # No sync per transaction: how fast entries are made is not what is measured.
    with lmdb.open(str(path), map_size=map_bytes, sync=False, metasync=False) as environment:
        for first in range(0, held, BLOCK_ROWS):
            block = flat[first : min(first + BLOCK_ROWS, held)]
            keys = np.arange(first, first + len(block)).astype(_KEY)
            entries = zip(map(bytes, keys[:, None]), map(bytes, block), strict=True)
            with environment.begin(write=True) as transaction:
                transaction.cursor().putmulti(entries, append=True)
        environment.sync(True)
