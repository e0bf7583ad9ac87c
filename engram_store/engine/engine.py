"""The engine: one store's tables, opened for training.

Threads: the caller commits; one stream per table computes updates; one thread seals and one folds,
beside training. Locks, always taken in this order: `_commit_lock` (commits, freezes, snapshots and
restores exclude each other), a catalog's lock (manifests are published one at a time), a table's
lock (remap and addresses).
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from numpy.typing import NDArray

from engram_store.engine.background import Background
from engram_store.engine.catalog import Catalog, check_files
from engram_store.engine.cold import Paging
from engram_store.engine.garbage import Janitor
from engram_store.engine.journal import Journal
from engram_store.engine.maintenance import Maintenance
from engram_store.engine.memory_plan import MemoryPlan, store_plan
from engram_store.engine.memtable import Commit, memtable_bytes
from engram_store.engine.options import EngineOptions
from engram_store.engine.overlay import Overlay
from engram_store.engine.placement import (
    StoreLock,
    make_memtables,
    memtable_places,
    remove_memtables,
)
from engram_store.engine.recovery import RecoveryReport, recover
from engram_store.engine.restoring import Parts, Restoring, start_from
from engram_store.engine.scrub import Scrubber
from engram_store.engine.statistics import MaintenanceCounters
from engram_store.engine.table import Table
from engram_store.engine.updates import PostImages, TableUpdate, check_updates
from engram_store.errors import (
    DuplicateStepError,
    StepGapError,
    StoreClosedError,
)
from engram_store.failpoints import failpoint
from engram_store.layout.manifest import Mark
from engram_store.layout.metadata import StoreMetadata
from engram_store.layout.paths import StorePaths
from engram_store.layout.snapshots import Wanted
from engram_store.session import SnapshotRef
from engram_store.types import Durability, RowIds


class Engine:
    """Tables, memtables and files of one store. See the module's docstring for threads."""

    def __init__(self, paths: StorePaths, metadata: StoreMetadata, options: EngineOptions) -> None:
        """Open, and recover what a killed process left.

        Raises:
            StoreLockedError, StoreFileError, CapacityError, ConfigError.
        """
        self.paths, self.metadata, self.options = paths, metadata, options
        self.specs = list(metadata.tables.values())
        self._index = {spec.layer: i for i, spec in enumerate(self.specs)}
        self.memory_plan: MemoryPlan = store_plan(
            self.specs, options.memory_bytes, options.overlay_bytes, options.lookahead_bytes
        )
        self.capacity = self.memory_plan.capacity
        self._durability = Durability.parse(options.durability)
        self._lock = StoreLock(paths)
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise

    def _open(self) -> None:
        store_id = self.metadata.store_id
        self.catalog = Catalog(self.paths, self.metadata, self.options.disk)
        self.recovery: RecoveryReport = recover(self.catalog, self.options.memtable_dir)
        parts = self._take_files()
        self.paging = Paging(plan=self.memory_plan)
        self.tables = {
            spec.layer: Table(self.paths, store_id, spec, self.capacity, self.paging)
            for spec in self.specs
        }
        self.streams = {
            spec.layer: ThreadPoolExecutor(1, f"engram-layer-{spec.layer}") for spec in self.specs
        }
        self._post_images = PostImages()
        self.overlay = Overlay(self._memtables)
        self._commit_lock = threading.RLock()
        self._background = Background(
            self.catalog, self.tables, self._memtables, self._make_maintenance(), self._sealed
        )
        self._scrubber = Scrubber(
            self.tables.values(), self.options.scrub_bytes_per_second, self.maintenance
        )
        self._durable_step = self.catalog.manifest.step
        self._janitor = Janitor(self.catalog.keep_snapshots, self.options.keep_snapshots)
        self._listeners: list[Callable[[int], None]] = []
        self._journal = self._make_journal() if self._durability.journaled else None
        self.stall_seconds = 0.0
        self.closed = False
        self._restoring = Restoring(self.catalog, self._mark_open)
        try:
            self._fill(parts)
            # Only now: a process that died before this lost nothing.
            self._mark_open()
            self._scrubber.start()
        except BaseException:
            self._let_go()
            self._close_memtables()
            raise

    def _take_files(self) -> Parts:
        """Check the store's files, and make the memtables."""
        store_id, options = self.metadata.store_id, self.options
        try:
            parts = check_files(self.paths, self.metadata, self.catalog.manifest)
            self._memtables = make_memtables(
                self.paths, store_id, self.specs, self.capacity, options.memtable_dir, options.disk
            )
        except BaseException:
            # Recovery has sealed what a dead process left. A store that cannot be opened for
            # another reason must not keep a gigabyte of shared memory until somebody finds out.
            for directory in memtable_places(self.paths, store_id, options.memtable_dir):
                remove_memtables(directory, options.disk)
            raise
        self.catalog.adopt(parts)
        return parts

    def _make_maintenance(self) -> Maintenance:
        return Maintenance(
            self.catalog,
            self.tables,
            self.options.fold_ratio,
            self.options.fold_bytes_per_second,
            # What both memtables become when they are sealed.
            reserve_bytes=2 * memtable_bytes(self.specs, self.capacity),
        )

    def _make_journal(self) -> Journal:
        return Journal(
            self.paths,
            self.metadata.store_id,
            self.specs,
            lambda: self.catalog.manifest.lineage,
            self._durability,
            self.options.disk,
            on_durable=self._made_durable,
            seal=self.seal,
        )

    def _fill(self, parts: Parts) -> None:
        manifest, tables = self.catalog.manifest, self.tables.values()
        self._open_index = 0
        self._commit = start_from(manifest, parts, tables, self._memtables)

    def _mark_open(self) -> None:
        # The parent: the directory's own name tells a store from its copies.
        parent = self._memtables[0].path.parent.parent.absolute()
        self.catalog.mark(closed=False, memtables=str(parent), journaled=self._durability.journaled)

    # ------------------------------------------------------------------ reading

    @property
    def step(self) -> int:
        """Steps applied."""
        return self._commit.step

    @property
    def marks(self) -> tuple[Mark, ...]:
        """High-water marks of the sessions, as of the last commit."""
        return self._commit.marks

    def gather(self, layer: int, rows: RowIds, out: NDArray[Any]) -> tuple[int, int]:
        """Copy rows as they are now into `out`; see `Table.gather`."""
        return self.tables[layer].gather(rows, [out])

    def count_uses(self, layer: int, rows: RowIds) -> None:
        """Rows were read; only stores that are only read count that (`Reader.count_uses`)."""

    # ------------------------------------------------------------------ committing

    def commit(
        self, step: int, updates: Sequence[TableUpdate], marks: tuple[Mark, ...] = ()
    ) -> None:
        """Apply one step to all tables, or to none.

        Args:
            step: must be `self.step`.
            updates: at most one per table.
            marks: high-water marks of the sessions from this commit on.

        Raises:
            DuplicateStepError, StepGapError, RowRangeError, StepTooLargeError.
            DiskFullError: both memtables are full and cannot be sealed.
            SharedMemoryFullError: memory that memtables gave back is needed again, and gone.
        """
        with self._commit_lock:
            self._check(step, updates)
            self._restoring.settle()
            self._make_room(updates)
            counts = list(self._commit.counts)
            firsts = {u.layer: counts[self._index[u.layer]] for u in updates}
            computed = [
                self.streams[u.layer].submit(self._compute, u, firsts[u.layer]) for u in updates
            ]
            wait(computed)  # all of them: a retry must not meet one that still writes
            rows = [future.result() for future in computed]
            failpoint("commit.computed")
            for update in updates:
                counts[self._index[update.layer]] += update.rows.size
            commit = Commit(step + 1, tuple(counts), marks)
            # In `step` mode this waits for the disk, and a commit that it refuses is none; in
            # `group` mode the journal's thread reads the slots, which nobody changes any more.
            if self._journal is not None:
                firsts_of_all = self._commit.counts
                memtable = self._memtables[self._open_index]
                self._journal.record(memtable.number, memtable.tables, firsts_of_all, commit)
            self._memtables[self._open_index].publish(commit)
            self._commit = commit
            failpoint("commit.published")
            for update, in_slots in zip(updates, rows, strict=True):
                self.tables[update.layer].point_at_memtable(
                    self._open_index, firsts[update.layer], in_slots
                )
            most = max((update.rows.size for update in updates), default=0)
            self.overlay.step_done(self._open_index, max(counts), self.paging.counted(), most)

    def _check(self, step: int, updates: Sequence[TableUpdate]) -> None:
        if self.closed:
            raise StoreClosedError("the store was closed; open it again")
        if step != self.step:
            raise (DuplicateStepError if step < self.step else StepGapError)(step, self.step)
        check_updates(updates, self.metadata.tables, self.capacity)

    def _make_room(self, updates: Sequence[TableUpdate]) -> None:
        if self._journal is not None and self._journal.refused_in:
            # Its steps become durable in segments, and the next memtable has a new journal.
            if self._journal.refused_in == self._memtables[self._open_index].number:
                self._freeze(snapshot=False)
            self._background.wait_for_seal()
        counts, index = self._commit.counts, self._index
        most = max((update.rows.size for update in updates), default=0)
        needed = max((counts[index[u.layer]] + u.rows.size for u in updates), default=0)
        if needed > max(self.overlay.limit(self._open_index), most):
            started = time.perf_counter()
            self._background.maintenance.hold_back()
            self._freeze(snapshot=False)
            self.stall_seconds += time.perf_counter() - started
            needed = most
        self.overlay.reserve(self._open_index, needed)

    def _compute(self, update: TableUpdate, first: int) -> RowIds:
        memtable, index = self._memtables[self._open_index], self._index[update.layer]
        table = self.tables[update.layer]
        rows = self._post_images.write(table, update, memtable.tables[index], first)
        memtable.wrote(index, first, rows.size)
        return rows

    # ------------------------------------------------------------------ freezing and snapshots

    def freeze(self) -> "Future[SnapshotRef | None]":
        """Open the other memtable and seal this one in the background.

        Waits only if the other memtable is still being sealed. The future is done when the
        segments are durable.
        """
        with self._commit_lock:
            return self._freeze(snapshot=False)

    def seal(self) -> None:
        """Write what is in shared memory to disk; returns when that is durable."""
        self.freeze().result()

    def _freeze(self, *, snapshot: bool) -> "Future[SnapshotRef | None]":
        self._background.wait_for_seal()
        frozen, commit = self._open_index, self._commit
        number = self._memtables[frozen].number
        after = Commit(commit.step, (0,) * len(self.specs), commit.marks)
        manifest = self.catalog.manifest
        self.overlay.make_ready(1 - frozen)
        for table in self.tables.values():
            table.use_memtable_again(1 - frozen)
        self._memtables[1 - frozen].open_as(number + 1, manifest.store_id, manifest.lineage, after)
        self._open_index, self._commit = 1 - frozen, after
        failpoint("freeze.switched")
        return self._background.seal(frozen, number, commit, snapshot=snapshot)

    def snapshot(self) -> SnapshotRef:
        """Keep the tables at the current step; returns when that is durable.

        Raises:
            DiskFullError: no snapshot was made, training can go on.
        """
        with self._commit_lock:
            if self.closed:
                raise StoreClosedError("the store was closed; open it again")
            self._restoring.settle()
            if not any(self._commit.counts) and self._background.sealed_step == self.step:
                self._background.wait_for_seal()
                return self.catalog.snapshot()
            sealed = self._freeze(snapshot=True)
        ref = sealed.result()
        assert ref is not None
        self._janitor.snapshot_made()
        return ref

    def restore(self, snapshot: Wanted) -> None:
        """Go back to a snapshot; everything newer is forgotten.

        Raises:
            SnapshotMismatchError, StoreFileError, DiskFullError, ProtocolError (newer ones are
            pinned): nothing changed.
        """
        with (
            self._commit_lock,
            self.catalog.goal(snapshot) as manifest,
            self._background.standing_still(),
        ):
            newest = max(memtable.number for memtable in self._memtables)
            self._restoring.go_back(
                manifest, newest, forget_newer=self._forget_newer, start_over=self._start_over
            )

    def _forget_newer(self, step: int) -> None:
        if self._journal is not None:
            self._journal.forget()
        self._durable_step = step

    def _start_over(self, parts: Parts) -> None:
        self._fill(parts)
        self._background.start_over()

    # ------------------------------------------------------------------ durability

    @property
    def durable_step(self) -> int:
        """Steps below this one outlive the host."""
        if self._durability.journaled:
            return self._durable_step
        return max(self.catalog.snapshots(), default=0)

    def when_durable(self, listener: Callable[[int], None]) -> None:
        """Call with `durable_step` whenever a journal or a seal has moved it; on any thread."""
        self._listeners.append(listener)

    def _made_durable(self, step: int) -> None:
        if self._durability.journaled and step > self._durable_step:
            self._durable_step = step
            for listener in self._listeners:
                listener(step)

    def _sealed(self, number: int, step: int) -> None:
        if self._journal is not None:
            self._journal.sealed(number)
        self._made_durable(step)

    def fold(self) -> None:
        """Fold every table's segments into its base now; training can go on meanwhile."""
        self._background.maintenance.fold_now()

    def merge(self) -> None:
        """Merge every table's segments into one now; training can go on meanwhile."""
        self._background.maintenance.merge_now()

    @property
    def overlay_changes(self) -> tuple[int, int]:
        """How often memtables were made smaller, and larger again."""
        return self.overlay.rule.shrunk, self.overlay.rule.grown

    @property
    def seals(self) -> int:
        """Memtables sealed since the store was opened."""
        return self._background.seals

    @property
    def maintenance(self) -> MaintenanceCounters:
        """What folds, merges and the scrubber did since the store was opened."""
        return self._background.maintenance.counters

    @property
    def bytes_written(self) -> int:
        """Bytes written to the data directory since the store was opened."""
        return self.options.disk.written_bytes

    def close(self) -> None:
        """Seal, keep a snapshot of the current step, and let go of everything.

        If the disk is full, the memtables stay in shared memory for the next open.
        """
        if self.closed:
            return
        sealed = False
        try:
            self._restoring.settle()
            if self.step not in self.catalog.snapshots():
                self.snapshot()
            self._background.drain()
            self.catalog.mark(closed=True)
            if self._journal is not None:
                self._journal.forget()
            sealed = True
        finally:
            self._let_go()
            self._close_memtables()
            if sealed:
                remove_memtables(self._memtables[0].path.parent, self.options.disk)
            self._lock.release()

    def _close_memtables(self) -> None:
        for memtable in self._memtables:
            memtable.close()

    def _let_go(self) -> None:
        """End the threads and unmap everything but the memtables; files stay as they are."""
        self.closed = True
        self._scrubber.stop()
        if self._journal is not None:
            self._journal.stop()
        self._background.stop()
        self._janitor.stop()
        for stream in self.streams.values():
            stream.shutdown()
        for table in self.tables.values():
            table.close()
        self.paging.close()
