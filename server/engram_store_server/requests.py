"""What a trainer may ask of its session: windows, gradients, steps.

Nothing here knows how requests come and answers go. One thread at a time calls `handle`; answers
that take time are given to `send` later, from the thread that finishes them.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from engram_store import wire
from engram_store.chunks import Chunk
from engram_store.engine.lookup import SlotPool
from engram_store.errors import (
    DuplicateStepError,
    EngramStoreError,
    ProtocolError,
    StepGapError,
    WindowClosedError,
)
from engram_store.types import Inverse, RowBlock, RowIds
from engram_store.v1 import store_pb2 as pb
from engram_store.window import StoreWindow
from engram_store_server.incoming import GradientChunks, Request
from engram_store_server.jobs import Job
from engram_store_server.limits import SessionLimits
from engram_store_server.outgoing import RowsAnswer
from engram_store_server.slots import SessionSlots

if TYPE_CHECKING:
    from engram_store_server.stores import ServedStore

_logger = logging.getLogger(__name__)
_Handler = Callable[[int, Any], pb.SessionResponse | None]
"""Given a request's id and content: the response, or None if it is answered later."""
_MAX_REFUSED = 10_000
Send = Callable[[pb.SessionResponse | RowsAnswer], None]


@dataclass(frozen=True, slots=True)
class _Refused:
    """An announcement or a gradient that was refused: its step must not go on without it."""

    step: int
    error: EngramStoreError
    restores: int
    """How often the store had gone back to a snapshot then; earlier refusals are history."""


