"""What runs beside training: one thread seals memtables, another folds segments.

A fold that cannot keep up makes commits wait, visibly; it never makes them fail.
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from engram_store.engine.catalog import Catalog
from engram_store.engine.fold import fold_table
from engram_store.engine.memory import memory_headroom_bytes
from engram_store.engine.memtable import Commit, Memtable
from engram_store.engine.seal import Live, write_segments
from engram_store.engine.table import Table
from engram_store.errors import EngramStoreError
from engram_store.failpoints import failpoint
from engram_store.layout.manifest import SegmentRef
from engram_store.layout.segments import open_segment
from engram_store.session import SnapshotRef

MAX_SEGMENTS = 64
"""Segments of a table that start a fold whatever their size; twice as many make commits wait."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Frozen:
    """A memtable on its way to disk."""

    index: int
    number: int
    commit: Commit
    written: dict[int, tuple[SegmentRef, Live]] = field(default_factory=dict)
    """Its segments once they are durable: a manifest may name them, so they are written once."""


class Background:
    """The two maintenance threads of an engine."""

    def __init__(
        self,
        catalog: Catalog,
        tables: dict[int, Table],
        memtables: list[Memtable],
        fold_ratio: float,
    ) -> None:
        self._catalog, self._tables, self._memtables = catalog, tables, memtables
        self._fold_ratio = fold_ratio
        self._sealer = ThreadPoolExecutor(1, "engram-seal")
        self._folder = ThreadPoolExecutor(1, "engram-fold")
        self._seal: tuple[_Frozen, Future[SnapshotRef | None]] | None = None
        self._fold: Future[None] | None = None
        self.sealed_step = catalog.manifest.step
        """Step covered by everything sealed or being sealed."""
        self.seals = 0
        self.folds = 0

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
                catalog.counter,
            )
        failpoint("seal.segments_written")
        refs = {layer: ref for layer, (ref, _) in written.items()}
        ref = catalog.append_segments(frozen.number, frozen.commit, refs, snapshot=snapshot)
        failpoint("seal.published")
        for layer, (segment_ref, live) in written.items():
            self._switch_to_segment(self._tables[layer], frozen.index, segment_ref, live)
        failpoint("seal.patched")
        memtable.release()
        self.seals += 1
        self._start_fold_if_due()
        return ref

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
        table.move_to_segment(index, live, segment)

    # ------------------------------------------------------------------ folding

    def _due(self, table: Table) -> bool:
        spec = table.spec
        per_row = spec.row_bytes + spec.state_bytes
        segment_bytes = sum(segment.ref.slots for segment in table.segments) * per_row
        return (
            segment_bytes >= self._fold_ratio * spec.rows * per_row
            or len(table.segments) >= MAX_SEGMENTS
        )

    def _start_fold_if_due(self) -> None:
        idle = self._fold is None or self._fold.done()
        due = [table for table in self._tables.values() if self._due(table)]
        if idle and due:
            self._fold = self._folder.submit(self._fold_tables, due)

    def fold_now(self) -> None:
        """Fold every table that has segments; returns when it is done.

        Raises:
            DiskFullError: the tables are as before.
        """
        self._folder.submit(self._fold_tables, list(self._tables.values())).result()

    def _fold_tables(self, tables: list[Table]) -> None:
        try:
            for table in tables:
                self._fold_one(table)
        except (EngramStoreError, OSError) as error:
            _logger.warning("a fold failed and will be tried again: %s", error)
            raise

    def _fold_one(self, table: Table) -> None:
        with table.lock:
            segments = list(table.segments)
        if not segments:
            return
        catalog, layer = self._catalog, table.spec.layer
        generation = catalog.manifest.table(layer).generation
        folded = fold_table(table, generation, catalog.bases[layer], segments, catalog.counter)
        failpoint("fold.base_written")
        catalog.replace_base(layer, {segment.ref.number for segment in segments}, folded)
        failpoint("fold.published")
        table.fold_into_base(segments, folded.generation, folded.description)
        failpoint("fold.swapped")
        self.folds += 1
        catalog.collect_garbage()

    def wait_for_folds(self) -> None:
        """Hold a commit back while some table has far too many segments."""
        while self._fold is not None and any(
            len(table.segments) >= 2 * MAX_SEGMENTS for table in self._tables.values()
        ):
            _logger.warning("commits wait for a fold: the disk is slower than training")
            self._fold.result()
            self._start_fold_if_due()

    # ------------------------------------------------------------------ standing still

    def drain(self) -> None:
        """Wait for seals and folds. Raises: what a seal raises; a failed fold is only logged."""
        self.wait_for_seal()
        # One thread folds, so this also waits for folds that somebody asked for.
        self._folder.submit(int).result()
        self._fold = None

    def start_over(self) -> None:
        """The tables were filled anew; nothing is under way."""
        self._seal = None
        self.sealed_step = self._catalog.manifest.step

    def stop(self) -> None:
        """Finish what runs and end the threads."""
        self._sealer.shutdown()
        self._folder.shutdown()
