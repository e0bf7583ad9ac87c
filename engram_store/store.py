"""A store in the trainer's own process: the session protocol over the engine."""

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Literal, Self

import numpy as np

from engram_store.announced import AnnouncedWindows
from engram_store.engine import Engine, EngineOptions, RecoveryReport
from engram_store.engine.engine import TableUpdate
from engram_store.engine.garbage import GarbageReport
from engram_store.engine.gradients import GradientSummer, SummedGradients
from engram_store.engine.lookup import Allocate, SlotPool, plain_memory
from engram_store.engine.memtable import new_session_id
from engram_store.engine.reader import Reader
from engram_store.engine.statistics import StoreCounters, TableCounters
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
            self._engine = Engine(paths, self.metadata, options)
        else:
            self._engine = Reader(paths, self.metadata, snapshot)
        self._session = new_session_id()
        self._slots = SlotPool(allocate)
        self._summers = {layer: GradientSummer(spec) for layer, spec in self.tables.items()}
        self._summed: dict[int, SummedGradients] | None = None
        self._counters = StoreCounters()
        self._table_counters = {layer: TableCounters() for layer in self.tables}
        self._announced = AnnouncedWindows(self._engine, self.metadata, self._table_counters)

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
        """Steps applied so far, which is the number of the next one to commit."""
        return self._engine.step

    @property
    def durable_step(self) -> int:
        """See `session.Session.durable_step`."""
        return self._engine.durable_step

    def when_durable(self, listener: Callable[[int], None]) -> None:
        """Call with `durable_step` whenever a journal or a seal has moved it; on any thread."""
        self._trained().when_durable(listener)

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

    def _trained(self) -> Engine:
        """The engine, for calls that write. Raises: StoreClosedError, ReadOnlyError."""
        self.check_open()
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

    def start_gather(self, window: StoreWindow, layer: int) -> None:
        """Gather a window's rows as they are now, if that was not begun before."""
        self._announced.start(window, layer)

    def release(self, window: StoreWindow) -> None:
        """Give the buffers of a closed window back."""
        self.forget_sums()
        self._announced.end(window)

    def count_wait(self, seconds: float, *, late: bool) -> None:
        """A caller waited for rows."""
        self._counters.count_wait(seconds, late=late)

    # ------------------------------------------------------------------ committing

    def _pending(self) -> list[StoreWindow]:
        return self._announced.of_step(self.step)

    def _sum_gradients(self) -> dict[int, SummedGradients]:
        """The pending step's gradients of every table, summed once per push."""
        if self._summed is not None:
            return self._summed
        futures: dict[int, Future[SummedGradients]] = {}
        for layer, stream in self._engine.streams.items():
            parts = [
                part for w in self._pending() if (part := w.lookups[layer].gradient) is not None
            ]
            futures[layer] = stream.submit(
                self._summers[layer].sum_parts, parts, self._announced.scratch[layer]
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
        self._trained()
        self._summed = self._sum_gradients()
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
    ) -> Applied:
        """See `session.Session.commit`; `marks` say for whom, if not for this process."""
        engine = self._trained()
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
        pending, summed = self._pending(), self._sum_gradients()
        updates = [
            TableUpdate(layer, part.rows, part.sums, rule_step(spec, step, hyper[layer]))
            for layer, spec in self.tables.items()
            if (part := summed[layer]).rows.size
        ]
        mine = Mark(session=self._session, epoch=0, step=step)
        engine.commit(step, updates, marks or (mine,))
        self.forget_sums()
        for window in pending:
            window.close()
        self._announced.begin_step()
        self._counters.steps += 1
        for layer, part in summed.items():
            self._table_counters[layer].count_update(part.rows.size, part.skipped)
        return Applied(
            step=step,
            rows={layer: int(part.rows.size) for layer, part in summed.items()},
            skipped_rows={layer: part.skipped for layer, part in summed.items()},
        )

    # ------------------------------------------------------------------ snapshots

    def snapshot(self) -> SnapshotRef:
        """See `session.Session.snapshot`."""
        return self._trained().snapshot()

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
        engine = self._trained()
        with engine.catalog.goal(snapshot):  # before anything changes
            self._announced.end_all()
            engine.restore(snapshot)

    def seal(self) -> None:
        """Write what is in shared memory to disk now; returns when that is durable."""
        self._trained().seal()

    def fold(self) -> None:
        """Write segments into a new base generation now, instead of when they outweigh it."""
        self._trained().fold()

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
