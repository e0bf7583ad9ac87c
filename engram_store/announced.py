"""The windows that are announced and not done with: hashed, gathered, given back.

Everything about one table happens on that table's stream, in the order in which it was asked for.
"""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.engine import Engine
from engram_store.engine.lookup import LookupScratch
from engram_store.engine.reader import Reader
from engram_store.engine.statistics import TableCounters
from engram_store.errors import WindowClosedError
from engram_store.layout.metadata import StoreMetadata
from engram_store.types import Inverse, RowBlock, RowIds
from engram_store.window import LayerLookup, StoreWindow


class AnnouncedWindows:
    """Hashes and gathers for windows. Any thread may announce, start and end.

    Args:
        engine: gathers, and has a stream for every table.
        metadata: recipe and tables.
        counters: of the tables, by layer.
    """

    def __init__(
        self, engine: Engine | Reader, metadata: StoreMetadata, counters: dict[int, TableCounters]
    ) -> None:
        self._engine, self._metadata, self._counters = engine, metadata, counters
        self._training: list[StoreWindow] = []
        # Guards the list, and that a gather starts once: when its step comes, or when asked for.
        self._lock = threading.RLock()
        self.scratch = {layer: LookupScratch() for layer in metadata.tables}
        """Belongs to the tables' streams."""

    def add(self, window: StoreWindow) -> None:
        """Hash a window's tokens; gather its rows if its step is the next one."""
        for layer, stream in self._engine.streams.items():
            lookup = window.lookups[layer] = LayerLookup()
            lookup.found = stream.submit(self._find, window, layer)
        if window.step is None:
            return
        with self._lock:
            self._training.append(window)
            if window.step == self._engine.step:
                self._start(window)

    def of_step(self, step: int) -> list[StoreWindow]:
        """Its windows, by part and then in the order of their announcement."""
        with self._lock:
            windows = [window for window in self._training if window.step == step]
        return sorted(windows, key=lambda window: window.part)

    def begin_step(self) -> None:
        """The engine reached a step: gather for the windows that waited for it."""
        with self._lock:
            for window in self.of_step(self._engine.step):
                self._start(window)

    def _start(self, window: StoreWindow) -> None:
        for layer in window.lookups:
            self.start(window, layer)

    def start(self, window: StoreWindow, layer: int) -> None:
        """Let the layer's stream gather the rows as they are now, unless it was told before."""
        lookup = window.lookups[layer]
        with self._lock:
            if lookup.started:
                return
            lookup.started = True
        self._engine.streams[layer].submit(self._gather, window, layer)

    def end(self, window: StoreWindow) -> None:
        """Give a closed window's memory back; who waits for its rows is told."""
        with self._lock:
            if window in self._training:
                self._training.remove(window)
            waiting = [lookup for lookup in window.lookups.values() if not lookup.started]
            for lookup in waiting:
                lookup.started = True
        for lookup in waiting:
            # Outside the lock: whoever waits is called back here.
            lookup.gathered.set_exception(WindowClosedError("the window was closed"))
        for layer, lookup in window.lookups.items():
            if self._engine.closed:
                return
            self._engine.streams[layer].submit(_recycle, window, lookup)

    def end_all(self) -> None:
        """Close every training window and wait until nothing of them is under way."""
        with self._lock:
            windows = list(self._training)
        for window in windows:
            window.close()
        for stream in self._engine.streams.values():
            stream.submit(int).result()

    # ------------------------------------------------------------------ on the streams

    def _find(self, window: StoreWindow, layer: int) -> tuple[RowIds, Inverse]:
        n = window.tokens.size * self._metadata.recipe.columns
        buffer = window.slots.take(8 * n)
        window.lookups[layer].buffers.append(buffer)
        inverse, ids = buffer[: 8 * n].view(np.int32).reshape(2, n)
        return self.scratch[layer].look_up(
            self._metadata.recipe,
            layer,
            window.tokens,
            window.context,
            window.attention_mask,
            out=(ids, inverse),
        )

    def _gather(self, window: StoreWindow, layer: int) -> None:
        lookup = window.lookups[layer]
        try:
            rows = self._gathered(window, layer, lookup)
        except BaseException as error:
            lookup.gathered.set_exception(error)
        else:
            lookup.gathered.set_result(rows)

    def _gathered(self, window: StoreWindow, layer: int, lookup: LayerLookup) -> RowBlock:
        spec = self._metadata.tables[layer]
        rows, inverse = lookup.found.result()
        needed = rows.size * spec.row_bytes
        buffer = window.slots.take(needed)
        lookup.buffers.append(buffer)
        block: NDArray[Any] = buffer[:needed].view(spec.dtype.storage).reshape(rows.size, spec.dim)
        found = self._engine.gather(layer, rows, block)
        self._counters[layer].count_gather(inverse.size, rows.size, *found)
        return block


def _recycle(window: StoreWindow, lookup: LayerLookup) -> None:
    """On the stream, so after whatever may still be running there for the window."""
    while lookup.buffers:
        window.slots.give_back(lookup.buffers.pop())
