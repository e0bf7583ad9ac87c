"""What a trainer makes of a store's answers: whatever they are, calls end, with our own errors."""

import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
from google.protobuf.message import DecodeError

from engram_store import chunks, wire
from engram_store.errors import EngramStoreError, ShapeError
from engram_store.session import SnapshotRef
from engram_store.testing import MemorySession
from engram_store.v1 import store_pb2 as pb
from tests.fuzz.frames import Frame, decode_frames, encode_frames, mutate_frames
from tests.fuzz.samples import metadata
from tests.fuzz.target import MEBIBYTE, Target
from tests.fuzz.targets.sessions import trouble

_SECONDS = 0.03
"""How long a trainer waits for an answer, and an answer for its question."""
_END_SECONDS = 5.0
TOKENS = np.array([[5, 6, 7, 5], [1, 2, 3, 4]])
_REF = SnapshotRef(store_id=metadata().store_id, step=1, digest="ab" * 32)


def _rpc_error(details: str) -> Exception:
    import grpc

    class Broken(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

        def details(self) -> str:
            return details

        def trailing_metadata(self) -> tuple[()]:
            return ()

    return Broken()


class _Call:
    """A Session call whose answers are given beforehand.

    An answer waits for the request with its number, so that it does not come too early.
    """

    def __init__(self, requests: Iterable[Any], answers: list[bytes], seconds: float) -> None:
        self._answers, self._seconds = iter(answers), seconds
        self._changed = threading.Condition()
        self._asked, self._cancelled = {0}, False  # notices come unasked
        self._taking = threading.Thread(
            target=self._take, args=(requests,), name="engram-fuzz-requests", daemon=True
        )
        self._taking.start()

    def _take(self, requests: Iterable[Any]) -> None:
        """On gRPC's thread."""
        for request in requests:
            raw = chunks.REQUESTS.serialize(request)
            with self._changed:
                self._asked.add(chunks.REQUESTS.deserialize(raw).id)
                self._changed.notify_all()

    def __iter__(self) -> Iterator[Any]:
        for raw in self._answers:
            try:
                answer = chunks.RESPONSES.deserialize(raw)
            except DecodeError:
                raise _rpc_error("an answer that cannot be read") from None
            with self._changed:
                self._changed.wait_for(partial(self._ready, answer.id), self._seconds)
                if self._cancelled:
                    break
            yield answer
        raise _rpc_error("no more answers")

    def _ready(self, number: int) -> bool:
        return self._cancelled or number in self._asked

    def cancel(self) -> None:
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()


class _Channel:
    """A channel to a store that has only answers; every stream uses those of its own number."""

    def __init__(self, answers: list[bytes], seconds: float) -> None:
        self._answers, self._seconds = answers, seconds

    def stream_stream(self, *_method: Any, **_codecs: Any) -> Callable[[Iterable[Any]], _Call]:
        return lambda requests: _Call(requests, self._answers, self._seconds)

    def unary_unary(self, *_method: Any, **_codecs: Any) -> Callable[..., Any]:
        def call(*_arguments: Any, **_options: Any) -> Any:
            raise _rpc_error("there are no unary calls here")

        return call

    def close(self) -> None:
        """Nothing is open."""


def _delays() -> Iterator[float]:
    return itertools.repeat(1e-3)


@contextlib.contextmanager
def answering(frames: Iterable[Frame], seconds: float) -> Iterator[Any]:
    """Remote sessions hear these answers, whatever they ask.

    Args:
        frames: `SessionResponse` messages, by the number of the stream.
        seconds: how long calls wait for an answer, and an answer for its question.

    Yields:
        `RemoteOptions` for them.
    """
    from engram_store_client.remote import RemoteOptions

    streams: dict[int, list[bytes]] = {}
    for number, raw in frames:
        streams.setdefault(number, []).append(raw)
    numbers = itertools.count()

    def open_channel(*_arguments: Any) -> _Channel:
        return _Channel(streams.get(next(numbers), []), seconds)

    with (
        mock.patch("engram_store_client.remote.session.open_channel", open_channel),
        mock.patch("engram_store_client.remote.connection.delays", _delays),
    ):
        yield RemoteOptions(
            deadline_seconds=seconds,
            work_seconds=seconds,
            reconnect_seconds=seconds,
            connect_seconds=0.0,
            shared_memory=False,
        )


def _check_answers(data: bytes) -> None:
    lost: list[str] = []
    said = trouble().said
    said.clear()
    with (
        answering(decode_frames(data), _SECONDS) as options,
        mock.patch("threading.excepthook", lambda args: lost.append(repr(args.exc_value))),
        contextlib.suppress(EngramStoreError),
    ):
        _train(options)
    for thread in threading.enumerate():
        if thread.name.startswith("engram"):
            thread.join(_END_SECONDS)
            assert not thread.is_alive(), f"{thread.name} did not end"
    assert not lost, lost[0]
    assert not said, said[0]


def _train(options: Any) -> None:
    """What a trainer does; every call may be refused, none may fail otherwise or lie.

    Raises: EngramStoreError: not welcome.
    """
    from engram_store_client.remote import RemoteSession

    with RemoteSession("fuzz:1", options=options) as session:
        # Another store than ours, with other tables, is as good: what is checked is its own.
        for work in (_step, _reading, _snapshots):
            with contextlib.suppress(EngramStoreError):
                work(session)
        assert 0 <= session.step < 2**64
        assert 0 <= session.durable_step < 2**64


def _step(session: Any) -> None:
    before = session.step
    window = session.announce(TOKENS, before)
    for layer, spec in session.tables.items():
        with contextlib.suppress(EngramStoreError):
            _check_rows(session, window, layer)
        with contextlib.suppress(EngramStoreError):
            # Hashed here, should the store not tell.
            ids = window.row_ids(layer)
            window.push(layer, np.ones((ids.size, spec.dim), np.float32))
    session.gradient_norm()
    applied = session.commit(before, 0.5)
    assert applied.step == before, "another step was applied"
    assert session.step == before + 1
    assert applied.rows.keys() == session.tables.keys(), "rows of other tables"


def _check_rows(session: Any, window: Any, layer: int) -> None:
    spec = session.tables[layer]
    rows, inverse = window.rows(layer)
    ids = window.row_ids(layer)
    assert ids.dtype == np.int32
    assert inverse.dtype == np.int32
    assert rows.dtype == spec.dtype.storage
    assert rows.shape == (ids.size, spec.dim)
    assert inverse.shape == (*TOKENS.shape, session.recipe.columns)
    # A trainer indexes with them, and a GPU does not check.
    assert inverse.min() >= 0, "a position before the first row"
    assert inverse.max() < ids.size, "a position behind the last row"
    assert 0 <= ids.min() <= ids.max() < spec.rows, "a row that the table does not have"


def _reading(session: Any) -> None:
    with session.announce(TOKENS) as window:
        for layer in session.tables:
            with contextlib.suppress(EngramStoreError):
                _check_rows(session, window, layer)


def _snapshots(session: Any) -> None:
    ref = session.snapshot()
    assert ref.store_id == session.store_id, "a snapshot of another store"
    session.restore(ref)
    assert session.step == ref.step, "at another step than the snapshot's"


# ------------------------------------------------------------------ good answers


class Answers:
    """Those to `_train`, in the order of its requests."""

    def __init__(self, *, in_chunks: bool = False) -> None:
        self._oracle = MemorySession(metadata().recipe, dict(metadata().tables), {})
        self._in_chunks = in_chunks
        self.frames: list[Frame] = []
        self._stream, self.number = 0, 0

    def give(self, **response: Any) -> None:
        """The answer to the next request."""
        self.number += 1
        self.answer(self.number, **response)

    def answer(self, number: int, **response: Any) -> None:
        """The answer to the request of a number."""
        self._add(pb.SessionResponse(id=number, **response))

    def again(self, number: int) -> None:
        """The same answer as before."""
        self.frames.append((self._stream, self.frames[number - 1][1]))

    def notice(self, step: int) -> None:
        self._add(pb.SessionResponse(durable=pb.Durable(step=step)))

    def break_off(self) -> None:
        """The rest comes on another stream."""
        self._stream += 1

    def _add(self, response: pb.SessionResponse) -> None:
        self.frames.append((self._stream, response.SerializeToString()))

    def welcome(self, step: int = 0) -> None:
        token_map = metadata().recipe.token_map
        assert token_map is not None
        self.give(
            welcome=pb.Welcome(
                protocol=wire.PROTOCOL,
                store_id=metadata().store_id,
                fingerprint=metadata().fingerprint,
                recipe_json=json.dumps(metadata().recipe.to_json()),
                tables_json=json.dumps([spec.to_json() for spec in metadata().tables.values()]),
                token_map=wire.encode_array(token_map),
                step=step,
                credits=pb.Credits(bytes=1 << 20, windows=4),
            )
        )

    def window(self) -> None:
        self.give(announced=pb.Announced())
        window = self._oracle.announce(TOKENS)
        for layer in metadata().tables:
            rows, inverse = window.rows(layer)
            self._rows(window.row_ids(layer), rows, inverse)

    def _rows(self, *arrays: Any) -> None:
        if not self._in_chunks:
            self.give(
                rows=pb.Rows(**dict(zip(_ARRAYS, map(wire.encode_array, arrays), strict=True)))
            )
            return
        announced = dict(zip(_ARRAYS, map(chunks.announce, arrays), strict=True))
        self.give(rows=pb.Rows(**announced))
        for field, array in enumerate(arrays, 1):
            content = chunks.bytes_of(np.ascontiguousarray(array))
            half = content.size // 2
            for offset, part in ((0, content[:half]), (half, content[half:])):
                chunk = pb.RowsChunk(array=field, offset=offset)
                raw = chunks.RESPONSES.encode(self.number, chunk, part)
                self.frames.append((self._stream, raw))

    def step(self) -> None:
        self.window()
        for _ in metadata().tables:
            self.give(pushed=pb.Pushed())
        self.give(norm=pb.Norm(value=1.5))
        self.commit()

    def commit(self, *, repeated: bool = False) -> None:
        rows = dict.fromkeys(metadata().tables, 0 if repeated else 11)
        self.give(applied=pb.Applied(step=0, rows=rows, skipped_rows=rows, repeated=repeated))
        self.notice(1)

    def rest(self) -> None:
        self.window()
        self.give(released=pb.Released())
        self.give(snapshot_taken=pb.SnapshotTaken(snapshot=wire.encode_ref(_REF)))
        self.give(restored=pb.Restored(step=1))
        self.give(farewell=pb.Farewell())


_ARRAYS = ("row_ids", "rows", "inverse")


def _conversations() -> Iterator[bytes]:
    for in_chunks in (False, True):
        answers = Answers(in_chunks=in_chunks)
        answers.welcome()
        answers.step()
        answers.rest()
        yield encode_frames(answers.frames)
    broken = Answers()
    broken.welcome()
    broken.window()
    for _ in metadata().tables:
        broken.give(pushed=pb.Pushed())
    broken.give(durable=pb.Durable())  # when the norm has been asked for
    broken.break_off()
    broken.welcome()
    # What lasts is asked for again with its old number; the newer hello has one in between.
    norm = broken.number - 1
    for number in (2, norm - 2, norm - 1):
        broken.again(number)
    broken.answer(norm, norm=pb.Norm(value=1.5))
    broken.commit()
    broken.rest()
    yield encode_frames(broken.frames)
    refused = Answers()
    refused.welcome()
    refused.give(failure=wire.encode_error(ShapeError("tokens", (2, 4), "[batch, time]")))
    yield encode_frames(refused.frames)
    alone = Answers()
    alone.give(farewell=pb.Farewell())
    yield encode_frames(alone.frames)


TARGETS = (
    Target(
        name="session-answers",
        check=_check_answers,
        seeds=_conversations,
        allowed=(),
        mutate=mutate_frames(pb.SessionResponse),
        memory_bytes=2048 * MEBIBYTE,
        needs=("grpc",),
    ),
)
