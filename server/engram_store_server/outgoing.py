"""What a session sends: small answers as they come, rows in chunks when the stream takes them."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator

from engram_store import chunks, wire
from engram_store.errors import WindowClosedError
from engram_store.types import Inverse, RowBlock, RowIds
from engram_store.v1 import store_pb2 as pb
from engram_store.window import StoreWindow

TURN_BYTES = 8 << 20
"""Chunks of one answer that go out before the next answer's: windows up to this size are complete
one after the other, larger ones hold nobody up for longer."""
_UNSENT_ANSWERS = 1024
"""A client that lets so many lie is not listened to until it reads."""
_ARRAYS = ("row_ids", "rows", "inverse")


class RowsAnswer:
    """Rows of one layer, which stay where the window has them until they are sent.

    Args:
        number: id of the request.
        window: they belong to it. Once it is closed the rest is not sent.
        ids, rows, inverse: as `session.Window` describes them, C-contiguous.
    """

    def __init__(
        self, number: int, window: StoreWindow, ids: RowIds, rows: RowBlock, inverse: Inverse
    ) -> None:
        self._number, self._window = number, window
        self._arrays = dict(zip(_ARRAYS, (ids, rows, inverse), strict=True))
        self._messages = self._cut()

    def next(self) -> pb.SessionResponse | bytes | None:
        """The next message; None: there are no more."""
        message = next(self._messages, None)
        # Asked after the copy was made: the memory of a closed window is used again.
        if message is not None and self._window.closed:
            self._messages = iter(())
            closed = WindowClosedError("the window was closed before all its rows were sent")
            return pb.SessionResponse(id=self._number, failure=wire.encode_error(closed))
        return message

    def _cut(self) -> Iterator[pb.SessionResponse | bytes]:
        large = {n: a for n, a in self._arrays.items() if a.nbytes >= chunks.INLINE_BYTES}
        header = {
            name: chunks.announce(array) if name in large else wire.encode_array(array)
            for name, array in self._arrays.items()
        }
        yield pb.SessionResponse(id=self._number, rows=pb.Rows(**header))
        for name, array in large.items():
            content = chunks.bytes_of(array)
            field = pb.Rows.DESCRIPTOR.fields_by_name[name].number
            for start, end in chunks.cut(content.size):
                chunk = pb.RowsChunk(array=field, offset=start)
                yield chunks.RESPONSES.encode(self._number, chunk, content[start:end])


class Outgoing:
    """Answers that wait for the stream; belongs to the event loop."""

    def __init__(self) -> None:
        self._small: deque[pb.SessionResponse] = deque()
        self._large: deque[RowsAnswer] = deque()
        self._turn_bytes = 0
        """Sent of the first large answer since its turn began."""
        self._ending = False
        self._more, self._fewer = asyncio.Event(), asyncio.Event()

    def put(self, answer: pb.SessionResponse | RowsAnswer) -> None:
        """Send it when its turn comes; dropped after `end`."""
        if self._ending:
            return
        if isinstance(answer, RowsAnswer):
            self._large.append(answer)
        else:
            self._small.append(answer)
        self._more.set()

    def end(self) -> None:
        """Nothing more comes; what is there is sent."""
        self._ending = True
        self._more.set()

    def drop_rows(self) -> None:
        """Nobody waits for rows any more."""
        self._large.clear()

    async def wait_for_room(self) -> None:
        """Until fewer answers wait than are allowed."""
        while len(self._small) + len(self._large) >= _UNSENT_ANSWERS:
            self._fewer.clear()
            await self._fewer.wait()

    async def messages(self) -> AsyncIterator[pb.SessionResponse | bytes]:
        """Everything that was put, until the end."""
        while True:
            message = self._next()
            if message is not None:
                yield message
            elif self._ending:
                return
            else:
                self._more.clear()
                await self._more.wait()

    def _next(self) -> pb.SessionResponse | bytes | None:
        """Made now, so that no more than one message of rows is held as a copy."""
        self._fewer.set()
        if self._small:
            return self._small.popleft()
        while self._large:
            message = self._large[0].next()
            if message is None:
                self._large.popleft()
                self._turn_bytes = 0
                continue
            self._turn_bytes += len(message) if isinstance(message, bytes) else 0
            if self._turn_bytes >= TURN_BYTES:
                self._large.rotate(-1)
                self._turn_bytes = 0
            return message
        return None
