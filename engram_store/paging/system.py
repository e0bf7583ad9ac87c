"""System calls that Python has no name for, each without the interpreter lock.

A failure comes back as a negative errno: callers decide what it means to them.
"""

import ctypes
import errno
import mmap
import os
import resource
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = mmap.PAGESIZE
MAX_RANGES = 1024
"""Of one process_madvise: the kernel's limit of an iovec array."""
_PROCESS_MADVISE, _CACHESTAT = 440, 451
"""The same numbers on every architecture that wheels are built for."""
_WILLNEED = 3
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def willneed(pidfd: int, ranges: NDArray[np.int64]) -> int:
    """process_madvise(MADV_WILLNEED) on ranges of the process behind a pidfd.

    Args:
        pidfd: of this process.
        ranges: int64 [n <= MAX_RANGES, 2], C-contiguous: address, length in bytes. That is also
            what an array of iovec looks like.

    Returns:
        Bytes of the ranges that were advised before one failed; or, if the first one did, the
        negative errno.
    """
    assert ranges.shape[0] <= MAX_RANGES
    assert ranges.flags.c_contiguous
    advised = _libc.syscall(
        ctypes.c_long(_PROCESS_MADVISE),
        ctypes.c_long(pidfd),
        ctypes.c_void_p(ranges.ctypes.data),
        ctypes.c_size_t(ranges.shape[0]),
        ctypes.c_long(_WILLNEED),
        ctypes.c_long(0),
    )
    return int(advised) if advised >= 0 else -ctypes.get_errno()


def mincore(address: int, out: NDArray[np.uint8]) -> int:
    """Which pages from `address` on are in memory: bit 0 of each byte of `out`.

    Returns:
        0, or the negative errno.
    """
    length = out.size * PAGE_BYTES
    failed = _libc.mincore(
        ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_void_p(out.ctypes.data)
    )
    return -ctypes.get_errno() if failed else 0


def cached_bytes(file: Path | int) -> int | None:
    """Bytes of a file in the page cache, by cachestat (Linux 6.5).

    It costs microseconds where little is cached or in large folios, and 75 ns per cached page at
    worst: ask once a second, not once a window.

    Args:
        file: its path or an open descriptor.

    Returns:
        Bytes, in whole pages. None: the kernel cannot tell, or does not tell this user, who must
        own the file or may write to it.

    Raises:
        OSError: there is no such file, or it cannot be opened.
    """
    if isinstance(file, int):
        return _cached_bytes(file)
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _cached_bytes(fd)
    finally:
        os.close(fd)


def _cached_bytes(fd: int) -> int | None:
    whole = np.zeros(2, np.uint64)  # offset, length; 0: to the end
    counts = np.zeros(5, np.uint64)  # cached, dirty, writeback, evicted, recently evicted
    failed = _libc.syscall(
        ctypes.c_long(_CACHESTAT),
        ctypes.c_long(fd),
        ctypes.c_void_p(whole.ctypes.data),
        ctypes.c_void_p(counts.ctypes.data),
        ctypes.c_long(0),
    )
    if not failed:
        return int(counts[0]) * PAGE_BYTES
    error = ctypes.get_errno()
    if error == errno.EBADF:
        raise OSError(error, f"descriptor {fd} is not open; ask before the file is closed")
    return None


def major_faults() -> int:
    """Page faults of the calling thread that waited for a disk, since it began; about 1 us.

    A fault that met a page whose read was under way is not one on Linux 6.4 and newer; older
    kernels count some of those.
    """
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
