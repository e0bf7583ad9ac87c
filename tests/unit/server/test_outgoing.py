"""Answers on their way out: in turns, in chunks that are made when they are taken."""

import asyncio
from typing import Any

import numpy as np
import pytest

from engram_store import chunks, wire
from engram_store.chunks import Chunk
from engram_store.errors import WindowClosedError
from engram_store.v1 import store_pb2 as pb
from engram_store_server.outgoing import TURN_BYTES, Outgoing, RowsAnswer


class Window:
    """As much of a window as sending needs."""

    closed = False


def answer_of(number: int, size: int, window: Any = None) -> RowsAnswer:
    """Rows of so many bytes."""
    if window is None:
        window = Window()
    ids, inverse = np.zeros(3, np.int32), np.zeros((1, 1, 3), np.int32)
    return RowsAnswer(number, window, ids, np.zeros(size, np.uint8), inverse)


def decoded(message: Any) -> Any:
    if isinstance(message, bytes):
        return chunks.RESPONSES.deserialize(message)
    return message


def drain(out: Outgoing, most: int = 1000) -> list[Any]:
    """What would be sent until nothing is left, without waiting."""
    messages: list[Any] = []
    while len(messages) < most and (message := out._next()) is not None:
        messages.append(decoded(message))
    return messages


def test_a_small_answer_goes_between_chunks() -> None:
    """It waits for one chunk, not for the rows."""

    async def scenario() -> None:
        out = Outgoing()
        out.put(answer_of(1, 16 * chunks.CHUNK_BYTES))
        begun = drain(out, 3)
        out.put(pb.SessionResponse(id=2, applied=pb.Applied(step=5)))

        assert {message.id for message in begun} == {1}
        assert [message.id for message in drain(out, 2)] == [2, 1]
        assert len(drain(out)) == 16 - 2 - 1

    asyncio.run(scenario())


def test_large_answers_take_turns() -> None:
    """One does not wait for all of the other, however large that is."""

    async def scenario() -> None:
        out = Outgoing()
        for number in (1, 2):
            out.put(answer_of(number, 3 * TURN_BYTES))
        order = [message.id for message in drain(out) if isinstance(message, Chunk)]

        turn = TURN_BYTES // chunks.CHUNK_BYTES
        assert order == ([1] * turn + [2] * turn) * 3

    asyncio.run(scenario())


def test_chunks_are_made_when_they_are_taken() -> None:
    """What is not sent yet is the window's own memory, not a copy of it."""

    async def scenario() -> None:
        out, window = Outgoing(), Window()
        rows = np.zeros(4 * chunks.CHUNK_BYTES, np.uint8)
        index = np.zeros(1, np.int32)
        out.put(RowsAnswer(1, window, index, rows, index))  # type: ignore[arg-type]
        drain(out, 2)
        rows[:] = 7

        assert [set(bytes(message.data)) for message in drain(out)] == [{7}] * 3

    asyncio.run(scenario())


@pytest.mark.parametrize("sent", [0, 1, 3])
def test_rows_of_a_window_that_was_closed_are_not_sent(sent: int) -> None:
    """Their memory is somebody else's now: the request fails, others go on."""

    async def scenario() -> None:
        out, window = Outgoing(), Window()
        out.put(answer_of(1, 4 * chunks.CHUNK_BYTES, window))
        out.put(answer_of(2, chunks.CHUNK_BYTES))
        drain(out, sent)
        window.closed = True
        failed, *others = drain(out)

        assert isinstance(wire.decode_error(failed.failure), WindowClosedError)
        assert failed.id == 1
        assert [message.id for message in others] == [2, 2]

    asyncio.run(scenario())


def test_what_was_there_at_the_end_is_sent_and_nothing_more() -> None:
    """Unless nobody waits for rows any more."""

    async def scenario() -> list[int]:
        out = Outgoing()
        out.put(answer_of(1, chunks.CHUNK_BYTES))
        out.put(pb.SessionResponse(id=2))
        out.end()
        out.put(pb.SessionResponse(id=3))
        return [decoded(message).id async for message in out.messages()]

    assert asyncio.run(scenario()) == [2, 1, 1]


def test_a_client_that_does_not_read_is_not_listened_to() -> None:
    """Until fewer answers wait."""

    async def scenario() -> None:
        out = Outgoing()
        await out.wait_for_room()
        while len(out._small) < 1024:
            out.put(pb.SessionResponse(id=1))
        waiting = asyncio.create_task(out.wait_for_room())
        await asyncio.sleep(0)
        assert not waiting.done()
        drain(out, 1)
        await waiting

    asyncio.run(scenario())
