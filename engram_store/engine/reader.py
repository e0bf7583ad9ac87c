"""A store opened for reading: one snapshot's tables, without locks, memtables or writes."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from numpy.typing import NDArray

from engram_store.engine.catalog import check_files, fill_table, find_snapshot
from engram_store.engine.table import Table
from engram_store.layout.manifest import read_manifest
from engram_store.layout.metadata import StoreMetadata
from engram_store.layout.paths import StorePaths
from engram_store.session import SnapshotRef
from engram_store.types import RowIds


class Reader:
    """The tables of one snapshot. They stay readable whatever happens to the store's files."""

    seals = folds = bytes_written = 0
    stall_seconds = 0.0

    def __init__(
        self, paths: StorePaths, metadata: StoreMetadata, snapshot: SnapshotRef | int | None
    ) -> None:
        """`snapshot` None is the newest one.

        Raises:
            SnapshotMismatchError, StoreFileError.
        """
        self.paths, self.metadata = paths, metadata
        current, _ = read_manifest(paths)
        # Later ones than the store itself never happened: a restore is about to remove them.
        steps = [step for step in paths.snapshot_steps() if step <= current.step]
        wanted = snapshot if snapshot is not None else max(steps, default=0)
        manifest = find_snapshot(paths, metadata.store_id, steps, wanted)
        parts = check_files(paths, metadata, manifest)
        self.step = manifest.step
        self.marks = manifest.marks
        self.tables = {}
        self.streams = {}
        for layer, spec in metadata.tables.items():
            table = Table(paths, metadata.store_id, spec, capacity=0)
            fill_table(table, parts[layer])
            self.tables[layer] = table
            self.streams[layer] = ThreadPoolExecutor(1, f"engram-layer-{layer}")
        self.closed = False

    def gather(self, layer: int, rows: RowIds, out: NDArray[Any]) -> tuple[int, int]:
        """Copy rows into `out`; see `Table.gather`."""
        return self.tables[layer].gather(rows, [out])

    def close(self) -> None:
        """Unmap everything."""
        if self.closed:
            return
        self.closed = True
        for stream in self.streams.values():
            stream.shutdown()
        for table in self.tables.values():
            table.close()
