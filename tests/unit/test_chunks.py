"""Chunks: the same bytes as protobuf's own classes, in order, and in memory that comes back."""

from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from engram_store import chunks
from engram_store.chunks import REQUESTS, RESPONSES, Arriving, Chunk
from engram_store.errors import ProtocolError
from engram_store.reuse import ReusedMemory
from engram_store.types import TableSpec
from engram_store.v1 import store_pb2 as pb
from engram_store_client.remote.incoming import ROWS, IncomingAnswers, WantedRows
from tests.pairs import specs_of

DATA = np.arange(1, 1 + 300, dtype=np.uint16).view(np.uint8)
_NUMBERS = st.integers(0, 2**64 - 1)


def gradient_message(number: int, window: int, layer: int, offset: int, data: bytes) -> bytes:
    """As a client writes it that has the generated classes only."""
    chunk = pb.GradientChunk(window=window, layer=layer, offset=offset, data=data)
    return pb.SessionRequest(id=number, gradient_chunk=chunk).SerializeToString()


# ---------------------------------------------------------------------- the codec


@given(number=_NUMBERS, window=_NUMBERS, layer=st.integers(-5, 300), offset=_NUMBERS)
def test_a_gradient_chunk_is_the_message_that_protobuf_writes(
    number: int, window: int, layer: int, offset: int
) -> None:
    """Byte for byte, whatever its numbers."""
    header = pb.GradientChunk(window=window, layer=layer, offset=offset)

    written = REQUESTS.encode(number, header, DATA)

    assert written == gradient_message(number, window, layer, offset, DATA.tobytes())


@given(number=_NUMBERS, array=st.integers(0, 3), offset=_NUMBERS, size=st.integers(0, 300))
def test_a_rows_chunk_that_protobuf_wrote_is_read(
    number: int, array: int, offset: int, size: int
) -> None:
    """Also an empty one, whose data field is not written at all."""
    data = DATA[:size].tobytes()
    message = pb.RowsChunk(array=array, offset=offset, data=data)

    chunk = RESPONSES.deserialize(
        pb.SessionResponse(id=number, rows_chunk=message).SerializeToString()
    )

    assert isinstance(chunk, Chunk)
    assert (chunk.id, chunk.header.array, chunk.header.offset) == (number, array, offset)
    assert bytes(chunk.data) == data
    assert not chunk.header.data


def test_other_messages_pass_as_they_are() -> None:
    """In both directions; what is encoded already is not encoded again."""
    request = pb.SessionRequest(id=3, release=pb.Release(window=7))
    raw = request.SerializeToString()

    assert REQUESTS.serialize(request) == raw
    assert REQUESTS.serialize(raw) is raw
    assert REQUESTS.deserialize(raw) == request


def outcome(read: Any, raw: bytes) -> Any:
    """What a parser makes of bytes, comparable between parsers; None: it refuses them."""
    try:
        message = read(raw)
    except DecodeError:
        return None
    if isinstance(message, Chunk):
        return message.id, message.header.SerializeToString(), bytes(message.data)
    if isinstance(message, pb.SessionRequest) and message.HasField("gradient_chunk"):
        header = pb.GradientChunk()
        header.CopyFrom(message.gradient_chunk)
        header.ClearField("data")
        return message.id, header.SerializeToString(), message.gradient_chunk.data
    return message.SerializeToString(deterministic=True)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.binary(max_size=3)), max_size=3),
    st.integers(0, 60),
)
def test_damaged_chunks_are_read_as_protobuf_reads_them(
    edits: list[tuple[int, bytes]], end: int
) -> None:
    """Or refused as it refuses them: what is recognised here decides nothing."""
    raw = gradient_message(300, 5, 2, 1 << 20, bytes(range(40)))
    for at, replacement in edits:
        raw = raw[:at] + replacement + raw[at + 1 :]
    for damaged in (raw, raw[:end]):
        expected = outcome(pb.SessionRequest.FromString, damaged)
        assert outcome(REQUESTS.deserialize, damaged) == expected


def test_fields_in_another_order_or_twice_are_read_as_protobuf_reads_them() -> None:
    """A writer may choose; the last one counts."""
    first = gradient_message(1, 5, 2, 0, b"abc")
    second = gradient_message(2, 6, 3, 4, b"defg")
    identity, chunk = first[:2], first[2:]

    for raw in (chunk + identity, first + second, identity + first, second + chunk):
        expected = outcome(pb.SessionRequest.FromString, raw)
        assert outcome(REQUESTS.deserialize, raw) == expected


# ---------------------------------------------------------------------- arriving


def test_chunks_fill_memory_in_order() -> None:
    """And it is complete with the last byte."""
    memory = np.zeros(DATA.size, np.uint8)
    arriving = Arriving(memory, "a test")
    for start in range(0, DATA.size, 256):
        assert not arriving.complete
        arriving.add(start, DATA[start : start + 256].data)

    assert arriving.complete
    np.testing.assert_array_equal(memory, DATA)


