"""Slots: pieces of memory that a store and a trainer of one host share.

Each is a memfd, made and written by one side, mapped read-only by the other. Its file descriptor
travels once over a Unix socket (SCM_RIGHTS); after that a message names it by number. Sealed
against shrinking and growing, so that nobody can take mapped pages away from the other side, and
against new writable mappings.
"""

import fcntl
import mmap
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_store.errors import ProtocolError

TOKEN_BYTES = 16
"""Proof of a session, sent first on the slot socket."""
_F_SEAL_FUTURE_WRITE = 0x0010  # linux/fcntl.h; the fcntl module does not name it
_NEEDED_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_HEADER = struct.Struct("<QQ")
_PEER = struct.Struct("3i")


def slot_door(socket_path: Path) -> Path:
    """The socket through which slots go, beside the one for gRPC."""
    return socket_path.with_name(socket_path.name + ".slots")


@dataclass(frozen=True, slots=True)
class Slot:
    """One piece of shared memory, mapped in this process."""

    number: int
    bytes: NDArray[np.uint8]
    """Writable where it was made, read-only on the other side."""


def make_slot(number: int, length: int) -> tuple[Slot, int]:
    """A new slot, and the file descriptor to send; the caller closes it."""
    fd = os.memfd_create(f"engram-slot-{number}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # Reserved now: a page that is missing later would be SIGBUS.
        os.posix_fallocate(fd, 0, length)
        memory = mmap.mmap(fd, length, mmap.MAP_SHARED)
        seals = _NEEDED_SEALS | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return Slot(number, np.frombuffer(memory, np.uint8)), fd


def map_slot(number: int, length: int, fd: int, *, private: bool = False) -> Slot:
    """Map the other side's slot; trusts nothing it says about it.

    Args:
        number, length: as announced.
        fd: its file descriptor, which may be closed afterwards.
        private: False maps read-only. True gives arrays that may be written to (torch wants
            such), but a write stays in this process.

    Raises:
        ProtocolError: it could be truncated under us, or is not as long as announced.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ProtocolError(f"slot {number} is not sealed memory ({error.strerror})") from error
    if seals & _NEEDED_SEALS != _NEEDED_SEALS:
        raise ProtocolError(f"slot {number} is not sealed against shrinking and growing")
    size = os.fstat(fd).st_size
    if size != length or not length:
        raise ProtocolError(f"slot {number} has {size} bytes, {length} were announced")
    if private:
        writable = mmap.PROT_READ | mmap.PROT_WRITE
        memory = mmap.mmap(fd, length, mmap.MAP_PRIVATE, writable)
    else:
        memory = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ)
    return Slot(number, np.frombuffer(memory, np.uint8))


def send_slot(channel: socket.socket, number: int, length: int, fd: int) -> None:
    """Hand a slot over on a SOCK_SEQPACKET socket."""
    socket.send_fds(channel, [_HEADER.pack(number, length)], [fd])


def receive_slot(channel: socket.socket, *, private: bool = False) -> Slot | None:
    """Wait for the next slot and map it; None when the other side has hung up.

    Raises:
        ProtocolError: not what `send_slot` sends, or `map_slot` refuses it.
    """
    data, fds, _flags, _address = socket.recv_fds(channel, _HEADER.size, 1)
    try:
        if not data:
            return None
        if len(data) != _HEADER.size or len(fds) != 1:
            raise ProtocolError(f"{len(data)} bytes and {len(fds)} descriptors are not a slot")
        number, length = _HEADER.unpack(data)
        return map_slot(number, length, fds[0], private=private)
    finally:
        for fd in fds:
            os.close(fd)


def peer_uid(channel: socket.socket) -> int:
    """User id of the process at the other end of a Unix socket."""
    data = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(data)[1])
