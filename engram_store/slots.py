"""Slots: pieces of memory that a store and a trainer of one host share.

Each is a memfd, made and written by one side, mapped read-only by the other. Its file descriptor
travels once over a Unix socket (SCM_RIGHTS); after that a message names it by number. Sealed
against shrinking and growing, so that nobody can take mapped pages away from the other side, and
against new writable mappings.

A slot counts how often it was filled, in a page of its own behind the content. A message carries
the count too: whoever reads a slot that was filled again meanwhile is told, instead of training
on somebody else's rows.
"""

import contextlib
import fcntl
import mmap
import os
import socket
import struct
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.errors import ProtocolError

TOKEN_BYTES = 16
"""Proof of a session, sent first on the slot socket."""
_F_SEAL_FUTURE_WRITE = 0x0010  # linux/fcntl.h; the fcntl module does not name it
_NEEDED_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
MAX_PACKET_BYTES = 64 << 10
"""Of a message beside the slots; a kernel's default socket buffer holds three of them."""
_HEADER = struct.Struct("<QQ")
_PEER = struct.Struct("3i")
_SEQUENCE_BYTES = mmap.PAGESIZE
_ARRIVAL_SECONDS = 10.0
_BUFFER_BYTES = 1 << 20
_MAX_BACKLOG = 4096
"""Messages that wait for the other side to read; one that lets more wait is given up."""
_MAX_SLOTS = 1 << 15
"""One side may send: half of the mappings that Linux allows a process."""


def slot_door(socket_path: Path) -> Path:
    """The socket through which slots go, beside the one for gRPC."""
    return socket_path.with_name(socket_path.name + ".slots")


@dataclass(frozen=True, slots=True)
class Slot:
    """One piece of shared memory, mapped in this process."""

    number: int
    bytes: NDArray[np.uint8]
    """Writable where it was made, read-only on the other side."""
    _sequence: NDArray[np.uint64]

    @property
    def sequence(self) -> int:
        """How often it was filled."""
        return int(self._sequence[0])

    def fill(self) -> int:
        """Count a new content, before it is written; its number."""
        self._sequence[0] += np.uint64(1)
        return self.sequence


@dataclass(frozen=True, slots=True)
class SlotRange:
    """Bytes in a slot, as a message names them."""

    slot: int
    offset: int
    length: int
    sequence: int


def _slot(number: int, memory: mmap.mmap, length: int) -> Slot:
    content = np.frombuffer(memory, np.uint8)
    return Slot(number, content[:length], content[length : length + 8].view(np.uint64))


