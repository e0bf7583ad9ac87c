"""The engine: one store's tables, opened for training.

Threads: the caller commits; one stream per table computes updates; one thread seals and one folds,
beside training. Locks, always taken in this order: `_commit_lock` (commits, freezes, snapshots and
restores exclude each other), a catalog's lock (manifests are published one at a time), a table's
lock (remap and addresses).
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.background import Background
from engram_store.engine.catalog import Catalog, check_files, fill_table
from engram_store.engine.memtable import Commit
from engram_store.engine.placement import StoreLock, make_memtables, overlay_capacity
from engram_store.engine.recovery import RecoveryReport, recover, remove_memtables
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
from engram_store.optimizers import Step
from engram_store.optimizers.kernels import apply_update
from engram_store.session import SnapshotRef
from engram_store.types import RowIds


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How a store runs. None of it decides what is stored."""

    overlay_bytes: int | None = None
    """Shared memory of both memtables; None chooses by the memory limit. More means fewer bytes
    written, because a row updated often is sealed once."""
    memtable_dir: Path | None = None
    """Directory for memtables; None: /dev/shm, or the data directory where that is small."""
    fold_ratio: float = 1.0
    """Fold when a table's segments reach this multiple of its base; below 1 rewrites too much."""


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
        self._lock = StoreLock(paths)
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise

    def _open(self) -> None:
        store_id = self.metadata.store_id
        self.catalog = Catalog(self.paths, self.metadata)
        self.recovery: RecoveryReport = recover(self.catalog, self.options.memtable_dir)
        parts = check_files(self.paths, self.metadata, self.catalog.manifest)
        self.catalog.adopt(parts)
        self._memtables = make_memtables(
            self.paths, store_id, self.specs, self.capacity, self.options.memtable_dir
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
            self.catalog, self.tables, self._memtables, self.options.fold_ratio
        )
        self.stall_seconds = 0.0
        self.closed = False
        self._fill(parts)
        # Only now: a process that died before this lost nothing.
        self._mark_open()

    def _fill(self, parts: Any) -> None:
        """Read from the given files, with an empty memtable on top."""
        manifest = self.catalog.manifest
        for memtable in self._memtables:
            memtable.release()
        for number, table in enumerate(self.tables.values()):
            # Windows that are only read may be gathered by other threads meanwhile.
            with table.lock:
                table.forget()
                fill_table(table, parts[table.spec.layer])
                for index, memtable in enumerate(self._memtables):
                    table.map_memtable(index, memtable.addresses[number])
        self._open_index = 0
        self._commit = Commit(manifest.step, (0,) * len(self.specs), manifest.marks)
        self._memtables[0].open_as(
            manifest.sealed + 1, manifest.store_id, manifest.lineage, self._commit
        )

    def _mark_open(self) -> None:
        # The parent: the directory's own name tells a store from its copies.
        parent = self._memtables[0].path.parent.parent.absolute()
        self.catalog.mark(closed=False, memtables=str(parent))

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
        counts = self._commit.counts
        if any(counts[self._index[u.layer]] + u.rows.size > self.capacity for u in updates):
            started = time.perf_counter()
            self._background.wait_for_folds()
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
            if not any(self._commit.counts) and self._background.sealed_step == self.step:
                self._background.wait_for_seal()
                return self.catalog.snapshot()
            sealed = self._freeze(snapshot=True)
        ref = sealed.result()
        assert ref is not None
        return ref

    def restore(self, snapshot: SnapshotRef | int) -> None:
        """Go back to a snapshot; everything newer is forgotten.

        Raises:
            SnapshotMismatchError, StoreFileError: nothing changed.
        """
        with self._commit_lock:
            self._background.drain()
            manifest = self.catalog.find_snapshot(snapshot)
            parts = check_files(self.paths, self.metadata, manifest)
            newest = max(memtable.number for memtable in self._memtables)
            self.catalog.roll_back(manifest, newest)
            failpoint("restore.published")
            self.catalog.drop_newer_snapshots()
            failpoint("restore.snapshots_dropped")
            self.catalog.adopt(parts)
            self._fill(parts)
            self._mark_open()
            self._background.start_over()
            self.catalog.collect_garbage()

    def fold(self) -> None:
        """Fold every table's segments into its base now; training can go on meanwhile."""
        self._background.fold_now()

    @property
    def seals(self) -> int:
        """Memtables sealed since the store was opened."""
        return self._background.seals

    @property
    def folds(self) -> int:
        """Tables folded since the store was opened."""
        return self._background.folds

    @property
    def bytes_written(self) -> int:
        """Bytes written to the data directory since the store was opened."""
        return self.catalog.counter.written_bytes

    def close(self) -> None:
        """Seal, keep a snapshot of the current step, and let go of everything.

        If the disk is full, the memtables stay in shared memory for the next open.
        """
        if self.closed:
            return
        sealed = False
        try:
            if self.step not in self.catalog.snapshots():
                self.snapshot()
            self._background.drain()
            self.catalog.mark(closed=True)
            sealed = True
        finally:
            self.closed = True
            self._background.stop()
            for stream in self.streams.values():
                stream.shutdown()
            for table in self.tables.values():
                table.close()
            if sealed:
                remove_memtables(self._memtables)
            self._lock.release()
