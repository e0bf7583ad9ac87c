"""Writes a chunk of a new base so that the page cache holds it well.

A file's pages come into the cache as one folio for each write, up to 2 MiB. Where everything stays
in memory large folios are what makes a gather fast: they are mapped as huge pages, and finding a
row's page costs the processor next to nothing. Where memory is short they are a burden: a folio
stays or goes as a whole, and one hot row would keep 511 cold pages.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.memory import PAGE_BYTES
from engram_store.engine.pieces import Pages, forget_pages
from engram_store.layout.disk import Disk
from engram_store.layout.files import HUGE_PAGE_BYTES


class ChunkWriter:
    """Writes one file from its beginning to its end, in blocks of 2 MiB.

    A block that is to stay in the page cache is one write. In others, pages that stay and pages
    that go are written apart, so that the latter can be dropped.

    Args:
        disk: writes.
        fd: an empty file; closed by its owner.
    """

    def __init__(self, disk: Disk, fd: int) -> None:
        self._disk, self._fd = disk, fd
        self._block = np.empty(HUGE_PAGE_BYTES, np.uint8)
        self._keep = np.empty(HUGE_PAGE_BYTES // PAGE_BYTES, np.bool_)
        self._filled = self._written = self._synced = 0
        self._unsynced: list[tuple[int, Pages]] = []

    @property
    def unsynced_bytes(self) -> int:
        """Bytes that were written since the last `sync`."""
        return self._written - self._synced

    def add(self, data: NDArray[np.uint8], keep: Pages) -> None:
        """The next bytes.

        Args:
            data: uint8 [n], whole pages but for the file's last; the caller may use it again.
            keep: bool [pages], which of them shall stay in the page cache.
        """
        done = 0
        while done < data.size:
            count = min(data.size - done, HUGE_PAGE_BYTES - self._filled)
            stop = self._filled + count
            self._block[self._filled : stop] = data[done : done + count]
            stays = keep[done // PAGE_BYTES : -(-(done + count) // PAGE_BYTES)]
            self._keep[self._filled // PAGE_BYTES : -(-stop // PAGE_BYTES)] = stays
            self._filled, done = stop, done + count
            if stop == HUGE_PAGE_BYTES:
                self._write_block()

    def sync(self) -> None:
        """Make what was written durable, and drop the pages that need not stay."""
        self._disk.sync(self._fd)
        self._synced = self._written
        for offset, pages in self._unsynced:
            forget_pages(self._fd, offset, pages)
        self._unsynced.clear()

    def finish(self) -> None:
        """Write the rest, and `sync`."""
        if self._filled:
            self._write_block()
        self.sync()

    def _write_block(self) -> None:
        keep = self._keep[: -(-self._filled // PAGE_BYTES)]
        edges, offset = (np.flatnonzero(np.diff(keep)) + 1) * PAGE_BYTES, self._written
        for first, stop in pairwise([0, *edges.tolist(), self._filled]):
            self._write(self._block[first:stop])
        if not keep.all():
            self._unsynced.append((offset, ~keep))
        self._filled = 0

    def _write(self, data: NDArray[np.uint8]) -> None:
        view = memoryview(data)  # type: ignore[arg-type]
        while view:
            written = self._disk.write(self._fd, view, self._written)
            view, self._written = view[written:], self._written + written
