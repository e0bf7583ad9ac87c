"""What is known of a table's hash heads: from samples of windows, and from sealed rows.

A window is looked at after its rows were handed out, one window of 16; the seal thread marks rows
that were updated. So neither who waits for rows nor a commit pays for what is counted here.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.fetch import Fetched
from engram_store.kernels import statistics as kernels
from engram_store.kernels.hashing import make_plan
from engram_store.kernels.statistics import REGISTERS, HeadRanges
from engram_store.recipes import Recipe
from engram_store.recipes.families import NO_TOKEN
from engram_store.stats import HeadStats, OrderStats
from engram_store.types import RowIds, TableSpec, TokenIds

SAMPLE_EVERY = 16
"""Windows of which one is looked at: a look takes a tenth of what the window itself does."""
GROWTH_POINTS = 64
"""Points of a growth curve at most; when there are more, every other one is dropped."""


def head_ranges(recipe: Recipe, spec: TableSpec) -> HeadRanges:
    """Which rows of a table belong to which head."""
    return HeadRanges.of(recipe.layer(spec.layer).offsets, spec.rows)


class WindowSamples:
    """What sampled windows of one table looked up; belongs to the table's stream.

    Its registers take 16 KB per head and per order, from the first sample on.

    Args:
        recipe, spec: of the table.
    """

    def __init__(self, recipe: Recipe, spec: TableSpec) -> None:
        self._recipe, self._layer = recipe, recipe.layer(spec.layer)
        self._ranges = head_ranges(recipe, spec)
        self._plan = make_plan(
            token_map=recipe.token_map,
            filler=recipe.filler,
            separator=recipe.separator,
            separator_hides_itself=recipe.rules.separator_hides_itself,
            oldest_first=recipe.rules.oldest_first,
            orders=recipe.orders,
            multipliers=self._layer.multipliers,
            moduli=self._layer.moduli,
        )
        self._lines = np.full(recipe.max_order, -1, np.int64)
        for line, order in enumerate(recipe.orders):
            self._lines[order - 1] = line
        self._found: NDArray[np.int64] = np.zeros((recipe.columns, 2), np.int64)
        """Of each head: rows of sampled windows, and those of them in shared memory."""
        self._in_files: NDArray[np.int64] = np.zeros(recipe.columns, np.int64)
        """Of each head: rows of sampled windows found on pages in memory."""
        self._cold: NDArray[np.int64] = np.zeros(recipe.columns, np.int64)
        """Of each head: rows of all windows that had to be read."""
        self._rows = self._ngrams = np.zeros((0, REGISTERS), np.uint8)
        self._scratch = np.empty((2, 0), np.int64)
        self.seen = 0
        """Windows."""
        self.sampled = 0
        """Of them, those that were looked at."""

    def next_is_due(self) -> bool:
        """A window's rows were handed out: whether to look at it."""
        self.seen += 1
        # One at a pseudo-random place of every 16, so that a step of 16 windows is sampled fairly;
        # the very first one too, or a short run would have none.
        block, place = divmod(self.seen - 1, SAMPLE_EVERY)
        return place == (block * 0x9E3779B1 >> 16) % SAMPLE_EVERY

    def count_cold(self, fetched: Fetched) -> NDArray[np.int64]:
        """Count a window's cold rows by head: int64 [columns]. Reading one took far longer."""
        found: NDArray[np.int64] = np.zeros(self._cold.size, np.int64)
        if fetched.cold is not None:
            ranges = self._ranges
            where = ranges.starts, ranges.guesses, ranges.shift
            kernels.count_cold(fetched.rows, fetched.cold, *where, found)
            self._cold += found
        return found

    def look_at(
        self,
        fetched: Fetched,
        slots: int,
        cold: NDArray[np.int64],
        tokens: TokenIds,
        context: TokenIds | None,
        attention_mask: NDArray[Any] | None,
    ) -> None:
        """Count a window's rows by head, and take note of its rows and n-grams.

        Args:
            fetched: its rows, their places still there.
            slots: of the memtables; see `kernels.statistics.count_heads`.
            cold: of `count_cold`.
            tokens, context, attention_mask: as for `Recipe.rows`, checked before.
        """
        ranges = self._ranges
        if not self._rows.size:
            self._rows = np.zeros((self._recipe.columns, REGISTERS), np.uint8)
            self._ngrams = np.zeros((len(self._recipe.orders), REGISTERS), np.uint8)
        where = ranges.starts, ranges.guesses, ranges.shift
        found: NDArray[np.int64] = np.zeros_like(self._found)
        kernels.count_heads(fetched.rows, fetched.places, slots, *where, found, self._rows)
        self._found += found
        # A row that moved since it was read may be in shared memory by now.
        self._in_files += np.maximum(found[:, 0] - found[:, 1] - cold, 0)
        self._note_ngrams(tokens, context, attention_mask)
        self.sampled += 1

    def _note_ngrams(
        self, tokens: TokenIds, context: TokenIds | None, attention_mask: NDArray[Any] | None
    ) -> None:
        recipe = self._recipe
        if attention_mask is not None and recipe.rules.masks_padding:
            tokens = np.where(attention_mask != 0, tokens, np.int64(recipe.filler))
        batch, time = tokens.shape
        if context is None:
            context = np.full((batch, recipe.context_length), NO_TOKEN, np.int64)
        if self._scratch.shape[1] < recipe.context_length + time:
            self._scratch = np.empty((2, recipe.context_length + time), np.int64)
        kernels.count_ngrams(
            np.ascontiguousarray(tokens),
            np.ascontiguousarray(context),
            self._plan,
            self._scratch,
            self._lines,
            self._ngrams,
        )

    def record(
        self, lookups: int, unique: int, overlay: int, cold: int, touched: Sequence[int]
    ) -> tuple[OrderStats, ...]:
        """What the samples say, scaled to the table's exact counters.

        Args:
            lookups, unique, overlay, cold: of the table.
            touched: rows updated of each head.
        """
        recipe, layer = self._recipe, self._layer
        found = (
            _share(overlay, self._found[:, 1], self._found[:, 0]),
            _share(unique - overlay - cold, self._in_files, self._found[:, 0]),
            self._cold.tolist(),
        )
        distinct = [kernels.estimate_distinct(line) for line in self._rows]
        ngrams = [kernels.estimate_distinct(line) for line in self._ngrams]
        orders = []
        for i, order in enumerate(recipe.orders):
            heads = []
            for j, modulus in enumerate(layer.moduli[i]):
                column = i * recipe.heads + j
                overlay_hits, page_hits, page_misses = (part[column] for part in found)
                heads.append(
                    HeadStats(
                        rows=modulus,
                        lookups=lookups // recipe.columns,
                        unique_rows=overlay_hits + page_hits + page_misses,
                        overlay_hits=overlay_hits,
                        page_hits=page_hits,
                        page_misses=page_misses,
                        sampled_rows=distinct[column] if distinct else 0,
                        touched_rows=touched[column] if touched else 0,
                    )
                )
            seen = ngrams[i] if ngrams else 0
            orders.append(OrderStats(order=order, sampled_ngrams=seen, heads=tuple(heads)))
        return tuple(orders)