def make_slot(number: int, length: int) -> tuple[Slot, int]:
    """A new slot, and the file descriptor to send; the caller closes it.

    Raises:
        OSError: shared memory is used up.
    """
    fd = os.memfd_create(f"engram-slot-{number}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    size = length + _SEQUENCE_BYTES
    try:
        # Reserved now: a page that is missing later would be SIGBUS.
        os.posix_fallocate(fd, 0, size)
        memory = mmap.mmap(fd, size, mmap.MAP_SHARED)
        seals = _NEEDED_SEALS | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return _slot(number, memory, length), fd


def map_slot(number: int, length: int, fd: int) -> Slot:
    """Map the other side's slot, read-only; trusts nothing it says about it.

    Args:
        number, length: as announced.
        fd: its file descriptor, which may be closed afterwards.

    Raises:
        ProtocolError: it could be truncated under us, is not as long as announced, or is larger
            than can be mapped.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ProtocolError(f"slot {number} is not sealed memory ({error.strerror})") from error
    if seals & _NEEDED_SEALS != _NEEDED_SEALS:
        raise ProtocolError(f"slot {number} is not sealed against shrinking and growing")
    size = os.fstat(fd).st_size
    if size != length + _SEQUENCE_BYTES or not length:
        raise ProtocolError(
            f"slot {number} has {size} bytes, {length} and a page for its sequence were announced"
        )
    try:
        memory = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
    except (OSError, OverflowError) as error:  # a file may claim more than memory has addresses
        raise ProtocolError(f"slot {number} of {size:,} bytes cannot be mapped: {error}") from error
    return _slot(number, memory, length)


def send_slot(channel: socket.socket, number: int, length: int, fd: int) -> None:
    """Hand a slot over on a SOCK_SEQPACKET socket."""
    socket.send_fds(channel, [_HEADER.pack(number, length)], [fd])


def receive_packet(channel: socket.socket, limit_bytes: int) -> Slot | bytes | None:
    """Wait for the next slot, which is mapped, or message; None when the other side has hung up.

    Args:
        channel: a SOCK_SEQPACKET socket.
        limit_bytes: of the slot's content; a larger one is not mapped.

    Raises:
        ProtocolError: a message that is too long, not what `send_slot` sends, a slot larger than
            the limit, or `map_slot` refuses it.
    """
    data, fds, flags, _address = socket.recv_fds(channel, MAX_PACKET_BYTES, 2)
    try:
        if flags & socket.MSG_TRUNC:
            raise ProtocolError(f"a message of more than {MAX_PACKET_BYTES:,} bytes")
        if not fds:
            return data or None
        if len(data) != _HEADER.size or len(fds) != 1:
            raise ProtocolError(f"{len(data)} bytes and {len(fds)} descriptors are not a slot")
        number, length = _HEADER.unpack(data)
        if length > limit_bytes:
            raise ProtocolError(
                f"slot {number} of {length:,} bytes; {limit_bytes:,} are left of what this "
                "connection's slots may hold"
            )
        return map_slot(number, length, fds[0])
    finally:
        for fd in fds:
            os.close(fd)


def peer_uid(channel: socket.socket) -> int:
    """User id of the process at the other end of a Unix socket."""
    data = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(data)[1])


class SlotExchange:
    """All slots of one connection, as one side sees them; for any thread.

    Messages travel beside them: in order with the slots that they name, and ten times faster than
    through gRPC.

    Args:
        limit_bytes: of the slots that the other side may send.
        on_message: gets what the other side posts, on the thread that calls `receive`.
        on_slot: gets the memory of each slot, ours and theirs, before anybody uses it.
    """

    def __init__(
        self,
        limit_bytes: int,
        on_message: Callable[[bytes], None] | None = None,
        on_slot: Callable[[NDArray[np.uint8]], None] | None = None,
    ) -> None:
        self.on_message, self._on_slot = on_message, on_slot
        self._posting = threading.Lock()
        self._backlog: deque[bytes] = deque()
        self._left_bytes, self._left_slots = limit_bytes, _MAX_SLOTS
        self._channel: socket.socket | None = None
        self._making = threading.Lock()
        self._ours: list[Slot] = []
        """By number, which starts at 1."""
        self._starts: list[int] = []
        """Addresses of our slots, ascending; their slots are in `_by_start`."""
        self._by_start: dict[int, Slot] = {}
        self._changed = threading.Condition()
        self._theirs: dict[int, Slot] = {}
        self._closed = False

    # ------------------------------------------------------------------ our slots

    def attach(self, channel: socket.socket) -> None:
        """Begin to use a connected SOCK_SEQPACKET socket."""
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            channel.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        self._channel = channel
        with self._changed:
            self._changed.notify_all()

    @property
    def attached(self) -> bool:
        """Whether there is a channel that is still used."""
        return self._channel is not None and not self._closed

    def wait_attached(self, seconds: float) -> bool:
        """Wait until there is a channel; whether there is one, and it is still used."""
        with self._changed:
            self._changed.wait_for(lambda: self._channel is not None or self._closed, seconds)
        return self.attached

    def allocate(self, length: int) -> NDArray[np.uint8]:
        """A new slot's memory; the other side has it before any message names it.

        Raises:
            OSError: shared memory is used up, or the other side has hung up.
        """
        assert self._channel is not None
        with self._making:
            slot, fd = make_slot(len(self._ours) + 1, length)
            try:
                send_slot(self._channel, slot.number, length, fd)
            finally:
                os.close(fd)
            self._ours.append(slot)
            start = slot.bytes.ctypes.data
            self._by_start[start] = slot
            self._starts = sorted(self._by_start)
        if self._on_slot is not None:
            self._on_slot(slot.bytes)
        return slot.bytes

    def holds(self, array: NDArray[Any]) -> bool:
        """Whether an array lies in one of our slots."""
        return self._slot_of(array) is not None

    def fill(self, buffer: NDArray[np.uint8]) -> None:
        """A slot is about to get another content; messages about the old one are void."""
        slot = self._slot_of(buffer)
        assert slot is not None
        slot.fill()

    def range_of(self, array: NDArray[Any]) -> SlotRange:
        """Where an array is that lies in one of our slots."""
        slot = self._slot_of(array)
        assert slot is not None
        offset = array.ctypes.data - slot.bytes.ctypes.data
        return SlotRange(slot.number, offset, array.nbytes, slot.sequence)

    def _slot_of(self, array: NDArray[Any]) -> Slot | None:
        address = array.ctypes.data
        before = bisect_right(self._starts, address)
        if not before:
            return None
        slot = self._by_start[self._starts[before - 1]]
        inside = address + array.nbytes <= slot.bytes.ctypes.data + slot.bytes.size
        return slot if inside else None

    # ------------------------------------------------------------------ messages

    def post(self, message: bytes) -> None:
        """Send a message after all before it, without waiting; lost if the other side is gone.

        One that does not read ends the connection when thousands wait for it.
        """
        assert self._channel is not None
        with self._posting:
            if not self._backlog:
                with contextlib.suppress(BlockingIOError):
                    self._send(message, socket.MSG_DONTWAIT)
                    return
            self._backlog.append(message)
            if len(self._backlog) == 1:
                threading.Thread(target=self._send_backlog, daemon=True).start()
            if len(self._backlog) > _MAX_BACKLOG:
                self.close()

    def _send(self, message: bytes, flags: int = 0) -> None:
        assert self._channel is not None
        try:
            self._channel.send(message, flags)
        except BlockingIOError:
            raise
        except OSError:
            self.close()

    def _send_backlog(self) -> None:
        while True:
            self._send(self._backlog[0])
            with self._posting:
                self._backlog.popleft()
                if not self._backlog:
                    return

    # ------------------------------------------------------------------ their slots

    def receive(self) -> None:
        """Take what the other side sends until it hangs up, or `close`; closes the socket.

        Raises:
            ProtocolError: it sends something else, or too much. OSError: the socket broke.
        """
        assert self._channel is not None
        try:
            while (slot := receive_packet(self._channel, self._left_bytes)) is not None:
                if isinstance(slot, bytes):
                    if self.on_message is None:
                        raise ProtocolError("a message where only slots are expected")
                    self.on_message(slot)
                    continue
                # Numbers are used once, but a slot that is replaced may still be read.
                self._left_bytes -= slot.bytes.size
                self._left_slots -= 1
                if self._left_slots < 0:
                    raise ProtocolError(f"more than {_MAX_SLOTS:,} slots in one connection")
                if self._on_slot is not None:
                    self._on_slot(slot.bytes)
                with self._changed:
                    self._theirs[slot.number] = slot
                    self._changed.notify_all()
        finally:
            self.close()
            # Only here: its descriptor must not be used for something else during a receive.
            self._channel.close()

    def view(self, wanted: SlotRange) -> NDArray[np.uint8]:
        """The bytes of a range of the other side's memory; no copy, read-only.

        Raises:
            ProtocolError: the slot did not come, is shorter, or was filled again.
        """
        # A message may be faster than the slot it speaks of, which was sent before it.
        with self._changed:
            self._changed.wait_for(
                lambda: wanted.slot in self._theirs or self._closed, _ARRIVAL_SECONDS
            )
            slot = self._theirs.get(wanted.slot)
        end = wanted.offset + wanted.length
        if slot is None or end > slot.bytes.size:
            size = "which was never sent" if slot is None else f"of {slot.bytes.size} bytes"
            raise ProtocolError(
                f"{wanted.length} bytes at {wanted.offset} of slot {wanted.slot}, {size}"
            )
        if slot.sequence != wanted.sequence:
            raise ProtocolError(
                f"slot {wanted.slot} was filled {slot.sequence} times, the message is about "
                f"content {wanted.sequence}"
            )
        return slot.bytes[wanted.offset : end]

    def close(self) -> None:
        """Hang up. Views stay readable while they are used."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._channel is not None:
            with contextlib.suppress(OSError):  # it is down already
                self._channel.shutdown(socket.SHUT_RDWR)
