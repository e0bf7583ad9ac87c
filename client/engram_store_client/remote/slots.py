"""The trainer's side of shared memory: rows that the store gathered, gradients on their way."""

import contextlib
import socket
import threading
from collections.abc import Callable

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from engram_store import wire
from engram_store.engine.lookup import SlotPool
from engram_store.errors import ProtocolError
from engram_store.slots import SlotExchange
from engram_store.v1 import store_pb2 as pb
from engram_store_client.devices.host_memory import HostMemory

_INLINE_BYTES = 16 << 10
_LIMIT_BYTES = 1 << 40
"""The store decides how much memory it shares; this is against nonsense."""


class TrainerSlots:
    """Slots of one connection: the store's, mapped here, and our own, mapped there."""

    def __init__(
        self,
        path: str,
        token: bytes,
        on_response: Callable[[pb.SessionResponse], None],
        memory: HostMemory,
    ) -> None:
        """Fetch the session's shared memory at the store's door.

        Args:
            path: of the slot socket.
            token: from Welcome.
            on_response: gets what the store answers through this socket, on its thread.
            memory: told of every slot, so that a GPU can copy from there and to there.

        Raises:
            OSError: the door is closed; rows must travel in messages.
        """
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            channel.connect(path)
            channel.send(token)
        except OSError:
            channel.close()
            raise
        self._on_response = on_response
        self.exchange = SlotExchange(_LIMIT_BYTES, self._take, memory.add)
        self.exchange.attach(channel)
        self.view = self.exchange.view
        self._pool = SlotPool(self.exchange.allocate, self.exchange.fill)
        self._lent: dict[int, list[NDArray[np.uint8]]] = {}
        """Slots that hold gradients, by window."""
        self._lock = threading.Lock()
        threading.Thread(target=self._receive, name="engram-slots", daemon=True).start()

    def _receive(self) -> None:
        """Take what the store sends until it hangs up."""
        # If it breaks, so does the stream, and says why.
        with contextlib.suppress(OSError, ProtocolError, DecodeError):
            self.exchange.receive()

    def _take(self, message: bytes) -> None:
        """Raises: DecodeError."""
        self._on_response(pb.SessionResponse.FromString(message))

    def post(self, request: pb.SessionRequest) -> None:
        """Send a request; large arrays of an announcement go in a slot."""
        if request.HasField("announce") and request.ByteSize() > _INLINE_BYTES:
            request = self._with_slots(request)
        self.exchange.post(request.SerializeToString())

    def _with_slots(self, request: pb.SessionRequest) -> pb.SessionRequest:
        slim = pb.SessionRequest()
        slim.CopyFrom(request)
        announce = slim.announce
        for name in ("tokens", "context", "attention_mask"):
            if not announce.HasField(name):
                continue
            array = wire.decode_array(getattr(announce, name))
            buffer = self.lend(announce.window, array.nbytes)
            placed = buffer[: array.nbytes].view(array.dtype).reshape(array.shape)
            np.copyto(placed, array)
            where = self.exchange.range_of(placed)
            getattr(announce, name).CopyFrom(wire.encode_array(placed, where))
        return slim

    def lend(self, window: int, size: int) -> NDArray[np.uint8]:
        """At least so many bytes that the store can see, until `take_back`.

        Raises:
            OSError: shared memory is used up, or the store has hung up.
        """
        buffer = self._pool.take(size)
        with self._lock:
            self._lent.setdefault(window, []).append(buffer)
        return buffer

    def take_back(self, windows: set[int]) -> None:
        """The store needs what was lent for these windows no more."""
        with self._lock:
            buffers = [buffer for window in windows for buffer in self._lent.pop(window, [])]
        for buffer in buffers:
            self._pool.give_back(buffer)

    def close(self) -> None:
        """Hang up. Views of rows stay readable while they are used."""
        self.exchange.close()
