"""Rows and gradients in messages, for clients that have the generated classes and no more."""

import asyncio
import contextlib
import itertools
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

import engram_store
from engram_store import chunks, wire
from engram_store.chunks import REQUESTS, Chunk
from engram_store.errors import ProtocolError
from engram_store.recipes import Recipe
from engram_store.store import Store
from engram_store.v1 import store_pb2 as pb
from engram_store.v1.store_pb2_grpc import StoreServiceStub
from engram_store_client.remote import RemoteSession
from engram_store_server.incoming import GradientChunks, RequestQueue
from tests.pairs import (
    INITIAL,
    VOCABULARY,
    MakeStore,
    Pair,
    assert_same_tables,
    make_oracle,
    random_tokens,
)
from tests.servers import serving

_SECONDS = 30.0
_BREAKS = 8
"""Rows begin anew after each: a stream that never lives long enough for them never ends."""
_FIELDS = {1: "row_ids", 2: "rows", 3: "inverse"}


class PlainClient:
    """A session over the generated stub: what anybody can write who has the .proto file."""

    def __init__(self, address: str, mode: pb.Mode = pb.MODE_TRAIN) -> None:
        unlimited = [("grpc.max_receive_message_length", -1)]
        self._channel = grpc.insecure_channel(address, unlimited)
        self._requests: SimpleQueue[pb.SessionRequest | None] = SimpleQueue()
        stub = StoreServiceStub(self._channel)
        self._call = stub.Session(iter(self._requests.get, None), timeout=_SECONDS)
        self._number = 0
        hello = pb.Hello(protocol=1, oldest_protocol=1, mode=mode, session_id="ab" * 16, epoch=1)
        assert self.answer(hello=hello).HasField("welcome")

    def send(self, number: int | None = None, **request: Any) -> int:
        """Send a request; its id, which is the next one unless it is given."""
        if number is None:
            self._number += 1
            number = self._number
        self._requests.put(pb.SessionRequest(id=number, **request))
        return number

    def next(self) -> pb.SessionResponse:
        """The next response."""
        return next(self._call)

    def answer(self, **request: Any) -> pb.SessionResponse:
        """Send a request and wait for its answer, which nothing else comes before."""
        number = self.send(**request)
        response = self.next()
        assert response.id == number
        return response

    def announce(self, window: int, tokens: NDArray[Any], step: int | None = None) -> None:
        announce = pb.Announce(window=window, tokens=wire.encode_array(tokens), step=step)
        assert self.answer(announce=announce).HasField("announced")

    def push(
        self, window: int, gradient: NDArray[Any], pieces: list[tuple[int, int]]
    ) -> pb.SessionResponse:
        """Push with the bytes of these ranges in chunks ahead."""
        content, number = gradient.tobytes(), self._number + 1
        for start, end in pieces:
            data = content[start:end]
            chunk = pb.GradientChunk(window=window, layer=1, offset=start, data=data)
            self.send(number, gradient_chunk=chunk)
        return self.answer(
            push=pb.Push(window=window, layer=1, gradients=chunks.announce(gradient))
        )

    def close(self) -> None:
        self._requests.put(None)
        self._channel.close()


def collect(client: PlainClient, first: pb.SessionResponse) -> dict[str, NDArray[Any]]:
    """The arrays of an answer to a read, whose chunks are the next messages."""
    arrays = {name: getattr(first.rows, name) for name in _FIELDS.values()}
    missing = {
        number: np.dtype(arrays[name].dtype).itemsize * int(np.prod(arrays[name].shape))
        for number, name in _FIELDS.items()
        if arrays[name].in_chunks
    }
    received = dict.fromkeys(missing, b"")
    while any(len(received[number]) < size for number, size in missing.items()):
        chunk = client.next().rows_chunk
        assert chunk.offset == len(received[chunk.array])
        received[chunk.array] += chunk.data
    return {
        name: wire.decode_array(
            arrays[name],
            received=np.frombuffer(received[number], np.uint8) if number in received else None,
        )
        for number, name in _FIELDS.items()
    }


@pytest.fixture
def store(make_store: MakeStore) -> Iterator[Store]:
    with engram_store.open(make_store(), "train") as store:
        yield store


