"""A store in the trainer's own process: the session protocol over the engine."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from engram_store.announced import AnnouncedWindows
from engram_store.engine import Engine, EngineOptions, RecoveryReport
from engram_store.engine.garbage import GarbageReport
from engram_store.engine.gradients import GradientSummer, SummedGradients
from engram_store.engine.lookup import Allocate, SlotPool, plain_memory
from engram_store.engine.memory_plan import MemoryPlan
from engram_store.engine.memtable import new_session_id
from engram_store.engine.promotion import Promotion
from engram_store.engine.reader import Reader
from engram_store.engine.statistics import Late, StoreCounters, TableCounters
from engram_store.engine.updates import TableUpdate
from engram_store.errors import (
    ConfigError,
    DtypeError,
    DuplicateStepError,
    MissingGradientError,
    ProtocolError,
    ReadOnlyError,
    RowRangeError,
    StepGapError,
    StoreClosedError,
    UnknownLayerError,
)
from engram_store.kernels.gradients import sum_of_squares
from engram_store.layout.manifest import Mark
from engram_store.layout.metadata import StoreMetadata, check_recipe, read_metadata
from engram_store.layout.paths import StorePaths
from engram_store.layout.snapshots import Wanted
from engram_store.optimizers import rule_step
from engram_store.recipes import Recipe
from engram_store.session import Applied, SnapshotRef
from engram_store.stats import StoreStats
from engram_store.types import HyperParameters, RowBlock, RowIds, TableSpec, TokenIds
from engram_store.window import StoreWindow

Mode = Literal["read", "train"]


@dataclass(frozen=True, slots=True)
class _Order:
    """A commit that was asked for and checked."""

    step: int
    hyper: Mapping[int, HyperParameters]
    windows: list[StoreWindow]
    summed: dict[int, SummedGradients] | None
    """Their gradients, if they were summed before."""
    marks: tuple[Mark, ...]


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
        self._session = new_session_id()
        self._slots = SlotPool(allocate)
        self._summers = {layer: GradientSummer(spec) for layer, spec in self.tables.items()}
        self._summed: dict[int, SummedGradients] | None = None
        self._committer: ThreadPoolExecutor | None = None
        self._under_way: tuple[int, Future[Applied]] | None = None
        """The last step that was begun in the background."""
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
        if self._under_way is not None:
            step, applied = self._under_way
            if not applied.done():
                return step + 1
        return self._engine.step

    @property
    def durable_step(self) -> int:
        """See `session.Session.durable_step`."""
        return self._engine.durable_step

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
        self.check_open()
        if alone and self._under_way is not None:
            # Whoever began it is told what came of it.
            wait([self._under_way[1]])
            self._under_way = None
        if not isinstance(self._engine, Engine):
            raise ReadOnlyError("the store was opened with mode='read'; open it with mode='train'")
        return self._engine

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
        if self._under_way is None or self._under_way[0] + 1 != step:
            return
        applied = self._under_way[1]
        either: list[Future[Any]] = [gathered, applied]
        wait(either, return_when=FIRST_COMPLETED)
        if not gathered.done():
            applied.result()

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

    def _pending(self) -> list[StoreWindow]:
        return self._announced.of_step(self.step)

    def _sum_gradients(self, windows: list[StoreWindow]) -> dict[int, SummedGradients]:
        """A step's gradients of every table."""
        futures: dict[int, Future[SummedGradients]] = {}
        for layer, stream in self._engine.streams.items():
            parts = [part for w in windows if (part := w.lookups[layer].gradient) is not None]
            futures[layer] = stream.submit(
                self._summers[layer].sum_parts, parts, self._announced.scratch(layer)
            )
        wait(futures.values())  # also when one fails: its memory is used again
        return {layer: future.result() for layer, future in futures.items()}

    def forget_sums(self) -> None:
        """Gradients changed since they were summed."""
        self._summed = None

    def _check_gradients(self) -> None:
        """Raises: MissingGradientError."""
        missing = sorted({layer for window in self._pending() for layer in window.missing()})
        if missing:
            raise MissingGradientError(self.step, missing)

    def gradient_norm(self) -> float:
        """See `session.Session.gradient_norm`."""
        self._trained(alone=True)
        if self._summed is None:
            self._summed = self._sum_gradients(self._pending())
        return math.sqrt(sum(sum_of_squares(part.sums) for part in self._summed.values()))

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
        order = self._order(step, lr, gradient_scale, eps, betas, marks)
        return self._commit(order, early=early)

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
        order = self._order(step, lr, gradient_scale, eps, betas, ())
        if self._committer is None:
            self._committer = ThreadPoolExecutor(1, "engram-commit")
        applied = self._committer.submit(self._commit, order, early=True)
        self._under_way = step, applied
        return applied

    def _order(
        self,
        step: int,
        lr: float | Mapping[int, float],
        gradient_scale: float,
        eps: float | None,
        betas: tuple[float, float],
        marks: tuple[Mark, ...],
    ) -> _Order:
        """Check a commit. Raises: as `commit`."""
        self._trained(alone=True)
        if step != self.step:
            raise (DuplicateStepError if step < self.step else StepGapError)(step, self.step)
        hyper = {
            layer: HyperParameters(
                lr=_rate(lr, layer),
                eps=eps,
                beta1=betas[0],
                beta2=betas[1],
                gradient_scale=gradient_scale,
            )
            for layer in self.tables
        }
        self._check_gradients()
        mine = Mark(session=self._session, epoch=0, step=step)
        return _Order(step, hyper, self._pending(), self._summed, marks or (mine,))

    def _commit(self, order: _Order, *, early: bool) -> Applied:
        engine = self._trained()
        summed = order.summed or self._sum_gradients(order.windows)
        early_windows = self._announced.claim_early() if early else {}
        applied = False
        try:
            updates = [
                TableUpdate(
                    layer,
                    part.rows,
                    part.sums,
                    rule_step(spec, order.step, order.hyper[layer]),
                    early=early_windows.get(layer),
                    old=self._announced.kept_rows(layer, order.windows, part),
                )
                for layer, spec in self.tables.items()
                if (part := summed[layer]).rows.size
            ]
            engine.commit(order.step, updates, order.marks)
            applied = True
        finally:
            self._announced.end_early(applied=applied)
        self.forget_sums()
        for window in order.windows:
            window.close()
        self._announced.begin_step()
        self._counters.steps += 1
        for layer, part in summed.items():
            self._table_counters[layer].count_update(part.rows.size, part.skipped)
        return Applied(
            step=order.step,
            rows={layer: int(part.rows.size) for layer, part in summed.items()},
            skipped_rows={layer: part.skipped for layer, part in summed.items()},
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
            if self._committer is not None:
                self._committer.shutdown()
            self._announced.ahead.stop()
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _rate(lr: float | Mapping[int, float], layer: int) -> float:
    if not isinstance(lr, Mapping):
        return lr
    if layer not in lr:
        raise ConfigError(f"no learning rate for layer {layer}; lr has layers {sorted(lr)}")
    return lr[layer]


def _checked_rows(spec: TableSpec, rows: RowIds) -> RowIds:
    if rows.dtype.kind not in "iu":
        raise DtypeError("row ids", rows.dtype, "integers")
    for row in (int(rows.min(initial=0)), int(rows.max(initial=0))):
        if not 0 <= row < spec.rows:
            raise RowRangeError(spec.name, row, spec.rows)
    return np.ascontiguousarray(rows, np.int32)
