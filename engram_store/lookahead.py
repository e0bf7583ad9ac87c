"""Looking ahead: work on windows before their step comes, one thread per table.

A window that is announced early is hashed while earlier steps train. If rows were cold lately its
pages are read, and its rows are copied ("staged"); when its step comes, only rows that have changed
meanwhile are copied again. The earliest window goes first, and windows wait as tokens when memory
for more is taken.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from engram_store.engine.cold import Paging
from engram_store.engine.memory import memory_limit_bytes
from engram_store.engine.statistics import StoreCounters, TableCounters
from engram_store.gathering import Gatherer
from engram_store.window import LayerLookup, Phase, StoreWindow

_MAX_DEFAULT_BYTES = 2 << 30
_SHARE = 1 / 8


def default_room() -> int:
    """Bytes that windows of all stores of a process may take ahead of their step by default."""
    return min(_MAX_DEFAULT_BYTES, int(_SHARE * memory_limit_bytes()))


class LookAhead:
    """Stages windows. Any thread may call.

    Args:
        gatherers: by layer; they belong to the threads made here.
        paging: tells whether rows were cold lately.
        lock: guards the phases of all windows.
        room: bytes that windows may take ahead of their step.
        counters: of the session.
        table_counters: by layer.
        due: called, holding the lock, with a window and a layer whose step has come while it was
            worked on.
    """

    def __init__(
        self,
        gatherers: Mapping[int, Gatherer],
        paging: Paging,
        lock: threading.RLock,
        room: int,
        counters: StoreCounters,
        table_counters: Mapping[int, TableCounters],
        due: Callable[[StoreWindow, int], None],
    ) -> None:
        self._gatherers, self._paging, self._lock = gatherers, paging, lock
        self._store_counters, self._counters = counters, table_counters
        self._due = due
        self.room = room
        """Bytes that are left."""
        self.indexed = False
        """Whether staged rows are made findable for commits in the background (`early`)."""
        self.stages_warm = False
        """Whether rows are staged although nothing was cold lately, as they are for commits in the
        background. Copying rows twice costs more than copying them once, a little later."""
        self._waiting: dict[int, list[StoreWindow]] = {layer: [] for layer in gatherers}
        self._without_room = dict.fromkeys(gatherers, 0)
        """How often each thread found no room, and has to be called again."""
        self._threads: dict[int, ThreadPoolExecutor] = {}

    # ------------------------------------------------------------------ what others call

    def put(self, window: StoreWindow) -> None:
        """Work on a window of a later step when it is its turn."""
        for layer, waiting in self._waiting.items():
            with self._lock:
                waiting.append(window)
            self.submit(layer, self._work, layer)

    def catch_up(self, window: StoreWindow) -> None:
        """Let a staged window have now what commits have changed so far. Hold the lock."""
        for layer, lookup in window.lookups.items():
            if lookup.phase is Phase.STAGED and lookup.fetched is not None:
                lookup.phase = Phase.AHEAD
                self.submit(layer, self._refresh, window, layer, lookup)

    def count_stale(self, window: StoreWindow) -> None:
        """The window's step has begun: count which of its rows are out of date. Hold the lock."""
        for layer, lookup in window.lookups.items():
            lookup.lent = True
            self.submit(layer, self._count_stale, window, layer, lookup)

    def submit(self, layer: int, call: Callable[..., None], *arguments: Any) -> None:
        """Run something on a table's look-ahead thread, after what it was given before."""
        with self._lock:
            if layer not in self._threads:
                self._threads[layer] = ThreadPoolExecutor(1, f"engram-ahead-{layer}")
            self._threads[layer].submit(call, *arguments)

    def give_back(self, size: int) -> None:
        """A window is done with; who found no room tries again."""
        with self._lock:
            self.room += size
            calls, self._without_room = self._without_room, dict.fromkeys(self._without_room, 0)
        for layer, times in calls.items():
            for _ in range(times):
                self.submit(layer, self._work, layer)

    def drain(self) -> None:
        """Wait for everything that was submitted before."""
        with self._lock:
            threads = list(self._threads.values())
        for thread in threads:
            thread.submit(int).result()

    def stop(self) -> None:
        """End the threads; windows that wait are not worked on any more."""
        with self._lock:
            self._waiting = {layer: [] for layer in self._waiting}
        for thread in self._threads.values():
            thread.shutdown()

    # ------------------------------------------------------------------ on the threads

    def _work(self, layer: int) -> None:
        """The earliest window that nobody works on."""
        taken = self._take(layer)
        if taken is not None:
            self._stage(layer, *taken)

    def _take(self, layer: int) -> tuple[StoreWindow, bool] | None:
        """The earliest window that waits, and whether to hash it; None: there is no room."""
        with self._lock:
            waiting = [
                window
                for window in self._waiting[layer]
                if window.lookups[layer].phase is Phase.ANNOUNCED
            ]
            self._waiting[layer] = waiting
            if not waiting:
                return None
            window = min(waiting, key=lambda window: (window.step, window.arrival))
            needed = self._gatherers[layer].most_bytes(
                window.tokens.size, indexed=self.indexed, keep=self._paging.cold
            )
            if needed > self.room:
                self._without_room[layer] += 1
                self._store_counters.count_held()
                return None
            lookup = window.lookups[layer]
            self.room -= needed
            find = not lookup.finding
            lookup.phase, lookup.reserved, lookup.finding = Phase.AHEAD, needed, True
        return window, find

    def _stage(self, layer: int, window: StoreWindow, find: bool) -> None:
        lookup, gatherer = window.lookups[layer], self._gatherers[layer]
        if find:
            gatherer.find(window, lookup)
        cold = self._paging.cold
        try:
            if cold or self.indexed or self.stages_warm:
                gatherer.stage(window, lookup, index=self.indexed, keep=cold)
        except BaseException:
            # The stream meets it again when the rows are due, and tells whoever asks.
            lookup.fetched = None
        taken = sum(buffer.size for buffer in lookup.buffers)
        taken += 0 if lookup.kept is None else lookup.kept.size
        with self._lock:
            # Most windows repeat rows and need less than was set aside.
            self.room += lookup.reserved - taken
            lookup.reserved = taken
        self._staged(window, layer, lookup)

    def _refresh(self, window: StoreWindow, layer: int, lookup: LayerLookup) -> None:
        try:
            if not window.closed:
                self._gatherers[layer].refresh(lookup)
        except BaseException:
            lookup.fetched = None
        self._staged(window, layer, lookup)

    def _staged(self, window: StoreWindow, layer: int, lookup: LayerLookup) -> None:
        with self._lock:
            if lookup.phase is Phase.STARTED:
                return  # closed meanwhile
            lookup.phase = Phase.STAGED
            if lookup.due:
                self._due(window, layer)

    def _count_stale(self, window: StoreWindow, layer: int, lookup: LayerLookup) -> None:
        if lookup.fetched is not None and not window.closed:
            stale = self._gatherers[layer].fetcher.count_changed(lookup.fetched)
            self._counters[layer].count_stale(stale)