@pytest.fixture
def address(store: Store) -> Iterator[str]:
    with serving(store, "tcp:") as address:
        yield address.removeprefix("tcp://")


@pytest.fixture
def client(address: str) -> Iterator[PlainClient]:
    client = PlainClient(address)
    yield client
    client.close()


def many_tokens(tokens: int) -> NDArray[np.int64]:
    """Eight look-ups each, in two layers of about 16,000 rows."""
    return np.random.default_rng(0).integers(0, VOCABULARY, (1, tokens))


# ---------------------------------------------------------------------- any client


def test_a_plain_client_reads_large_rows(client: PlainClient, store: Store) -> None:
    """The inverse comes in several chunks, the rows in one, and they are the store's own."""
    tokens = many_tokens(50_000)
    client.announce(1, tokens)
    first = client.answer(read=pb.Read(window=1, layer=1))

    got = collect(client, first)

    assert first.rows.inverse.in_chunks
    assert got["inverse"].nbytes > chunks.CHUNK_BYTES
    with store.announce(tokens) as window:
        rows, inverse = window.rows(1)
        np.testing.assert_array_equal(got["row_ids"], window.row_ids(1))
        assert got["rows"].tobytes() == rows.tobytes()
        np.testing.assert_array_equal(got["inverse"], inverse)


def test_small_rows_come_in_one_message(client: PlainClient) -> None:
    """Nothing else has to be waited for."""
    client.announce(1, many_tokens(10))
    rows = client.answer(read=pb.Read(window=1, layer=1)).rows

    assert not any(getattr(rows, name).in_chunks for name in _FIELDS.values())
    assert wire.decode_array(rows.rows).shape == (*rows.row_ids.shape, 16)


def train_layer_two(client: PlainClient, rows: int) -> None:
    gradient = wire.encode_array(np.zeros((rows, 16), np.float32))
    assert client.answer(push=pb.Push(window=1, layer=2, gradients=gradient)).HasField("pushed")


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_a_plain_client_pushes_in_chunks(
    client: PlainClient, store: Store, recipe: Recipe, dtype: type
) -> None:
    """In pieces of any length, of either format; the tables become the oracle's."""
    tokens = many_tokens(40)
    oracle = make_oracle(recipe, INITIAL)
    same = oracle.announce(tokens, 0)
    gradient = np.random.default_rng(1).standard_normal(same.rows(1)[0].shape, np.float32)
    if dtype is np.uint16:
        gradient = (gradient.view(np.uint32) >> 16).astype(np.uint16)
    client.announce(1, tokens, 0)
    bounds = [0, 1, 100, 101, gradient.nbytes]

    answer = client.push(1, gradient, list(itertools.pairwise(bounds)))
    assert answer.HasField("pushed"), answer
    other = same.rows(2)[0].shape
    train_layer_two(client, other[0])
    commit = pb.Commit(step=0, rates={1: 0.5, 2: 0.5}, gradient_scale=1, beta1=0.9, beta2=0.99)
    assert client.answer(commit=commit).HasField("applied")

    same.push(1, gradient)
    same.push(2, np.zeros(other, np.float32))
    oracle.commit(0, 0.5, betas=(0.9, 0.99))
    assert_same_tables(store, oracle)


BROKEN = {
    "out of order": [(100, 200), (0, 100)],
    "overlapping": [(0, 100), (50, 150)],
    "twice": [(0, 100), (0, 100)],
    "with a gap": [(0, 100), (200, 300)],
    "not all": [(0, 100)],
    "none": [],
}


@pytest.mark.parametrize("pieces", BROKEN.values(), ids=BROKEN.keys())
def test_chunks_that_make_no_gradient_are_refused_with_their_push(
    client: PlainClient, address: str, pieces: list[tuple[int, int]]
) -> None:
    """A good push may follow, and another session notices nothing."""
    tokens = many_tokens(40)
    with RemoteSession(address, "read") as other:
        before = other.announce(tokens).rows(1)[0].tobytes()
        client.announce(1, tokens, 0)
        rows = collect(client, client.answer(read=pb.Read(window=1, layer=1)))["rows"]
        gradient = np.ones(rows.shape, np.float32)

        refused = client.push(1, gradient, pieces)

        assert refused.failure.error == "ProtocolError", refused
        assert other.announce(tokens).rows(1)[0].tobytes() == before
        assert client.push(1, gradient, [(0, gradient.nbytes)]).HasField("pushed")


