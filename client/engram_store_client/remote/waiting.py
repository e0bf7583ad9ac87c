"""How long a trainer waited for rows of a store process: only it can tell."""

import threading
from collections.abc import Iterable
from dataclasses import replace

from engram_store.engine.statistics import WaitCounter
from engram_store.stats import StoreStats


class Waiting:
    """Counts waits of one session, on any thread.

    Args:
        layers: of the store.
    """

    def __init__(self, layers: Iterable[int]) -> None:
        self._lock = threading.Lock()
        self._all = WaitCounter()
        self._tables = {layer: WaitCounter() for layer in layers}
        self._late = 0

    def count(self, layer: int, seconds: float, *, late: bool) -> None:
        """Rows of a layer were asked for, and were there after so many seconds.

        Args:
            layer: of the store.
            seconds: until they were there.
            late: of a training window whose rows had not come when they were asked for.
        """
        with self._lock:
            self._all.count(seconds)
            self._tables[layer].count(seconds)
            self._late += late

    def put_into(self, stats: StoreStats) -> StoreStats:
        """The store's statistics with this session's waits in place of its own."""
        with self._lock:
            waits, late = self._all.record(), self._late
            tables = {
                layer: replace(table, waits=self._tables[layer].record())
                for layer, table in stats.tables.items()
            }
        return replace(
            stats, tables=tables, waits=waits, wait_seconds=waits.seconds, late_windows=late
        )
