"""A store opened for reading: one snapshot's tables, without locks, memtables or writes."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from numpy.typing import NDArray

from engram_store.engine.catalog import check_files, fill_table
from engram_store.engine.statistics import MaintenanceCounters
from engram_store.engine.table import Table
from engram_store.layout.manifest import Manifest, read_manifest
from engram_store.layout.metadata import StoreMetadata
from engram_store.layout.paths import StorePaths
from engram_store.layout.pins import NEWEST
from engram_store.layout.snapshots import Wanted, held_snapshot
from engram_store.types import RowIds


def _counted_steps(paths: StorePaths) -> list[int]:
    """Later snapshots than the store itself never happened: a restore is about to remove them.

    Raises: StoreFileError: the working manifest is damaged.
    """
    current, _ = read_manifest(paths)
    return [step for step in paths.snapshot_steps() if step <= current.step]


class Reader:
    """The tables of one snapshot. They stay readable whatever happens to the store's files."""

    seals = bytes_written = 0
    stall_seconds = 0.0
    maintenance = MaintenanceCounters()

    def __init__(self, paths: StorePaths, metadata: StoreMetadata, snapshot: Wanted | None) -> None:
        """`snapshot` None is the newest one.

        Raises:
            SnapshotMismatchError, StoreFileError.
        """
        self.paths, self.metadata = paths, metadata
        wanted = NEWEST if snapshot is None else snapshot
        with held_snapshot(paths, metadata, wanted, _counted_steps) as (manifest, _):
            self._open(manifest)

    def _open(self, manifest: Manifest) -> None:
        paths, metadata = self.paths, self.metadata
        parts = check_files(paths, metadata, manifest)
        self.step = manifest.step
        self.marks = manifest.marks
        self.tables: dict[int, Table] = {}
        self.streams: dict[int, ThreadPoolExecutor] = {}
        for layer, spec in metadata.tables.items():
            table = Table(paths, metadata.store_id, spec, capacity=0)
            fill_table(table, parts[layer])
            self.tables[layer] = table
            self.streams[layer] = ThreadPoolExecutor(1, f"engram-layer-{layer}")
        self.durable_step = manifest.step
        """Steps below this one outlive the host."""
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
