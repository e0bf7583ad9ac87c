"""How a store writes files: data is written and synced first, then a name makes it real."""

import contextlib
import errno
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from numpy.typing import NDArray

from engram_store.errors import (
    DiskFaultError,
    DiskFullError,
    EngramStoreError,
    StoreFileError,
    TruncatedTableError,
)
from engram_store.layout.disk import Disk

WRITE_BYTES = 8 << 20
"""Bytes handed to one write call: large enough for the disk, small enough to stop early."""
HUGE_PAGE_BYTES = 2 << 20
"""What is written in whole, aligned blocks of this can be mapped as huge pages, which makes reading
single rows of it faster."""
_FAULTS = frozenset(
    {errno.EIO, errno.EROFS, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.EREMOTEIO}
)
"""What the kernel says of a disk that fails, was taken away, or is read-only since it failed."""


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk into `DiskFullError` and a failing one into `DiskFaultError`.

    Everything else passes unchanged.
    """
    try:
        yield
    except EngramStoreError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                errno.ENOSPC,
                f"no space left writing {path}; free space on that disk (old snapshots hold "
                "segments and base generations). What was stored before is intact",
            ) from error
        if error.errno in _FAULTS:
            raise DiskFaultError(path, error.errno) from error
        raise


def check_length(path: Path, expected: int) -> None:
    """A shorter file would kill the process (SIGBUS) or read as zeros once it is mapped."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise StoreFileError(
            path, f"is missing; its manifest says it has {expected} bytes"
        ) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StoreFileError(path, "is a link that leads back to itself") from None
        raise
    if size != expected:
        raise TruncatedTableError(path, size, expected)


Part: TypeAlias = bytes | NDArray[Any]


def write_file(path: Path, parts: Iterable[Part], disk: Disk) -> None:
    """Write a new file from several buffers and make its bytes durable.

    The name becomes durable with `sync_directory` of its parent. After a failure the file is not
    written again: what a failed sync left of it is unknown, so the next attempt makes a new one.

    Raises:
        DiskFullError: the file is removed again. DiskFaultError: it may be there, in part.
    """
    try:
        # A new file, never new bytes in an old one: the name may be a hard link or be mapped.
        remove_file(path, disk)
        with disk_errors(path):
            fd = disk.create(path)
            try:
                _write_parts(fd, parts, disk)
                disk.sync(fd)
            finally:
                disk.close(fd)
    except DiskFullError:
        with contextlib.suppress(OSError):
            remove_file(path, disk)
        raise


def _write_parts(fd: int, parts: Iterable[Part], disk: Disk) -> None:
    offset = 0
    for view in _joined(parts):
        while view:
            written = disk.write(fd, view[:WRITE_BYTES], offset)
            view, offset = view[written:], offset + written


def _joined(parts: Iterable[Part]) -> Iterator[memoryview]:
    """The same bytes in pieces that begin at multiples of a huge page. A part may be used again."""
    held = bytearray()
    for part in parts:
        view = memoryview(part).cast("B")  # type: ignore[arg-type]
        if held:
            missing = HUGE_PAGE_BYTES - len(held)
            held += view[:missing]
            view = view[missing:]
            if len(held) < HUGE_PAGE_BYTES:
                continue
            yield memoryview(held)
            held = bytearray()
        whole = len(view) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if whole:
            yield view[:whole]
        held += view[whole:]
    if held:
        yield memoryview(held)


def replace_file(path: Path, data: bytes, disk: Disk) -> None:
    """Give a name new content atomically and durably: temporary file, sync, rename, sync."""
    temporary = path.with_name(path.name + ".tmp")
    write_file(temporary, [data], disk)
    with disk_errors(path):
        disk.rename(temporary, path)
    sync_directory(path.parent, disk)


def sync_directory(path: Path, disk: Disk) -> None:
    """Make the names in a directory durable. Raises: DiskFullError, DiskFaultError."""
    with disk_errors(path):
        disk.sync_directory(path)


def make_directory(path: Path, disk: Disk) -> None:
    """Create a directory and its parents, each name durable."""
    if path.is_dir():
        return
    make_directory(path.parent, disk)
    with disk_errors(path):
        with contextlib.suppress(FileExistsError):
            disk.make_directory(path)
        disk.sync_directory(path.parent)


def remove_file(path: Path, disk: Disk) -> None:
    """Remove a file if it is there. Raises: DiskFaultError."""
    with disk_errors(path), contextlib.suppress(FileNotFoundError):
        disk.unlink(path)


def remove_tree(path: Path, disk: Disk) -> None:
    """Remove a directory with all that is in it, if it is there; links are not followed."""
    if path.is_symlink() or not path.is_dir():
        remove_file(path, disk)
        return
    for entry in path.iterdir():
        remove_tree(entry, disk)
    with disk_errors(path), contextlib.suppress(FileNotFoundError):
        disk.remove_directory(path)


def allocated_bytes(path: Path) -> int:
    """Bytes on disk below a directory; a sparse or missing file counts what it really uses."""
    files = (entry for entry in path.rglob("*") if entry.is_file())
    return sum(entry.stat().st_blocks * 512 for entry in files)
