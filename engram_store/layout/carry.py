"""Sealed files of one store become files of another: linked where that works, copied elsewhere.

Block checksums are seeded with the store, so every block is read, compared with its checksum and
summed again. A damaged block ends it: an export never carries damage on.
"""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_store.errors import ChecksumError, StoreFileError, TruncatedTableError
from engram_store.layout import checksums
from engram_store.layout.checksums import BLOCK_BYTES, Checksums
from engram_store.layout.disk import Disk
from engram_store.layout.files import disk_errors, write_file

READ_BYTES = 8 << 20
"""Read at a time: whole checksum blocks."""
_NO_LINK = (
    errno.EXDEV,
    errno.EPERM,
    errno.EACCES,
    errno.EMLINK,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
)
"""What a link fails with where a copy may still work."""


class Carrier:
    """Carries files and counts what it did.

    Args:
        disk: what changes files.
        copy: never link.
        on_read: told how many more bytes were read.
    """

    def __init__(self, disk: Disk, *, copy: bool, on_read: Callable[[int], None]) -> None:
        self._disk, self._copy, self._on_read = disk, copy, on_read
        self._buffer = np.empty(READ_BYTES, np.uint8)
        self.linked = self.copied = 0
        """Files."""

    def carry(
        self, source: Path, target: Path, length: int, seeds: tuple[int, int], expected: Checksums
    ) -> Checksums:
        """Make one file, whose bytes are durable; its name is not yet.

        Args:
            source, target: the files; the target's directory is there.
            length: bytes of the source.
            seeds: identity of the file in its store, and in the new one.
            expected: checksums of the source.

        Returns:
            Checksums of the target.

        Raises:
            ChecksumError, StoreFileError: the source is damaged, or gone.
            DiskFullError, DiskFaultError.
        """
        sums: list[Checksums] = []
        if not self._copy and self._link(source, target):
            # By the new name: the old one may be taken away meanwhile.
            for _ in self._checked(target, source, length, seeds, expected, sums):
                pass
            self.linked += 1
        else:
            pieces = self._checked(source, source, length, seeds, expected, sums)
            write_file(target, pieces, self._disk)
            self.copied += 1
        return np.concatenate([*sums, np.empty(0, "<u8")])

    def _link(self, source: Path, target: Path) -> bool:
        """Whether the target is a link to the source now."""
        if source.is_symlink():  # the new name would need what it leads to, as the old one does
            return False
        try:
            with disk_errors(target):
                self._disk.link(source, target)
        except FileNotFoundError:
            raise StoreFileError(source, "is missing") from None
        except OSError as error:
            if error.errno in _NO_LINK:
                return False
            raise
        return True

    def _checked(
        self,
        path: Path,
        named: Path,
        length: int,
        seeds: tuple[int, int],
        expected: Checksums,
        sums: list[Checksums],
    ) -> Iterator[NDArray[np.uint8]]:
        """The bytes of a file, after comparing them; their new checksums are added to `sums`.

        Pieces share one buffer. Errors speak of `named`.
        """
        blocks = size = 0
        for piece in self._pieces(path, named):
            if size + piece.size > length:
                raise TruncatedTableError(named, size + piece.size, length)
            found = checksums.block_checksums(piece, seeds[0], blocks)
            wrong = np.flatnonzero(found != expected[blocks : blocks + found.size])
            if wrong.size:
                raise ChecksumError(
                    named,
                    f"block {blocks + int(wrong[0])} does not match its checksum; `engram-store "
                    "verify` names the rows. Export a snapshot that does not need this file",
                )
            sums.append(checksums.block_checksums(piece, seeds[1], blocks))
            blocks, size = blocks + found.size, size + piece.size
            yield piece
        if size != length:
            raise TruncatedTableError(named, size, length)

    def _pieces(self, path: Path, named: Path) -> Iterator[NDArray[np.uint8]]:
        try:
            with path.open("rb", buffering=0) as file:
                while count := _read_whole(file.fileno(), self._buffer):
                    self._on_read(count)
                    yield self._buffer[:count]
        except FileNotFoundError:
            raise StoreFileError(named, "is missing") from None
        except OSError as error:
            if isinstance(error, StoreFileError) or error.errno not in (errno.EIO, errno.EISDIR):
                raise
            raise StoreFileError(named, f"cannot be read ({os.strerror(error.errno)})") from error


def _read_whole(fd: int, buffer: NDArray[np.uint8]) -> int:
    """Fill the buffer unless the file ends: all pieces but the last are whole blocks."""
    assert buffer.size % BLOCK_BYTES == 0
    view, count = buffer.data, 0
    while count < len(view) and (read := os.readv(fd, [view[count:]])):
        count += read
    return count