class RequestHandlers:
    """The windows of one session, and what is done with them.

    Args:
        served: the store.
        hello: what the client said.
        limits: of every session.
        slots: shared memory of the session; None: arrays travel in messages.
        send: takes an answer, from any thread.
    """

    def __init__(
        self,
        served: "ServedStore",
        hello: pb.Hello,
        limits: SessionLimits,
        slots: SessionSlots | None,
        send: Send,
    ) -> None:
        self.job: Job | None = None
        """Set when the session was admitted to train."""
        self._session_id, self._rank = hello.session_id, hello.rank
        self._trains = hello.mode == pb.MODE_TRAIN
        self._served, self._store, self._limits = served, served.store, limits
        self._slots, self._send = slots, send
        self._pool = slots.pool if slots is not None else SlotPool()
        self._windows: dict[int, StoreWindow] = {}
        self._costs: dict[int, int] = {}
        """Bytes of the session's credit that open windows take."""
        self._refused: dict[tuple[int, int | None], _Refused] = {}
        """By window, and by layer for gradients."""
        self._gave_up = False
        self._gradients = GradientChunks()
        self._handlers: dict[str, _Handler] = {
            "announce": self._announce,
            "read": self._read,
            "release": self._release,
            "push": self._push,
            "gradient_norm": self._gradient_norm,
            "commit": self._commit,
            "take_snapshot": self._take_snapshot,
            "restore": self._restore,
            "goodbye": self._goodbye,
        }

    def handle(self, request: Request) -> pb.SessionResponse | None:
        """The answer to a request, or None if it comes later. Never raises."""
        if isinstance(request, Chunk):
            self._gradients.take(request, self._windows.get(request.header.window))
            return None
        kind = request.WhichOneof("request") or ""
        handler = self._handlers.get(kind)
        try:
            if handler is None:
                raise ProtocolError(f"request {kind or 'without content'!r} is not expected here")
            response = handler(request.id, getattr(request, kind))
        except Exception as error:
            response = failure(error)
        if response is not None:
            response.id = request.id
        return response

    def close(self) -> None:
        """Close what is open; a client that comes back announces again."""
        for window in self._windows.values():
            window.close()
        self._windows.clear()

    # ------------------------------------------------------------------ windows

    def _announce(self, _number: int, request: pb.Announce) -> pb.SessionResponse:
        step = request.step if request.HasField("step") else None
        try:
            window, cost = self._announced(request, step)
        except EngramStoreError as error:
            if step is not None:
                self._refuse((request.window, None), step, error)
            raise
        self._windows[request.window], self._costs[request.window] = window, cost
        return pb.SessionResponse(announced=pb.Announced())

    def _refuse(self, key: tuple[int, int | None], step: int, error: EngramStoreError) -> None:
        """Remember what a step must not go on without; after too much of it, none goes on."""
        if len(self._refused) >= _MAX_REFUSED:
            self._gave_up = True
            return
        self._refused[key] = _Refused(step, error, self._served.restores)

    def _announced(self, request: pb.Announce, step: int | None) -> tuple[StoreWindow, int]:
        """The window and its cost. Raises: as `Store.announce`, ProtocolError, CapacityError."""
        self._forget_closed()
        if request.window in self._windows:
            raise ProtocolError(f"window {request.window} is announced already")
        if step is not None and not self._trains:
            raise ProtocolError("this session only reads; connect with mode='train' to train")
        if self._slots is not None:
            self._slots.wait_until_fetched()
        tokens = self._copied(request.tokens)
        cost = wire.session_cost(
            self._store.recipe, self._store.tables, tokens.size, trains=step is not None
        )
        self._check_credit(cost)
        window = self._store.announce(
            tokens,
            step,
            context=self._copied(request.context) if request.HasField("context") else None,
            attention_mask=(
                self._copied(request.attention_mask) if request.HasField("attention_mask") else None
            ),
            part=self._rank,
            slots=self._pool,
        )
        return window, cost

    def _copied(self, array: pb.Array) -> Any:
        """An array that is checked and then relied upon: not in memory that a trainer can change.

        Raises: ProtocolError.
        """
        if self._slots is None or not array.HasField("slot"):
            return wire.decode_array(array)
        return wire.decode_array(array, self._slots.exchange.view).copy()

    def _check_credit(self, cost: int) -> None:
        """Raises: CapacityError."""
        limits, taken = self._limits, sum(self._costs.values())
        if len(self._windows) >= limits.open_windows:
            raise wire.window_limit_error(limits.open_windows)
        if taken + cost > limits.session_bytes:
            raise wire.credit_error(cost, taken, limits.session_bytes)

    def _window(self, number: int) -> StoreWindow:
        window = self._windows.get(number)
        if window is None:
            raise WindowClosedError(f"window {number} is not open; announce it again")
        return window

    def _read(self, number: int, request: pb.Read) -> None:
        window = self._window(request.window)
        window.when_gathered(request.layer, partial(self._send_rows, number, window, request.layer))

    def _send_rows(
        self, number: int, window: StoreWindow, layer: int, gathered: "Future[RowBlock]"
    ) -> None:
        """On the thread that gathered."""
        response: pb.SessionResponse | RowsAnswer
        try:
            rows, (ids, inverse) = gathered.result(), window.index(layer)
            if self._slots is None:
                response = RowsAnswer(number, window, ids, rows, inverse)
            else:
                placed = _place_rows(self._slots, ids, rows, inverse)
                response = pb.SessionResponse(id=number, rows=placed)
        except Exception as error:
            response = failure(error)
            response.id = number
        self._send(response)

    def _release(self, _number: int, request: pb.Release) -> pb.SessionResponse:
        window = self._windows.get(request.window)
        if window is not None:
            window.close()
        self._forget_closed()
        for key in [key for key in self._refused if key[0] == request.window]:
            del self._refused[key]
        return pb.SessionResponse(released=pb.Released())

    def _forget_closed(self) -> None:
        for number in [number for number, window in self._windows.items() if window.closed]:
            del self._windows[number], self._costs[number]
        self._gradients.keep_only(self._windows)
        step = self._store.step
        self._refused = {key: entry for key, entry in self._refused.items() if entry.step >= step}

    # ------------------------------------------------------------------ steps

    def _push(self, _number: int, request: pb.Push) -> pb.SessionResponse:
        window = self._window(request.window)
        key = (request.window, request.layer)
        view = None if self._slots is None else self._slots.exchange.view
        try:
            # Not copied: what could hurt the store, shapes and row ids, is not in there. The
            # values are checked now, and read again when they are applied.
            received = self._gradients.hand_over(request.window, request.layer)
            window.push(request.layer, wire.decode_array(request.gradients, view, received))
        except EngramStoreError as error:
            if window.step is not None:
                self._refuse(key, window.step, error)
            raise
        self._refused.pop(key, None)
        return pb.SessionResponse(pushed=pb.Pushed())

    def _trained(self) -> Job:
        """Raises: ProtocolError."""
        if self.job is None:
            raise ProtocolError("this session only reads; connect with mode='train' to train")
        return self.job

    def _check_complete(self, step: int) -> None:
        """Raises: why something of the step was refused; it would be left out."""
        if self._gave_up:
            raise ProtocolError(
                f"more than {_MAX_REFUSED} announcements and gradients of this session were "
                "refused, too many to remember; connect again"
            )
        for entry in self._refused.values():
            if entry.step == step and entry.restores == self._served.restores:
                raise entry.error

    def _together(
        self,
        number: int,
        what: str,
        asked: bytes,
        work: Callable[[bool], pb.SessionResponse],
        *,
        early: bool = False,
    ) -> None:
        """See `Job.together`. Raises: ProtocolError."""

        def do(all_early: bool) -> pb.SessionResponse:
            try:
                return work(all_early)
            except Exception as error:
                return failure(error)

        def answer(response: pb.SessionResponse) -> None:
            response.id = number
            self._send(response)

        self._trained().together(self._rank, what, asked, do, answer, early=early)

    def _gradient_norm(self, number: int, _request: pb.GradientNorm) -> None:
        step = self._store.step
        self._check_complete(step)

        def work(_early: bool) -> pb.SessionResponse:
            return pb.SessionResponse(norm=pb.Norm(value=self._store.gradient_norm()))

        self._together(number, f"the gradient norm of step {step}", b"", work)

    def _commit(self, number: int, request: pb.Commit) -> pb.SessionResponse | None:
        job, expected = self._trained(), self._store.step
        if request.step < expected and self._applied_before(request.step):
            return pb.SessionResponse(applied=pb.Applied(step=request.step, repeated=True))
        if request.step != expected:
            raise (DuplicateStepError if request.step < expected else StepGapError)(
                request.step, expected
            )
        self._check_complete(request.step)

        def work(early: bool) -> pb.SessionResponse:
            # Rows of the next windows leave while this runs: their streams send them.
            applied = self._store.commit(
                request.step,
                dict(request.rates),
                gradient_scale=request.gradient_scale,
                eps=request.eps if request.HasField("eps") else None,
                betas=(request.beta1, request.beta2),
                marks=job.marks(request.step),
                early=early,
            )
            return pb.SessionResponse(
                applied=pb.Applied(
                    step=applied.step, rows=applied.rows, skipped_rows=applied.skipped_rows
                )
            )

        early = request.early
        request.ClearField("early")  # ranks may differ in it
        asked = request.SerializeToString(deterministic=True)
        self._together(number, f"the commit of step {request.step}", asked, work, early=early)
        return None

    def _applied_before(self, step: int) -> bool:
        """Whether an earlier connection of this rank got this step applied."""
        return any(
            mark.session == self._session_id and mark.part == self._rank and mark.step >= step
            for mark in self._store.marks
        )

    def _take_snapshot(self, _number: int, _request: pb.TakeSnapshot) -> pb.SessionResponse:
        self._trained()
        ref = wire.encode_ref(self._store.snapshot())
        self._served.durable_changed()
        return pb.SessionResponse(snapshot_taken=pb.SnapshotTaken(snapshot=ref))

    def _restore(self, number: int, request: pb.Restore) -> None:
        wanted = wire.decode_ref(request.snapshot)

        def work(_early: bool) -> pb.SessionResponse:
            # Without a digest it is a step that was asked for.
            self._store.restore(wanted if wanted.digest else wanted.step)
            self._served.restored()
            return pb.SessionResponse(restored=pb.Restored(step=self._store.step))

        asked = request.SerializeToString(deterministic=True)
        self._together(number, f"the restore of the snapshot at {wanted.step}", asked, work)

    def _goodbye(self, _number: int, _request: pb.Goodbye) -> pb.SessionResponse:
        return pb.SessionResponse(farewell=pb.Farewell())


def _place_rows(slots: SessionSlots, ids: RowIds, rows: RowBlock, inverse: Inverse) -> pb.Rows:
    """Where the trainer finds rows: they were gathered where it sees them."""
    ids_at, rows_at, inverse_at = (
        slots.exchange.range_of(array) if array.size else None for array in (ids, rows, inverse)
    )
    return pb.Rows(
        row_ids=wire.encode_array(ids, ids_at),
        rows=wire.encode_array(rows, rows_at),
        inverse=wire.encode_array(inverse, inverse_at),
    )


def failure(error: Exception) -> pb.SessionResponse:
    """The answer to a request that failed."""
    if isinstance(error, EngramStoreError):
        return pb.SessionResponse(failure=wire.encode_error(error))
    _logger.exception("a request failed", exc_info=error)
    unexpected = EngramStoreError(f"internal error in the store ({error!r}); its log has more")
    return pb.SessionResponse(failure=wire.encode_error(unexpected))
