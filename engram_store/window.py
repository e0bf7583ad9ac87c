"""A window of a store in the same process: hashed early, gathered when its step comes."""

import enum
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.fetch import Fetched
from engram_store.engine.gradients import GradientPart, check_part
from engram_store.engine.lookup import SlotPool
from engram_store.engine.statistics import Late
from engram_store.errors import (
    ProtocolError,
    ReadOnlyError,
    StepGapError,
    UnknownLayerError,
    WindowClosedError,
)
from engram_store.types import GradientBlock, Inverse, RowBlock, RowIds, TokenIds

if TYPE_CHECKING:
    from engram_store.gathering import Kept
    from engram_store.store import Store


class Phase(enum.Enum):
    """How far one table's part of a window is."""

    ANNOUNCED = enum.auto()
    """Nobody works on it."""
    AHEAD = enum.auto()
    """The look-ahead thread hashes it, reads what is cold and copies its rows."""
    STAGED = enum.auto()
    """It was worked on before its step: hashed, and its rows copied if some were cold."""
    STARTED = enum.auto()
    """Its step has come, or its rows were asked for: the stream gathers, or has."""


@dataclass(slots=True)
class LayerLookup:
    """One table's part of a window."""

    phase: Phase = Phase.ANNOUNCED
    found: "Future[tuple[RowIds, Inverse]]" = field(default_factory=Future)
    """Unique rows and inverse, once hashed."""
    finding: bool = False
    """Whether somebody hashes, or has."""
    gathered: "Future[RowBlock]" = field(default_factory=Future)
    """The rows, as they are handed out."""
    due: bool = False
    """Whether its step came while it was worked on ahead."""
    block: RowBlock | None = None
    """Memory of the rows, once it was taken."""
    fetched: Fetched | None = None
    """When and where the rows in `block` were copied."""
    kept: "Kept | None" = None
    """Its rows for the commit, if their pages were cold; then `fetched` is about them."""
    index: NDArray[np.uint32] | None = None
    """Finds its rows among those of a commit; see `early`."""
    claimed: bool = False
    """Whether the commit under way is going to give it its rows."""
    abandoned: bool = False
    """Whether it was closed while it was claimed."""
    staged: bool = False
    """Whether its rows had been copied before its step."""
    cold: bool = False
    """Whether some of its rows had to be read."""
    lent: bool = False
    """Whether the look-ahead thread may use its buffers after its step has begun."""
    reserved: int = 0
    """Bytes counted for it."""
    buffers: list[NDArray[np.uint8]] = field(default_factory=list)
    """Slots that hold inverse, ids, places and rows; given back when the window closes."""
    read: bool = False
    """Whether the rows were handed out."""
    gradient: GradientPart | None = None
    room: NDArray[np.float32] | None = None
    """Memory for a gradient, if it was asked for."""

    @property
    def why_late(self) -> Late:
        """Why its rows, which are there by now, were not when they were asked for."""
        if not self.staged:
            return Late.UNSTAGED
        return Late.COLD if self.cold else Late.BEHIND


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
    arrival: int = 0
    """Number of the announcement."""

    def _lookup(self, layer: int) -> LayerLookup:
        self.store.check_open()
        if self.closed:
            raise WindowClosedError("the window was committed or closed; announce it again")
        if layer not in self.lookups:
            raise UnknownLayerError(layer, sorted(self.lookups))
        return self.lookups[layer]

    def row_ids(self, layer: int) -> RowIds:
        """See `session.Window.row_ids`."""
        return self._found(layer)[0].copy()

    def _found(self, layer: int) -> tuple[RowIds, Inverse]:
        lookup = self._lookup(layer)
        self.store.start_find(self, layer)
        return lookup.found.result()

    def rows(self, layer: int) -> tuple[RowBlock, Inverse]:
        """See `session.Window.rows`."""
        lookup = self._lookup(layer)
        if self.step is not None and not self.store.may_read(self.step):
            raise StepGapError(self.step, self.store.step)
        started = time.perf_counter()
        late = self.step is not None and not lookup.gathered.done()
        if self.step is not None:
            self.store.wait_for_commit(self.step, lookup.gathered)
        self.store.start_gather(self, layer)
        rows = lookup.gathered.result()
        if not lookup.read:
            seconds = time.perf_counter() - started
            self.store.count_wait(layer, seconds, lookup.why_late if late else None)
        lookup.read = True
        return rows, lookup.found.result()[1]

    def ready(self, layer: int) -> bool:
        """See `session.Window.ready`."""
        return self._lookup(layer).gathered.done()

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
        return self._found(layer)

    def missing(self) -> set[int]:
        """Layers that were read and got no gradient; all of them if the window was not used."""
        pushed = {layer for layer, lookup in self.lookups.items() if lookup.gradient is not None}
        read = {layer for layer, lookup in self.lookups.items() if lookup.read}
        return (read if read or pushed else set(self.lookups)) - pushed

    @property
    def unused(self) -> bool:
        """Whether nobody read its rows, or trained them."""
        lookups = self.lookups.values()
        return not any(lookup.read or lookup.gradient is not None for lookup in lookups)

    def gradient_buffer(self, layer: int) -> NDArray[np.float32]:
        """See `session.Window.gradient_buffer`."""
        lookup = self._lookup(layer)
        if self.step is None:
            raise ReadOnlyError("the window was announced without a step; it takes no gradients")
        if lookup.room is None:
            shape = (self._found(layer)[0].size, self.store.tables[layer].dim)
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
        lookup.gradient = check_part(spec, self.step, self._found(layer)[0], gradients)
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
