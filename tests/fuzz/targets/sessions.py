"""A live session, as a store process serves it: whatever is sent, it answers and lives on."""

import asyncio
import contextlib
import logging
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

import engram_store
from engram_store import chunks, wire
from engram_store.chunks import Chunk
from engram_store.errors import EngramStoreError
from engram_store.layout.create import create_store
from engram_store.testing import MemorySession
from engram_store.types import GradientBlock
from engram_store.v1 import store_pb2 as pb
from tests.fuzz.frames import Frame, decode_frames, encode_frames, mutate_frames
from tests.fuzz.samples import metadata
from tests.fuzz.target import MEBIBYTE, Target

_STEPWISE, _HANGS_UP = 1, 2
"""Bits of an input's first byte: wait for each answer before the next request; end connections
without saying so."""
_ANSWER_SECONDS = 0.02
"""How long a request may go unanswered before the next one: not all have an answer."""
_END_SECONDS = 5.0
_TOKENS = np.array([[5, 6, 7, 5], [1, 2, 3, 4]])
_GOOD = "60" * 16


class _Trouble(logging.Handler):
    """Keeps what was logged as an error, which is how a swallowed exception shows."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(self.format(record))


@cache
def trouble() -> _Trouble:
    """Of this process."""
    handler = _Trouble()
    logging.getLogger().addHandler(handler)
    return handler


class _Connection:
    """One Session call, as gRPC would make it."""

    def __init__(self, servicer: Any) -> None:
        self._requests: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.asked: Counter[int] = Counter()
        self.answered: Counter[int] = Counter()
        self.heard: list[pb.SessionResponse] = []
        self._begun = False
        self._more = asyncio.Event()
        self.task = asyncio.create_task(self._serve(servicer))

    async def _messages(self) -> AsyncIterator[Any]:
        while (raw := await self._requests.get()) is not None:
            # What cannot be read ends the call, where gRPC reads it.
            yield chunks.REQUESTS.deserialize(raw)

    async def _serve(self, servicer: Any) -> None:
        try:
            with contextlib.suppress(DecodeError):
                async with contextlib.aclosing(
                    servicer.Session(self._messages(), None)
                ) as responses:
                    async for response in responses:
                        self._hear(chunks.RESPONSES.serialize(response))
        finally:
            self._more.set()

    def _hear(self, raw: bytes) -> None:
        response = chunks.RESPONSES.deserialize(raw)
        if isinstance(response, Chunk):
            return
        kind = response.WhichOneof("response")
        assert kind is not None, "an answer without content"
        self.heard.append(response)
        if kind == "durable":
            return
        self.answered[response.id] += 1
        self._more.set()
        if kind == "failure":
            error = wire.decode_error(response.failure)
            assert isinstance(error, EngramStoreError)
            assert "internal error in the store" not in str(error), str(error)

    async def send(self, raw: bytes, *, wait: bool) -> None:
        try:
            request = chunks.REQUESTS.deserialize(raw)
        except DecodeError:
            request = None
        self._requests.put_nowait(raw)
        # A chunk has no answer of its own, unless it comes in place of Hello.
        if request is None or (isinstance(request, Chunk) and self._begun):
            return
        self._begun = True
        self.asked[request.id] += 1
        if wait:
            await self.answer_of(request.id)

    async def answer_of(self, number: int) -> None:
        """Wait a little."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ANSWER_SECONDS):
                while self.answered[number] < self.asked[number] and not self.task.done():
                    self._more.clear()
                    await self._more.wait()

    async def end(self, *, hang_up: bool) -> None:
        """No more requests, or nobody there any more; then nothing of it may be left."""
        for number in self.asked if not hang_up else ():
            await self.answer_of(number)
        if hang_up:
            await asyncio.sleep(0)
            self.task.cancel()
        self._requests.put_nowait(None)
        _, late = await asyncio.wait([self.task], timeout=_END_SECONDS)
        assert not late, "a session did not end"
        if not self.task.cancelled() and (error := self.task.exception()) is not None:
            raise error
        extra = self.answered - self.asked
        assert not extra, f"answers that nobody asked for: {extra}"


