"""What runs beside training: one thread seals memtables, another folds and merges segments.

A fold that cannot keep up makes commits wait, visibly; it never makes them fail.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from engram_store.engine.catalog import Catalog
from engram_store.engine.heads import TouchedRows
from engram_store.engine.maintenance import Maintenance
from engram_store.engine.memory import memory_headroom_bytes
from engram_store.engine.memtable import Commit, Memtable
from engram_store.engine.seal import Live, write_segments
from engram_store.engine.table import Table
from engram_store.errors import EngramStoreError
from engram_store.failpoints import failpoint
from engram_store.layout.manifest import SegmentRef
from engram_store.layout.segments import open_segment
from engram_store.session import SnapshotRef


@dataclass(frozen=True, slots=True)
class _Frozen:
    """A memtable on its way to disk."""

    index: int
    number: int
    commit: Commit
    written: dict[int, tuple[SegmentRef, Live]] = field(default_factory=dict)
    """Its segments once they are durable: a manifest may name them, so they are written once."""


class Background:
    """The two background threads of an engine."""

    def __init__(
        self,
        catalog: Catalog,
        tables: dict[int, Table],
        memtables: list[Memtable],
        maintenance: Maintenance,
        on_sealed: Callable[[int, int], None],
    ) -> None:
        """`on_sealed` is told number and step of a memtable before its memory is used again."""
        self._catalog, self._tables, self._memtables = catalog, tables, memtables
        self._on_sealed = on_sealed
        self._sealer = ThreadPoolExecutor(1, "engram-seal")
        self.maintenance = maintenance
        recipe = catalog.metadata.recipe
        self._touched = {layer: TouchedRows(recipe, table.spec) for layer, table in tables.items()}
        maintenance.counters.touched = self._touched
        self._seal: tuple[_Frozen, Future[SnapshotRef | None]] | None = None
        self.sealed_step = catalog.manifest.step
        """Step covered by everything sealed or being sealed."""
        self.seals = 0

    # ------------------------------------------------------------------ sealing

    def seal(
        self, index: int, number: int, commit: Commit, *, snapshot: bool
    ) -> "Future[SnapshotRef | None]":
        """Seal the frozen memtable `index`, and make the result a snapshot if asked to."""
        frozen = _Frozen(index, number, commit)
        future = self._sealer.submit(self._seal_memtable, frozen, snapshot)
        self._seal = frozen, future
        self.sealed_step = commit.step
        return future

    def wait_for_seal(self) -> None:
        """Wait until no memtable is being sealed; a seal that failed is tried once more.

        Raises:
            DiskFullError: it failed again; its rows stay in shared memory and readable.
        """
        if self._seal is None:
            return
        frozen, future = self._seal
        try:
            future.result()
        except (EngramStoreError, OSError):
            future = self._sealer.submit(self._seal_memtable, frozen, False)
            self._seal = frozen, future
            future.result()
        self._seal = None

    def _seal_memtable(self, frozen: _Frozen, snapshot: bool) -> SnapshotRef | None:
        catalog, memtable = self._catalog, self._memtables[frozen.index]
        specs = [table.spec for table in self._tables.values()]
        written = frozen.written
        if not written:
            written |= write_segments(
                catalog.paths,
                catalog.metadata.store_id,
                specs,
                memtable.tables,
                frozen.number,
                frozen.commit,
                catalog.disk,
            )
        failpoint("seal.segments_written")
        refs = {layer: ref for layer, (ref, _) in written.items()}
        ref = catalog.append_segments(frozen.number, frozen.commit, refs, snapshot=snapshot)
        failpoint("seal.published")
        for layer, (segment_ref, live) in written.items():
            self._switch_to_segment(self._tables[layer], frozen.index, segment_ref, live)
        failpoint("seal.patched")
        self._on_sealed(frozen.number, frozen.commit.step)
        slots = dict(zip(self._tables, memtable.tables, strict=True))
        for layer, (_, live) in written.items():
            self._touched[layer].add(slots[layer].ids[live], frozen.commit.step)
        memtable.release()
        self.seals += 1
        self._count(frozen, written)
        self.maintenance.start_if_due()
        return ref

    def _count(self, frozen: _Frozen, written: dict[int, tuple[SegmentRef, Live]]) -> None:
        counts = dict(zip(self._tables, frozen.commit.counts, strict=True))
        for layer, (ref, _) in written.items():
            spec = self._tables[layer].spec
            slot_bytes = 4 + spec.row_bytes + spec.state_bytes
            self.maintenance.budget.sealed(counts[layer] * slot_bytes, ref.slots * slot_bytes)

    def _switch_to_segment(self, table: Table, index: int, ref: SegmentRef, live: Live) -> None:
        catalog = self._catalog
        files = open_segment(catalog.paths, catalog.metadata.store_id, table.spec, ref)
        with table.lock:
            segment = table.map_segment(ref, files)
        if memory_headroom_bytes() > 2 * sum(files.lengths().values()):
            # Just written, so in the page cache: fill the page tables before rows are read
            # here. Under memory pressure the pages are gone again, and this would read them back.
            for mapping in segment.mappings:
                mapping.populate_read()
        if table.paging is not None:
            table.paging.look_at(segment.mappings)
        table.move_to_segment(index, live, segment)

    # ------------------------------------------------------------------ standing still

    def drain(self) -> None:
        """Wait for seals and folds. Raises: what a seal raises; a failed fold is only logged."""
        self.wait_for_seal()
        self.maintenance.drain()

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Nothing is sealed, folded or merged meanwhile; nobody may freeze a memtable.

        Raises: as `wait_for_seal`.
        """
        self.wait_for_seal()
        with self.maintenance.standing_still():
            yield

    def start_over(self) -> None:
        """The tables were filled anew; nothing is under way."""
        self._seal = None
        self.sealed_step = self._catalog.manifest.step
        self.maintenance.start_over()

    def stop(self) -> None:
        """Finish what runs and end the threads."""
        self._sealer.shutdown()
        self.maintenance.stop()
