"""The trainer's side of shared memory: rows that the store gathered, gradients on their way."""

import os
import socket
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store import slots
from engram_store.engine.lookup import SlotPool
from engram_store.errors import ProtocolError
from engram_store.v1 import store_pb2 as pb

_SLOT_SECONDS = 10.0


class TrainerSlots:
    """Slots of one connection: the store's, mapped here, and our own, mapped there."""

    def __init__(self, path: str, token: bytes) -> None:
        """Fetch the session's shared memory at the store's door.

        Args:
            path: of the slot socket.
            token: from Welcome.

        Raises:
            OSError: the door is closed; rows must travel in messages.
        """
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._channel.connect(path)
            self._channel.send(token)
        except OSError:
            self._channel.close()
            raise
        self._changed = threading.Condition()
        self._theirs: dict[int, slots.Slot] = {}
        self._ours: dict[int, slots.Slot] = {}
        """By address of their first byte."""
        self._pool = SlotPool(self._allocate)
        self._open = True
        threading.Thread(target=self._receive, name="engram-slots", daemon=True).start()

    def _receive(self) -> None:
        """Map what the store sends until it hangs up."""
        try:
            while (slot := slots.receive_slot(self._channel, private=True)) is not None:
                with self._changed:
                    self._theirs[slot.number] = slot
                    self._changed.notify_all()
        except (OSError, ProtocolError):
            pass  # the stream breaks too, and says why
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def view(self, wanted: pb.SlotRange) -> NDArray[np.uint8]:
        """The bytes of a range of the store's memory; no copy.

        Raises:
            ProtocolError: the slot did not come, or is shorter.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: wanted.slot in self._theirs or not self._open, _SLOT_SECONDS
            )
            slot = self._theirs.get(wanted.slot)
        if slot is None or wanted.offset + wanted.length > slot.bytes.size:
            raise ProtocolError(f"the store names slot {wanted.slot}, which it did not send")
        return slot.bytes[wanted.offset : wanted.offset + wanted.length]

    def _allocate(self, length: int) -> NDArray[np.uint8]:
        slot, fd = slots.make_slot(len(self._ours) + 1, length)
        try:
            slots.send_slot(self._channel, slot.number, length, fd)
        finally:
            os.close(fd)
        self._ours[slot.bytes.ctypes.data] = slot
        return slot.bytes

    def put(self, array: NDArray[Any]) -> tuple[pb.SlotRange, NDArray[np.uint8]]:
        """Copy an array to where the store can see it; give the buffer back when it was read."""
        buffer = self._pool.take(array.nbytes)
        target = buffer[: array.nbytes].view(array.dtype).reshape(array.shape)
        np.copyto(target, array)
        slot = self._ours[buffer.ctypes.data]
        return pb.SlotRange(slot=slot.number, length=array.nbytes), buffer

    def give_back(self, buffer: NDArray[np.uint8]) -> None:
        """The store has answered for what was in the buffer."""
        self._pool.give_back(buffer)

    def close(self) -> None:
        """Hang up. Views of rows stay readable while they are used."""
        self._open = False
        self._channel.close()
