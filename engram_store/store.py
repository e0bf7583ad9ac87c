"""A store in the trainer's own process: the session protocol over the engine."""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Literal, Self

import numpy as np

from engram_store.announced import AnnouncedWindows
from engram_store.committing import Commits
from engram_store.engine import Engine, EngineOptions, RecoveryReport
from engram_store.engine.garbage import GarbageReport
from engram_store.engine.lookup import Allocate, SlotPool, plain_memory
from engram_store.engine.memory_plan import MemoryPlan
from engram_store.engine.promotion import Promotion
from engram_store.engine.reader import Reader
from engram_store.engine.statistics import Late, StoreCounters, TableCounters
from engram_store.errors import (
    ConfigError,
    DtypeError,
    DuplicateStepError,
    ProtocolError,
    ReadOnlyError,
    RowRangeError,
    StoreClosedError,
    UnknownLayerError,
)
from engram_store.layout.manifest import Mark
from engram_store.layout.metadata import StoreMetadata, check_recipe, read_metadata
from engram_store.layout.paths import StorePaths
from engram_store.layout.snapshots import Wanted
from engram_store.recipes import Recipe
from engram_store.session import Applied, SnapshotRef
from engram_store.stats import StoreStats
from engram_store.types import RowBlock, RowIds, TableSpec, TokenIds
from engram_store.window import StoreWindow

Mode = Literal["read", "train"]


