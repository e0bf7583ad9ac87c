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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store import slots
from engram_store.engine.lookup import SlotPool
from engram_store.errors import ProtocolError, SharedMemoryFullError
from engram_store.v1 import store_pb2 as pb

MAX_SLOT_BYTES = 4 << 30
"""Shared memory of one session, so that a greedy one cannot starve the others."""
_ATTACH_SECONDS = 10.0
_ARRIVAL_SECONDS = 2.0
_logger = logging.getLogger(__name__)


class SessionSlots:
    """Shared memory of one session; used by streams, readers and the door's thread."""

    def __init__(self) -> None:
        self.token = os.urandom(slots.TOKEN_BYTES)
        self.pool = SlotPool(self._allocate)
        self._attached = threading.Event()
        self._channel: socket.socket | None = None
        self._lock = threading.Lock()
        self._ours: dict[int, slots.Slot] = {}
        """By address of their first byte."""
        self._theirs: dict[int, slots.Slot] = {}
        self._arrived = threading.Condition()
        self._used_bytes = 0

    def wait_until_fetched(self) -> None:
        """Wait, on the session's own thread, until the trainer came to the door.

        Raises:
            ProtocolError: it did not. Nobody else has waited for it.
        """
        if not self._attached.wait(_ATTACH_SECONDS):
            raise ProtocolError("the trainer asked for shared memory and never fetched it")

    def _allocate(self, length: int) -> NDArray[np.uint8]:
        """A new slot's memory; the trainer has it before any message names it."""
        with self._lock:
            if self._used_bytes + length > MAX_SLOT_BYTES:
                left = MAX_SLOT_BYTES - self._used_bytes
                raise SharedMemoryFullError(length, left, "the session's limit")
            slot, fd = _make(len(self._ours) + 1, length)
            try:
                assert self._channel is not None
                slots.send_slot(self._channel, slot.number, length, fd)
            except OSError as error:
                raise ProtocolError("the trainer let go of its shared memory") from error
            finally:
                os.close(fd)
            self._used_bytes += length
            self._ours[slot.bytes.ctypes.data] = slot
            return slot.bytes

    def range_of(self, array: NDArray[Any]) -> pb.SlotRange:
        """Where an array that lies at the start of a slot is."""
        slot = self._ours[array.ctypes.data]
        return pb.SlotRange(slot=slot.number, length=array.nbytes)

    def copy_of(self, wanted: pb.SlotRange) -> NDArray[np.uint8]:
        """The bytes of a range of the trainer's memory, copied before anybody looks at them.

        Raises:
            ProtocolError: the slot was never sent, or is shorter.
        """
        # A message may be faster than the slot it speaks of, which was sent before it.
        with self._arrived:
            self._arrived.wait_for(lambda: wanted.slot in self._theirs, _ARRIVAL_SECONDS)
            slot = self._theirs.get(wanted.slot)
        if slot is None or wanted.offset + wanted.length > slot.bytes.size:
            size = "which was never sent" if slot is None else f"of {slot.bytes.size} bytes"
            raise ProtocolError(
                f"{wanted.length} bytes at {wanted.offset} of slot {wanted.slot}, {size}"
            )
        return slot.bytes[wanted.offset : wanted.offset + wanted.length].copy()

    def serve(self, channel: socket.socket) -> None:
        """Send and receive slots until the trainer hangs up. Runs on the door's thread."""
        self._channel = channel
        self._attached.set()
        received = 0
        while (slot := slots.receive_slot(channel)) is not None:
            received += slot.bytes.size
            if received > MAX_SLOT_BYTES:
                raise ProtocolError(f"more than {MAX_SLOT_BYTES} bytes of slots from one session")
            with self._arrived:
                self._theirs[slot.number] = slot
                self._arrived.notify_all()

    def close(self) -> None:
        """Hang up and forget everything."""
        self._attached.set()
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_RDWR)
        self._ours.clear()
        self._theirs.clear()


def _make(number: int, length: int) -> tuple[slots.Slot, int]:
    try:
        return slots.make_slot(number, length)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            raise SharedMemoryFullError(length, 0, "shared memory") from error
        raise


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
