"""The seam between a store and the operating system: every change of a file, one method each.

The engine changes files through a `Disk` and in no other way; that includes what a commit stores
in shared memory. So one object can count, record (`testing.RecordingDisk`) or refuse
(`testing.FaultyDisk`) all of it. Reading is not here: files are mapped, and what is sealed does
not change.
"""

import ctypes
import os
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

_KEEP_SIZE, _PUNCH_HOLE = 1, 2
"""Of fallocate(2); the os module has neither."""
_libc = ctypes.CDLL(None, use_errno=True)


class Disk:
    """The real one; others derive from it. Methods raise `OSError`; for any thread."""

    def __init__(self) -> None:
        self.written_bytes = 0
        """Bytes written to files since it was made; shared memory does not count."""

    # ------------------------------------------------------------------ content

    def create(self, path: Path) -> int:
        """Make a new file and open it for writing; the caller closes it."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        """Write at an offset; returns how many bytes were taken, as `os.pwrite`."""
        written = os.pwrite(fd, data, offset)
        self.written_bytes += written
        return written

    def reserve(self, fd: int, length: int) -> None:
        """Allocate a file's blocks up to a length, as zeros."""
        os.posix_fallocate(fd, 0, length)

    def truncate(self, fd: int, length: int) -> None:
        """Cut a file."""
        os.ftruncate(fd, length)

    def sync(self, fd: int) -> None:
        """Make a file's content and length outlive the host."""
        os.fdatasync(fd)

    def close(self, fd: int) -> None:
        """Close what `create` opened."""
        os.close(fd)

    # ------------------------------------------------------------------ names

    def rename(self, old: Path, new: Path) -> None:
        """Move a file or a directory, over a file of the new name."""
        old.rename(new)

    def link(self, existing: Path, new: Path) -> None:
        """Give a file one more name."""
        os.link(existing, new)

    def unlink(self, path: Path) -> None:
        """Take a file's name away."""
        path.unlink()

    def make_directory(self, path: Path) -> None:
        """Make one directory."""
        path.mkdir()

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        path.rmdir()

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory outlive the host."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    # ------------------------------------------------------------------ shared memory

    def open_shared(self, path: Path, length: int) -> int:
        """Open a file to be mapped for writing, made and allocated if it is new."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Reserved now: on a full tmpfs a later store would be SIGBUS, this is an error.
            os.posix_fallocate(fd, 0, length)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def reserve_shared(self, path: Path, offset: int, length: int) -> None:
        """Allocate part of a file that is mapped for writing; what is allocated stays."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_fallocate(fd, offset, length)
        finally:
            os.close(fd)

    def discard(self, path: Path, offset: int, length: int) -> None:
        """Give the memory of part of a mapped file back: whole pages, zeros from then on."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            mode = ctypes.c_int(_PUNCH_HOLE | _KEEP_SIZE)
            if _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
                error = ctypes.get_errno()
                raise OSError(error, os.strerror(error), str(path))
        finally:
            os.close(fd)

    def store(self, path: Path, offset: int, memory: NDArray[Any], value: Any) -> None:  # noqa: ARG002
        """Write to a mapped file: one store for one aligned item of at most 8 bytes.

        Args:
            path: the file.
            offset: of `memory` in it, bytes.
            memory: what is written to.
            value: what, as numpy assigns it.
        """
        memory[...] = value

    def stored(self, path: Path, offset: int, memory: NDArray[Any]) -> None:
        """A kernel has written to a mapped file; its content is in `memory` now."""
