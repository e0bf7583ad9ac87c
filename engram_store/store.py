"""A store in the trainer's own process: the session protocol over the engine."""

import math
import threading
from collections.abc import Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from engram_store.engine import Engine, EngineOptions, RecoveryReport
from engram_store.engine.engine import TableUpdate
from engram_store.engine.gradients import GradientSummer, SummedGradients
from engram_store.engine.lookup import Allocate, LookupScratch, SlotPool, plain_memory
from engram_store.engine.memtable import new_session_id
from engram_store.engine.reader import Reader
from engram_store.engine.statistics import StoreCounters, TableCounters
from engram_store.errors import (
    ConfigError,
    DtypeError,
    DuplicateStepError,
    MissingGradientError,
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
from engram_store.optimizers import rule_step
from engram_store.recipes import Recipe
from engram_store.session import Applied, SnapshotRef
from engram_store.stats import StoreStats
from engram_store.types import HyperParameters, Inverse, RowBlock, RowIds, TableSpec, TokenIds
from engram_store.window import LayerLookup, StoreWindow

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
        snapshot: SnapshotRef | int | None = None,
        recipe: Recipe | None = None,
        allocate: Allocate = plain_memory,
    ) -> None:
        """See `engram_store.open`."""
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
        self._windows: list[StoreWindow] = []
        self._lock = threading.Lock()
        self._session = new_session_id()
        self._slots = SlotPool(allocate)
        self._scratch = {layer: LookupScratch() for layer in self.tables}
        self._summers = {layer: GradientSummer(spec) for layer, spec in self.tables.items()}
        self._summed: dict[int, SummedGradients] | None = None
        self._counters = StoreCounters()
        self._table_counters = {layer: TableCounters() for layer in self.tables}

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
        """Raises: StoreClosedError."""
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
        slots: SlotPool | None = None,
    ) -> StoreWindow:
        """See `session.Session.announce`; rows go to `slots`, if not to the store's own."""
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
            np.array(tokens, np.int64),
            None if context is None else np.array(context, np.int64),
            None if attention_mask is None else np.array(attention_mask),
            slots or self._slots,
        )
        for layer, stream in self._engine.streams.items():
            window.lookups[layer] = LayerLookup(stream.submit(self._find, window, layer))
        self._counters.windows += 1
        if step is not None:
            with self._lock:
                self._windows.append(window)
            if step == self.step:
                self._start_gathers(window)
        return window

    def _find(self, window: StoreWindow, layer: int) -> tuple[RowIds, Inverse]:
        return self._scratch[layer].look_up(
            self.recipe, layer, window.tokens, window.context, window.attention_mask
        )

    def _start_gathers(self, window: StoreWindow) -> None:
        for layer in window.lookups:
            self.start_gather(window, layer)

    def start_gather(self, window: StoreWindow, layer: int) -> None:
        """Let the layer's stream gather the window's rows as they are now."""
        stream = self._engine.streams[layer]
        window.lookups[layer].gathered = stream.submit(self._gather, window, layer)

    def _gather(self, window: StoreWindow, layer: int) -> RowBlock:
        lookup, spec = window.lookups[layer], self.tables[layer]
        rows, inverse = lookup.found.result()
        needed = rows.size * spec.row_bytes
        buffer = window.slots.take(needed)
        lookup.buffer = buffer
        block: NDArray[Any] = buffer[:needed].view(spec.dtype.storage).reshape(rows.size, spec.dim)
        found = self._engine.gather(layer, rows, block)
        self._table_counters[layer].count_gather(inverse.size, rows.size, *found)
        return block

    def release(self, window: StoreWindow) -> None:
        """Give the buffers of a closed window back."""
        with self._lock:
            if window in self._windows:
                self._windows.remove(window)
        self.forget_sums()
        for layer, lookup in window.lookups.items():
            if self._engine.closed:
                return
            if lookup.gathered is not None:
                self._engine.streams[layer].submit(_recycle, window.slots, lookup)

    def count_wait(self, seconds: float, *, late: bool) -> None:
        """A caller waited for rows."""
        self._counters.count_wait(seconds, late=late)

    # ------------------------------------------------------------------ committing

    def _pending(self) -> list[StoreWindow]:
        with self._lock:
            return [w for w in self._windows if w.step == self.step]

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
                self._summers[layer].sum_parts, parts, self._scratch[layer]
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
        mark: Mark | None = None,
    ) -> Applied:
        """See `session.Session.commit`; `mark` says for whom, if not for this process."""
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
        engine.commit(step, updates, (mark or Mark(session=self._session, epoch=0, step=step),))
        self.forget_sums()
        for window in pending:
            window.close()
        for window in self._pending():
            self._start_gathers(window)
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
        """Drop all but the newest snapshots, and the files that only they need.

        Nothing drops snapshots by itself: a checkpoint may name any of them. A kept snapshot
        keeps its segments and its base generation on disk.

        Raises:
            ConfigError: fewer than one is to be kept.
        """
        if newest < 1:
            raise ConfigError(f"at least one snapshot is kept, asked for {newest}")
        self._trained().catalog.keep_snapshots(newest)

    def restore(self, snapshot: SnapshotRef | int) -> None:
        """See `session.Session.restore`. Announced windows are closed."""
        engine = self._trained()
        engine.catalog.find_snapshot(snapshot)  # before anything changes
        with self._lock:
            windows = list(self._windows)
        for window in windows:
            window.close()
        for stream in engine.streams.values():
            stream.submit(int).result()
        engine.restore(snapshot)

    def seal(self) -> None:
        """Write what is in shared memory to disk now; returns when that is durable."""
        self._trained().freeze().result()

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

        Raises:
            DiskFullError: the newest rows stay in shared memory for the next open.
        """
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _recycle(slots: SlotPool, lookup: LayerLookup) -> None:
    """On the stream, so after the gather that may still be running."""
    if lookup.buffer is not None:
        buffer, lookup.buffer = lookup.buffer, None
        slots.give_back(buffer)


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