def test_a_gradient_that_is_too_long_is_refused(client: PlainClient) -> None:
    """Before there is memory for it."""
    client.announce(1, many_tokens(40), 0)
    rows = collect(client, client.answer(read=pb.Read(window=1, layer=1)))["rows"]
    gradient = np.ones((rows.shape[0] + 1, rows.shape[1]), np.float32)

    refused = client.push(1, gradient, [(0, 100), (100, gradient.nbytes)])

    assert refused.failure.error == "ProtocolError"
    assert f"at most {4 * rows.size:,}" in refused.failure.message


def test_an_accepted_gradient_cannot_be_written_over(client: PlainClient) -> None:
    """Chunks that come after it change nothing, and their push is refused."""
    client.announce(1, many_tokens(40), 0)
    rows = collect(client, client.answer(read=pb.Read(window=1, layer=1)))["rows"]
    ones, wild = np.ones(rows.shape, np.float32), np.full(rows.shape, 1e30, np.float32)
    assert client.push(1, ones, [(0, ones.nbytes)]).HasField("pushed")

    chunk = pb.GradientChunk(window=1, layer=1, data=wild.tobytes())
    client.send(99, gradient_chunk=chunk)
    norm = client.answer(gradient_norm=pb.GradientNorm())
    assert norm.norm.value == pytest.approx(np.sqrt(rows.size)), norm
    assert "pushed before" in client.push(1, wild, []).failure.message


def test_chunks_for_windows_that_take_none_use_no_memory(store: Store) -> None:
    """Not open, unknown to the table, or only read: the push says why."""
    collected = GradientChunks()

    def chunk(window: int, layer: int) -> Chunk[pb.GradientChunk]:
        return Chunk(1, pb.GradientChunk(window=window, layer=layer), memoryview(bytes(64)))

    with store.announce(many_tokens(5)) as read_only:
        collected.take(chunk(7, 1), None)
        collected.take(chunk(8, 99), read_only)
        collected.take(chunk(8, 1), read_only)
        assert list(collected._arriving) == [(8, 1)]
        with pytest.raises(engram_store.errors.ReadOnlyError):
            collected.hand_over(8, 1)
    collected.take(chunk(8, 1), read_only)
    assert not collected._arriving


def test_a_session_that_begins_with_a_chunk_is_refused(address: str) -> None:
    """As with anything else but Hello."""
    with grpc.insecure_channel(address) as channel:
        stub = StoreServiceStub(channel)
        chunk = pb.GradientChunk(window=1, layer=1, data=b"abc")
        (answer,) = stub.Session(iter([pb.SessionRequest(id=9, gradient_chunk=chunk)]))

    assert answer.id == 9
    assert "must be Hello" in answer.failure.message


def test_a_client_that_stopped_reading_holds_no_other_up(
    client: PlainClient, address: str, store: Store
) -> None:
    """Its rows wait in its window; when that is closed, they are not sent any more."""
    tokens = many_tokens(600_000)  # 19 MB of inverse: more than connections hold on their way
    client.announce(1, tokens)
    reads = [client.send(read=pb.Read(window=1, layer=1)) for _ in range(4)]
    with RemoteSession(address, "read") as other, store.announce(tokens) as window:
        rows, inverse = other.announce(tokens).rows(1)
        assert rows.tobytes() == window.rows(1)[0].tobytes()
        np.testing.assert_array_equal(inverse, window.rows(1)[1])
    release = client.send(release=pb.Release(window=1))

    ends: dict[int, str] = {}
    while release not in ends or len(ends) < 1 + len(reads):
        response = client.next()
        kind = response.WhichOneof("response")
        if kind not in ("rows", "rows_chunk"):
            ends[response.id] = kind or ""
    assert ends == {release: "released", **dict.fromkeys(reads, "failure")}


