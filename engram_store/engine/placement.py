"""Where memtables live and how large they are."""

import errno
import fcntl
import logging
import os
import shutil
import socket
import weakref
from pathlib import Path

from engram_store.engine.memory import memory_headroom_bytes, memory_limit_bytes
from engram_store.engine.memtable import Memtable, memtable_bytes, slot_bytes
from engram_store.engine.table import BLOCK_SLOTS
from engram_store.errors import (
    ConfigError,
    DiskFullError,
    SharedMemoryFullError,
    StoreLockedError,
)
from engram_store.layout.disk import Disk
from engram_store.layout.paths import StorePaths
from engram_store.types import TableSpec

_logger = logging.getLogger(__name__)
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the tmpfs that outlives a process
_MAX_DEFAULT_OVERLAY_BYTES = 1 << 30
_OVERLAY_SHARE = 0.2


def overlay_capacity(specs: list[TableSpec], overlay_bytes: int | None) -> int:
    """Slots of each of the two memtables.

    Args:
        specs: the tables; each gets the same number of slots.
        overlay_bytes: bytes of both memtables; None: a fifth of the memory limit, at most 1 GiB,
            and no more than four slots per row of the largest table.

    Raises:
        ConfigError: not even one block of slots fits.
    """
    per_slot = slot_bytes(specs)
    smallest = 2 * BLOCK_SLOTS * per_slot
    if overlay_bytes is None:
        useful = 4 * max(spec.rows for spec in specs)
        limit = min(_MAX_DEFAULT_OVERLAY_BYTES, int(_OVERLAY_SHARE * memory_limit_bytes()))
        slots = min(limit // 2 // per_slot, useful + BLOCK_SLOTS)
        return max(slots // BLOCK_SLOTS, 1) * BLOCK_SLOTS
    if overlay_bytes < smallest:
        raise ConfigError(
            f"overlay_bytes is {overlay_bytes:,}; this store's tables need at least {smallest:,}"
        )
    return overlay_bytes // 2 // per_slot // BLOCK_SLOTS * BLOCK_SLOTS


def shared_directory(paths: StorePaths, store_id: str, chosen: Path | None) -> Path:
    """Directory of a store's memtables in shared memory.

    The inode of the store's directory is in the name: a copy of a store is another store, and
    must not take over the memtables of the original.
    """
    parent = chosen or SHARED_MEMORY / f"engram-store-{os.getuid()}"
    return parent / f"{store_id}-{paths.root.stat().st_ino}"


def disk_directory(paths: StorePaths) -> Path:
    """Where memtables go when shared memory is too small."""
    return paths.root / "memtables"


def make_memtables(
    paths: StorePaths,
    store_id: str,
    specs: list[TableSpec],
    capacity: int,
    chosen: Path | None,
    disk: Disk,
) -> list[Memtable]:
    """Two empty memtables in shared memory, or in the data directory if that is too small.

    Args:
        paths, store_id, specs: of the store.
        capacity: slots of each.
        chosen: directory asked for; then there is no fallback.
        disk: what changes files.

    Raises:
        SharedMemoryFullError: they do not fit into `chosen`.
        DiskFullError: nor do they fit on the disk.
    """
    needed = 2 * memtable_bytes(specs, capacity)
    directory = shared_directory(paths, store_id, chosen)
    try:
        _check_room(directory.parent, needed)
    except SharedMemoryFullError as error:
        if chosen is not None:
            raise
        directory = disk_directory(paths)
        _logger.warning(
            "memtables go to %s, which is slower and does not survive every crash: %s",
            directory,
            error,
        )
        free = shutil.disk_usage(paths.root).free
        if free < needed:
            raise DiskFullError(
                errno.ENOSPC,
                f"the memtables need {needed:,} bytes, more than shared memory has, and the disk "
                f"of {paths.root} has {free:,}; lower overlay_bytes or free space",
            ) from None
    # The parent too: who may write there could swap a store's directory.
    for private in (directory.parent, directory):
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
    return [Memtable(directory / f"memtable-{i}", specs, capacity, disk) for i in range(2)]


def _check_room(directory: Path, needed: int) -> None:
    """Before reserving: tmpfs under a memory cgroup kills the process instead of failing."""
    existing = directory
    while not existing.exists():
        existing = existing.parent
    usage = shutil.disk_usage(existing)
    if usage.free < needed:
        raise SharedMemoryFullError(needed, usage.free, str(existing))
    headroom = memory_headroom_bytes()
    if headroom < needed:
        raise SharedMemoryFullError(needed, headroom, "the memory limit")


class StoreLock:
    """The right to train a store: one process at a time, on one machine."""

    def __init__(self, paths: StorePaths) -> None:
        """Raises: StoreLockedError, naming the holder."""
        self._fd = os.open(paths.lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 200, 0).decode(errors="replace").strip()
            os.close(self._fd)
            raise StoreLockedError(paths.root, holder or "another process") from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        _held_locks.add(self)

    def release(self) -> None:
        """Let others in."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


_held_locks: "weakref.WeakSet[StoreLock]" = weakref.WeakSet()


def _let_go_after_fork() -> None:
    """A forked child that lives on, a data loader's worker say, must not keep the lock."""
    for lock in list(_held_locks):
        lock.release()


os.register_at_fork(after_in_child=_let_go_after_fork)
