"""A store opened for reading: one snapshot's tables, without locks, memtables or writes."""

import operator
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from numpy.typing import NDArray

from engram_store.engine.catalog import check_files, fill_table
from engram_store.engine.cold import Paging
from engram_store.engine.packed import PackableTable
from engram_store.engine.promotion import Promotion, UseCounts, promote
from engram_store.engine.statistics import MaintenanceCounters
from engram_store.errors import ConfigError, StoreClosedError, UnknownLayerError
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
    overlay_changes = 0, 0
    maintenance = MaintenanceCounters()

    def __init__(
        self,
        paths: StorePaths,
        metadata: StoreMetadata,
        snapshot: Wanted | None,
        *,
        count_uses: bool = False,
    ) -> None:
        """`snapshot` None is the newest one; `count_uses` is what `promote` needs.

        Raises:
            SnapshotMismatchError, StoreFileError.
        """
        self.paths, self.metadata = paths, metadata
        self.uses: dict[int, UseCounts] | None = None
        """Of each layer; None: they are not counted."""
        if count_uses:
            self.uses = {layer: UseCounts(spec) for layer, spec in metadata.tables.items()}
        self.promoted: Promotion | None = None
        """What `promote` packed last."""
        self._promoting = threading.Lock()
        wanted = NEWEST if snapshot is None else snapshot
        with held_snapshot(paths, metadata, wanted, _counted_steps) as (manifest, _):
            self._open(manifest)

    def _open(self, manifest: Manifest) -> None:
        paths, metadata = self.paths, self.metadata
        parts = check_files(paths, metadata, manifest)
        self.step = manifest.step
        self.marks = manifest.marks
        self.paging = Paging()
        self.tables: dict[int, PackableTable] = {}
        self.streams: dict[int, ThreadPoolExecutor] = {}
        for layer, spec in metadata.tables.items():
            table = PackableTable(paths, metadata.store_id, spec, self.paging)
            fill_table(table, parts[layer])
            self.tables[layer] = table
            self.streams[layer] = ThreadPoolExecutor(1, f"engram-layer-{layer}")
        self.durable_step = manifest.step
        """Steps below this one outlive the host."""
        self.closed = False

    def gather(self, layer: int, rows: RowIds, out: NDArray[Any]) -> tuple[int, int]:
        """Copy rows into `out`; see `Table.gather`."""
        found = self.tables[layer].gather(rows, [out])
        self.count_uses(layer, rows)
        return found

    def count_uses(self, layer: int, rows: RowIds) -> None:
        """Rows were read, int32 [n] in range: count that, if uses are counted."""
        if self.uses is not None:
            self.uses[layer].count(rows)

    def promote(self, max_bytes: int, layers: Iterable[int] | None) -> Promotion:
        """See `Store.promote`."""
        if self.uses is None:
            raise ConfigError(
                "promote() packs the rows that are used most, and this store does not count uses; "
                "open it with count_uses=True"
            )
        wanted = [*self.tables] if layers is None else [*dict.fromkeys(layers)]
        for layer in wanted:
            if layer not in self.tables:
                raise UnknownLayerError(layer, sorted(self.tables))
        if not wanted:
            raise ConfigError(
                f"layers is empty; name some of {sorted(self.tables)}, or leave it out"
            )
        try:
            size = operator.index(max_bytes)
        except TypeError:
            raise ConfigError(f"max_bytes is {max_bytes!r}; it is a number of bytes") from None
        with self._promoting:
            self._wait_for_counts()
            self.promoted = promote(self.tables, self.uses, wanted, size)
            return self.promoted

    def _wait_for_counts(self) -> None:
        """Windows are counted behind their readers' backs. Raises: StoreClosedError."""
        try:
            for stream in self.streams.values():
                stream.submit(int).result()
        except RuntimeError:  # it takes nothing any more
            raise StoreClosedError("the store was closed; open it again") from None

    def close(self) -> None:
        """Unmap everything."""
        if self.closed:
            return
        self.closed = True
        for stream in self.streams.values():
            stream.shutdown()
        for table in self.tables.values():
            table.close()
        self.paging.close()