# ---------------------------------------------------------------------- our own client


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every array of the tiny stores in many chunks."""
    monkeypatch.setattr(chunks, "INLINE_BYTES", 64)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 200)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("counted", ["received", "sent"])
def test_a_stream_that_breaks_between_chunks_is_replaced(
    address: str,
    store: Store,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    counted: str,
) -> None:
    """Half-received rows are dropped, gradients are sent again from their start."""
    breaks: list[int] = []
    with RemoteSession(address) as session:
        breaker = Breaker(session, every=97, breaks=breaks)
        if counted == "sent":
            monkeypatch.setattr(REQUESTS, "encode", breaker.around(REQUESTS.encode))
        else:
            monkeypatch.setattr(chunks.Arriving, "add", breaker.around(chunks.Arriving.add))
        pair = Pair(session, make_oracle(recipe, INITIAL))
        for _ in range(6):
            windows = [pair.announce(random_tokens(pair.rng), pair.step) for _ in range(2)]
            for window in windows:
                window.push_random(pair.rng)
            pair.commit()

    assert len(breaks) == _BREAKS
    assert store.step == 6
    assert_same_tables(store, pair.oracle)


class Breaker:
    """Breaks a session's stream at every n-th call of something."""

    def __init__(self, session: RemoteSession, every: int, breaks: list[int]) -> None:
        self._session, self._every, self._breaks = session, every, breaks
        self._calls, self._lock = 0, threading.Lock()

    def around(self, call: Any) -> Any:
        """The same call, counted."""

        def counted(*arguments: Any) -> Any:
            with self._lock:
                self._calls += 1
                due = self._calls % self._every == 0 and len(self._breaks) < _BREAKS
            stream = self._session.connection._stream
            if due and stream is not None:
                self._breaks.append(self._calls)
                stream._call.cancel()
            return call(*arguments)

        return counted


@pytest.mark.usefixtures("small_chunks")
def test_rows_that_a_store_announces_wrongly_fail_their_read_only(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session goes on."""
    tokens = many_tokens(40)
    true_announce = chunks.announce

    def lie(array: NDArray[Any]) -> pb.Array:
        message = true_announce(array)
        message.shape[0] += 1
        return message

    with RemoteSession(address, "read") as session:
        with monkeypatch.context() as patch:
            patch.setattr(chunks, "announce", lie)
            with pytest.raises(ProtocolError, match="the store announced"):
                session.announce(tokens).rows(1)
        assert session.announce(tokens).rows(1)[0].any()


def test_rows_outlive_their_window(address: str, store: Store) -> None:
    """Memory is lent again only when nobody looks at it any more."""
    tokens = many_tokens(30_000)
    with store.announce(tokens) as window:
        expected = window.rows(1)[1].copy()
    with RemoteSession(address, "read") as session:
        with session.announce(tokens) as first:
            kept = first.rows(1)[1]
        for _ in range(3):
            with session.announce(tokens[:, ::-1].copy()) as other:
                other.rows(1)

    np.testing.assert_array_equal(kept, expected)


def test_over_a_unix_socket_without_shared_memory_it_is_the_same(store: Store) -> None:
    """Where there is no room for shared memory, say."""
    from engram_store_client.remote import RemoteOptions

    tokens = many_tokens(30_000)
    with contextlib.ExitStack() as stack:
        short = stack.enter_context(tempfile.TemporaryDirectory())
        address = stack.enter_context(serving(store, f"unix:{Path(short)}/s.sock"))
        options = RemoteOptions(shared_memory=False)
        session = stack.enter_context(RemoteSession(address, "read", options))
        with session.announce(tokens) as got, store.announce(tokens) as window:
            assert session.transport == "messages"
            assert got.rows(1)[0].tobytes() == window.rows(1)[0].tobytes()
            np.testing.assert_array_equal(got.rows(1)[1], window.rows(1)[1])


# ---------------------------------------------------------------------- reading ahead


@pytest.mark.parametrize(("size", "fit"), [(10, 64), (1 << 20, 32), (20 << 20, 1), (200 << 20, 1)])
def test_requests_are_read_ahead_as_far_as_their_bytes_allow(size: int, fit: int) -> None:
    """One is always let in, however large; the next when there is room again."""

    async def scenario() -> None:
        queue = RequestQueue()
        for _ in range(fit):
            await queue.enter(size)
        waiting = asyncio.create_task(queue.enter(size))
        await asyncio.sleep(0)
        assert not waiting.done()
        queue.leave(size)
        await waiting

    asyncio.run(scenario())
