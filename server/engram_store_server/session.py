"""One trainer's session: its requests in, their answers out.

Requests that change something run one after the other on the session's own thread, in the order
in which they came; the event loop never waits for the store. Reads are answered when the rows are
there, so several are under way at once.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store import wire
from engram_store.errors import (
    EngramStoreError,
    ProtocolError,
    WindowClosedError,
)
from engram_store.layout.manifest import Mark
from engram_store.store import Store
from engram_store.v1 import store_pb2 as pb
from engram_store.window import StoreWindow
from engram_store_server.slots import SessionSlots

MAX_OPEN_WINDOWS = 1024
_logger = logging.getLogger(__name__)
_Handler = Callable[[Any], pb.SessionResponse]


class SessionServer:
    """Serves the requests of one connection after its Hello was accepted."""

    def __init__(self, store: Store, hello: pb.Hello, *, shared_memory: bool) -> None:
        """`shared_memory`: whether slots can reach the client at all."""
        self.session_id, self.epoch = hello.session_id, hello.epoch
        self.trains = hello.mode == pb.MODE_TRAIN
        self.slots = SessionSlots() if hello.shared_memory and shared_memory else None
        self._inverses: dict[int, list[NDArray[np.uint8]]] = {}
        """Slots of the windows' inverses."""
        self._store = store
        self._windows: dict[int, StoreWindow] = {}
        self._parked: list[tuple[int, pb.Read]] = []
        """Reads of windows whose step has not come yet."""
        self._answers: asyncio.Queue[pb.SessionResponse | None] = asyncio.Queue()
        self._worker = ThreadPoolExecutor(1, "engram-session")
        self._left = asyncio.Event()
        self._readers = ThreadPoolExecutor(2 * len(store.tables), "engram-read")
        self._reads: set[asyncio.Task[None]] = set()
        self._taking: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._handlers: dict[str, _Handler] = {
            "announce": self._announce,
            "release": self._release,
            "push": self._push,
            "gradient_norm": self._gradient_norm,
            "commit": self._commit,
            "take_snapshot": self._take_snapshot,
            "restore": self._restore,
        }

    async def serve(
        self, requests: AsyncIterator[pb.SessionRequest]
    ) -> AsyncGenerator[pb.SessionResponse, None]:
        """Yield the answers to all requests, until they end or the session is closed."""
        if self._leaving is not None:  # replaced before it began
            return
        self._taking = asyncio.create_task(self._take(requests))
        try:
            while (answer := await self._answers.get()) is not None:
                yield answer
        finally:
            await self.leave()

    async def leave(self) -> None:
        """End the session and wait until nothing of it is under way; may be called again."""
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._leave())
        await asyncio.shield(self._leaving)

    async def _leave(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
        for read in self._reads:
            read.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self._let_go)
        self._left.set()
        self.end()

    async def ends_within(self, seconds: float) -> bool:
        """Wait for the session to leave by itself; whether it has."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._left.wait(), seconds)
        return self._left.is_set()

    def end(self) -> None:
        """Close the stream after the answers that are ready."""
        self._answers.put_nowait(None)

    def _let_go(self) -> None:
        """Close what the connection had open; a client that comes back announces again."""
        self._worker.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)
        for window in self._windows.values():
            window.close()
        self._windows.clear()
        if self.slots is not None:
            self.slots.close()

    async def _take(self, requests: AsyncIterator[pb.SessionRequest]) -> None:
        loop = asyncio.get_running_loop()
        try:
            async for request in requests:
                if request.WhichOneof("request") == "read":
                    self._start_read(request.id, request.read)
                    continue
                answer = await loop.run_in_executor(self._worker, self._handle, request)
                self._answers.put_nowait(answer)
                self._unpark()
        finally:
            self.end()

    def _handle(self, request: pb.SessionRequest) -> pb.SessionResponse:
        """One request on the session's thread. Never raises."""
        kind = request.WhichOneof("request") or ""
        handler = self._handlers.get(kind)
        try:
            if handler is None:
                raise ProtocolError(f"request {kind or 'without content'!r} is not expected here")
            response = handler(getattr(request, kind))
        except Exception as error:
            response = failure(error)
        response.id = request.id
        return response

    # ------------------------------------------------------------------ reading

    def _start_read(self, number: int, read: pb.Read) -> None:
        window = self._windows.get(read.window)
        if window is not None and window.step is not None and window.step > self._store.step:
            self._parked.append((number, read))
            return
        task = asyncio.create_task(self._read(number, read))
        self._reads.add(task)
        task.add_done_callback(self._reads.discard)

    def _unpark(self) -> None:
        """Start the reads whose step has come, or whose window is gone."""
        parked, self._parked = self._parked, []
        for number, read in parked:
            self._start_read(number, read)

    async def _read(self, number: int, read: pb.Read) -> None:
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(self._readers, self._rows, number, read)
        self._answers.put_nowait(answer)

    def _rows(self, number: int, read: pb.Read) -> pb.SessionResponse:
        try:
            window = self._window(read.window)
            content = self._encode_rows(read.window, window, read.layer)
            response = pb.SessionResponse(rows=content)
        except Exception as error:
            response = failure(error)
        response.id = number
        return response

    def _encode_rows(self, number: int, window: StoreWindow, layer: int) -> pb.Rows:
        """Rows as a message; with shared memory they were gathered where the trainer sees them."""
        # Trainers ask ahead; what their model used, and left without a gradient, they check.
        rows, inverse = window.fetch(layer)
        content = pb.Rows(row_ids=wire.encode_array(window.row_ids(layer)))
        if self.slots is None or not rows.size:
            content.rows.CopyFrom(wire.encode_array(rows))
            content.inverse.CopyFrom(wire.encode_array(inverse))
            return content
        buffer = self.slots.pool.take(inverse.nbytes)
        self._inverses.setdefault(number, []).append(buffer)
        shared = buffer[: inverse.nbytes].view(inverse.dtype).reshape(inverse.shape)
        np.copyto(shared, inverse)
        content.rows.CopyFrom(wire.encode_array(rows, self.slots.range_of(rows)))
        content.inverse.CopyFrom(wire.encode_array(shared, self.slots.range_of(shared)))
        return content

    def _window(self, number: int) -> StoreWindow:
        window = self._windows.get(number)
        if window is None:
            raise WindowClosedError(f"window {number} is not open; announce it again")
        return window

    # ------------------------------------------------------------------ requests that change

    def _announce(self, request: pb.Announce) -> pb.SessionResponse:
        if request.window in self._windows:
            raise ProtocolError(f"window {request.window} is announced already")
        if len(self._windows) >= MAX_OPEN_WINDOWS:
            raise ProtocolError(
                f"{MAX_OPEN_WINDOWS} windows are open; close or commit some before more"
            )
        if self.slots is not None:
            self.slots.wait_until_fetched()
        step = request.step if request.HasField("step") else None
        if step is not None and not self.trains:
            raise ProtocolError("this session only reads; connect with mode='train' to train")
        self._windows[request.window] = self._store.announce(
            wire.decode_array(request.tokens),
            step,
            context=_optional(request, "context"),
            attention_mask=_optional(request, "attention_mask"),
            slots=None if self.slots is None else self.slots.pool,
        )
        return pb.SessionResponse(announced=pb.Announced())

    def _release(self, request: pb.Release) -> pb.SessionResponse:
        window = self._windows.get(request.window)
        if window is not None:
            window.close()
        self._forget_closed()
        return pb.SessionResponse(released=pb.Released())

    def _push(self, request: pb.Push) -> pb.SessionResponse:
        read_slot = None if self.slots is None else self.slots.copy_of
        gradients = wire.decode_array(request.gradients, read_slot)
        self._window(request.window).push(request.layer, gradients)
        return pb.SessionResponse(pushed=pb.Pushed())

    def _gradient_norm(self, _request: pb.GradientNorm) -> pb.SessionResponse:
        return pb.SessionResponse(norm=pb.Norm(value=self._store.gradient_norm()))

    def _commit(self, request: pb.Commit) -> pb.SessionResponse:
        if request.step < self._store.step and self._applied_before(request.step):
            return pb.SessionResponse(applied=pb.Applied(step=request.step, repeated=True))
        mark = Mark(session=self.session_id, epoch=self.epoch, step=request.step)
        applied = self._store.commit(
            request.step,
            dict(request.rates),
            gradient_scale=request.gradient_scale,
            eps=request.eps if request.HasField("eps") else None,
            betas=(request.beta1, request.beta2),
            mark=mark,
        )
        self._forget_closed()
        counts = pb.Applied(step=applied.step, rows=applied.rows, skipped_rows=applied.skipped_rows)
        return pb.SessionResponse(applied=counts)

    def _applied_before(self, step: int) -> bool:
        """Whether an earlier connection of this session got this step applied."""
        return any(m.session == self.session_id and m.step >= step for m in self._store.marks)

    def _take_snapshot(self, _request: pb.TakeSnapshot) -> pb.SessionResponse:
        ref = wire.encode_ref(self._store.snapshot())
        return pb.SessionResponse(snapshot_taken=pb.SnapshotTaken(snapshot=ref))

    def _restore(self, request: pb.Restore) -> pb.SessionResponse:
        wanted = wire.decode_ref(request.snapshot)
        # Without a digest it is a step that was asked for.
        self._store.restore(wanted if wanted.digest else wanted.step)
        self._forget_closed()
        return pb.SessionResponse(restored=pb.Restored(step=self._store.step))

    def _forget_closed(self) -> None:
        closed = [number for number, window in self._windows.items() if window.closed]
        for number in closed:
            del self._windows[number]
            for buffer in self._inverses.pop(number, []):
                assert self.slots is not None
                self.slots.pool.give_back(buffer)


def _optional(request: pb.Announce, name: str) -> Any:
    return wire.decode_array(getattr(request, name)) if request.HasField(name) else None


def failure(error: Exception) -> pb.SessionResponse:
    """The answer to a request that failed."""
    if isinstance(error, EngramStoreError):
        return pb.SessionResponse(failure=wire.encode_error(error))
    _logger.exception("a request failed", exc_info=error)
    unexpected = EngramStoreError(f"internal error in the store ({error!r}); its log has more")
    return pb.SessionResponse(failure=wire.encode_error(unexpected))