class Store:
    """Implements `session.Session` for one process; made by `engram_store.open`.

    One thread trains (announces, pushes, commits); windows that are only read may be announced
    and read by other threads too.
    """

    def __init__(
        self,
        path: Path,
        mode: Mode,
        options: EngineOptions,
        *,
        snapshot: Wanted | None = None,
        recipe: Recipe | None = None,
        allocate: Allocate = plain_memory,
        count_uses: bool = False,
    ) -> None:
        """See `engram_store.open`."""
        self._process = os.getpid()
        paths = StorePaths(path)
        self.metadata: StoreMetadata = read_metadata(paths)
        if recipe is not None:
            check_recipe(self.metadata, recipe)
        self._engine: Engine | Reader
        if mode == "train":
            if snapshot is not None:
                raise ConfigError("a store opened for training goes to a snapshot by restore()")
            if count_uses:
                raise ConfigError(
                    "count_uses is for promote(), of a store that is only read; leave it out, or "
                    "open the store with mode='read'"
                )
            self._engine = Engine(paths, self.metadata, options)
        else:
            self._engine = Reader(paths, self.metadata, snapshot, count_uses=count_uses)
        self._slots = SlotPool(allocate)
        self._counters = StoreCounters()
        self._table_counters = {
            layer: TableCounters(self.recipe, spec) for layer, spec in self.tables.items()
        }
        ahead = self.memory_plan.staging_bytes if self.memory_plan else 0
        self._announced = AnnouncedWindows(
            self._engine,
            self.metadata,
            self._counters,
            self._table_counters,
            lookahead_bytes=ahead,
            staleness=options.staleness,
        )
        self._commits: Commits | None = None
        if isinstance(self._engine, Engine):
            self._commits = Commits(
                self._engine,
                self.tables,
                self._announced,
                self._counters,
                self._table_counters,
                self.check_open,
            )

    # ------------------------------------------------------------------ what it is

    @property
    def store_id(self) -> str:
        """Names the store for its whole life."""
        return self.metadata.store_id

    @property
    def recipe(self) -> Recipe:
        """How tokens become rows."""
        return self.metadata.recipe

    @property
    def tables(self) -> Mapping[int, TableSpec]:
        """The tables, by layer."""
        return self.metadata.tables

    @property
    def step(self) -> int:
        """See `session.Session.step`."""
        return self._engine.step if self._commits is None else self._commits.step

    @property
    def durable_step(self) -> int:
        """See `session.Session.durable_step`."""
        return self._engine.durable_step

    @property
    def world_size(self) -> int:
        """Always 1; ranks train together through a store process."""
        return 1

    def when_durable(self, listener: Callable[[int], None]) -> None:
        """Call with `durable_step` whenever a journal or a seal has moved it; on any thread."""
        self._trained().when_durable(listener)

    @property
    def memory_plan(self) -> MemoryPlan | None:
        """How the store's memory is divided; None for one that is only read."""
        return self._engine.memory_plan if isinstance(self._engine, Engine) else None

    @property
    def staleness(self) -> int:
        """By how many steps the rows of a window may lag behind; 0 is exact."""
        return self._announced.staleness

    @property
    def recovery(self) -> RecoveryReport | None:
        """How the store was found when it was opened for training."""
        return self._engine.recovery if isinstance(self._engine, Engine) else None

    @property
    def path(self) -> Path:
        """The store's directory."""
        return self._engine.paths.root

    @property
    def marks(self) -> tuple[Mark, ...]:
        """What was last applied for which session, as of the last commit."""
        return self._engine.marks

    def check_open(self) -> None:
        """Raises: StoreClosedError, ProtocolError (another process)."""
        if os.getpid() != self._process:
            raise ProtocolError(
                f"the store was opened in process {self._process}; it does not survive a fork. "
                "Open it after the fork, or start worker processes by 'spawn'"
            )
        if self._engine.closed:
            raise StoreClosedError("the store was closed; open it again")

    def _trained(self, *, alone: bool = False) -> Engine:
        """The engine, for calls that write; `alone` waits for a commit under way.

        Raises: StoreClosedError, ReadOnlyError.
        """
        return self._pending_step(alone=alone).engine

    def _pending_step(self, *, alone: bool = True) -> Commits:
        """The step that gradients are pushed for; otherwise as `_trained`."""
        self.check_open()
        if self._commits is None:
            raise ReadOnlyError("the store was opened with mode='read'; open it with mode='train'")
        if alone:
            self._commits.wait()
        return self._commits

    # ------------------------------------------------------------------ windows

    def announce(
        self,
        tokens: TokenIds,
        step: int | None = None,
        *,
        context: TokenIds | None = None,
        attention_mask: TokenIds | None = None,
        part: int = 0,
        slots: SlotPool | None = None,
    ) -> StoreWindow:
        """See `session.Session.announce`.

        Args:
            tokens, step, context, attention_mask: as there.
            part: gradients of a step are summed by part, then in the order of announcement.
            slots: where the rows go; None: the store's own.
        """
        self.check_open()
        if step is not None:
            self._trained()
            if step < self.step:
                raise DuplicateStepError(step, self.step)
        # Checked here, in the caller's thread, so that bad input fails at once.
        self.recipe.carry(tokens, context, attention_mask=attention_mask)
        window = StoreWindow(
            self,
            step,
            part,
            np.array(tokens, np.int64),
            None if context is None else np.array(context, np.int64),
            None if attention_mask is None else np.array(attention_mask),
            slots or self._slots,
        )
        self._announced.add(window)
        self._counters.windows += 1
        return window

    def may_read(self, step: int) -> bool:
        """Whether rows of a step's windows can be had now, or after the commit under way."""
        return step == self.step or self._announced.may_read(step)

    def wait_for_commit(self, step: int, gathered: "Future[RowBlock]") -> None:
        """If the step before is being committed, wait for rows that it hands out, or for its end.

        Raises: what the commit raised.
        """
        if self._commits is not None:
            self._commits.wait_for_rows(step, gathered)

    def start_find(self, window: StoreWindow, layer: int) -> None:
        """Hash a window's tokens, if that was not begun before."""
        self._announced.start_find(window, layer)

    def start_gather(self, window: StoreWindow, layer: int) -> None:
        """Gather a window's rows as they are now, if that was not begun before."""
        self._announced.start(window, layer)

    def release(self, window: StoreWindow) -> None:
        """Give the buffers of a closed window back."""
        self.forget_sums()
        self._announced.end(window)

    def count_wait(self, layer: int, seconds: float, late: Late | None) -> None:
        """A caller waited for a layer's rows; `late`: why they were not there."""
        self._counters.count_wait(self._table_counters[layer], seconds, late)

    # ------------------------------------------------------------------ committing

    def forget_sums(self) -> None:
        """Gradients changed since they were summed."""
        if self._commits is not None:
            self._commits.forget_sums()

    def gradient_norm(self) -> float:
        """See `session.Session.gradient_norm`."""
        return self._pending_step().gradient_norm()

    def commit(
        self,
        step: int,
        lr: float | Mapping[int, float],
        *,
        gradient_scale: float = 1.0,
        eps: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        marks: tuple[Mark, ...] = (),
        early: bool = False,
    ) -> Applied:
        """See `session.Session.commit`.

        Args:
            step, lr, gradient_scale, eps, betas: as there.
            marks: for whom, if not for this process.
            early: hand rows of the next window out before the commit is done.
        """
        pending = self._pending_step()
        order = pending.order(
            step, lr, gradient_scale=gradient_scale, eps=eps, betas=betas, marks=marks
        )
        return pending.apply(order, early=early)

    def begin_commit(
        self,
        step: int,
        lr: float | Mapping[int, float],
        *,
        gradient_scale: float = 1.0,
        eps: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> "Future[Applied]":
        """See `session.Session.begin_commit`."""
        pending = self._pending_step()
        return pending.begin(
            pending.order(step, lr, gradient_scale=gradient_scale, eps=eps, betas=betas)
        )

    # ------------------------------------------------------------------ snapshots

    def snapshot(self) -> SnapshotRef:
        """See `session.Session.snapshot`."""
        return self._trained(alone=True).snapshot()

    def snapshots(self) -> list[int]:
        """Steps that have a snapshot, ascending."""
        return self._engine.paths.snapshot_steps()

    def keep_snapshots(self, newest: int) -> None:
        """Drop all but the newest snapshots and the pinned ones; see `collect_garbage`."""
        self._trained().catalog.keep_snapshots(newest)

    def collect_garbage(self, keep: int | None = None, *, dry_run: bool = False) -> GarbageReport:
        """Drop older snapshots, and the files that only they need.

        A snapshot keeps its segments and its base generation on disk. None is dropped unless it is
        asked for, here or by `keep_snapshots` of `engram_store.open`: a checkpoint may name any.

        Args:
            keep: how many of the newest stay, beside the pinned; None: all.
            dry_run: only tell what would go.

        Raises:
            ConfigError: `keep` is less than 1.
            StoreFileError: a snapshot or a pin is damaged; files stay where that is so.
        """
        return self._trained().catalog.collect(keep=keep, dry_run=dry_run)

    def restore(self, snapshot: Wanted) -> None:
        """See `session.Session.restore`; takes names too. Announced windows are closed.

        Raises:
            ProtocolError: a newer snapshot is pinned, and would be forgotten; nothing changed.
        """
        engine = self._trained(alone=True)
        with engine.catalog.goal(snapshot):  # before anything changes
            self._announced.end_all()
            try:
                engine.restore(snapshot)
            finally:
                self._announced.begin_step()

    def seal(self) -> None:
        """Write what is in shared memory to disk now; returns when that is durable."""
        self._trained(alone=True).seal()

    def fold(self) -> None:
        """Write segments into a new base generation now, instead of when they outweigh it."""
        self._trained(alone=True).fold()

    # ------------------------------------------------------------------ looking and leaving

    def read_rows(self, layer: int, rows: RowIds) -> RowBlock:
        """Rows of one table as they are now, in request order.

        Args:
            layer: a table of the store.
            rows: int32 or int64 [n]; repeats are fine.

        Returns:
            Storage dtype [n, dim], the caller's own.

        Raises:
            RowRangeError, DtypeError, UnknownLayerError, StoreClosedError.
        """
        self.check_open()
        if layer not in self.tables:
            raise UnknownLayerError(layer, sorted(self.tables))
        spec = self.tables[layer]
        ids = _checked_rows(spec, rows)
        out = np.empty((ids.size, spec.dim), spec.dtype.storage)
        self._engine.gather(layer, ids, out)
        return out

    def promote(self, *, max_bytes: int, layers: Iterable[int] | None = None) -> Promotion:
        """Pack the rows that were read most so far in memory, and read them from there.

        For stores that are only read, with `count_uses`: serving, evaluation. Rows keep their
        bytes, and may be read meanwhile. What was promoted before is given up, of all layers,
        once the new rows are in memory; until then both take memory, and for a moment the counts
        are copied too.

        Args:
            max_bytes: memory for packed rows, of all layers together. Eight bytes per row that
                say where it was come on top.
            layers: whose rows; None: all. A row counts by how often windows or `read_rows` asked
                for it since the store was opened, by byte of it.

        Raises:
            ProtocolError: the store was opened for training, or no row was read yet.
            ConfigError: uses are not counted, or `max_bytes` is too small for a row.
            CapacityError: there is not so much memory.
            UnknownLayerError, StoreClosedError.
        """
        self.check_open()
        if not isinstance(self._engine, Reader):
            raise ProtocolError(
                "the store was opened for training, where every step moves rows; promote() is for "
                "stores opened with mode='read' and count_uses=True"
            )
        return self._engine.promote(max_bytes, layers)

    def stats(self) -> StoreStats:
        """See `session.Session.stats`."""
        self.check_open()
        return self._counters.record(self._engine, self._table_counters)

    def close(self) -> None:
        """Close the store; in training its current step becomes a snapshot.

        Closing twice is fine; in a forked process nothing happens.

        Raises:
            DiskFullError: the newest rows stay in shared memory for the next open.
        """
        if os.getpid() == self._process:
            if self._commits is not None:
                self._commits.close()
            self._announced.ahead.stop()
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _checked_rows(spec: TableSpec, rows: RowIds) -> RowIds:
    if rows.dtype.kind not in "iu":
        raise DtypeError("row ids", rows.dtype, "integers")
    for row in (int(rows.min(initial=0)), int(rows.max(initial=0))):
        if not 0 <= row < spec.rows:
            raise RowRangeError(spec.name, row, spec.rows)
    return np.ascontiguousarray(rows, np.int32)
