"""Begin to read pages of mapped files, so that nobody has to wait for them one by one.

Readers give advice: a range that cannot be read is passed over, and its rows then come by page
faults, slower and with the same bytes. `choose_reader` takes the fastest that works here.
"""

import errno
import logging
import mmap
import os
import threading
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engram_store.kernels import pages as kernels
from engram_store.paging import system

MAX_RANGE_BYTES = 128 << 10
"""The kernel cuts what one call asks for at the device's read-ahead, and does not say so. This is
the usual one; a range is handed over in pieces of it."""
_LOST = (errno.EBADF, errno.ESRCH)
"""The pidfd is not what it was; or, the first, there is no file under the range."""
_OF_A_RANGE = (errno.ENOMEM, errno.EBADF, errno.EAGAIN, errno.EIO, errno.EINVAL)
_logger = logging.getLogger(__name__)


class PageReader(Protocol):
    """Something that brings pages of mapped files into memory. Any thread may use it."""

    name: str

    def start(self, ranges: NDArray[np.int64]) -> None:
        """Begin to read; may wait while the device's queue is full.

        Does not hold the interpreter lock while it waits, and raises nothing for a range that was
        unmapped meanwhile.

        Args:
            ranges: int64 [n, 2], C-contiguous: address and length in bytes of mapped memory, both
                multiples of the page size. In ascending order the device is fastest.
        """
        ...


class AdviceReader(PageReader, Protocol):
    """A reader that knows how much of its advice was refused."""

    failed_ranges: int
    """Ranges, or pieces of long ones, that could not be read ahead since the reader was made."""


