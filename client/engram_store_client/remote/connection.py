"""A session's requests and their answers, across as many streams as it takes.

The journal holds every request that a store which has forgotten this session would have to see
again, in the order in which they were sent: what was not answered, and the announcements and
gradients of windows that are still open. Coming back is sending the journal again.
"""

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_store import wire
from engram_store.chunks import Chunk
from engram_store.errors import (
    DeadlineError,
    EngramStoreError,
    ProtocolError,
    StoreClosedError,
    StoreUnreachableError,
    WindowClosedError,
)
from engram_store.reuse import ReusedMemory
from engram_store.slots import slot_door
from engram_store.types import GradientBlock
from engram_store.v1 import store_pb2 as pb
from engram_store_client.devices.host_memory import HostMemory
from engram_store_client.remote.expected import check_answer
from engram_store_client.remote.incoming import WantedRows
from engram_store_client.remote.options import RemoteOptions
from engram_store_client.remote.pending import Pending
from engram_store_client.remote.resume import Verdict, delays, judge
from engram_store_client.remote.slots import TrainerSlots
from engram_store_client.remote.stream import Response, Stream

OpenStream = Callable[..., Stream]
"""Given a hello and what is called for responses and at the end: opens a `Stream`."""
_HELLO_SECONDS = 10.0
_ID_BYTES = 64
"""Room for what is added to a request when it is sent."""
_KEPT_BYTES = 256 << 20
"""Memory of rows and gradients that is kept for the next windows."""
_SHORT_LIFE_SECONDS = 1.0
"""A stream that breaks sooner is not replaced at once."""


