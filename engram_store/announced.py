"""The windows that are announced and not done with: hashed, gathered, given back.

Two threads work for each table. Its stream does what a step waits for: the windows of the step that
is under way, and commits. Its look-ahead thread does the same for later windows (`lookahead`). When
their step comes, the stream only copies the rows again that have changed meanwhile.
"""

import itertools
import threading
from concurrent.futures import Future
from functools import partial
from typing import Any

from engram_store.early import EarlyWindow
from engram_store.engine import Engine
from engram_store.engine.fetch import Fetched
from engram_store.engine.gradients import SummedGradients
from engram_store.engine.lookup import LookupScratch
from engram_store.engine.reader import Reader
from engram_store.engine.statistics import StoreCounters, TableCounters
from engram_store.errors import WindowClosedError
from engram_store.gathering import Gatherer, KeptRows
from engram_store.layout.metadata import StoreMetadata
from engram_store.lookahead import LookAhead
from engram_store.window import LayerLookup, Phase, StoreWindow


class AnnouncedWindows:
    """Says who works on which window, and when. Any thread may announce, start and end.

    Args:
        engine: has the tables, and a stream for each.
        metadata: recipe and tables.
        counters: of the session.
        table_counters: of the tables, by layer.
        lookahead_bytes: what windows of later steps may take together.
        staleness: steps by which the rows of a window may lag behind.
    """

    def __init__(
        self,
        engine: Engine | Reader,
        metadata: StoreMetadata,
        counters: StoreCounters,
        table_counters: dict[int, TableCounters],
        *,
        lookahead_bytes: int,
        staleness: int = 0,
    ) -> None:
        self._engine, self._counters = engine, table_counters
        self._store_counters = counters
        self.staleness = staleness
        self._training: list[StoreWindow] = []
        # Guards the list, and the phases of windows.
        self._lock = threading.RLock()
        self._begun = engine.step
        """Steps whose rows are all in the tables; the engine's own count is ahead of that while a
        commit is under way."""
        self._arrivals = itertools.count()
        self._claims: list[tuple[StoreWindow, int, LayerLookup]] = []
        """What the commit under way was promised to hand out."""
        gatherers, ahead = (
            {layer: Gatherer(metadata.recipe, table) for layer, table in engine.tables.items()}
            for _ in range(2)
        )
        self._gatherers = gatherers
        self.ahead = LookAhead(
            ahead,
            engine.paging,
            self._lock,
            lookahead_bytes,
            counters,
            table_counters,
            self.start,
        )

    def scratch(self, layer: int) -> LookupScratch:
        """Room to remove repeats in; belongs to the table's stream."""
        return self._gatherers[layer].scratch

    # ------------------------------------------------------------------ announced, started, ended

    def add(self, window: StoreWindow) -> None:
        """Hash a window's tokens and gather its rows, now or ahead of its step."""
        window.lookups = {layer: LayerLookup() for layer in self._gatherers}
        window.arrival = next(self._arrivals)
        if window.step is None:
            for layer in window.lookups:
                self.start_find(window, layer)
            return
        with self._lock:
            self._training.append(window)
            if self.may_read(window.step):
                self._start(window)
                return
        self.ahead.put(window)

    def may_read(self, step: int) -> bool:
        """Whether rows of a step's windows can be had now."""
        return self._begun <= step <= self._begun + self.staleness

    def of_step(self, step: int) -> list[StoreWindow]:
        """Its windows, by part and then in the order of their announcement."""
        with self._lock:
            windows = [window for window in self._training if window.step == step]
        return sorted(windows, key=lambda window: (window.part, window.arrival))

    def begin_step(self) -> None:
        """The engine is at another step: gather for the windows that waited for it."""
        with self._lock:
            self._begun = self._engine.step
            for window in list(self._training):
                if window.step is not None and self.may_read(window.step):
                    self._start(window)
            for window in self.of_step(self._begun):
                if self.staleness:
                    self.ahead.count_stale(window)
            if self.ahead.indexed:
                for window in self.of_step(self._begun + 1):
                    self.ahead.catch_up(window)

    def _start(self, window: StoreWindow) -> None:
        for layer in window.lookups:
            self.start(window, layer)

    def start_find(self, window: StoreWindow, layer: int) -> None:
        """Let the layer's stream hash, unless somebody does or did."""
        lookup = window.lookups[layer]
        with self._lock:
            if lookup.finding:
                return
            lookup.finding = True
        self._engine.streams[layer].submit(self._gatherers[layer].find, window, lookup)

    def start(self, window: StoreWindow, layer: int) -> None:
        """Let the layer's stream gather the rows as they are now, unless it was told before."""
        lookup = window.lookups[layer]
        with self._lock:
            if lookup.phase is Phase.AHEAD:
                lookup.due = True
                return
            if lookup.phase is Phase.STARTED:
                return
            lookup.phase = Phase.STARTED
        self.start_find(window, layer)
        self._engine.streams[layer].submit(self._gather, window, layer, lookup)

    def end(self, window: StoreWindow) -> None:
        """Give a closed window's memory back; who waits for its rows is told."""
        waiting: list[Future[Any]] = []
        if window.step is not None and window.unused:
            self._store_counters.count_unused()
        with self._lock:
            if window in self._training:
                self._training.remove(window)
            for lookup in window.lookups.values():
                if lookup.phase is not Phase.STARTED:
                    waiting.append(lookup.gathered)
                if not lookup.finding:
                    waiting.append(lookup.found)
                lookup.lent |= lookup.phase is Phase.AHEAD
                lookup.phase, lookup.finding = Phase.STARTED, True
        for future in waiting:
            # Outside the lock: whoever waits is called back here.
            future.set_exception(WindowClosedError("the window was closed"))
        if self._engine.closed:
            return
        for layer, lookup in window.lookups.items():
            # There, so after whatever may still be running there for the window.
            self._engine.streams[layer].submit(self._give_back, window, layer, lookup)

    def _give_back(self, window: StoreWindow, layer: int, lookup: LayerLookup) -> None:
        with self._lock:
            if lookup.claimed:
                lookup.abandoned = True  # the commit still has to do with it
                return
        if lookup.lent:
            self.ahead.submit(layer, self._recycle, window, lookup)
        else:
            self._recycle(window, lookup)

    def _recycle(self, window: StoreWindow, lookup: LayerLookup) -> None:
        while lookup.buffers:
            window.slots.give_back(lookup.buffers.pop())
        if lookup.kept is not None:
            lookup.kept.give_back()
        reserved, lookup.reserved = lookup.reserved, 0
        self.ahead.give_back(reserved)

    def end_all(self) -> None:
        """Close every training window and wait until nothing of them is under way."""
        with self._lock:
            windows = list(self._training)
        for window in windows:
            window.close()
        self.ahead.drain()
        for stream in self._engine.streams.values():
            stream.submit(int).result()
        self.ahead.drain()

    def _gather(self, window: StoreWindow, layer: int, lookup: LayerLookup) -> None:
        """On the stream."""
        try:
            rows, inverse = lookup.found.result()
            lookup.staged = lookup.fetched is not None
            fetched, again = self._gatherers[layer].gather(
                window,
                lookup,
                keep_places=bool(self.staleness),
                keep=window.step is not None and self._engine.paging.cold,
            )
            lookup.cold = fetched.waited
        except BaseException as error:
            lookup.gathered.set_exception(error)
            return
        assert lookup.block is not None
        lookup.gathered.set_result(lookup.block)
        self._counters[layer].count_gather(inverse.size, fetched, again)
        self._engine.count_uses(layer, rows)
        self._counters[layer].look_at(window, self._engine.tables[layer], fetched)

    def kept_rows(
        self, layer: int, windows: list[StoreWindow], summed: SummedGradients
    ) -> KeptRows | None:
        """What a step's windows have kept for its commit; None: not all of it."""
        lookups = [w.lookups[layer] for w in windows if w.lookups[layer].gradient is not None]
        if summed.skipped or not all(lookup.kept and lookup.fetched for lookup in lookups):
            return None
        gatherer = self._gatherers[layer]
        return KeptRows(gatherer, lookups, summed.positions, summed.rows.size)

    # ------------------------------------------------------------------ before a commit is done

    def claim_early(self) -> dict[int, EarlyWindow]:
        """What the first window of the next step can get from the commit of this one.

        By layer, as far as its rows are staged. `end_early` says how the commit ended.
        """
        early = {}
        with self._lock:
            self.ahead.indexed = True
            windows = self.of_step(self._begun + 1)
            if not windows or self.staleness:
                return {}
            window = windows[0]
            for layer, lookup in window.lookups.items():
                if lookup.phase is not Phase.STAGED or lookup.index is None:
                    continue
                lookup.phase, lookup.claimed = Phase.STARTED, True
                self._claims.append((window, layer, lookup))
                hand_out = partial(self._hand_out, window, layer, lookup)
                early[layer] = EarlyWindow(self._gatherers[layer], lookup, hand_out)
        return early

    def _hand_out(
        self,
        window: StoreWindow,
        layer: int,
        lookup: LayerLookup,
        again: int,
        error: BaseException | None,
    ) -> None:
        """On the stream: a commit gave a window its rows, or could not."""
        if error is not None:
            lookup.gathered.set_exception(error)
        else:
            fetched = lookup.fetched
            assert lookup.block is not None
            assert fetched is not None
            lookup.staged, lookup.cold = True, fetched.waited
            # After the commit, and before the window's memory can be used for another.
            self._engine.streams[layer].submit(self._look_at, window, layer, fetched)
            lookup.gathered.set_result(lookup.block)
            _, inverse = lookup.found.result()
            self._counters[layer].count_gather(inverse.size, fetched, again)
        self._end_claim(window, layer, lookup)

    def _look_at(self, window: StoreWindow, layer: int, fetched: Fetched) -> None:
        if not window.closed:
            self._counters[layer].look_at(window, self._engine.tables[layer], fetched)

    def _end_claim(self, window: StoreWindow, layer: int, lookup: LayerLookup) -> None:
        with self._lock:
            lookup.claimed = False
            abandoned, lookup.abandoned = lookup.abandoned, False
        if abandoned:
            self._give_back(window, layer, lookup)

    def end_early(self, *, applied: bool) -> None:
        """The commit is done. If it failed, what it handed out never was in a table."""
        with self._lock:
            claims, self._claims = self._claims, []
        for window, layer, lookup in claims:
            if lookup.claimed:
                with self._lock:
                    closed = window.closed
                    if not closed:
                        lookup.phase = Phase.STAGED
                if closed:
                    lookup.gathered.set_exception(WindowClosedError("the window was closed"))
                self._end_claim(window, layer, lookup)
            elif not applied:
                window.close()
