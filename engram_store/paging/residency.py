"""Which pages of mapped files are in memory: believed, refreshed now and then, never asked per row.

A `Residency` holds one byte per page of one file; kernels read and change the bytes without a lock
(`kernels.pages`). It is a belief, and being wrong costs time, never data: rows are copied through
the mapping either way. A page that is believed to be in memory and is not costs a page fault; one
that is in memory and believed not to be costs an advice that has nothing to do.
"""

import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_store.kernels import pages as kernels
from engram_store.kernels.pages import UNIT_BYTES
from engram_store.paging import system
from engram_store.paging.system import PAGE_BYTES, cached_bytes, major_faults

__all__ = ["Keeper", "Residency", "cached_bytes", "major_faults"]

PIECE_PAGES = 1 << 15
"""Pages asked for at once: 128 MiB of a file, 2 ms."""
_HURRIED_SHARE = 10
"""How much more time than usual a refresh after page faults may take."""
_HURRIED_PAUSE = 4
"""Times the length of a hurried pass until the next one, so that they take a fifth of the time."""
_logger = logging.getLogger(__name__)


class Residency:
    """What is believed about the pages of one mapped file.

    Args:
        mapped_at: address of the mapping, on a page boundary.
        length: of the file, in bytes.
        path: of the file. The kernel tells only those who own a file, or may write to it, which
            pages are in memory, and others that all are; None: it will tell.
    """

    def __init__(self, mapped_at: int, length: int, path: Path | None = None) -> None:
        assert length > 0
        assert mapped_at % PAGE_BYTES == 0
        self.pages = np.zeros(-(-length // UNIT_BYTES), np.uint8)
        """uint8 [pages of 4 KiB, also where the machine has larger ones]: 0 not in memory,
        1 believed to be, 2 being read (`kernels.pages`)."""
        self.address = int(self.pages.ctypes.data)
        """Of `pages`; valid as long as this object lives."""
        self.observable = path is None or _may_observe(path)
        """False: only what this process itself reads is known, and forgotten at a refresh."""
        self._mapped_at = mapped_at
        self._missing = np.full(-(-self.pages.size // PIECE_PAGES), -1, np.int64)
        """Pages of each piece that were not in memory when it was refreshed; -1: never was."""

    def refresh(self, first: int = 0, count: int | None = None) -> None:
        """Ask the kernel, without the interpreter lock: 12-18 ms per GB of file.

        A page that is being read stays so until it is in memory: if that read was lost, its rows
        are read when they are next wanted, as those of absent pages are. A page that is marked by
        a kernel in this very moment may become absent instead, and then is read once more.

        Args:
            first, count: pages; widened to whole pieces of 32,768. None: to the end.

        Raises:
            OSError: the file is no longer mapped there; what was believed is unchanged.
        """
        end = self.pages.size if count is None else min(first + count, self.pages.size)
        for piece in range(first // PIECE_PAGES, -(-end // PIECE_PAGES)):
            pages = self.pages[piece * PIECE_PAGES : (piece + 1) * PIECE_PAGES]
            if self.observable:
                self._ask(piece, pages)
            if not self.observable:
                pages[pages == kernels.RESIDENT] = kernels.ABSENT

    def _ask(self, piece: int, pages: NDArray[np.uint8]) -> None:
        units = PAGE_BYTES // UNIT_BYTES
        told = np.empty(-(-pages.size // units), np.uint8)
        at = self._mapped_at + piece * PIECE_PAGES * UNIT_BYTES
        error = -system.mincore(at, told)
        if error == errno.ENOMEM:
            raise OSError(error, f"no file is mapped at {at:#x}; forget it before it is unmapped")
        if error in (errno.ENOSYS, errno.EPERM):
            _logger.warning("mincore is refused (%s): only own reads are known", os.strerror(error))
            self.observable = False
            self._missing[:] = -1
        elif not error:
            self._missing[piece] = kernels.refresh_resident(pages, told.repeat(units))

    @property
    def known(self) -> bool:
        """Whether every page was asked for at least once."""
        return bool((self._missing >= 0).all())

    @property
    def whole(self) -> bool:
        """Whether every page was in memory when it was last asked for."""
        return not self._missing.any()

    @property
    def resident_share(self) -> float | None:
        """Share of pages in memory as of the last refresh; None until all were asked for."""
        if not self.known:
            return None
        return float(self.pages.size - self._missing.sum()) / self.pages.size


def _may_observe(path: Path) -> bool:
    """Whether the kernel's answer about a file's pages is true for this user; if in doubt, no."""
    try:
        owner = path.stat().st_uid
    except OSError:
        return False
    return os.geteuid() in (0, owner) or os.access(path, os.W_OK, effective_ids=True)


class Keeper:
    """A thread that refreshes the residency of many files in turn.

    It runs from the first `register` to `stop`, a small share of one core, more for one pass when
    page faults show that the beliefs are out of date.

    Args:
        cpu_share: of one core; after page faults ten times that, for at most a fifth of the time.
        interval_seconds: least time from the begin of one pass over all files to the next.
        clock, cpu_clock: seconds, of the wall and of the calling thread's work.
    """

    def __init__(
        self,
        cpu_share: float = 0.01,
        interval_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._share, self._interval = cpu_share, interval_seconds
        self._clock, self._cpu_clock = clock, cpu_clock
        self._changed = threading.Condition()
        """Protects what is below; notified when a refresh ends."""
        self._files: list[Residency] = []
        self._pass: deque[tuple[Residency, int]] = deque()
        """What this pass still has to do, each from a page on."""
        self._pass_began = -interval_seconds
        self._busy: Residency | None = None
        self._hurried = False
        self._no_hurry_before = 0.0
        self._suspected = False
        self._wake = threading.Event()
        self._stopped = False
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------ what others call

    def register(self, residency: Residency) -> None:
        """A file was mapped; it is refreshed next. After `stop` it never is."""
        with self._changed:
            self._files.append(residency)
            if residency.observable:
                self._pass.appendleft((residency, 0))
            if not self._stopped and not self._running():
                self._thread = threading.Thread(
                    target=self._run, name="engram-residency", daemon=True
                )
                self._thread.start()
        self._wake.set()

    def forget(self, residency: Residency) -> None:
        """A file is about to be unmapped. Waits until the thread is not asking about it.

        That takes milliseconds at most. One that was never registered is fine.
        """
        with self._changed:
            self._files = [file for file in self._files if file is not residency]
            self._pass = deque(item for item in self._pass if item[0] is not residency)
            while self._busy is residency and self._running():
                self._changed.wait(1.0)

    def suspect(self) -> None:
        """Rows that should have been in memory met page faults: refresh everything soon.

        Costs nothing when it was said before and not answered yet.
        """
        if not self._suspected:
            self._suspected = True
            self._wake.set()

    def stop(self) -> None:
        """End the thread, and wait for that."""
        with self._changed:
            self._stopped = True
            thread = self._thread
        self._wake.set()
        if thread is not None:
            thread.join()

    # ------------------------------------------------------------------ the thread

    def _running(self) -> bool:
        """False also in a forked child, which has no thread until it maps a file itself."""
        return self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopped:
            self._wake.wait(self.turn())
            self._wake.clear()

    def turn(self) -> float | None:
        """Refresh what is next, at most one piece's worth of pages.

        Returns:
            Seconds to rest before the next turn; None: until there is something to do.
        """
        began = self._cpu_clock()
        with self._changed:
            self._begin_pass_if_due()
        left = PIECE_PAGES
        while left > 0 and (item := self._take()) is not None:
            left -= self._refresh(*item)
        return self._rest_seconds(self._cpu_clock() - began)

    def _begin_pass_if_due(self) -> None:
        now = self._clock()
        if self._suspected and not self._hurried and now >= self._no_hurry_before:
            self._suspected, self._hurried = False, True
            self._pass = deque((file, 0) for file in self._files)
            self._pass_began = now
        elif not self._pass and now >= self._pass_began + self._interval:
            self._pass = deque((file, 0) for file in self._files if file.observable)
            self._pass_began = now

    def _take(self) -> tuple[Residency, int] | None:
        with self._changed:
            if not self._pass:
                return None
            residency, first = self._pass.popleft()
            self._busy = residency
            return residency, first

    def _refresh(self, residency: Residency, first: int) -> int:
        """Refresh a piece; returns its pages."""
        after = first + PIECE_PAGES
        try:
            residency.refresh(first, PIECE_PAGES)
        except OSError as error:
            _logger.error("the residency of a file is not refreshed any more: %s", error)
            after = residency.pages.size
            with self._changed:
                self._files = [file for file in self._files if file is not residency]
        with self._changed:
            self._busy = None
            # Not if it was forgotten meanwhile.
            if after < residency.pages.size and any(file is residency for file in self._files):
                self._pass.appendleft((residency, after))
            self._changed.notify_all()
        return min(after, residency.pages.size) - first

    def _rest_seconds(self, spent: float) -> float | None:
        with self._changed:
            now = self._clock()
            share = min(self._share * (_HURRIED_SHARE if self._hurried else 1), 1.0)
            rest = spent / share - spent
            if not self._pass:
                if self._hurried:
                    self._hurried = False
                    self._no_hurry_before = now + _HURRIED_PAUSE * (now - self._pass_began)
                if not self._files:
                    return None
                rest = max(rest, self._pass_began + self._interval - now)
            if self._suspected and not self._hurried:
                rest = min(rest, max(self._no_hurry_before - now, 0.0))
            return rest
