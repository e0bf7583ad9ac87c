"""A window of a store in the same process: hashed early, gathered when its step comes."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.gradients import GradientPart, check_part
from engram_store.engine.lookup import SlotPool
from engram_store.errors import (
    ProtocolError,
    ReadOnlyError,
    StepGapError,
    UnknownLayerError,
    WindowClosedError,
)
from engram_store.types import GradientBlock, Inverse, RowBlock, RowIds, TokenIds

if TYPE_CHECKING:
    from engram_store.store import Store


@dataclass(slots=True)
class LayerLookup:
    """One table's part of a window."""

    found: "Future[tuple[RowIds, Inverse]]" = field(default_factory=Future)
    """Unique rows and inverse, once hashed."""
    gathered: "Future[RowBlock]" = field(default_factory=Future)
    """The rows; nobody works on them before `started`."""
    started: bool = False
    """Whether the stream was told to gather."""
    buffers: list[NDArray[np.uint8]] = field(default_factory=list)
    """Slots that hold inverse, ids and rows; given back when the window closes."""
    read: bool = False
    """Whether the rows were handed out."""
    gradient: GradientPart | None = None
    room: NDArray[np.float32] | None = None
    """Memory for a gradient, if it was asked for."""


@dataclass(eq=False)
class StoreWindow:
    """Implements `session.Window`; made by `Store.announce`."""

    store: "Store"
    step: int | None
    part: int
    """Which part of its step it belongs to: the rank of its trainer."""
    tokens: TokenIds
    context: TokenIds | None
    attention_mask: NDArray[Any] | None
    slots: SlotPool
    """Where its rows are put."""
    lookups: dict[int, LayerLookup] = field(default_factory=dict)
    closed: bool = False

    def _lookup(self, layer: int) -> LayerLookup:
        self.store.check_open()
        if self.closed:
            raise WindowClosedError("the window was committed or closed; announce it again")
        if layer not in self.lookups:
            raise UnknownLayerError(layer, sorted(self.lookups))
        return self.lookups[layer]

    def row_ids(self, layer: int) -> RowIds:
        """See `session.Window.row_ids`."""
        return self._lookup(layer).found.result()[0].copy()

    def rows(self, layer: int) -> tuple[RowBlock, Inverse]:
        """See `session.Window.rows`."""
        lookup = self._lookup(layer)
        if self.step is not None and self.step != self.store.step:
            raise StepGapError(self.step, self.store.step)
        self.store.start_gather(self, layer)
        late = not lookup.gathered.done()
        started = time.perf_counter()
        rows = lookup.gathered.result()
        self.store.count_wait(time.perf_counter() - started, late=late and self.step is not None)
        lookup.read = True
        return rows, lookup.found.result()[1]

    def when_gathered(self, layer: int, call: Callable[["Future[RowBlock]"], None]) -> None:
        """Call back, on any thread, once the rows are there, or cannot come any more.

        Whoever asks like this may not use the rows: no gradient is expected because of it.

        Raises:
            UnknownLayerError, WindowClosedError, StoreClosedError.
        """
        lookup = self._lookup(layer)
        if self.step is None:
            self.store.start_gather(self, layer)
        lookup.gathered.add_done_callback(call)

    def index(self, layer: int) -> tuple[RowIds, Inverse]:
        """Row ids and inverse, in the window's own memory.

        Raises:
            UnknownLayerError, WindowClosedError, StoreClosedError.
        """
        return self._lookup(layer).found.result()

    def missing(self) -> set[int]:
        """Layers that were read and got no gradient; all of them if the window was not used."""
        pushed = {layer for layer, lookup in self.lookups.items() if lookup.gradient is not None}
        read = {layer for layer, lookup in self.lookups.items() if lookup.read}
        return (read if read or pushed else set(self.lookups)) - pushed

    def gradient_buffer(self, layer: int) -> NDArray[np.float32]:
        """See `session.Window.gradient_buffer`."""
        lookup = self._lookup(layer)
        if self.step is None:
            raise ReadOnlyError("the window was announced without a step; it takes no gradients")
        if lookup.room is None:
            shape = (lookup.found.result()[0].size, self.store.tables[layer].dim)
            needed = 4 * shape[0] * shape[1]
            buffer = self.slots.take(needed)
            lookup.buffers.append(buffer)
            lookup.room = buffer[:needed].view(np.float32).reshape(shape)
        return lookup.room

    def push(self, layer: int, gradients: GradientBlock) -> None:
        """See `session.Window.push`."""
        lookup = self._lookup(layer)
        if self.step is None:
            raise ReadOnlyError("the window was announced without a step; it takes no gradients")
        if lookup.gradient is not None:
            raise ProtocolError(f"layer {layer} of this window was pushed before")
        spec = self.store.tables[layer]
        lookup.gradient = check_part(spec, self.step, lookup.found.result()[0], gradients)
        self.store.forget_sums()

    def close(self) -> None:
        """See `session.Window.close`."""
        if self.closed:
            return
        self.closed = True
        self.store.release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
