"""A window of a store in another process."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from engram_store import wire
from engram_store.engine.gradients import check_part
from engram_store.engine.lookup import LookupScratch
from engram_store.errors import (
    EngramStoreError,
    ProtocolError,
    ReadOnlyError,
    StepGapError,
    UnknownLayerError,
    WindowClosedError,
)
from engram_store.types import GradientBlock, Inverse, RowBlock, RowIds, TokenIds
from engram_store.v1 import store_pb2 as pb
from engram_store_client.remote.incoming import INVERSE, ROW_IDS, ROWS, WantedRows
from engram_store_client.remote.pending import Pending

if TYPE_CHECKING:
    from engram_store_client.remote.session import RemoteSession


@dataclass(frozen=True, slots=True)
class ReceivedRows:
    """One layer's rows: memory of their own, or of a slot until the window is closed."""

    row_ids: RowIds
    rows: RowBlock
    inverse: Inverse


@dataclass(frozen=True, slots=True)
class Pushed:
    """One layer's gradient on its way; the journal has the gradient itself."""

    request: Pending
    rows: RowIds
    bad: NDArray[np.bool_] | None
    """Rows that the step skips; None: there are none."""


@dataclass(eq=False)
class RemoteWindow:
    """Implements `session.Window`; made by `RemoteSession.announce`.

    Rows of a training window are asked for when it is announced, and come when its step does.
    """

    session: "RemoteSession"
    number: int
    step: int | None
    tokens: TokenIds
    context: TokenIds | None
    attention_mask: NDArray[Any] | None
    announced: Pending | None = None
    closed: bool = False
    pushed: dict[int, Pushed] = field(default_factory=dict)
    _used: set[int] = field(default_factory=set)
    _asked: dict[int, Pending] = field(default_factory=dict)
    _received: dict[int, ReceivedRows] = field(default_factory=dict)
    _row_ids: dict[int, RowIds] = field(default_factory=dict)
    _rooms: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    """Memory for gradients that was asked for, by layer."""

    def _check(self, layer: int) -> None:
        """Raises: as every method of the window does."""
        self.session.connection.check()
        if self.closed:
            raise WindowClosedError("the window was committed or closed; announce it again")
        if layer not in self.session.tables:
            raise UnknownLayerError(layer, sorted(self.session.tables))

    def send(self) -> None:
        """Tell the store; of a training window, ask for all rows. Waits for nothing."""
        announce = pb.Announce(
            window=self.number,
            tokens=wire.encode_array(_narrow(self.tokens)),
            step=self.step,
            context=None if self.context is None else wire.encode_array(_narrow(self.context)),
            attention_mask=_optional(self.attention_mask),
        )
        request = pb.SessionRequest(announce=announce)
        self.announced = self.session.connection.send(request, self.number)
        if self.step is not None:
            for layer in self.session.tables:
                self._request_rows(layer)

    def _confirm_announced(self) -> None:
        """Raises: EngramStoreError: the store refused the window, so it refuses all about it."""
        assert self.announced is not None
        self.session.connection.result(self.announced, "take a window's tokens", works=True)

    def _request_rows(self, layer: int) -> None:
        read = pb.Read(window=self.number, layer=layer)
        request = pb.SessionRequest(read=read)
        shape = (*self.tokens.shape, self.session.recipe.columns)
        wanted = WantedRows(self.session.tables[layer], shape)
        self._asked[layer] = self.session.connection.send(request, self.number, wanted=wanted)

    def _receive(self, layer: int) -> ReceivedRows:
        if layer in self._received:
            return self._received[layer]
        self.session.wait_until_sent(self)
        if layer not in self._asked:
            self._request_rows(layer)
        self.session.commits.wait_for(self.step, self._asked[layer].answer)
        asked = f"rows of layer {layer} for a window of step {self.step}"
        try:
            response = self.session.connection.result(self._asked[layer], asked, works=True)
        except WindowClosedError:
            self._confirm_announced()  # why there is no such window
            raise
        received = _decode_rows(response.rows, self._asked[layer])
        return self._received.setdefault(layer, received)

    def row_ids(self, layer: int) -> RowIds:
        """See `session.Window.row_ids`."""
        self._check(layer)
        if layer in self._received or self.step == self.session.connection.step:
            return self._receive(layer).row_ids.copy()
        # The store answers when the step has come, or with rows as they are now: hash them here.
        if layer not in self._row_ids:
            self._row_ids[layer], _ = LookupScratch().look_up(
                self.session.recipe, layer, self.tokens, self.context, self.attention_mask
            )
        return self._row_ids[layer]

    def rows(self, layer: int) -> tuple[RowBlock, Inverse]:
        """See `session.Window.rows`. Both arrays are read-only."""
        self._check(layer)
        if self.step is not None and not self.session.may_read(self.step):
            raise StepGapError(self.step, self.session.step)
        began, there = time.perf_counter(), self.ready(layer)
        received = self._receive(layer)
        if layer not in self._used:
            late = self.step is not None and not there
            self.session.waiting.count(layer, time.perf_counter() - began, late=late)
        self._used.add(layer)
        return received.rows, received.inverse

    def ready(self, layer: int) -> bool:
        """See `session.Window.ready`."""
        self._check(layer)
        return layer in self._asked and self._asked[layer].answer.done()

    def got_rows(self) -> bool:
        """Whether the store has sent rows of any layer."""
        return any(asked.has_answer("rows") for asked in self._asked.values())

    def missing(self) -> set[int]:
        """Layers that were read and got no gradient; all of them if the window was not used."""
        used = self._used if self._used or self.pushed else set(self.session.tables)
        return used - self.pushed.keys()

    def gradient_buffer(self, layer: int) -> NDArray[np.float32]:
        """See `session.Window.gradient_buffer`: shared memory, where it is used."""
        self._check(layer)
        if self.step is None:
            raise ReadOnlyError("the window was announced without a step; it takes no gradients")
        if layer not in self._rooms:
            shape = (self.row_ids(layer).size, self.session.tables[layer].dim)
            needed = 4 * shape[0] * shape[1]
            room = self.session.connection.lend(self.number, needed)
            self._rooms[layer] = room[:needed].view(np.float32).reshape(shape)
        return self._rooms[layer]

    def push(self, layer: int, gradients: GradientBlock) -> None:
        """See `session.Window.push`. A store that comes back is sent the same array again."""
        self._check(layer)
        if self.step is None:
            raise ReadOnlyError("the window was announced without a step; it takes no gradients")
        if layer in self.pushed:
            raise ProtocolError(f"layer {layer} of this window was pushed before")
        spec, row_ids = self.session.tables[layer], self.row_ids(layer)
        # The store checks the same again; here it costs no round trip.
        part = check_part(spec, self.step, row_ids, gradients)
        self.session.wait_until_sent(self)
        placed = self.session.connection.place(self.number, gradients)
        push = pb.SessionRequest(push=pb.Push(window=self.number, layer=layer))
        request = self.session.connection.send(push, self.number, placed)
        self.pushed[layer] = Pushed(request, part.rows, part.bad)

    def confirm_pushes(self) -> None:
        """Wait until the store has every gradient.

        Raises: EngramStoreError: it refused one, which may be pushed again.
        """
        if self.announced is None:  # waits for credit: nothing was pushed
            return
        self._confirm_announced()
        for layer, pushed in list(self.pushed.items()):
            asked = f"take the gradient of layer {layer} at step {self.step}"
            try:
                self.session.connection.result(pushed.request, asked, works=True)
            except EngramStoreError:
                if pushed.request.answer.done():
                    del self.pushed[layer]
                raise

    def close(self) -> None:
        """See `session.Window.close`."""
        if not self.closed:
            self.closed = True
            self.session.release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _optional(array: NDArray[Any] | None) -> pb.Array | None:
    return None if array is None else wire.encode_array(array)