def cut_ranges(ranges: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same pages in ranges of at most `MAX_RANGE_BYTES`, in the same order; none is empty."""
    ranges = np.ascontiguousarray(ranges, np.int64)
    lengths = ranges[:, 1]
    if not lengths.size or (lengths.max() <= MAX_RANGE_BYTES and lengths.min() > 0):
        return ranges
    pieces = -(-np.maximum(lengths, 0) // MAX_RANGE_BYTES)
    first = np.cumsum(pieces) - pieces
    starts = np.repeat(ranges[:, 0] - first * MAX_RANGE_BYTES, pieces)
    starts += np.arange(starts.size) * MAX_RANGE_BYTES
    ends = np.repeat(ranges[:, 0] + lengths, pieces)
    return np.stack([starts, np.minimum(ends - starts, MAX_RANGE_BYTES)], axis=1)


_pidfds: dict[int, int] = {}
"""By process id: in a forked child the inherited one still means the parent."""


def own_pidfd() -> int:
    """A pidfd of this process, the same at every call, open until the process ends.

    Takes no lock, which a fork could leave locked for ever.

    Raises:
        OSError: the kernel has no pidfds, or refuses.
    """
    pid = os.getpid()
    held = _pidfds.get(pid)
    if held is None:
        opened = os.pidfd_open(pid)
        held = _pidfds.setdefault(pid, opened)
        if held != opened:  # another thread was first
            os.close(opened)
    return held


def forget_lost_pidfd() -> bool:
    """Whether somebody closed this process's pidfd; the next call of `own_pidfd` opens another.

    Programs that become daemons close every descriptor, and the number may mean another file now,
    so it is not closed here.
    """
    pid = os.getpid()
    held = _pidfds.get(pid)
    try:
        info = Path(f"/proc/self/fdinfo/{held}").read_text()
    except OSError:
        info = ""
    if f"Pid:\t{pid}\n" in info:
        return False
    _pidfds.pop(pid, None)
    return True


class BatchedAdvice:
    """process_madvise on this process: up to 1,024 ranges for one system call.

    Linux 5.10; older kernels allow it only with CAP_SYS_NICE.
    """

    name = "process_madvise"

    def __init__(self) -> None:
        self.failed_ranges = 0
        """See `AdviceReader`."""
        self._worked = False

    def start(self, ranges: NDArray[np.int64]) -> None:
        """See `PageReader`."""
        pieces = cut_ranges(ranges)
        first, renewed = 0, False
        while first < len(pieces):
            batch = pieces[first : first + system.MAX_RANGES]
            advised = _advise_own(batch)
            if advised > 0:
                self._worked = True
                first += _whole_ranges(batch, advised)
            elif -advised in _LOST and not renewed and forget_lost_pidfd():
                renewed = True
            elif advised == 0 or -advised in _OF_A_RANGE:
                self.failed_ranges += 1
                first += 1
            else:
                self._give_up(-advised, len(pieces) - first)
                return

    def _give_up(self, error: int, ranges: int) -> None:
        self.failed_ranges += ranges
        if self._worked:
            self._worked = False
            _logger.warning(
                "process_madvise worked and fails now (%s): pages are not read ahead, and rows "
                "wait for them one at a time; look for what was forbidden to this process",
                os.strerror(error),
            )


def _advise_own(batch: NDArray[np.int64]) -> int:
    """Bytes of a batch that were advised, or the negative errno of its first range."""
    try:
        pidfd = own_pidfd()
    except OSError as error:
        return -(error.errno or errno.ENOSYS)
    return system.willneed(pidfd, batch)


def _whole_ranges(batch: NDArray[np.int64], advised: int) -> int:
    """How many ranges the first `advised` bytes are: at least one, so that there is progress."""
    ends = np.cumsum(batch[:, 1])
    return max(int(np.searchsorted(ends, advised, side="right")), 1)


class Advice:
    """madvise for one range after the other, in a compiled loop. Works on every Linux."""

    name = "madvise"

    def __init__(self) -> None:
        self.failed_ranges = 0
        """See `AdviceReader`."""

    def start(self, ranges: NDArray[np.int64]) -> None:
        """See `PageReader`."""
        self.failed_ranges += int(kernels.advise(cut_ranges(ranges)))


class MappedFiles:
    """Which file is mapped where, for readers that need its descriptor. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[int, tuple[int, int]] = {}
        self._table = self._sorted()

    def add(self, address: int, length: int, path: Path) -> None:
        """A file is mapped whole, from its first byte on; it is opened once more for reading.

        Args:
            address, length: of the mapping, in bytes.
            path: of the file.

        Raises:
            OSError: the file cannot be opened.
        """
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        whole_pages = -(-length // system.PAGE_BYTES) * system.PAGE_BYTES
        with self._lock:
            assert address not in self._files
            self._files[address] = (whole_pages, fd)
            self._table = self._sorted()

    def remove(self, address: int) -> None:
        """The file at that address is about to be unmapped.

        A read that another thread just begins may still use the number of its descriptor: at worst
        some pages of another file are read.
        """
        with self._lock:
            _, fd = self._files.pop(address)
            self._table = self._sorted()
        os.close(fd)

    def table(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
        """Addresses (ascending), lengths and descriptors of all files, as they are now."""
        return self._table

    def _sorted(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
        files = sorted((address, *file) for address, file in self._files.items())
        columns = np.array(files, np.int64).reshape(-1, 3).T
        return columns[0].copy(), columns[1].copy(), columns[2].astype(np.int32)


class FileAdvice:
    """posix_fadvise for one range after the other, in a compiled loop: needs no mapping.

    Args:
        files: where the ranges come from; one of another file counts as failed.
    """

    name = "posix_fadvise"

    def __init__(self, files: MappedFiles) -> None:
        self._files = files
        self.failed_ranges = 0
        """See `AdviceReader`."""

    def start(self, ranges: NDArray[np.int64]) -> None:
        """See `PageReader`."""
        table = self._files.table()
        self.failed_ranges += int(kernels.advise_files(cut_ranges(ranges), *table))


def choose_reader(files: MappedFiles | None = None) -> PageReader:
    """The fastest reader that works in this process; each is tried once, on a small mapped file.

    Args:
        files: where the files are mapped that will be read; None: no reader that needs to know.

    Returns:
        A new reader. Where none works it is one whose advice fails, and rows come by page faults;
        that is logged as a warning.
    """
    registry = files or MappedFiles()
    readers: list[AdviceReader] = [BatchedAdvice(), Advice()]
    if files is not None:
        readers.insert(1, FileAdvice(files))
    for reader in readers:
        if _works(reader, registry):
            _logger.info("cold pages are read by %s", reader.name)
            return reader
    _logger.warning(
        "%s do not work here: pages are not read ahead, and rows wait for them one at a time; "
        "allow one of these system calls to the process",
        ", ".join(reader.name for reader in readers),
    )
    return readers[-1]


def _works(reader: AdviceReader, files: MappedFiles) -> bool:
    """Whether it can read ahead in a file that exists for certain: this one."""
    path = Path(__file__)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        view = np.frombuffer(memory, np.uint8)
        address = int(view.ctypes.data)
        del view  # a mapping with views cannot be closed
        files.add(address, len(memory), path)
        try:
            reader.start(np.array([[address, system.PAGE_BYTES]], np.int64))
        finally:
            files.remove(address)
    return not reader.failed_ranges
