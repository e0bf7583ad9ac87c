"""A session whose tables are plain numpy arrays: the oracle of every other one.

It shares the recipe and the reference arithmetic with the store and nothing else: no files, no
kernels, no threads. What a store holds after the same calls must equal it bit for bit.
"""

import hashlib
import math
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from engram_store.errors import (
    ConfigError,
    DtypeError,
    DuplicateStepError,
    MissingGradientError,
    NonFiniteGradientError,
    ProtocolError,
    ReadOnlyError,
    ShapeError,
    SnapshotMismatchError,
    StepGapError,
    StoreClosedError,
    UnknownLayerError,
    WindowClosedError,
)
from engram_store.optimizers import apply_reference, rule_step
from engram_store.optimizers.reference import widen
from engram_store.recipes import Recipe
from engram_store.session import Applied, SnapshotRef
from engram_store.stats import StoreStats, Waits
from engram_store.types import (
    GradientBlock,
    HyperParameters,
    Inverse,
    NonFinitePolicy,
    RowBlock,
    RowIds,
    TableSpec,
    TokenIds,
)


@dataclass
class MemoryTable:
    """One table: rows in storage dtype [rows, dim], state float32 [rows, state width]."""

    spec: TableSpec
    rows: RowBlock
    state: NDArray[np.float32]

    def copy(self) -> "MemoryTable":
        """Independent copy."""
        return MemoryTable(self.spec, self.rows.copy(), self.state.copy())


@dataclass
class _Lookup:
    unique: RowIds
    inverse: Inverse
    rows: RowBlock | None = None
    gradient: NDArray[np.float32] | None = None
    room: NDArray[np.float32] | None = None