def _share(total: int, counts: NDArray[np.int64], otherwise: NDArray[np.int64]) -> list[int]:
    """A total shared out like the counts, or like others if there are none; else nothing."""
    if not counts.any():
        counts = otherwise
    counted = int(counts.sum())
    return [round(total * int(count) / counted) if counted else 0 for count in counts]


class TouchedRows:
    """Which rows of one table were updated since the store was opened; kept by the seal thread.

    One bit per row, from the first seal on.

    Args:
        recipe, spec: of the table.
    """

    def __init__(self, recipe: Recipe, spec: TableSpec) -> None:
        self._ranges = head_ranges(recipe, spec)
        self._marks = np.zeros(0, np.uint8)
        self._bytes = spec.rows // 8 + 1
        self._found: NDArray[np.int64] = np.zeros(recipe.columns, np.int64)
        self._lock = threading.Lock()
        """Protects the points: the seal thread adds them."""
        self._points: list[tuple[int, int]] = []
        self._seals = 0
        self._stride = 1

    def add(self, rows: RowIds, step: int) -> None:
        """Rows (int32 [n]) were updated before a step, and are sealed now."""
        if not self._marks.size:
            self._marks = np.zeros(self._bytes, np.uint8)
        ranges = self._ranges
        where = ranges.starts, ranges.guesses, ranges.shift
        kernels.mark_rows(rows, *where, self._marks, self._found)
        with self._lock:
            self._add_point(step)

    def _add_point(self, step: int) -> None:
        # After a restore steps begin again: what was there is another history.
        self._points = [point for point in self._points if point[0] < step]
        if self._points and (self._seals - 1) % self._stride:
            # The last point is of the newest seal, whether it is one to stay or not.
            self._points.pop()
        self._points.append((step, int(self._found.sum())))
        self._seals += 1
        if len(self._points) > GROWTH_POINTS:
            self._points = [*self._points[:-1:2], self._points[-1]]
            self._stride *= 2

    def record(self) -> tuple[list[int], tuple[tuple[int, int], ...]]:
        """Rows of each head, and (step, rows) of some seals."""
        with self._lock:
            return self._found.tolist(), tuple(self._points)
