"""Where memtables live and how large they are."""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import socket
import stat
import weakref
from pathlib import Path

from engram_store.engine.extents import BLOCK_SLOTS
from engram_store.engine.memory import memory_headroom_bytes, memory_limit_bytes
from engram_store.engine.memtable import Memtable, memtable_bytes, slot_bytes
from engram_store.errors import (
    ConfigError,
    DiskFullError,
    SharedMemoryFullError,
    StoreLockedError,
)
from engram_store.layout.disk import Disk
from engram_store.layout.files import remove_tree
from engram_store.layout.paths import StorePaths
from engram_store.types import TableSpec

_logger = logging.getLogger(__name__)
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the tmpfs that outlives a process
_MAX_DEFAULT_OVERLAY_BYTES = 1 << 30
_OVERLAY_SHARE = 0.2


def overlay_capacity(
    specs: list[TableSpec], overlay_bytes: int | None, limit_bytes: int | None = None
) -> int:
    """Slots of each of the two memtables.

    Args:
        specs: the tables; each gets the same number of slots.
        overlay_bytes: bytes of both memtables; None: a fifth of the memory limit, at most 1 GiB,
            and no more than four slots per row of the largest table.
        limit_bytes: that limit; None: of the machine or the cgroup.

    Raises:
        ConfigError: not even one block of slots fits.
    """
    per_slot = slot_bytes(specs)
    smallest = 2 * BLOCK_SLOTS * per_slot
    if overlay_bytes is None:
        useful = 4 * max(spec.rows for spec in specs)
        whole = memory_limit_bytes() if limit_bytes is None else limit_bytes
        limit = min(_MAX_DEFAULT_OVERLAY_BYTES, int(_OVERLAY_SHARE * whole))
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


def memtable_places(paths: StorePaths, store_id: str, chosen: Path | None) -> tuple[Path, Path]:
    """Directories in which a process may make memtables: the first is tried first."""
    return shared_directory(paths, store_id, chosen), disk_directory(paths)


def memtable_files(directory: Path) -> list[Path]:
    """The two files in a directory of memtables, whether they are there or not."""
    return [directory / f"memtable-{index}" for index in range(2)]


def make_memtables(
    paths: StorePaths,
    store_id: str,
    specs: list[TableSpec],
    capacity: int,
    chosen: Path | None,
    disk: Disk,
) -> list[Memtable]:
    """Two empty memtables in shared memory, or in the data directory if that is too small.

    Files of memtables that a dead process left there are used again if they have the length:
    making 1.4 GB of shared memory and giving it back takes most of a second. Nothing in them is
    read: they hold nothing before this returns. Whatever else is in either place is removed.

    Args:
        paths, store_id, specs: of the store. What its last process left was taken over.
        capacity: slots of each.
        chosen: directory asked for; then there is no fallback.
        disk: what changes files.

    Raises:
        SharedMemoryFullError: they do not fit into `chosen`.
        DiskFullError: nor do they fit on the disk.
        StoreFileError, DiskFaultError: a file of another length cannot be removed.
    """
    length = memtable_bytes(specs, capacity)
    shared, on_disk = memtable_places(paths, store_id, chosen)
    for place in (shared, on_disk):
        with contextlib.suppress(OSError):
            _keep_usable(place, length, disk)
    directory, other = shared, on_disk
    try:
        _check_room(shared, length)
    except SharedMemoryFullError as error:
        if chosen is not None:
            raise
        directory, other = on_disk, shared
        _logger.warning(
            "memtables go to %s, which is slower and does not survive every crash: %s",
            directory,
            error,
        )
        free = shutil.disk_usage(paths.root).free + _there(on_disk, length)
        if free < 2 * length:
            raise DiskFullError(
                errno.ENOSPC,
                f"the memtables need {2 * length:,} bytes, more than shared memory has, and the "
                f"disk of {paths.root} has {free:,}; lower overlay_bytes or free space",
            ) from None
    remove_memtables(other, disk)
    # The parent too: who may write there could swap a store's directory.
    for private in (directory.parent, directory):
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
    memtables = [Memtable(path, specs, capacity, disk) for path in memtable_files(directory)]
    for memtable in memtables:
        memtable.release()
        memtable.populate()
    return memtables


def remove_memtables(directory: Path, disk: Disk) -> None:
    """Give the memory of a directory of memtables back; nothing in it is needed.

    If it cannot be removed now, the next opening tries again.
    """
    with contextlib.suppress(OSError):
        remove_tree(directory, disk)


def _keep_usable(directory: Path, length: int, disk: Disk) -> None:
    """Remove everything of which no memtable of this length can be made."""
    if not _is_ours(directory, stat.S_IFDIR, 0o700):
        remove_tree(directory, disk)
        return
    wanted = memtable_files(directory)
    for entry in directory.iterdir():
        if entry not in wanted or not _usable(entry, length):
            remove_tree(entry, disk)


def _usable(path: Path, length: int) -> bool:
    """Whether a file is one that `Disk.open_shared` made, of this length, with no other name."""
    if not _is_ours(path, stat.S_IFREG, 0o600):
        return False
    found = path.lstat()
    return found.st_size == length and found.st_nlink == 1


def _is_ours(path: Path, kind: int, permissions: int) -> bool:
    """Whether there is something of this kind and these permissions, and this user made it."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    is_so = stat.S_IFMT(found.st_mode) == kind and found.st_mode & 0o777 == permissions
    return is_so and found.st_uid == os.geteuid()


def _there(directory: Path, length: int) -> int:
    """Bytes that memtables of this length do not have to reserve any more."""
    usable = [path for path in memtable_files(directory) if _usable(path, length)]
    # What is allocated, not the length: a file may have holes.
    return sum(min(512 * path.lstat().st_blocks, length) for path in usable)


def _check_room(directory: Path, length: int) -> None:
    """Before reserving: tmpfs under a memory cgroup kills the process instead of failing."""
    existing = directory.parent
    while not existing.exists():
        existing = existing.parent
    needed, there = 2 * length, _there(directory, length)
    free = shutil.disk_usage(existing).free + there
    if free < needed:
        raise SharedMemoryFullError(needed, free, str(existing))
    headroom = memory_headroom_bytes() + there
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
