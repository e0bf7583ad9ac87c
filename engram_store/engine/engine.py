"""The engine: one store's tables, opened for training.

Threads: the caller commits; one stream per table computes updates; one thread seals and one folds,
beside training. Locks, always taken in this order: `_commit_lock` (commits, freezes, snapshots and
restores exclude each other), a catalog's lock (manifests are published one at a time), a table's
lock (remap and addresses).
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.background import Background
from engram_store.engine.catalog import Catalog, check_files, fill_table
from engram_store.engine.garbage import Janitor
from engram_store.engine.journal import Journal
from engram_store.engine.maintenance import Maintenance
from engram_store.engine.memtable import Commit, memtable_bytes
from engram_store.engine.options import EngineOptions
from engram_store.engine.placement import StoreLock, make_memtables, overlay_capacity
from engram_store.engine.recovery import RecoveryReport, recover, remove_memtables
from engram_store.engine.scrub import Scrubber
from engram_store.engine.sealed import find_again
from engram_store.engine.statistics import MaintenanceCounters
from engram_store.engine.table import Table
from engram_store.errors import (
    DuplicateStepError,
    RowRangeError,
    StepGapError,
    StepTooLargeError,
    StoreClosedError,
)
from engram_store.failpoints import failpoint
from engram_store.layout.manifest import Mark
from engram_store.layout.metadata import StoreMetadata
from engram_store.layout.paths import StorePaths
from engram_store.layout.snapshots import Wanted
from engram_store.optimizers import Step
from engram_store.optimizers.kernels import apply_update
from engram_store.session import SnapshotRef
from engram_store.types import Durability, RowIds

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TableUpdate:
    """One table's part of a commit."""

    layer: int
    rows: RowIds
    """int32 [n], distinct."""
    gradients: NDArray[np.float32]
    """[n, dim], summed per row."""
    step: Step


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
        self.capacity = overlay_capacity(self.specs, options.overlay_bytes)
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
        parts = check_files(self.paths, self.metadata, self.catalog.manifest)
        self.catalog.adopt(parts)
        self._memtables = make_memtables(
            self.paths,
            store_id,
            self.specs,
            self.capacity,
            self.options.memtable_dir,
            self.options.disk,
        )
        self.tables = {
            spec.layer: Table(self.paths, store_id, spec, self.capacity) for spec in self.specs
        }
        self.streams = {
            spec.layer: ThreadPoolExecutor(1, f"engram-layer-{spec.layer}") for spec in self.specs
        }
        self._scratch: dict[int, list[NDArray[Any]]] = {}
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
        self._owes_restore = False
        """A restore went through, or was refused by the disk, and what belongs to it is open."""
        try:
            self._fill(parts)
            # Only now: a process that died before this lost nothing.
            self._mark_open()
            self._scrubber.start()
        except BaseException:
            self._let_go()
            self._close_memtables()
            raise

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

    def _fill(self, parts: Any) -> None:
        """Read from the given files, with an empty memtable on top."""
        manifest = self.catalog.manifest
        for memtable in self._memtables:
            memtable.release()
        for number, table in enumerate(self.tables.values()):
            # Windows that are only read may be gathered by other threads meanwhile.
            with table.lock:
                known = table.damages
                table.forget()
                fill_table(table, parts[table.spec.layer])
                for index, memtable in enumerate(self._memtables):
                    table.map_memtable(index, memtable.addresses[number])
            find_again(table, known)
        self._open_index = 0
        self._commit = Commit(manifest.step, (0,) * len(self.specs), manifest.marks)
        self._memtables[0].open_as(
            manifest.sealed + 1, manifest.store_id, manifest.lineage, self._commit
        )

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
        """
        with self._commit_lock:
            self._check(step, updates)
            self._settle_restore()
            self._make_room(updates)
            counts = list(self._commit.counts)
            firsts = {u.layer: counts[self._index[u.layer]] for u in updates}
            computed = [
                self.streams[u.layer].submit(self._compute, u, firsts[u.layer]) for u in updates
            ]
            wait(computed)  # all of them: a retry must not meet one that still writes
            for future in computed:
                future.result()
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
            for update in updates:
                self.tables[update.layer].point_at_memtable(
                    self._open_index, firsts[update.layer], update.rows
                )

    def _check(self, step: int, updates: Sequence[TableUpdate]) -> None:
        if self.closed:
            raise StoreClosedError("the store was closed; open it again")
        if step != self.step:
            raise (DuplicateStepError if step < self.step else StepGapError)(step, self.step)
        for update in updates:
            spec = self.metadata.tables[update.layer]
            if not update.rows.size:
                continue
            for row in (int(update.rows.min()), int(update.rows.max())):
                if not 0 <= row < spec.rows:
                    raise RowRangeError(spec.name, row, spec.rows)
            if update.rows.size > self.capacity:
                needed = 2 * sum(4 + s.state_bytes + s.row_bytes for s in self.specs)
                raise StepTooLargeError(
                    update.layer,
                    update.rows.size,
                    self.capacity,
                    needed * (update.rows.size + 4096),
                )

    def _make_room(self, updates: Sequence[TableUpdate]) -> None:
        if self._journal is not None and self._journal.refused_in:
            # Its steps become durable in segments, and the next memtable has a new journal.
            if self._journal.refused_in == self._memtables[self._open_index].number:
                self._freeze(snapshot=False)
            self._background.wait_for_seal()
        counts = self._commit.counts
        if any(counts[self._index[u.layer]] + u.rows.size > self.capacity for u in updates):
            started = time.perf_counter()
            self._background.maintenance.hold_back()
            self._freeze(snapshot=False)
            self.stall_seconds += time.perf_counter() - started

    def _compute(self, update: TableUpdate, first: int) -> None:
        """Post-images of one table's rows, straight into the open memtable's free slots."""
        table, n = self.tables[update.layer], update.rows.size
        old, old_state = (block[:n] for block in self._blocks(update.layer, n))
        table.gather(update.rows, [old, old_state])
        slots = self._memtables[self._open_index].tables[self._index[update.layer]]
        new, new_state = slots.rows[first : first + n], slots.state[first : first + n]
        apply_update(
            table.spec, update.step, update.rows, old, old_state, update.gradients, new, new_state
        )
        slots.ids[first : first + n] = update.rows
        self._memtables[self._open_index].wrote(self._index[update.layer], first, n)

    def _blocks(self, layer: int, n: int) -> list[NDArray[Any]]:
        """Reused room for n rows and their state."""
        spec, have = self.metadata.tables[layer], self._scratch.get(layer)
        if have is None or len(have[0]) < n:
            have = [
                np.empty((n + n // 4, spec.dim), spec.dtype.storage),
                np.empty((n + n // 4, spec.state_width), np.float32),
            ]
            self._scratch[layer] = have
        return have

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
            self._settle_restore()
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
            parts = check_files(self.paths, self.metadata, manifest)
            newest = max(memtable.number for memtable in self._memtables)
            self._owes_restore = True
            self.catalog.roll_back(manifest, newest)
            failpoint("restore.published")
            if self._journal is not None:
                self._journal.forget()
            self._durable_step = manifest.step
            with _done_later():
                self.catalog.drop_newer_snapshots()
            failpoint("restore.snapshots_dropped")
            self.catalog.adopt(parts)
            self._fill(parts)
            self._background.start_over()
            with _done_later():
                self._settle_restore()
            self.catalog.collect_garbage()

    def _settle_restore(self) -> None:
        """Before anything is built upon a restore: finish it, or undo one that was refused.

        Raises:
            DiskFullError, DiskFaultError: nothing changed.
        """
        if self._owes_restore:
            self.catalog.settle()
            # A later step with the number of a forgotten snapshot must not be taken for it.
            self.catalog.drop_newer_snapshots()
            self._mark_open()
            self._owes_restore = False

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
            self._settle_restore()
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
                remove_memtables(self._memtables, self.options.disk)
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


@contextlib.contextmanager
def _done_later() -> Iterator[None]:
    """The store went back already: what the disk refuses now is done before the next commit."""
    try:
        yield
    except OSError as error:
        _logger.warning("the restore is finished before the next commit: %s", error)
