"""Memory whose addresses kernels may use: mapped files, shared memory, zeros."""

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = mmap.PAGESIZE
_POPULATE_READ, _POPULATE_WRITE = 22, 23
"""MADV_POPULATE_*, Linux 5.14; the mmap module does not name them."""
_libc = ctypes.CDLL(None, use_errno=True)


class Mapping:
    """One mapped piece of memory and the numpy view that keeps it alive.

    Addresses taken from it are valid until `close`. Who hands them to kernels makes sure that no
    kernel runs any more (`Table` does so under its lock).
    """

    def __init__(self, memory: mmap.mmap, path: Path | None = None) -> None:
        self._memory = memory
        self.path = path
        self.bytes: NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        self.address = int(self.bytes.ctypes.data)

    @classmethod
    def of_file(cls, path: Path) -> "Mapping":
        """A file, read-only, for random access: without the advice each fault reads megabytes.

        A store into it kills the process, which is wanted: sealed files never change.
        """
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        memory.madvise(mmap.MADV_RANDOM)
        return cls(memory, path)

    @classmethod
    def of_shared_file(cls, fd: int, length: int, path: Path) -> "Mapping":
        """A file that is written through its mapping: memtables only."""
        return cls(mmap.mmap(fd, length, mmap.MAP_SHARED), path)

    @classmethod
    def of_zeros(cls, length: int, *, writable: bool = False) -> "Mapping":
        """Anonymous zeros. Read-only ones share one page whatever their length."""
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, max(length, PAGE_BYTES), flags, protection)
        if writable:
            with contextlib.suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        return cls(memory)

    def view(self, dtype: Any, offset: int, shape: tuple[int, ...]) -> NDArray[Any]:
        """An array over part of the memory."""
        return np.ndarray(shape, dtype, self.bytes.data, offset)

    def populate(self, offset: int = 0, length: int | None = None) -> None:
        """Fault pages in for writing, so that a commit meets no page fault.

        Args:
            offset, length: bytes, multiples of the page size; None: to the end.
        """
        self._advise(_POPULATE_WRITE, offset, length)

    def populate_read(self) -> None:
        """Fill the page tables from the page cache, reading what is missing."""
        self._advise(_POPULATE_READ)

    def _advise(self, advice: int, offset: int = 0, length: int | None = None) -> None:
        # Not `mmap.madvise`: that keeps the interpreter lock, for seconds when it has to read.
        size = self.bytes.size - offset if length is None else length
        _libc.madvise(
            ctypes.c_void_p(self.address + offset), ctypes.c_size_t(size), ctypes.c_int(advice)
        )

    def close(self) -> None:
        """Unmap, or as soon as the last view is gone."""
        self.bytes = np.empty(0, np.uint8)
        with contextlib.suppress(BufferError):
            self._memory.close()


def forget_cached_pages(path: Path) -> None:
    """Tell the kernel that a file's pages are not needed any more."""
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def memory_limit_bytes() -> int:
    """Memory this process may use: the machine's, or the tightest cgroup limit above it."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *(limit for limit, _ in _cgroup_limits())])


def process_bytes() -> int:
    """Anonymous memory of this process: what no page of a file can make room for."""
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon:")
    )


def memory_headroom_bytes() -> int:
    """Bytes that may still be taken before a limit kills instead of refusing."""
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    return min([available, *(limit - used for limit, used in _cgroup_limits())])


def _evictable_bytes(group: Path, prefix: str) -> int:
    """Page cache of files charged to a cgroup; shared memory is in there too, and stays."""
    lines = (group / "memory.stat").read_text().splitlines()
    stat = {name: int(value) for name, value in (line.split() for line in lines)}
    return stat[f"{prefix}inactive_file"] + stat[f"{prefix}active_file"]


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """(limit, used without evictable file pages) of every memory cgroup above, v1 and v2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            root, names = Path("/sys/fs/cgroup/memory"), ("limit_in_bytes", "usage_in_bytes")
            prefix = "total_"
        elif not controllers:
            root, names = Path("/sys/fs/cgroup"), ("max", "current")
            prefix = ""
        else:
            continue
        group = root / path.lstrip("/")
        while True:
            with contextlib.suppress(OSError, ValueError, KeyError):
                limit, used = (int((group / f"memory.{name}").read_text()) for name in names)
                yield limit, used - _evictable_bytes(group, prefix)
            if group == root or root not in group.parents:
                break
            group = group.parent
