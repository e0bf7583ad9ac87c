"""Reading sealed files piece by piece, each block against its checksum, beside training.

What was cached stays cached and what was not is forgotten again, so that reading a table whole
pushes nobody's rows out of memory. Bytes come by `pread`, not through a mapping: mappings are for
random access and would read page by page, and a sector that cannot be read would kill the process.
"""

import contextlib
import ctypes
import errno
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.damage import BlockDamage
from engram_store.engine.memory import PAGE_BYTES, Mapping
from engram_store.layout.checksums import BLOCK_BYTES, Checksums, block_checksums

PIECE_BYTES = 16 * BLOCK_BYTES
_libc = ctypes.CDLL(None, use_errno=True)
Pages = NDArray[np.bool_]
"""bool [pages of a piece]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SealedFile:
    """A file of a table, and what its blocks should be."""

    path: Path
    layer: int
    sums: Checksums
    identity: int
    length: int
    row_bytes: int
    """Bytes of one row, or of one slot."""
    first_row: int
    """Of a chunk: its first row. 0 in a segment, where slots count."""
    rows: int
    """Rows or slots in it that exist; what follows is padding."""
    segment: int | None
    """The segment's number; None: it is a base chunk."""
    source: object
    """The base's description, or the segment's reference, that names it."""
    array: str
    chunk: int = 0

    def damage(self, block: int, problem: str) -> BlockDamage:
        """One of its blocks, as a damage."""
        first = block * BLOCK_BYTES // self.row_bytes
        stop = -(-min(self.length, (block + 1) * BLOCK_BYTES) // self.row_bytes)
        stop = min(stop, self.rows)
        first = min(first, stop)
        return BlockDamage(
            layer=self.layer,
            path=self.path,
            block=block,
            problem=problem,
            first=self.first_row + first,
            stop=self.first_row + stop,
            segment=self.segment,
            source=self.source,
            array=self.array,
            chunk=self.chunk,
        )

    def whole(self, problem: str) -> BlockDamage:
        """All of it, as a damage."""
        first = self.damage(0, problem)
        return replace(first, stop=self.first_row + self.rows)

    def check(self, first_block: int, data: NDArray[np.uint8]) -> list[BlockDamage]:
        """Damages of a piece that starts at a block."""
        actual = block_checksums(data, self.identity, first_block)
        expected = self.sums[first_block : first_block + actual.size]
        return [
            self.damage(first_block + int(block), "does not match its checksum")
            for block in np.flatnonzero(actual != expected)
        ]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some consecutive bytes of a file."""

    offset: int
    data: NDArray[np.uint8]
    """In a buffer that the next piece is read into."""
    cached: Pages
    """Which of its pages were in the page cache before it was read."""
    damages: list[BlockDamage]


class Throttle:
    """Keeps a background job to so many bytes a second.

    Args:
        bytes_per_second: None: as fast as it goes.
        clock: seconds, growing.
    """

    def __init__(
        self, bytes_per_second: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate, self._clock = bytes_per_second, clock
        self._free_at = clock()
        self._hurry = threading.Event()
        self.bytes = 0
        """Taken so far."""

    def take(self, count: int) -> None:
        """So many bytes were read or written: wait until they are paid for."""
        self.bytes += count
        if self._rate is None:
            return
        now = self._clock()
        self._free_at = max(self._free_at, now) + count / self._rate
        self._hurry.wait(self._free_at - now)

    def hurry(self) -> None:
        """Somebody waits for the job: no limit until `relax`."""
        self._hurry.set()

    def relax(self) -> None:
        """The limit holds again, and nothing is owed."""
        self._free_at = self._clock()
        self._hurry.clear()


def piece_rows(row_bytes: int, chunk_rows: int) -> int:
    """Rows of a piece that is whole rows and whole checksum blocks, about `PIECE_BYTES`.

    A power of two, like the rows of a chunk, which is the most it can be.
    """
    unit = BLOCK_BYTES // math.gcd(row_bytes, BLOCK_BYTES)
    times = max(1, PIECE_BYTES // (unit * row_bytes))
    return min(chunk_rows, unit << (times.bit_length() - 1))


def resident_pages(mapping: Mapping, offset: int, length: int) -> Pages:
    """Which pages of a piece of a mapped file are in the page cache; none if that is not told."""
    pages = np.zeros(-(-length // PAGE_BYTES), np.uint8)
    failed = _libc.mincore(
        ctypes.c_void_p(mapping.address + offset),
        ctypes.c_size_t(length),
        ctypes.c_void_p(pages.ctypes.data),
    )
    return np.zeros(pages.size, np.bool_) if failed else (pages & 1).astype(np.bool_)


def forget_pages(fd: int, offset: int, pages: Pages) -> None:
    """Take pages of a file that starts at a page out of the cache, where nobody maps them.

    Args:
        fd: the file.
        offset: of the first page.
        pages: which.
    """
    edges = np.flatnonzero(np.diff(pages, prepend=False, append=False)).tolist()
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        with contextlib.suppress(OSError):
            os.posix_fadvise(
                fd,
                offset + start * PAGE_BYTES,
                (stop - start) * PAGE_BYTES,
                os.POSIX_FADV_DONTNEED,
            )


def read_pieces(
    file: SealedFile, throttle: Throttle, size: int = PIECE_BYTES, *, keep: bool = False
) -> Iterator[Piece]:
    """A file from its beginning to its end.

    Args:
        file: what to read.
        throttle: limits the speed.
        size: bytes of a piece, whole blocks.
        keep: leave in the page cache what was read, for one who reads it again soon.

    Raises:
        OSError: it cannot be opened. What cannot be read is a damage.
    """
    fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Reading ahead on its own would make the next piece look as if it had been cached.
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        if not os.fstat(fd).st_size:
            raise OSError(errno.EIO, "is empty", str(file.path))
        mapping = Mapping.of_file(file.path)
        try:
            yield from _pieces(file, fd, mapping, throttle, size, keep)
        finally:
            mapping.close()
    finally:
        os.close(fd)


def _pieces(
    file: SealedFile, fd: int, mapping: Mapping, throttle: Throttle, size: int, keep: bool
) -> Iterator[Piece]:
    # A file that was cut off after it was opened ends early: its last blocks are damages.
    length = min(file.length, mapping.bytes.size)
    buffer = np.empty(min(size, file.length), np.uint8)
    cached = _start(fd, mapping, 0, min(size, length))
    for offset in range(0, file.length, size):
        data = buffer[: min(size, file.length - offset)]
        following = offset + data.size
        problems = _fill(fd, offset, data)
        ahead = _start(fd, mapping, following, min(size, max(0, length - following)))
        found = file.check(offset // BLOCK_BYTES, data)
        damages = [damage for damage in found if damage.block not in problems]
        damages += [file.damage(block, text) for block, text in problems.items()]
        yield Piece(offset, data, cached, damages)
        if not keep:
            forget_pages(fd, offset, ~cached)
        cached = ahead
        throttle.take(data.size)


def _start(fd: int, mapping: Mapping, offset: int, length: int) -> Pages:
    """Have the disk read a piece; returns which of its pages are here already."""
    if not length:
        return np.zeros(0, np.bool_)
    cached = resident_pages(mapping, offset, length)
    if not cached.all():
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)
    return cached


def _fill(fd: int, offset: int, data: NDArray[np.uint8]) -> dict[int, str]:
    """Read a piece; returns the blocks that cannot be read, and why."""
    try:
        _read(fd, offset, data)
    except OSError:
        return _fill_blocks(fd, offset, data)
    return {}


def _fill_blocks(fd: int, offset: int, data: NDArray[np.uint8]) -> dict[int, str]:
    problems = {}
    for start in range(0, data.size, BLOCK_BYTES):
        try:
            _read(fd, offset + start, data[start : start + BLOCK_BYTES])
        except OSError as error:
            block = (offset + start) // BLOCK_BYTES
            problems[block] = f"cannot be read: {error.strerror or error}"
    return problems


def _read(fd: int, offset: int, data: NDArray[np.uint8]) -> None:
    done = 0
    while done < data.size:
        count = os.preadv(fd, [data[done:].data], offset + done)
        if not count:
            raise OSError(errno.EIO, "the file was cut off")
        done += count
