"""The store's side of shared memory: slots of one session, and the door they leave through.

The door is a Unix socket beside the gRPC one. A trainer shows the token of its session there; the
kernel vouches for its user. Slots of the store go out through it, slots of the trainer come in.
"""

import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_store import slots
from engram_store.engine.lookup import SlotPool
from engram_store.errors import CapacityError, ProtocolError

_ATTACH_SECONDS = 10.0
_logger = logging.getLogger(__name__)


class SessionSlots:
    """Shared memory of one session; used by streams, readers and the door's thread.

    Args:
        limit_bytes: of each direction.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.token = os.urandom(slots.TOKEN_BYTES)
        self.exchange = slots.SlotExchange(limit_bytes)
        self.on_end: Callable[[], None] = lambda: None
        """Called when the trainer has hung up."""
        self.pool = SlotPool(self._allocate, self.exchange.fill)
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._used_bytes = 0

    def wait_until_fetched(self) -> None:
        """Wait, on the session's own thread, until the trainer came to the door.

        Raises:
            ProtocolError: it did not. Nobody else has waited for it.
        """
        if not self.exchange.wait_attached(_ATTACH_SECONDS):
            raise ProtocolError("the trainer asked for shared memory and never fetched it")

    def _allocate(self, length: int) -> NDArray[np.uint8]:
        """Raises: SharedMemoryFullError, ProtocolError."""
        with self._lock:
            if self._used_bytes + length > self._limit_bytes:
                raise CapacityError(
                    errno.ENOSPC,
                    f"the session's slots hold {self._used_bytes:,} of {self._limit_bytes:,} "
                    f"bytes, {length:,} more are needed; close windows, or raise session_bytes",
                )
            try:
                memory = self.exchange.allocate(length)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.ENOMEM):
                    raise CapacityError(
                        errno.ENOSPC,
                        f"there is no memory for a slot of {length:,} bytes; raise the memory "
                        "limit, or announce windows of fewer tokens",
                    ) from error
                raise ProtocolError("the trainer let go of its shared memory") from error
            self._used_bytes += length
            return memory

    def serve(self, channel: socket.socket) -> None:
        """Take slots and messages until the trainer hangs up. On a thread of the door.

        Raises:
            ProtocolError, OSError: it sends something else.
        """
        try:
            self.exchange.attach(channel)
            self.exchange.receive()
        finally:
            self.on_end()

    def close(self) -> None:
        """Hang up."""
        self.exchange.close()


class SlotDoor:
    """Listens for trainers that fetch the shared memory of their session."""

    def __init__(self, path: Path, find: Callable[[bytes], SessionSlots | None]) -> None:
        """`find` gives the session's slots for a token."""
        self.path, self._find = path, find
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(16)
        threading.Thread(target=self._accept, name="engram-door", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                channel, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._admit, args=(channel,), daemon=True).start()

    def _admit(self, channel: socket.socket) -> None:
        """One trainer, from its token until it hangs up."""
        with channel:
            try:
                session = self._identify(channel)
                if session is not None:
                    session.serve(channel)
            except (OSError, ProtocolError) as error:
                _logger.warning("the slot socket refused a client: %s", error)

    def _identify(self, channel: socket.socket) -> SessionSlots | None:
        uid = slots.peer_uid(channel)
        if uid not in (os.getuid(), 0):
            raise ProtocolError(f"user {uid} is not the store's user {os.getuid()}")
        channel.settimeout(_ATTACH_SECONDS)
        token = channel.recv(slots.TOKEN_BYTES + 1)
        channel.settimeout(None)
        session = self._find(token) if len(token) == slots.TOKEN_BYTES else None
        if session is None and token:
            raise ProtocolError("unknown session token")
        return session

    def close(self) -> None:
        """Stop listening."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.path.unlink(missing_ok=True)