@dataclass(eq=False)
class MemoryWindow:
    """Implements `session.Window` over a `MemorySession`."""

    session: "MemorySession"
    step: int | None
    lookups: dict[int, _Lookup]
    closed: bool = False
    read: set[int] = field(default_factory=set)

    def _lookup(self, layer: int) -> _Lookup:
        self.session._check_open()  # noqa: SLF001
        if self.closed:
            raise WindowClosedError("the window was committed or closed; announce it again")
        if layer not in self.lookups:
            raise UnknownLayerError(layer, sorted(self.lookups))
        return self.lookups[layer]

    def row_ids(self, layer: int) -> RowIds:
        """See `session.Window.row_ids`."""
        return self._lookup(layer).unique

    def rows(self, layer: int) -> tuple[RowBlock, Inverse]:
        """See `session.Window.rows`."""
        lookup = self._lookup(layer)
        if self.step is not None and self.step > self.session.step:
            raise StepGapError(self.step, self.session.step)
        self.read.add(layer)
        if lookup.rows is None:
            lookup.rows = self.session.contents[layer].rows[lookup.unique]
        return lookup.rows, lookup.inverse

    def ready(self, layer: int) -> bool:
        """See `session.Window.ready`: nothing is waited for here."""
        self._lookup(layer)
        return self.step is None or self.step <= self.session.step

    def missing(self) -> set[int]:
        """Layers that were read and got no gradient; all of them if the window was not used."""
        pushed = {layer for layer, lookup in self.lookups.items() if lookup.gradient is not None}
        return (self.read if self.read or pushed else set(self.lookups)) - pushed

    def gradient_buffer(self, layer: int) -> NDArray[np.float32]:
        """See `session.Window.gradient_buffer`."""
        lookup = self._lookup(layer)
        if self.step is None:
            raise ReadOnlyError("the window was announced without a step; it takes no gradients")
        if lookup.room is None:
            shape = (lookup.unique.size, self.session.tables[layer].dim)
            lookup.room = np.zeros(shape, np.float32)
        return lookup.room

    def push(self, layer: int, gradients: GradientBlock) -> None:
        """See `session.Window.push`."""
        lookup = self._lookup(layer)
        spec = self.session.tables[layer]
        if self.step is None:
            raise ReadOnlyError("the window was announced without a step; it takes no gradients")
        if gradients.dtype not in (np.float32, np.uint16):
            raise DtypeError("the gradient", gradients.dtype, "float32, or uint16 (bfloat16 bits)")
        if gradients.shape != (lookup.unique.size, spec.dim):
            raise ShapeError("the gradient", gradients.shape, f"({lookup.unique.size}, {spec.dim})")
        if not gradients.flags.c_contiguous:
            raise ShapeError("the gradient", gradients.shape, "C-contiguous memory")
        if lookup.gradient is not None:
            raise ProtocolError(f"layer {layer} of this window was pushed before")
        wide = widen(gradients)
        bad = ~np.isfinite(wide).all(axis=1)
        if bad.any() and spec.on_nonfinite is NonFinitePolicy.REJECT:
            first = int(lookup.unique[np.argmax(bad)])
            raise NonFiniteGradientError(layer, self.step, int(bad.sum()), first)
        lookup.gradient = wide

    def close(self) -> None:
        """See `session.Window.close`."""
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _unique_in_order(lookups: NDArray[np.int32]) -> tuple[RowIds, Inverse]:
    """Unique ids in order of first look-up, and the inverse."""
    values, first, inverse = np.unique(lookups, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    return values[order], rank[inverse].astype(np.int32).reshape(lookups.shape)


class MemorySession:
    """Implements `session.Session` with numpy arrays.

    Args:
        recipe: how tokens become rows.
        tables: a `TableSpec` for every layer of the recipe.
        rows: initial rows by layer, storage dtype [rows, dim]; zeros where missing.
    """

    def __init__(
        self,
        recipe: Recipe,
        tables: Mapping[int, TableSpec],
        rows: Mapping[int, RowBlock] | None = None,
    ) -> None:
        self.recipe = recipe
        self.tables = dict(tables)
        self.store_id = "memory"
        self.step = 0
        self.closed = False
        given = rows or {}
        self.contents = {
            layer: MemoryTable(
                spec,
                given[layer].copy()
                if layer in given
                else np.zeros((spec.rows, spec.dim), spec.dtype.storage),
                np.zeros((spec.rows, spec.state_width), np.float32),
            )
            for layer, spec in self.tables.items()
        }
        self._windows: list[MemoryWindow] = []
        self._snapshots: dict[int, tuple[SnapshotRef, dict[int, MemoryTable]]] = {}
        self._announced = 0

    def _check_open(self) -> None:
        if self.closed:
            raise StoreClosedError("the session was closed")

    @property
    def durable_step(self) -> int:
        """See `session.Session.durable_step`."""
        return max(self._snapshots, default=0)

    @property
    def world_size(self) -> int:
        """Always 1; ranks train together through a store process."""
        return 1

    def announce(
        self,
        tokens: TokenIds,
        step: int | None = None,
        *,
        context: TokenIds | None = None,
        attention_mask: TokenIds | None = None,
    ) -> MemoryWindow:
        """See `session.Session.announce`."""
        self._check_open()
        if step is not None and step < self.step:
            raise DuplicateStepError(step, self.step)
        lookups = {}
        for layer in self.tables:
            ids = self.recipe.rows(layer, tokens, context=context, attention_mask=attention_mask)
            lookups[layer] = _Lookup(*_unique_in_order(ids))
        window = MemoryWindow(self, step, lookups)
        self._announced += 1
        if step is not None:
            self._windows.append(window)
        return window

    def _merged(self, layer: int) -> tuple[RowIds, NDArray[np.float32], NDArray[np.bool_]]:
        """Unique rows of the pending step, their summed gradients, and which to skip."""
        parts = [
            (w.lookups[layer].unique, g)
            for w in self._windows
            if w.step == self.step and not w.closed
            if (g := w.lookups[layer].gradient) is not None
        ]
        dim = self.tables[layer].dim
        if not parts:
            return np.empty(0, np.int32), np.empty((0, dim), np.float32), np.empty(0, np.bool_)
        rows, _ = _unique_in_order(np.concatenate([rows for rows, _ in parts]))
        position = {int(row): i for i, row in enumerate(rows)}
        sums = np.zeros((rows.size, dim), np.float32)
        skip = np.zeros(rows.size, np.bool_)
        for unique, gradient in parts:
            index = np.array([position[int(row)] for row in unique], np.int64)
            if self.tables[layer].on_nonfinite is NonFinitePolicy.SKIP:
                skip[index] |= ~np.isfinite(gradient).all(axis=1)
            with np.errstate(all="ignore"):
                sums[index] = gradient if len(parts) == 1 else sums[index] + gradient
        return rows, sums, skip

    def gradient_norm(self) -> float:
        """See `session.Session.gradient_norm`."""
        total = 0.0
        for layer in self.tables:
            _, sums, skip = self._merged(layer)
            total += float(np.sum(sums[~skip].astype(np.float64) ** 2))
        return math.sqrt(total)

    def commit(
        self,
        step: int,
        lr: float | Mapping[int, float],
        *,
        gradient_scale: float = 1.0,
        eps: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> Applied:
        """See `session.Session.commit`."""
        self._check_open()
        if step != self.step:
            raise (DuplicateStepError if step < self.step else StepGapError)(step, self.step)
        pending = [w for w in self._windows if w.step == step and not w.closed]
        missing = sorted({layer for window in pending for layer in window.missing()})
        if missing:
            raise MissingGradientError(step, missing)
        changed, skipped = {}, {}
        rates = lr if isinstance(lr, Mapping) else dict.fromkeys(self.tables, lr)
        if not rates.keys() >= self.tables.keys():
            raise ConfigError(f"no learning rate for {sorted(self.tables.keys() - rates.keys())}")
        hypers = {
            layer: HyperParameters(
                lr=rates[layer],
                eps=eps,
                beta1=betas[0],
                beta2=betas[1],
                gradient_scale=gradient_scale,
            )
            for layer in self.tables
        }
        for layer, spec in self.tables.items():
            hyper = hypers[layer]
            rows, sums, skip = self._merged(layer)
            table, rows, sums = self.contents[layer], rows[~skip], sums[~skip]
            old, state = table.rows[rows], table.state[rows]
            new = apply_reference(spec, rule_step(spec, step, hyper), rows, old, state, sums)
            table.rows[rows], table.state[rows] = new
            changed[layer], skipped[layer] = rows.size, int(skip.sum())
        for window in pending:
            window.close()
        self._windows = [w for w in self._windows if not w.closed]
        self.step += 1
        return Applied(step=step, rows=changed, skipped_rows=skipped)

    def begin_commit(
        self,
        step: int,
        lr: float | Mapping[int, float],
        *,
        gradient_scale: float = 1.0,
        eps: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> "Future[Applied]":
        """See `session.Session.begin_commit`; it is done when this returns."""
        applied: Future[Applied] = Future()
        applied.set_result(
            self.commit(step, lr, gradient_scale=gradient_scale, eps=eps, betas=betas)
        )
        return applied

    def snapshot(self) -> SnapshotRef:
        """See `session.Session.snapshot`."""
        self._check_open()
        digest = hashlib.sha256()
        for table in self.contents.values():
            digest.update(table.rows.tobytes() + table.state.tobytes())
        ref = SnapshotRef(store_id=self.store_id, step=self.step, digest=digest.hexdigest())
        self._snapshots[self.step] = ref, {k: v.copy() for k, v in self.contents.items()}
        return ref

    def restore(self, snapshot: SnapshotRef | int) -> None:
        """See `session.Session.restore`."""
        self._check_open()
        step = snapshot if isinstance(snapshot, int) else snapshot.step
        known = self._snapshots.get(step)
        if known is None or (isinstance(snapshot, SnapshotRef) and known[0] != snapshot):
            have = [ref for ref, _ in self._snapshots.values()]
            raise SnapshotMismatchError(f"asked for {snapshot}, this store has {have}")
        self.contents = {k: v.copy() for k, v in known[1].items()}
        self._snapshots = {k: v for k, v in self._snapshots.items() if k <= step}
        self.step = step
        for window in self._windows:
            window.close()
        self._windows = []

    def stats(self) -> StoreStats:
        """Only steps and windows are counted here."""
        record: dict[str, Any] = dict.fromkeys(StoreStats.__dataclass_fields__, 0)
        record |= {"tables": {}, "damages": "", "waits": Waits()}
        record |= {"steps": self.step, "windows": self._announced}
        return StoreStats(**record)

    def close(self) -> None:
        """See `session.Session.close`."""
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
