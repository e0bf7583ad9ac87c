"""The few ways in which a store touches its disk.

Every write of the engine goes through here, so that durability is decided in one place: data is
written and synced first, then a name makes it real.
"""

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from numpy.typing import NDArray

from engram_store.errors import DiskFullError

WRITE_BYTES = 8 << 20
"""Bytes handed to one write call: large enough for the disk, small enough to stop early."""


class WriteCounter:
    """Bytes written to the data directory since the store was opened."""

    def __init__(self) -> None:
        self.written_bytes = 0


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk into `DiskFullError`; everything else passes unchanged."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                errno.ENOSPC,
                f"no space left writing {path}; free space on that disk (old snapshots hold "
                "segments and base generations). What was stored before is intact",
            ) from error
        raise


Part: TypeAlias = bytes | NDArray[Any]


def write_file(path: Path, parts: Iterable[Part], counter: WriteCounter) -> None:
    """Write a new file from several buffers and make its bytes durable.

    The name becomes durable with `sync_directory` of its parent.

    Raises:
        DiskFullError: the file is removed again.
    """
    try:
        # A new file, never new bytes in an old one: the name may be a hard link or be mapped.
        path.unlink(missing_ok=True)
        with disk_errors(path), path.open("xb", buffering=0) as file:
            for part in parts:
                view = memoryview(part).cast("B")  # type: ignore[arg-type]
                for start in range(0, len(view), WRITE_BYTES):
                    _write_all(file.fileno(), view[start : start + WRITE_BYTES])
                counter.written_bytes += len(view)
            os.fdatasync(file.fileno())
    except DiskFullError:
        path.unlink(missing_ok=True)
        raise


def _write_all(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]


def replace_file(path: Path, data: bytes, counter: WriteCounter) -> None:
    """Give a name new content atomically and durably: temporary file, sync, rename, sync."""
    temporary = path.with_name(path.name + ".tmp")
    write_file(temporary, [data], counter)
    with disk_errors(path):
        temporary.rename(path)
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """Create a directory and its parents, each name durable."""
    if path.is_dir():
        return
    make_directory(path.parent)
    with disk_errors(path):
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def allocated_bytes(path: Path) -> int:
    """Bytes on disk below a directory; a sparse or missing file counts what it really uses."""
    files = (entry for entry in path.rglob("*") if entry.is_file())
    return sum(entry.stat().st_blocks * 512 for entry in files)
