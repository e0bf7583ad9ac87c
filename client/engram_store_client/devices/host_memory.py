"""Host memory that rows and gradients of one session cross, pinned once a GPU wants it.

Only what was made for that is ever pinned: buffers of an embedded store and slots of a store
process. Never a file on disk, and never a table.
"""

import mmap
import os
import sys
import threading
import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store_client.devices.pin_advice import advise, look_around
from engram_store_client.devices.registrar import NoRegistrar, PinError, Registrar, pieces

Bytes = NDArray[np.uint8]


@dataclass(eq=False, slots=True)
class _Buffer:
    """One mapping. Its owner is the array whose end is the end of the mapping."""

    owner: "weakref.ref[NDArray[Any]]"
    address: int
    length: int
    read_only: bool
    pinned: list[tuple[int, int]] = field(default_factory=list)
    """Ranges that are registered: (address, length)."""
    refused: bool = False


class HostMemory:
    """Knows the buffers of one session; for any thread.

    Registrations follow the buffers: new ones are pinned when they come, old ones are let go just
    before their memory is.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._registrar: Registrar = NoRegistrar()
        self._integrated = False
        self._buffers: tuple[_Buffer, ...] = ()
        self._process = os.getpid()
        self._warned = False

    def allocate(self, size: int) -> Bytes:
        """Memory for an embedded store (`engram_store.open(allocate=...)`): uint8 [size].

        Where there is CUDA it starts at a page and belongs to no other allocation, and a fork does
        not make the parent's pages move, as it may with private memory that a GPU reads.
        """
        if not cuda_is_there():
            return np.empty(size, np.uint8)
        try:
            buffer = shared_pages(size)
        except OSError as error:
            self._warn(size, f"no shared memory: {error.strerror}")
            return np.empty(size, np.uint8)
        self.add(buffer)
        return buffer

    def add(self, array: NDArray[Any]) -> None:
        """A mapping is used from now on: of a slot, or of a buffer. Never raises.

        Args:
            array: a view that starts where the mapping does; it may end earlier.
        """
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        if not owner.nbytes:
            return
        address = owner.__array_interface__["data"][0]
        # To the end of the last page: a mapping consists of whole ones.
        length = -(-owner.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        buffer = _Buffer(weakref.ref(owner), address, length, not owner.flags.writeable)
        with self._lock:
            self._buffers = (*self._living(), buffer)
            self._register(buffer)

    def pin(self, registrar: Registrar, *, integrated: bool = False) -> None:
        """Register everything, now and when it comes. Only the first call does something.

        Warns: RuntimeWarning, once, if memory cannot be pinned.
        """
        with self._lock:
            if not isinstance(self._registrar, NoRegistrar):
                return
            self._registrar, self._integrated = registrar, integrated
            for buffer in self._living():
                self._register(buffer)

    def is_pinned(self, array: NDArray[Any]) -> bool:
        """Whether all of an array lies in one pinned range."""
        start = array.__array_interface__["data"][0]
        end = start + array.nbytes
        return any(
            first <= start and end <= first + length
            for buffer in self._buffers
            if buffer.address <= start < buffer.address + buffer.length
            and buffer.owner() is not None
            for first, length in buffer.pinned
        )

    @property
    def pinned_bytes(self) -> int:
        """Registered now."""
        return sum(length for buffer in self._living() for _, length in buffer.pinned)

    @property
    def pageable_bytes(self) -> int:
        """Refused by the registrar: copied to and from a GPU without overlap."""
        return sum(buffer.length for buffer in self._living() if buffer.refused)

    def _living(self) -> tuple[_Buffer, ...]:
        return tuple(buffer for buffer in self._buffers if buffer.owner() is not None)

    def _register(self, buffer: _Buffer) -> None:
        """The lock is held."""
        owner = buffer.owner()  # so that it does not go while it is registered
        if owner is None or isinstance(self._registrar, NoRegistrar):
            return
        # A dying array takes no lock: it may die on any thread, under any lock.
        weakref.finalize(owner, _let_go, self._registrar, buffer.pinned, self._process)
        try:
            for address, length in pieces(buffer.address, buffer.length):
                if self._registrar.register(address, length, read_only=buffer.read_only):
                    buffer.pinned.append((address, length))
        except PinError as error:
            buffer.refused = True
            _let_go(self._registrar, buffer.pinned, self._process)
            self._warn(buffer.length, str(error))

    def _warn(self, length: int, reason: str) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"{length:,} bytes of host memory could not be pinned for the GPU ({reason}). Training "
            "goes on with pageable copies, which do not overlap with computing. Probably: "
            f"{advise(length, look_around(integrated=self._integrated))}",
            RuntimeWarning,
            stacklevel=2,
        )


def _let_go(registrar: Registrar, pinned: list[tuple[int, int]], process: int) -> None:
    """Unregister each range once; in a forked child they are the parent's."""
    while pinned:
        address, _ = pinned.pop()
        if os.getpid() == process:
            registrar.unregister(address)


def cuda_is_there() -> bool:
    """Whether torch was imported and sees a CUDA device. Starts nothing on it."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_available())


def shared_pages(size: int) -> Bytes:
    """Whole pages of shared anonymous memory, all of them there: uint8 [size].

    Raises:
        OSError: there is not enough. Found here, it is an error; at the first touch it would be
            SIGBUS.
    """
    fd = os.memfd_create("engram-rows", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, size)
        memory = mmap.mmap(fd, size, mmap.MAP_SHARED)
    finally:
        os.close(fd)
    return np.frombuffer(memory, np.uint8)


_OF_SESSION: "weakref.WeakKeyDictionary[Any, HostMemory]" = weakref.WeakKeyDictionary()


def assign(session: Any, memory: HostMemory) -> None:
    """Remember whose buffers these are."""
    _OF_SESSION[session] = memory


def host_memory_of(session: Any) -> HostMemory | None:
    """The memory that a session's rows and gradients cross; None: nobody knows it."""
    try:
        return _OF_SESSION.get(session)
    except TypeError:  # a session that cannot be a key
        return None