class Connection:
    """Sends requests in order, hands out answers, and comes back when the store does.

    Args:
        address: of the store, for messages.
        open_stream: opens one stream.
        hello: without epoch; sent at the start of every stream.
        options: deadlines.
        on_answer: called with a request and its answer on a thread of the connection, before
            whoever waits for it.
    """

    def __init__(
        self,
        address: str,
        open_stream: OpenStream,
        hello: pb.Hello,
        options: RemoteOptions,
        on_answer: Callable[[Pending, pb.SessionResponse], None],
    ) -> None:
        self._address, self._open_stream = address, open_stream
        self._hello, self._options = hello, options
        self._on_answer = on_answer
        self._memory = ReusedMemory(_KEPT_BYTES)
        self.shared = HostMemory()
        """Slots of all streams."""
        self._process = os.getpid()
        self._numbers = itertools.count(1)
        # Guards the journal, the current stream, and that both agree on the order of requests.
        self._lock = threading.Condition()
        self._journal: dict[int, Pending] = {}
        self._stream: Stream | None = None
        self._error: EngramStoreError | None = None
        self._leaving = threading.Event()
        self._adopted = 0.0
        """When the current stream became the current one."""
        self._trouble: float | None = None
        """When the first stream broke since an answer came that had not come before."""
        self.step = 0
        """Steps that the store has acknowledged."""
        self.durable_step = 0
        """Steps below this one outlive the store's host."""
        self.staleness = 0
        """Steps by which the store's rows may lag behind."""
        stream, self.welcome = self._connect()
        self.step = self.welcome.step
        hello.fingerprint = self.welcome.fingerprint
        self._adopt(stream)

    @property
    def shares_memory(self) -> bool:
        """Whether arrays travel in shared memory, now or when the connection was lost."""
        return self._shares_memory

    # ------------------------------------------------------------------ asking

    def check(self) -> None:
        """Raises: StoreClosedError, ProtocolError (another process), or why it was lost."""
        self._check_process()
        if self._error is not None:
            raise self._error

    @property
    def forked(self) -> bool:
        """Whether it belongs to another process than this one."""
        return os.getpid() != self._process

    def _check_process(self) -> None:
        if self.forked:
            raise ProtocolError(
                f"the connection belongs to process {self._process}; it does not survive a fork. "
                "Connect after the fork (in data loader workers: not at all)"
            )

    def send(
        self,
        request: pb.SessionRequest,
        window: int | None = None,
        gradients: GradientBlock | None = None,
        wanted: WantedRows | None = None,
    ) -> Pending:
        """Send a request, now or when the store is back.

        Args:
            request: what to send.
            window: the window it belongs to.
            gradients: of a push; kept, not copied, until the window is forgotten.
            wanted: of a read, what its answer can look like.

        Raises:
            ProtocolError: it is too large for a message, and see `check`.
        """
        size = request.ByteSize()  # a large gradient goes in messages of its own
        if size > wire.MAX_MESSAGE_BYTES - _ID_BYTES:
            raise ProtocolError(
                f"the request has {size:,} bytes, a message holds "
                f"{wire.MAX_MESSAGE_BYTES:,}; announce windows of fewer tokens"
            )
        with self._lock:
            self.check()
            request.id = next(self._numbers)
            pending = Pending(request, window, gradients, wanted=wanted, sent=time.monotonic())
            self._journal[request.id] = pending
            if self._stream is not None:
                self._stream.send(request, gradients)
        return pending

    def result(self, pending: Pending, asked: str, *, works: bool = False) -> pb.SessionResponse:
        """Wait for an answer.

        Args:
            pending: the request.
            asked: what it is, for people.
            works: the store may be busy with it for long.

        Raises:
            DeadlineError: none came in time.
            EngramStoreError: the store refused, or was lost for good.
        """
        self._check_process()
        seconds = self._options.work_seconds if works else self._options.deadline_seconds
        asking = time.monotonic()
        while True:
            try:
                response = pending.answer.result(_left(max(asking, pending.sent), seconds))
            except TimeoutError as error:
                if isinstance(error, EngramStoreError):
                    raise
                if self._stream is not None and not _left(max(asking, pending.sent), seconds):
                    raise DeadlineError(asked, seconds) from None
                self._leaving.wait(0.01)
                continue
            if response.WhichOneof("response") == "failure":
                raise wire.decode_error(response.failure)
            return response

    def settle(self) -> None:
        """Wait until everything sent so far took effect; rows may still be on their way."""
        with self._lock:
            waiting = [p for p in self._journal.values() if p.kind != "read"]
        for pending in waiting:
            self.result(pending, f"confirm {pending.kind}", works=True)

    def forget(self, windows: set[int]) -> None:
        """Their requests need no answer and are not sent again; their memory is used again."""
        with self._lock:
            stream = self._stream
            dropped = [p for p in self._journal.values() if p.window in windows]
            for pending in dropped:
                del self._journal[pending.request.id]
        for pending in dropped:
            pending.settle(WindowClosedError("the window was closed; announce it again"))
        if stream is not None and stream.slots is not None:
            stream.slots.take_back(windows)

    def lend(self, window: int, size: int) -> NDArray[np.uint8]:
        """Bytes for a gradient: where the store sees them, if it can."""
        stream = self._stream
        if stream is not None and stream.slots is not None:
            with contextlib.suppress(OSError):
                return stream.slots.lend(window, size)
        return self._memory.take(size)

    def place(self, window: int, gradients: GradientBlock) -> GradientBlock:
        """See `Stream.place`; as it is while there is no stream."""
        stream = self._stream
        return gradients if stream is None else stream.place(window, gradients)

    def current_stream(self) -> Stream:
        """For unary calls; waits until there is one. Raises: see `check`."""
        with self._lock:
            self._check_process()
            self._lock.wait_for(lambda: self._stream is not None or self._error is not None)
            self.check()
            assert self._stream is not None
            return self._stream

    def close(self) -> None:
        """End the session. Closing twice is fine; in a forked process nothing happens."""
        if self.forked:
            return
        stream = self._fail(StoreClosedError("the session was closed; connect again"))
        if stream is not None:
            goodbye = pb.SessionRequest(id=next(self._numbers), goodbye=pb.Goodbye())
            stream.close(goodbye)

    # ------------------------------------------------------------------ hearing

    def _deliver(self, stream: Stream, response: Response) -> None:
        if not isinstance(response, Chunk) and response.WhichOneof("response") == "durable":
            self.durable_step = response.durable.step
            return
        with self._lock:
            pending = self._journal.get(response.id)
            if stream is not self._stream or pending is None:
                stream.incoming.drop(response.id)
                return
            pending.slots = stream.slots
        try:
            whole = stream.incoming.take(response, pending.wanted, self._memory)
        except ProtocolError as error:
            whole = pb.SessionResponse(failure=wire.encode_error(error)), {}
        if whole is not None:
            answer, pending.arrays = whole
            try:
                check_answer(pending.request, answer)
            except ProtocolError as error:
                self._abandon(error)
                return
            self._answer(pending, answer)

    def _answer(self, pending: Pending, response: pb.SessionResponse) -> None:
        refused = response.WhichOneof("response") == "failure"
        if refused and pending.lasts and pending.answer.done():
            # It was accepted before: the store that came back is not the one that was left.
            self._abandon(wire.decode_error(response.failure))
            return
        if refused or not pending.lasts:
            with self._lock:
                self._journal.pop(pending.request.id, None)
        match response.WhichOneof("response"):
            case "applied":
                self.step = response.applied.step + 1
            case "restored":
                self.step = response.restored.step
        self._on_answer(pending, response)
        if pending.settle(response):
            self._trouble = None

    def _fail(self, error: EngramStoreError) -> Stream | None:
        """Give everything up, for the first reason that comes; the stream that was left."""
        with self._lock:
            self._error = self._error or error
            stream, self._stream = self._stream, None
            unanswered = list(self._journal.values())
            self._journal.clear()
            self._lock.notify_all()
        self._leaving.set()
        for pending in unanswered:
            pending.settle(error)
        return stream

    def _abandon(self, error: EngramStoreError) -> None:
        stream = self._fail(error)
        if stream is not None:
            stream.abort()

    # ------------------------------------------------------------------ coming back

    def _connect(self) -> tuple[Stream, pb.Welcome]:
        """The first greeting; waits for a store that is still starting. Raises: see `_greet`."""
        until = time.monotonic() + self._options.connect_seconds
        for wait in delays():
            try:
                return self._greet()
            except StoreUnreachableError:
                if time.monotonic() + wait > until:
                    raise
            time.sleep(wait)
        raise AssertionError("delays never end")

    def _greet(self) -> tuple[Stream, pb.Welcome]:
        """Open a stream and be welcomed. Raises: see `Stream.welcome`."""
        self._hello.epoch += 1
        hello = pb.SessionRequest(id=next(self._numbers), hello=self._hello)
        stream = self._open_stream(hello, self._deliver, self._lost)
        welcome = stream.welcome(_HELLO_SECONDS)
        if welcome.slot_token and not self._hello.shared_memory:
            stream.abort()
            raise ProtocolError(
                f"{self._address} offers shared memory that was not asked for; is it an "
                "engram-store?"
            )
        if welcome.slot_token:
            door = slot_door(Path(self._address.removeprefix("unix:")))
            try:
                stream.slots = TrainerSlots(
                    str(door), welcome.slot_token, partial(self._deliver, stream), self.shared
                )
            except OSError:
                # A store in a container whose sockets, but not whose door, are mounted here.
                stream.abort()
                self._hello.shared_memory = False
                return self._greet()
        self._shares_memory = bool(welcome.slot_token)
        self.durable_step, self.staleness = welcome.durable_step, welcome.staleness
        return stream, welcome

    def _adopt(self, stream: Stream) -> None:
        """Make a stream the current one and send the journal. Raises: StoreUnreachableError."""
        with self._lock:
            if self._error is not None:
                stream.abort()
                return
            if stream.ended.is_set():
                stream.abort()
                raise StoreUnreachableError(self._address, "it went away again at once")
            self._stream, self._adopted = stream, time.monotonic()
            for pending in self._journal.values():
                pending.sent = time.monotonic()
                stream.send(pending.request, pending.gradients)
            self._lock.notify_all()

    def _lost(self, stream: Stream, reason: EngramStoreError) -> None:
        """On the thread of a stream that ended: come back, or give up."""
        with self._lock:
            if stream is not self._stream:
                return
            self._stream = None
        stream.abort()
        if not isinstance(reason, StoreUnreachableError):
            self._fail(reason)
            return
        until = self._patience()
        waits = delays()
        if time.monotonic() - self._adopted < _SHORT_LIFE_SECONDS:
            self._leaving.wait(next(waits))
        while not self._leaving.is_set():
            try:
                self._return()
            except StoreUnreachableError as error:
                reason = error
            except StoreClosedError:
                pass  # the store process is about to end, and may be started again
            except EngramStoreError as error:
                self._fail(error)
            else:
                return
            if time.monotonic() > until:
                self._fail(reason)
            self._leaving.wait(next(waits))

    def _patience(self) -> float:
        """Until when to try: streams that break again and again without an answer count as one."""
        now, seconds = time.monotonic(), self._options.reconnect_seconds
        if self._trouble is None or now - self._adopted > seconds:
            self._trouble = now
        return self._trouble + seconds

    def _return(self) -> None:
        """Raises: ProtocolError: the store is not where it was left; see `judge`."""
        stream, welcome = self._greet()
        if welcome.store_id != self.welcome.store_id:
            stream.abort()
            raise ProtocolError(
                f"store {welcome.store_id!r:.100} answers at {self._address} now, the session is "
                f"one of {self.welcome.store_id!r:.100}; serve that one there, or connect again "
                "and restore your checkpoint"
            )
        with self._lock:
            unanswered = [p for p in self._journal.values() if not p.answer.done()]
        commits = [p for p in unanswered if p.kind == "commit"]
        restoring = any(p.kind == "restore" for p in unanswered)
        try:
            verdict = judge(welcome.step, self.step, committing=bool(commits), restoring=restoring)
        except ProtocolError:
            stream.abort()
            raise
        if verdict is Verdict.APPLIED:
            applied = pb.Applied(step=self.step, repeated=True)
            self._answer(commits[0], pb.SessionResponse(applied=applied))
        self._adopt(stream)


def _left(since: float, seconds: float) -> float:
    return max(0.0, since + seconds - time.monotonic())
