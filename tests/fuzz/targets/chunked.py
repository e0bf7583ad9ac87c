"""Chunks of large arrays, read by hand: never otherwise than protobuf reads them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from engram_store.chunks import REQUESTS, RESPONSES, Arriving, Chunk
from engram_store.errors import ProtocolError
from engram_store.v1 import store_pb2 as pb
from tests.fuzz.frames import decode_frames, encode_frames, mutate_frames
from tests.fuzz.target import Target

_ROOM = 64
"""Bytes of the array that arrives."""
_CODECS: tuple[Any, Any] = (REQUESTS, RESPONSES)


def _check_chunks(data: bytes) -> None:
    """Messages of both directions, in an order in which nobody sends them."""
    arriving = Arriving(np.zeros(_ROOM, np.uint8), "an array")
    expected = b""
    for direction, raw in decode_frames(data):
        chunk = _read(_CODECS[direction % 2], raw)
        if chunk is None:
            continue
        content = bytes(chunk.data)
        try:
            arriving.add(chunk.header.offset, chunk.data)
        except ProtocolError:
            assert content == b"" or (
                chunk.header.offset != len(expected) or len(expected) + len(content) > _ROOM
            ), "the next chunk was refused"
        else:
            assert chunk.header.offset == len(expected)
            expected += content
        assert arriving.received().tobytes() == expected
        assert arriving.complete == (len(expected) == _ROOM)


def _read(codec: Any, raw: bytes) -> Chunk[Any] | None:
    """A chunk; None: something else, or nothing. The generated classes see the same."""
    try:
        by_class = codec._message.FromString(raw)
    except DecodeError:
        by_class = None
    try:
        found = codec.deserialize(raw)
    except DecodeError:
        found = None
    assert (found is None) == (by_class is None), "only one of the two can read it"
    if found is None or not isinstance(found, Chunk):
        assert found == by_class
        assert found is None or not found.HasField(codec._field)
        return None
    assert by_class.HasField(codec._field), "it is no chunk"
    header = getattr(by_class, codec._field)
    content = bytes(found.data)
    assert (found.id, content) == (by_class.id, header.data)
    header.ClearField("data")
    assert found.header == header
    if content:
        again = codec.deserialize(
            codec.encode(found.id, found.header, np.frombuffer(content, np.uint8))
        )
        assert (again.id, again.header, bytes(again.data)) == (found.id, found.header, content)
    return found


def _requests(*sizes: int) -> Iterator[tuple[int, bytes]]:
    offset = 0
    for number, size in enumerate(sizes, 1):
        header = pb.GradientChunk(window=3, layer=number, offset=offset)
        data = np.arange(1, size + 1, dtype=np.uint8)
        yield 0, REQUESTS.encode(number, header, data)
        offset += size


def _messages() -> Iterator[bytes]:
    yield encode_frames(_requests(20, 40, 4))
    rows = pb.RowsChunk(array=2, offset=0)
    answer = RESPONSES.encode(2**64 - 1, rows, np.ones(_ROOM, np.uint8))
    yield encode_frames([(1, answer), (1, answer[:-1]), (0, answer)])
    yield encode_frames(_requests(_ROOM + 1))
    # As the generated classes may write it: empty, beside other fields, twice, with unknown ones.
    empty = pb.SessionRequest(id=7, gradient_chunk=pb.GradientChunk(window=1, layer=-1))
    commit = pb.SessionRequest(id=7, commit=pb.Commit(step=1)).SerializeToString()
    chunk = next(_requests(9))[1]
    mixed = [commit + chunk, chunk + commit, chunk + chunk, b"", b"\x08"]
    yield encode_frames([(0, raw) for raw in (empty.SerializeToString(), *mixed)])
    # Numbers with more digits than they need, or than there are; lengths beyond the end.
    for digits in (b"\x81\x80\x00", b"\xff" * 9 + b"\x01", b"\x80" * 11 + b"\x00"):
        yield encode_frames([(0, b"\x08" + digits + chunk[2:]), (0, b"\x08" + digits)])
    at = chunk.index(bytes([REQUESTS._tag])) + 1
    for length in (0, 1, chunk[at] + 1, 0x7F):
        yield encode_frames([(0, chunk[:at] + bytes([length]) + chunk[at + 1 :])])


TARGETS = (
    Target(
        name="chunks",
        check=_check_chunks,
        seeds=_messages,
        allowed=(),
        mutate=mutate_frames(pb.SessionRequest),
    ),
)
