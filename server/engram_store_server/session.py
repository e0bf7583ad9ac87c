"""One trainer's connection: its requests in, their answers out.

Requests run one after the other on the session's own thread, in the order in which they came; the
event loop never waits for the store. What takes time is answered later, from the thread that
finishes it: rows when their stream has gathered them, a step when every rank has asked for it.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from engram_store.errors import ProtocolError
from engram_store.slots import MAX_PACKET_BYTES
from engram_store.v1 import store_pb2 as pb
from engram_store_server.incoming import Request, RequestQueue, size_of
from engram_store_server.jobs import Job
from engram_store_server.limits import SessionLimits
from engram_store_server.outgoing import Outgoing, RowsAnswer
from engram_store_server.requests import RequestHandlers
from engram_store_server.slots import SessionSlots

if TYPE_CHECKING:
    from engram_store_server.stores import ServedStore


class SessionServer:
    """Serves the requests of one connection after its Hello was accepted.

    Args:
        served: the store.
        hello: what the client said.
        limits: of every session.
        shared_memory: whether slots can reach the client at all.
    """

    def __init__(
        self, served: "ServedStore", hello: pb.Hello, limits: SessionLimits, *, shared_memory: bool
    ) -> None:
        self.session_id, self.epoch = hello.session_id, hello.epoch
        self.rank, self.world_size = hello.rank, hello.world_size or 1
        self.trains = hello.mode == pb.MODE_TRAIN
        self.slots: SessionSlots | None = None
        if hello.shared_memory and shared_memory:
            # Buffers are powers of two, so half of their bytes may be unused.
            self.slots = SessionSlots(2 * limits.session_bytes)
            self.slots.exchange.on_message = self._take_direct
            self.slots.on_end = self._hung_up
        self._requests = RequestHandlers(served, hello, limits, self.slots, self.notify)
        self._loop = asyncio.get_running_loop()
        self._answers = Outgoing()
        self._queue = RequestQueue()
        self._worker = ThreadPoolExecutor(1, "engram-session")
        # Requests come through the stream, or beside the slots; one at a time is worked on.
        self._turn = threading.Lock()
        self._over = False
        self._left = asyncio.Event()
        self._taking: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None

    @property
    def job(self) -> Job | None:
        """The job that it trains for, once it was admitted."""
        return self._requests.job

    @job.setter
    def job(self, job: Job) -> None:
        self._requests.job = job

    # ------------------------------------------------------------------ the stream

    async def serve(
        self, requests: AsyncIterator[Request]
    ) -> AsyncGenerator[pb.SessionResponse | bytes, None]:
        """Yield the answers to all requests, until they end or the session is closed."""
        if self._leaving is not None:  # replaced before it began
            return
        self._taking = asyncio.create_task(self._take(requests))
        try:
            async for message in self._answers.messages():
                yield message
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
        self._answers.end()

    def notify(self, response: pb.SessionResponse | RowsAnswer) -> None:
        """Send a response, from any thread; without a word if the session is over."""
        if self._over:
            return
        if self.slots is not None and isinstance(response, pb.SessionResponse):
            message = response.SerializeToString()
            if self.slots.exchange.attached and len(message) <= MAX_PACKET_BYTES:
                self.slots.exchange.post(message)
                return
        # A loop that was closed has no session left.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._answers.put, response)

    def _let_go(self) -> None:
        """Close what the connection had open; a client that comes back announces again."""
        self._worker.shutdown(cancel_futures=True)
        with self._turn:
            self._over = True
        # Another rank's thread may be applying a step that this one has a part in.
        if self.job is not None:
            self.job.leave(self)
        if self.slots is not None:
            self.slots.close()
        self._requests.close()

    async def _take(self, requests: AsyncIterator[Request]) -> None:
        try:
            async for request in requests:
                await self._answers.wait_for_room()
                await self._queue.enter(size_of(request))
                self._worker.submit(self._work, request)
            # No more come; those that did are answered first.
            await self._loop.run_in_executor(self._worker, int)
        finally:
            self.end()

    def _work(self, request: Request) -> None:
        """One request that came through the stream, on the session's thread."""
        with self._turn:
            answer = self._requests.handle(request)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._finish, size_of(request), answer)

    def _take_direct(self, message: bytes) -> None:
        """One request that came beside the slots, on the door's thread. Raises: ProtocolError."""
        try:
            request = pb.SessionRequest.FromString(message)
        except DecodeError as error:
            raise ProtocolError(f"{len(message)} bytes that are no request: {error}") from error
        with self._turn:
            answer = None if self._over else self._requests.handle(request)
        if answer is not None:
            self.notify(answer)

    def _hung_up(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.end)

    def _finish(self, size: int, answer: pb.SessionResponse | None) -> None:
        self._queue.leave(size)
        if answer is not None:
            self._answers.put(answer)
            if answer.HasField("farewell"):
                self._answers.drop_rows()
                self.end()
