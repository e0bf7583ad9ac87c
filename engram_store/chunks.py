"""Large arrays between processes: in messages of their own, 1 MiB each, copied as rarely as can be.

A chunk is an ordinary protobuf message whose last field is bytes of an array. Written here, it is
a short prefix and the array's own memory; read here, its data stays where the message is. Whoever
uses the generated classes instead reads and writes the same bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from engram_store.errors import ProtocolError
from engram_store.v1 import store_pb2 as pb

CHUNK_BYTES = 1 << 20
"""Bytes of an array in one message: less was slower, more no faster, and small answers wait for
one chunk."""
INLINE_BYTES = 64 << 10
"""Arrays smaller than this stay in the message that they belong to."""
CHANNEL_OPTIONS = [
    # A chunk in one HTTP/2 frame instead of 64.
    ("grpc.http2.max_frame_size", 4 << 20),
]
"""Of both ends of a connection."""
_ID_TAG = 0x08
_VARINT, _LENGTH = 0, 2
"""Wire types of protobuf."""
_M = TypeVar("_M", bound=Message)
_H = TypeVar("_H", bound=Message)


@dataclass(frozen=True, slots=True)
class Chunk(Generic[_H]):
    """A chunk that was received."""

    id: int
    """Of the request that it belongs to."""
    header: _H
    """The chunk's message, without data."""
    data: memoryview
    """Bytes of the array, in the memory of the message."""


class ChunkCodec(Generic[_M, _H]):
    """Messages of one direction to bytes and back, for gRPC.

    Args:
        message: of the direction.
        field: its chunk, whose data field is its last; both have numbers below 16.
        header: the chunk's class.
    """

    def __init__(self, message: type[_M], field: str, header: type[_H]) -> None:
        self._message: Any = message
        self._header: Any = header
        self._field = field
        number = message.DESCRIPTOR.fields_by_name[field].number
        data = header.DESCRIPTOR.fields_by_name["data"].number
        assert number < 16
        assert data == max(header.DESCRIPTOR.fields_by_number) < 16
        self._tag, self._data_tag = number << 3 | _LENGTH, data << 3 | _LENGTH

    def encode(self, number: int, header: _H, data: NDArray[np.uint8]) -> bytes:
        """A chunk as the bytes of a message.

        Args:
            number: id of the request that it belongs to.
            header: the chunk without data.
            data: uint8 [n], C-contiguous, n >= 1; copied once.
        """
        inner = header.SerializeToString() + bytes((self._data_tag,)) + _varint(data.size)
        outer = self._message(id=number).SerializeToString() + bytes((self._tag,))
        return b"".join((outer, _varint(len(inner) + data.size), inner, data.data))

    def serialize(self, message: _M | bytes) -> bytes:
        """A message as bytes; what `encode` made stays as it is."""
        return message if isinstance(message, bytes) else message.SerializeToString()

    def deserialize(self, raw: bytes) -> _M | Chunk[_H]:
        """Inverse of `serialize`. Chunks keep `raw` alive.

        Raises:
            google.protobuf.message.DecodeError: it is no message.
        """
        found = self._split(raw)
        if found is not None:
            number, start, end, data = found
            return Chunk(number, self._header.FromString(raw[start:end]), memoryview(raw)[data:])
        message = self._message.FromString(raw)
        if not message.HasField(self._field):
            return cast("_M", message)
        header = getattr(message, self._field)
        content = memoryview(header.data)
        header.ClearField("data")
        return Chunk(message.id, header, content)

    def _split(self, raw: bytes) -> tuple[int, int, int, int] | None:
        """Id, start and end of the header, and start of the data, which goes to the end.

        None: it is something else, or is written in another way than here. Then the generated
        class reads it, so that nothing depends on what is recognised.
        """
        try:
            number, at = 0, 0
            if raw[0] == _ID_TAG:
                number, at = _read_varint(raw, 1)
            if raw[at] != self._tag:
                return None
            length, at = _read_varint(raw, at + 1)
            if at + length != len(raw):
                return None
            start = at
            while raw[at] != self._data_tag:
                if raw[at] & 0x87 != _VARINT:
                    return None
                _, at = _read_varint(raw, at + 1)
            length, data = _read_varint(raw, at + 1)
        except IndexError:
            return None
        return (number, start, at, data) if data + length == len(raw) else None


REQUESTS = ChunkCodec(pb.SessionRequest, "gradient_chunk", pb.GradientChunk)
RESPONSES = ChunkCodec(pb.SessionResponse, "rows_chunk", pb.RowsChunk)


class Arriving:
    """Memory that is filled chunk by chunk.

    Args:
        memory: uint8 [n]: room for all of it.
        what: it is, for people.
    """

    def __init__(self, memory: NDArray[np.uint8], what: str) -> None:
        self._memory, self._what = memory, what
        self._filled = 0

    @property
    def complete(self) -> bool:
        """Whether the memory is full."""
        return self._filled == self._memory.size

    def received(self) -> NDArray[np.uint8]:
        """What came so far: uint8 [bytes]."""
        return self._memory[: self._filled]

    def add(self, offset: int, data: memoryview) -> None:
        """Put a chunk where it belongs.

        Raises:
            ProtocolError: it is not the next one, or too long. The memory is as it was.
        """
        if offset != self._filled or not data:
            raise ProtocolError(
                f"a chunk of {len(data):,} bytes at byte {offset:,} of {self._what}; byte "
                f"{self._filled:,} is next. Chunks come in order, none twice and none empty"
            )
        if offset + len(data) > self._memory.size:
            raise ProtocolError(
                f"a chunk up to byte {offset + len(data):,} of {self._what}, which has at most "
                f"{self._memory.size:,}"
            )
        self._memory[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        self._filled += len(data)


def cut(length: int) -> Iterator[tuple[int, int]]:
    """Start and end of every chunk of so many bytes."""
    for start in range(0, length, CHUNK_BYTES):
        yield start, min(start + CHUNK_BYTES, length)


def announce(array: NDArray[np.generic]) -> pb.Array:
    """What is said about an array whose bytes travel in chunks."""
    return pb.Array(dtype=array.dtype.str, shape=array.shape, in_chunks=True)


def bytes_of(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    """A C-contiguous array's own memory: uint8 [bytes]."""
    return array.reshape(-1).view(np.uint8)


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number and where it ends. Raises: IndexError: it ends too late, or has over 63 bits."""
    value = 0
    for shift in range(0, 63, 7):
        digit = raw[at]
        at += 1
        value |= (digit & 0x7F) << shift
        if digit < 0x80:
            return value, at
    raise IndexError
