"""A step's gradients, and its commit: at once, or in the background."""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from engram_store.announced import AnnouncedWindows
from engram_store.engine import Engine
from engram_store.engine.gradients import GradientSummer, SummedGradients
from engram_store.engine.memtable import new_session_id
from engram_store.engine.statistics import StoreCounters, TableCounters
from engram_store.engine.updates import TableUpdate
from engram_store.errors import (
    ConfigError,
    DuplicateStepError,
    MissingGradientError,
    StepGapError,
)
from engram_store.kernels.gradients import sum_of_squares
from engram_store.layout.manifest import Mark
from engram_store.optimizers import rule_step
from engram_store.session import Applied
from engram_store.types import HyperParameters, RowBlock, TableSpec
from engram_store.window import StoreWindow


@dataclass(frozen=True, slots=True)
class Order:
    """A commit that was asked for and checked."""

    step: int
    hyper: Mapping[int, HyperParameters]
    windows: list[StoreWindow]
    summed: dict[int, SummedGradients] | None
    """Their gradients, if they were summed before."""
    marks: tuple[Mark, ...]


class Commits:
    """The pending step of a store that is trained. One thread trains.

    Args:
        engine: applies.
        tables: by layer.
        announced: whose gradients are applied.
        counters, table_counters: told what was done.
        check: raises if the store cannot be written to any more.
    """

    def __init__(
        self,
        engine: Engine,
        tables: Mapping[int, TableSpec],
        announced: AnnouncedWindows,
        counters: StoreCounters,
        table_counters: Mapping[int, TableCounters],
        check: Callable[[], object],
    ) -> None:
        self.engine, self._tables, self._announced = engine, tables, announced
        self._counters, self._table_counters = counters, table_counters
        self._check = check
        self._session = new_session_id()
        self._summers = {layer: GradientSummer(spec) for layer, spec in tables.items()}
        self._summed: dict[int, SummedGradients] | None = None
        self._committer: ThreadPoolExecutor | None = None
        self._under_way: tuple[int, Future[Applied]] | None = None
        """The last step that was begun in the background."""

    @property
    def step(self) -> int:
        """See `session.Session.step`."""
        if self._under_way is not None:
            step, applied = self._under_way
            if not applied.done():
                return step + 1
        return self.engine.step

    def wait(self) -> None:
        """Until no commit is under way. Whoever began it is told what came of it."""
        if self._under_way is not None:
            wait([self._under_way[1]])
            self._under_way = None

    def wait_for_rows(self, step: int, gathered: "Future[RowBlock]") -> None:
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

    def close(self) -> None:
        """Wait for a commit under way, and end the thread."""
        if self._committer is not None:
            self._committer.shutdown()

    # ------------------------------------------------------------------ gradients

    def forget_sums(self) -> None:
        """Gradients changed since they were summed."""
        self._summed = None

    def gradient_norm(self) -> float:
        """See `session.Session.gradient_norm`. No commit is under way."""
        if self._summed is None:
            self._summed = self._sum_gradients(self._pending())
        return math.sqrt(sum(sum_of_squares(part.sums) for part in self._summed.values()))

    def _pending(self) -> list[StoreWindow]:
        return self._announced.of_step(self.step)

    def _sum_gradients(self, windows: list[StoreWindow]) -> dict[int, SummedGradients]:
        """A step's gradients of every table."""
        futures: dict[int, Future[SummedGradients]] = {}
        for layer, stream in self.engine.streams.items():
            parts = [part for w in windows if (part := w.lookups[layer].gradient) is not None]
            futures[layer] = stream.submit(
                self._summers[layer].sum_parts, parts, self._announced.scratch(layer)
            )
        wait(futures.values())  # also when one fails: its memory is used again
        return {layer: future.result() for layer, future in futures.items()}

    # ------------------------------------------------------------------ applying them

    def order(
        self,
        step: int,
        lr: float | Mapping[int, float],
        *,
        gradient_scale: float,
        eps: float | None,
        betas: tuple[float, float],
        marks: tuple[Mark, ...] = (),
    ) -> Order:
        """Check a commit; no other is under way. Raises: as `session.Session.commit`."""
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
            for layer in self._tables
        }
        windows = self._pending()
        if missing := sorted({layer for window in windows for layer in window.missing()}):
            raise MissingGradientError(step, missing)
        mine = Mark(session=self._session, epoch=0, step=step)
        return Order(step, hyper, windows, self._summed, marks or (mine,))

    def begin(self, order: Order) -> "Future[Applied]":
        """Apply it in the background; rows of the next window are handed out before its end."""
        if self._committer is None:
            self._committer = ThreadPoolExecutor(1, "engram-commit")
        applied = self._committer.submit(self.apply, order, early=True)
        self._under_way = order.step, applied
        return applied

    def apply(self, order: Order, *, early: bool) -> Applied:
        """Apply it; `early`: hand rows of the next window out before the end."""
        self._check()
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
                for layer, spec in self._tables.items()
                if (part := summed[layer]).rows.size
            ]
            self.engine.commit(order.step, updates, order.marks)
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


def _rate(lr: float | Mapping[int, float], layer: int) -> float:
    if not isinstance(lr, Mapping):
        return lr
    if layer not in lr:
        raise ConfigError(f"no learning rate for layer {layer}; lr has layers {sorted(lr)}")
    return lr[layer]