@pytest.mark.parametrize(
    ("offset", "size", "message"),
    [
        (0, 8, "byte 8 is next"),
        (16, 8, "byte 8 is next"),
        (4, 8, "byte 8 is next"),
        (8, 0, "none empty"),
        (8, 25, "at most 32"),
        (2**64 - 1, 8, "byte 8 is next"),
    ],
    ids=["twice", "a gap", "overlapping", "empty", "too long", "far away"],
)
def test_a_chunk_that_does_not_fit_changes_nothing(offset: int, size: int, message: str) -> None:
    """The one that does fit may still come."""
    memory = np.zeros(32, np.uint8)
    arriving = Arriving(memory, "a test")
    arriving.add(0, DATA[:8].data)
    before = memory.copy()

    with pytest.raises(ProtocolError, match=message):
        arriving.add(offset, np.full(size, 9, np.uint8).data)

    np.testing.assert_array_equal(memory, before)
    assert arriving.received().size == 8
    arriving.add(8, DATA[8:32].data)
    assert arriving.complete


# ---------------------------------------------------------------------- memory


def test_memory_is_lent_again_when_the_last_view_is_gone() -> None:
    """A view of a view, of another dtype, keeps it as well."""
    memory = ReusedMemory(1 << 20)
    lent = memory.take(10_000)
    address = lent.ctypes.data
    view = np.frombuffer(lent, np.float32)[10:].reshape(2, -1)
    del lent

    assert memory.take(10_000).ctypes.data != address
    del view
    again = [memory.take(10_000), memory.take(10_000)]
    assert address in [array.ctypes.data for array in again]


def test_no_more_memory_is_kept_than_was_agreed() -> None:
    """What is beyond goes back to the system."""
    memory = ReusedMemory(3 * 4096)
    lent = [memory.take(4096) for _ in range(8)]
    del lent
    memory.take(1 << 20)

    assert sum(kept.size for kept in memory._returned if kept.size == 4096) <= 3 * 4096


# ---------------------------------------------------------------------- a store that lies


class Forbidden(ReusedMemory):
    """Memory that nobody may take."""

    def take(self, size: int) -> Any:
        raise AssertionError(f"{size} bytes were taken")


@pytest.fixture
def spec(recipe: Any) -> TableSpec:
    return specs_of(recipe)[1]


def announcement(spec: TableSpec, n: int, tokens: int, **changes: Any) -> pb.SessionResponse:
    """Rows in chunks."""
    dtype = spec.dtype.storage.str
    arrays = {
        "row_ids": pb.Array(dtype="<i4", shape=[n], in_chunks=True),
        "rows": pb.Array(dtype=dtype, shape=[n, spec.dim], in_chunks=True),
        "inverse": pb.Array(dtype="<i4", shape=[1, tokens, 8], in_chunks=True),
    }
    return pb.SessionResponse(id=4, rows=pb.Rows(**(arrays | changes)))


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (1 << 40, {}),
        (41, {}),
        (40, {"rows": pb.Array(dtype="<u2", shape=[40, 1 << 40], in_chunks=True)}),
        (40, {"rows": pb.Array(dtype="<i8", shape=[40, 16], in_chunks=True)}),
        (40, {"row_ids": pb.Array(dtype="<i4", shape=[40, 40], in_chunks=True)}),
        (40, {"inverse": pb.Array(dtype="<i4", shape=[1 << 30, 5, 8], in_chunks=True)}),
        (40, {"inverse": pb.Array(dtype="object", shape=[1, 5, 8], in_chunks=True)}),
    ],
)
def test_a_store_that_announces_more_than_was_asked_gets_no_memory(
    spec: TableSpec, rows: int, changes: dict[str, pb.Array]
) -> None:
    """Five tokens with eight look-ups each have 40 rows at most."""
    wanted = WantedRows(spec, (1, 5, 8))

    with pytest.raises(ProtocolError, match="announced"):
        IncomingAnswers().take(announcement(spec, rows, 5, **changes), wanted, Forbidden(0))


def test_chunks_of_rows_that_were_not_announced_are_refused(spec: TableSpec) -> None:
    """Neither before the announcement, nor of an array that is not in chunks."""
    answers, memory = IncomingAnswers(), ReusedMemory(0)
    stray = Chunk(4, pb.RowsChunk(array=ROWS), DATA.data)
    with pytest.raises(ProtocolError, match="not announced"):
        answers.take(stray, WantedRows(spec, (1, 5, 8)), memory)

    inline = pb.Array(dtype="<i4", shape=[40], data=bytes(160))
    response = announcement(spec, 40, 5, row_ids=inline)
    assert answers.take(response, WantedRows(spec, (1, 5, 8)), memory) is None
    with pytest.raises(ProtocolError, match="array 1 of rows"):
        answers.take(Chunk(4, pb.RowsChunk(array=1), DATA.data), None, memory)


def test_rows_that_fail_half_way_are_dropped(spec: TableSpec) -> None:
    """The failure is the answer, and chunks after it belong to nothing."""
    answers, memory = IncomingAnswers(), ReusedMemory(0)
    assert answers.take(announcement(spec, 40, 5), WantedRows(spec, (1, 5, 8)), memory) is None
    failure = pb.SessionResponse(id=4, failure=pb.Failure(error="WindowClosedError"))

    assert answers.take(failure, WantedRows(spec, (1, 5, 8)), memory) == (failure, {})
    with pytest.raises(ProtocolError, match="not announced"):
        answers.take(Chunk(4, pb.RowsChunk(array=ROWS), DATA.data), None, memory)


def test_an_array_is_cut_without_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte once, the last chunk as long as is left."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 100)

    assert list(chunks.cut(250)) == [(0, 100), (100, 200), (200, 250)]
    assert list(chunks.cut(200)) == [(0, 100), (100, 200)]
