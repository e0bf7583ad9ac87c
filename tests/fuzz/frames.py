"""Inputs that are several messages, each on one of several connections."""

import random
from collections.abc import Callable, Iterable

from google.protobuf.message import DecodeError, Message

from tests.fuzz.mutators import mutate_bytes, mutate_message
from tests.fuzz.target import Mutator

Frame = tuple[int, bytes]
"""Number of the connection, and a message's bytes."""
_HEADER_BYTES = 3
_MAX_FRAMES = 64
_MAX_FRAME_BYTES = (1 << 16) - 1


def encode_frames(frames: Iterable[Frame]) -> bytes:
    """One byte for the connection, two for the length, the message."""
    return b"".join(
        bytes([connection]) + len(raw).to_bytes(2, "little") + raw for connection, raw in frames
    )


def decode_frames(data: bytes) -> list[Frame]:
    """Inverse of `encode_frames`, for any bytes; the last message may be cut off."""
    frames: list[Frame] = []
    at = 0
    while at + _HEADER_BYTES <= len(data) and len(frames) < _MAX_FRAMES:
        length = int.from_bytes(data[at + 1 : at + _HEADER_BYTES], "little")
        at += _HEADER_BYTES
        frames.append((data[at - _HEADER_BYTES], data[at : at + length]))
        at += length
    return frames


def mutate_frames(kind: Callable[[], Message], *, prefix: int = 0) -> Mutator:
    """Change, repeat, leave out, exchange or renumber messages, or put garbage among them.

    Args:
        kind: of the messages.
        prefix: bytes before the first message, which are changed too.
    """
    change = mutate_message(kind)

    def mutate(data: bytes, rng: random.Random) -> bytes:
        head, frames = data[:prefix], decode_frames(data[prefix:])
        if head and rng.randrange(8) == 0:
            head = bytes(rng.randrange(256) for _ in head)
        if not frames:
            return head + encode_frames([(0, rng.randbytes(8))])
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            _change_frames(frames, change, kind, rng)
        kept = [frame for frame in frames if len(frame[1]) <= _MAX_FRAME_BYTES][:_MAX_FRAMES]
        return head + encode_frames(kept)

    return mutate


def _change_frames(
    frames: list[Frame], change: Mutator, kind: Callable[[], Message], rng: random.Random
) -> None:
    at, other = rng.randrange(len(frames) + 1), rng.randrange(len(frames) + 1)
    if at == len(frames):
        frames.append((rng.randrange(2), mutate_bytes(b"", rng)))
        return
    connection, raw = frames[at]
    match rng.randrange(10):
        case 0:
            del frames[at]
            if not frames:
                frames.append((connection, raw))
        case 1:
            frames.insert(other, frames[at])
        case 2 if other < len(frames):
            frames[at], frames[other] = frames[other], frames[at]
        case 3:
            frames[at] = (rng.randrange(3), raw)
        case 4:
            frames[at] = (connection, mutate_bytes(raw, rng))
        case 5:
            frames[at] = (connection, _renumbered(raw, kind, rng))
        case _:
            frames[at] = (connection, change(raw, rng))


def _renumbered(raw: bytes, kind: Callable[[], Message], rng: random.Random) -> bytes:
    message = kind()
    try:
        message.ParseFromString(raw)
    except DecodeError:
        return raw
    message.id = rng.choice((0, 1, 2, 3, 5, 8, 2**64 - 1))  # type: ignore[attr-defined]
    return message.SerializeToString()
