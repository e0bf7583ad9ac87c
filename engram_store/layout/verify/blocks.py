"""Reading sealed files for their block checksums, beside a process that trains.

Pieces of 1 MiB go through two reused buffers, so that they are hashed while they are in the
processor's cache and the next piece comes from the disk meanwhile. What was cached stays cached and
what was not is forgotten again: a verification pushes nobody's rows out of memory.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_store.layout.checksums import BLOCK_BYTES, Checksums, block_checksums

PIECE_BYTES = 16 * BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class FileSums:
    """Block checksums of a file as it is."""

    size: int | None
    """Its length in bytes; None: it could not be opened."""
    sums: Checksums
    """Of the blocks that are there, up to the length asked for."""
    unreadable: Mapping[int, str] = field(default_factory=dict)
    """Blocks that could not be read, and why; their `sums` mean nothing."""
    problem: str = ""
    """Why it could not be opened."""


class BlockReader:
    """Computes block checksums of files and counts what it reads. For one thread."""

    def __init__(self, on_bytes: Callable[[int], None]) -> None:
        """`on_bytes` is told the bytes read so far after every piece."""
        self.files = self.read_bytes = 0
        self._on_bytes = on_bytes
        self._buffers = [np.empty(PIECE_BYTES, np.uint8) for _ in range(2)]
        self._linked: dict[tuple[int, ...], FileSums] = {}

    def count(self, size: int) -> None:
        """A file of this many bytes was read and checked elsewhere."""
        self.files += 1
        self.read_bytes += size
        self._on_bytes(self.read_bytes)

    def sums_of(self, path: Path, length: int, file_identity: int) -> FileSums:
        """Block checksums of the first `length` bytes of a file. Raises nothing for damage.

        A file with several names (unchanged chunks of generations) is read under the first one.
        """
        try:
            # Without waiting for a writer, should somebody have put a pipe there.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            return FileSums(None, np.empty(0, "<u8"), problem=open_problem(error))
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return FileSums(None, np.empty(0, "<u8"), problem="is not a regular file")
            key = (status.st_dev, status.st_ino, status.st_size, length, file_identity)
            self.files += 1
            if key in self._linked:
                return self._linked[key]
            found = self._read(fd, status.st_size, length, file_identity)
            if status.st_nlink > 1:
                self._linked[key] = found
            return found
        finally:
            os.close(fd)

    def _read(self, fd: int, size: int, length: int, file_identity: int) -> FileSums:
        length = min(size, length)
        sums = np.zeros(-(-length // BLOCK_BYTES), "<u8")
        unreadable: dict[int, str] = {}
        # Reading ahead on its own would make the next piece look as if it had been cached.
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        cached = self._start(fd, 0, length)
        for start in range(0, length, PIECE_BYTES):
            piece = self._piece(start, length)
            have = cached or 0
            unreadable |= _read_rest(fd, start, piece, have)
            was_cached = cached
            cached = self._start(fd, start + PIECE_BYTES, length)
            first = start // BLOCK_BYTES
            actual = block_checksums(piece, file_identity, first)
            sums[first : first + actual.size] = actual
            if was_cached is not None and have < piece.size:
                # A page that somebody maps stays whatever is said here.
                os.posix_fadvise(fd, start + have, piece.size - have, os.POSIX_FADV_DONTNEED)
            self.read_bytes += piece.size
            self._on_bytes(self.read_bytes)
        return FileSums(size, sums, unreadable)

    def _piece(self, start: int, length: int) -> NDArray[np.uint8]:
        buffer = self._buffers[start // PIECE_BYTES % 2]
        return buffer[: max(0, min(PIECE_BYTES, length - start))]

    def _start(self, fd: int, start: int, length: int) -> int | None:
        """Copy the cached beginning of a piece and have the disk read the rest of it.

        Returns:
            Bytes copied; None where the file system does not tell what is cached.
        """
        piece = self._piece(start, length)
        if not piece.size:
            return 0
        try:
            have = os.preadv(fd, [piece.data], start, os.RWF_NOWAIT)
        except BlockingIOError:
            have = 0
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                return None
            return 0  # `_read_rest` meets the error again and says where
        if have < piece.size:
            with contextlib.suppress(OSError):
                os.posix_fadvise(fd, start + have, piece.size - have, os.POSIX_FADV_WILLNEED)
        return have


def _read_rest(fd: int, start: int, piece: NDArray[np.uint8], have: int) -> dict[int, str]:
    """Read what is missing of a piece; returns the blocks that cannot be read, and why."""
    try:
        _fill(fd, start, piece, have)
    except OSError:
        unreadable = {}
        for offset in range(have - have % BLOCK_BYTES, piece.size, BLOCK_BYTES):
            try:
                _fill(fd, start + offset, piece[offset : offset + BLOCK_BYTES], 0)
            except OSError as error:
                unreadable[(start + offset) // BLOCK_BYTES] = (
                    f"cannot be read: {error.strerror or error}"
                )
        return unreadable
    return {}


def _fill(fd: int, start: int, piece: NDArray[np.uint8], have: int) -> None:
    while have < piece.size:
        count = os.preadv(fd, [piece[have:].data], start + have)
        if not count:
            raise OSError(errno.EIO, "the file was cut off while it was read")
        have += count


def open_problem(error: OSError) -> str:
    """Why a file cannot be opened or read, to be said after its name."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "is missing"
    return f"cannot be read: {error.strerror or error}"