class _Served:
    """A store that goes back to the beginning before every input; served without a network."""

    def __init__(self) -> None:
        from engram_store_server.limits import SessionLimits
        from engram_store_server.servicer import StoreServicer
        from engram_store_server.stores import Stores

        directory = Path(tempfile.mkdtemp(prefix="served-"))
        tables = list(metadata().tables.values())
        create_store(directory / "s.engram", metadata().recipe, tables)
        self.store = engram_store.open(
            directory / "s.engram", "train", overlay_bytes=1 << 20, memtable_dir=directory
        )
        limits = SessionLimits(handover_seconds=0.01, session_bytes=4 << 20, open_windows=4)
        self.runner = asyncio.Runner()
        self.runner.run(asyncio.sleep(0))
        self.runner.get_loop().set_exception_handler(self._failed)
        self.stores = Stores({"": self.store}, limits)
        self.servicer = StoreServicer(self.stores, limits)
        self.failures: list[str] = []
        self.trained = _trained_rows()
        _watch_workers(self.failures)

    def _failed(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # An input that no parser accepts ends the call where gRPC reads it; see `_messages`.
        if not isinstance(context.get("exception"), DecodeError):
            self.failures.append(repr(context))

    def run(self, data: bytes) -> list[pb.SessionResponse]:
        """All that is heard."""
        mode = data[0] if data else 0
        self.store.restore(0)
        heard = self.runner.run(self._drive(decode_frames(data[1:]), mode))
        self._check_quiet()
        return heard

    async def _drive(self, frames: list[Frame], mode: int) -> list[pb.SessionResponse]:
        connections: dict[int, _Connection] = {}
        for number, raw in frames:
            if number not in connections:
                connections[number] = _Connection(self.servicer)
            await connections[number].send(raw, wait=bool(mode & _STEPWISE))
        for connection in connections.values():
            await connection.end(hang_up=bool(mode & _HANGS_UP))
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            await asyncio.wait(left, timeout=_END_SECONDS)
        assert all(task.done() for task in left), f"tasks were left behind: {left}"
        return [response for connection in connections.values() for response in connection.heard]

    def _check_quiet(self) -> None:
        served = self.stores.find("")
        assert not served.sessions
        assert not served.trainers.connected
        assert not self.store._announced._training, "a window of nobody is open"
        failures, said = self.failures[:], trouble().said[:]
        self.failures.clear()
        trouble().said.clear()
        assert not failures, failures[0]
        assert not said, said[0]

    def check_usable(self) -> None:
        """A session like any other trains one step, to the bit."""
        answers = self.run(bytes([_STEPWISE]) + encode_frames(_good_step()))
        kinds = [a.WhichOneof("response") for a in answers]
        wanted = ["welcome", "announced", "rows", "rows", "pushed", "pushed", "applied", "farewell"]
        assert [kind for kind in kinds if kind != "durable"] == wanted, kinds
        for layer, rows in self.trained.items():
            ids = np.arange(len(rows), dtype=np.int32)
            assert self.store.read_rows(layer, ids).tobytes() == rows.tobytes(), "other rows"


def _watch_workers(failures: list[str]) -> None:
    """An exception on a session's own thread would be lost without a word."""
    from engram_store_server.session import SessionServer

    work = SessionServer._work

    def watched(self: SessionServer, request: Any) -> None:
        try:
            work(self, request)
        except BaseException as error:
            failures.append(f"on a session's thread: {error!r}")
            raise

    SessionServer._work = watched  # type: ignore[method-assign]


@cache
def _served() -> _Served:
    served = _Served()
    for data in _sessions():  # compiles kernels, before memory is limited
        served.run(data)
    return served


def _check_session(data: bytes) -> None:
    served = _served()
    served.run(data)
    served.check_usable()


# ------------------------------------------------------------------ good sessions


def _gradients() -> dict[int, GradientBlock]:
    """For `_TOKENS`, by layer."""
    window = MemorySession(metadata().recipe, dict(metadata().tables), {}).announce(_TOKENS, 0)
    return {
        layer: np.ones((window.row_ids(layer).size, spec.dim), np.float32)
        for layer, spec in metadata().tables.items()
    }


def _trained_rows() -> dict[int, Any]:
    """Tables after one step with them."""
    session = MemorySession(metadata().recipe, dict(metadata().tables), {})
    window = session.announce(_TOKENS, 0)
    for layer, gradients in _gradients().items():
        window.push(layer, gradients)
    session.commit(0, 0.5)
    return {layer: content.rows for layer, content in session.contents.items()}


class _Script:
    """Requests of one connection, numbered in order."""

    def __init__(self, connection: int = 0, **hello: Any) -> None:
        self._connection, self.frames = connection, list[Frame]()
        given: dict[str, Any] = {
            "protocol": wire.PROTOCOL,
            "oldest_protocol": wire.OLDEST_PROTOCOL,
            "mode": pb.MODE_TRAIN,
            "session_id": _GOOD,
            "epoch": 1,
            **hello,
        }
        self.ask(hello=pb.Hello(**given))

    def ask(self, **request: Any) -> None:
        number = len(self.frames) + 1
        self.frames.append(
            (self._connection, pb.SessionRequest(id=number, **request).SerializeToString())
        )

    def announce(self, window: int, step: int | None, tokens: Any = _TOKENS) -> None:
        array = wire.encode_array(tokens)
        self.ask(announce=pb.Announce(window=window, tokens=array, step=step))

    def read(self, window: int) -> None:
        for layer in metadata().tables:
            self.ask(read=pb.Read(window=window, layer=layer))

    def push(self, window: int, *, in_chunks: bool = False) -> None:
        for layer, gradients in _gradients().items():
            array = wire.encode_array(gradients)
            if in_chunks:
                array = chunks.announce(gradients)
                content = chunks.bytes_of(gradients)
                half = content.size // 2
                for offset, part in ((0, content[:half]), (half, content[half:])):
                    chunk = pb.GradientChunk(window=window, layer=layer, offset=offset)
                    raw = chunks.REQUESTS.encode(len(self.frames) + 3 - (offset > 0), chunk, part)
                    self.frames.append((self._connection, raw))
            self.ask(push=pb.Push(window=window, layer=layer, gradients=array))

    def commit(self, step: int) -> None:
        rates = dict.fromkeys(metadata().tables, 0.5)
        self.ask(
            commit=pb.Commit(step=step, rates=rates, gradient_scale=1.0, beta1=0.9, beta2=0.999)
        )


def _good_step() -> list[Frame]:
    script = _Script()
    script.announce(1, 0)
    script.read(1)
    script.push(1)
    script.commit(0)
    script.ask(goodbye=pb.Goodbye())
    return script.frames


def _long_session() -> list[Frame]:
    """Everything that a session can ask for."""
    script = _Script()
    script.announce(1, 0)
    script.push(1, in_chunks=True)
    script.ask(gradient_norm=pb.GradientNorm())
    script.commit(0)
    script.ask(take_snapshot=pb.TakeSnapshot())
    script.announce(2, None)
    script.read(2)
    script.ask(release=pb.Release(window=2))
    script.announce(3, 1)
    script.commit(0)
    script.ask(restore=pb.Restore(snapshot=pb.SnapshotRef(step=0)))
    script.ask(goodbye=pb.Goodbye())
    return script.frames


def _two_ranks() -> list[Frame]:
    """Each brings a part of a step; the requests of both alternate."""
    ranks = []
    for rank in range(2):
        script = _Script(rank, rank=rank, world_size=2)
        script.announce(1, 0)
        script.push(1)
        script.commit(0)
        script.ask(restore=pb.Restore(snapshot=pb.SnapshotRef(step=0)))
        ranks.append(script.frames)
    return [frame for pair in zip(*ranks, strict=True) for frame in pair]


def _replaced() -> list[Frame]:
    """A reader, and a trainer whose newer connection takes over."""
    older, newer = _Script(0), _Script(1, epoch=2)
    reader = _Script(2, mode=pb.MODE_READ, session_id="ab" * 16)
    for script in (older, newer):
        script.announce(1, 0)
        script.push(1)
        script.commit(0)
    reader.announce(1, None)
    reader.read(1)
    return [*older.frames, *reader.frames, *newer.frames, *older.frames[1:]]


def _large_window() -> list[Frame]:
    """Its rows come in chunks."""
    script = _Script(mode=pb.MODE_READ)
    script.announce(1, None, np.arange(9_000, dtype=np.int32).reshape(1, -1) % 30)
    script.read(1)
    return script.frames


def _sessions() -> Iterator[bytes]:
    for mode in (_STEPWISE, 0, _HANGS_UP, _STEPWISE | _HANGS_UP):
        for frames in (_good_step(), _long_session(), _two_ranks(), _replaced(), _large_window()):
            yield bytes([mode]) + encode_frames(frames)


TARGETS = (
    Target(
        name="session",
        check=_check_session,
        seeds=_sessions,
        allowed=(),
        mutate=mutate_frames(pb.SessionRequest, prefix=1),
        # Threads of a session, and of tables, have address space of their own.
        memory_bytes=2048 * MEBIBYTE,
        needs=("grpc",),
    ),
)
