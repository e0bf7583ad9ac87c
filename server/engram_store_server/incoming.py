"""What a session receives: how much of it at once, and gradients that arrive in chunks."""

import asyncio
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from engram_store.chunks import Arriving, Chunk
from engram_store.errors import ProtocolError, ReadOnlyError
from engram_store.reuse import ReusedMemory
from engram_store.v1 import store_pb2 as pb
from engram_store.window import StoreWindow

_KEPT_BYTES = 256 << 20
"""Memory of applied gradients that a session keeps for the next ones."""
_QUEUED_REQUESTS = 64
"""Requests read ahead of the one that is being worked on."""
_QUEUED_BYTES = 32 << 20
"""Bytes of them, unless one alone has more."""
_Key = tuple[int, int]
"""Window and layer."""
Request = pb.SessionRequest | Chunk[pb.GradientChunk]
"""What a session receives."""


def size_of(request: Request) -> int:
    """Bytes of a request, about."""
    return len(request.data) if isinstance(request, Chunk) else request.ByteSize()


class RequestQueue:
    """Counts requests that were read and not worked on yet; belongs to the event loop."""

    def __init__(self) -> None:
        self._requests, self._bytes = 0, 0
        self._left = asyncio.Event()

    async def enter(self, size: int) -> None:
        """Wait until there is room for a request of so many bytes; one task at a time."""
        while self._requests >= _QUEUED_REQUESTS or (
            self._requests and self._bytes + size > _QUEUED_BYTES
        ):
            self._left.clear()
            await self._left.wait()
        self._requests += 1
        self._bytes += size

    def leave(self, size: int) -> None:
        """It was worked on."""
        self._requests -= 1
        self._bytes -= size
        self._left.set()


class GradientChunks:
    """Collects chunks; belongs to the session's thread.

    The memory is in the credit of the window, which counts an fp32 gradient. It belongs to
    whoever refers to it, so a gradient that is being applied outlives its window.
    """

    def __init__(self) -> None:
        self._memory = ReusedMemory(_KEPT_BYTES)
        self._arriving: dict[_Key, Arriving | Exception] = {}

    def take(self, chunk: Chunk[pb.GradientChunk], window: StoreWindow | None) -> None:
        """Keep a chunk, or the reason why not, until the push comes.

        Args:
            chunk: as received.
            window: the one that it names; None: it is not open. Then nothing is kept.
        """
        key = (chunk.header.window, chunk.header.layer)
        if window is None or window.closed or key[1] not in window.lookups:
            return
        try:
            arriving = self._arriving.get(key)
            if arriving is None:
                arriving = self._arriving[key] = self._prepare(window, key[1])
            if isinstance(arriving, Arriving):
                arriving.add(chunk.header.offset, chunk.data)
        except Exception as error:
            self._arriving[key] = error

    def _prepare(self, window: StoreWindow, layer: int) -> Arriving:
        """Room for the largest gradient. Raises: why the window takes none."""
        if window.step is None:
            raise ReadOnlyError("the window was announced without a step; it takes no gradients")
        if window.lookups[layer].gradient is not None:
            raise ProtocolError(f"layer {layer} of this window was pushed before")
        ids, _ = window.index(layer)
        size = 4 * ids.size * window.store.tables[layer].dim
        what = f"the gradient of layer {layer} of a window with {ids.size:,} rows"
        return Arriving(self._memory.take(size), what)

    def hand_over(self, window: int, layer: int) -> NDArray[np.uint8] | None:
        """What came for a push: uint8 [bytes]; None: nothing did. It is forgotten here.

        Raises:
            Why it was not kept.
        """
        arriving = self._arriving.pop((window, layer), None)
        if isinstance(arriving, Exception):
            raise arriving
        return None if arriving is None else arriving.received()

    def keep_only(self, windows: Collection[int]) -> None:
        """Forget what came for windows that are not open any more."""
        for key in [key for key in self._arriving if key[0] not in windows]:
            del self._arriving[key]