def _narrow(ids: TokenIds) -> NDArray[Any]:
    """Half the bytes, where that changes no id."""
    narrow = ids.astype(np.int32)
    return narrow if np.array_equal(narrow, ids) else ids


def _decode_rows(message: pb.Rows, asked: Pending) -> ReceivedRows:
    read_slot = None if asked.slots is None else asked.slots.view
    decoded = [
        wire.decode_array(array, read_slot, asked.arrays.get(number))
        for number, array in (
            (ROW_IDS, message.row_ids),
            (ROWS, message.rows),
            (INVERSE, message.inverse),
        )
    ]
    for array in decoded:
        array.flags.writeable = False
    received = ReceivedRows(*decoded)
    assert asked.wanted is not None
    _check_below(received.row_ids, asked.wanted.spec.rows, "row ids of a table of")
    _check_below(received.inverse, received.row_ids.size, "positions among")
    return received


def _check_below(ids: NDArray[np.int32], limit: int, what: str) -> None:
    """A trainer indexes with them, and a GPU that is told to go too far is lost.

    Raises: ProtocolError.
    """
    # One pass: what is negative is huge without its sign.
    if ids.size and int(ids.view(np.uint32).max()) >= limit:
        raise ProtocolError(
            f"the store answered with {what} {limit:,} rows that reach from {int(ids.min()):,} to "
            f"{int(ids.max()):,}; it or the connection is broken, connect again"
        )


def count_rows(pushed: Iterable[Pushed]) -> tuple[int, int]:
    """Rows that a step changes and rows that it skips, of one table."""
    parts = list(pushed)
    if not parts:
        return 0, 0
    rows = np.unique(np.concatenate([part.rows for part in parts]))
    bad = [part.rows[part.bad] for part in parts if part.bad is not None]
    skipped = np.unique(np.concatenate(bad)).size if bad else 0
    return rows.size - skipped, skipped
