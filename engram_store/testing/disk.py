"""Disks that record or refuse: hand one to `engram_store.open(..., disk=...)`.

disk = RecordingDisk()
with engram_store.open(path, "train", disk=disk) as store:
train(store)
disk.operations  # what a machine that crashes would have to get right

disk = FaultyDisk()
with engram_store.open(path, "train", disk=disk) as store:
disk.fail(errno.ENOSPC, at=3)  # the third operation from here
"""

import errno
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engram_store.layout.disk import Disk

_T = TypeVar("_T")
CONTENT = frozenset({"create", "write", "reserve", "truncate", "sync", "close"})
"""Kinds of operations on an open file."""
NAMES = frozenset(
    {"rename", "link", "unlink", "make_directory", "remove_directory", "sync_directory"}
)
"""Kinds of operations on names."""
MEMORY = frozenset({"open_shared", "reserve_shared", "discard", "store", "stored"})
"""Kinds of operations on shared memory."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation, as it was asked for."""

    kind: str
    """Name of the `Disk` method."""
    path: Path
    """What it was done to; of `rename` and `link` the name that existed before."""
    target: Path | None = None
    """The new name of `rename` and `link`."""
    offset: int = 0
    data: bytes = b""
    """What was written."""
    length: int = 0
    """Of `reserve`, `truncate`, `open_shared` and `reserve_shared`."""
    file: int = 0
    """Numbers the file that `create` made, whatever its names become."""


class _Watched(Disk, ABC):
    """Sees every operation before it is done; knows which file a descriptor is of."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()
        self._open: dict[int, tuple[Path, int]] = {}
        self._files = 0

    @abstractmethod
    def _do(self, operation: Operation, action: Callable[[], _T]) -> _T:
        """Do an operation, or not; on the thread that asks for it."""

    def _file(self, fd: int) -> tuple[Path, int]:
        # Files that were not made here are synced once, when a store is created.
        return self._open.get(fd, (Path(f"/proc/self/fd/{fd}"), 0))

    def _on(self, kind: str, fd: int, action: Callable[[], _T], **more: Any) -> _T:
        path, file = self._file(fd)
        return self._do(Operation(kind, path, file=file, **more), action)

    def create(self, path: Path) -> int:
        with self._lock:
            self._files += 1
            number = self._files
            action = super().create
            fd = self._do(Operation("create", path, file=number), lambda: action(path))
            self._open[fd] = path, number
            return fd

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        action = super().write
        return self._on(
            "write", fd, lambda: action(fd, data, offset), offset=offset, data=bytes(data)
        )

    def reserve(self, fd: int, length: int) -> None:
        action = super().reserve
        self._on("reserve", fd, lambda: action(fd, length), length=length)

    def truncate(self, fd: int, length: int) -> None:
        action = super().truncate
        self._on("truncate", fd, lambda: action(fd, length), length=length)

    def sync(self, fd: int) -> None:
        action = super().sync
        self._on("sync", fd, lambda: action(fd))

    def close(self, fd: int) -> None:
        action = super().close
        try:
            self._on("close", fd, lambda: action(fd))
        finally:
            self._open.pop(fd, None)

    def rename(self, old: Path, new: Path) -> None:
        action = super().rename
        self._do(Operation("rename", old, new), lambda: action(old, new))

    def link(self, existing: Path, new: Path) -> None:
        action = super().link
        self._do(Operation("link", existing, new), lambda: action(existing, new))

    def unlink(self, path: Path) -> None:
        action = super().unlink
        self._do(Operation("unlink", path), lambda: action(path))

    def make_directory(self, path: Path) -> None:
        action = super().make_directory
        self._do(Operation("make_directory", path), lambda: action(path))

    def remove_directory(self, path: Path) -> None:
        action = super().remove_directory
        self._do(Operation("remove_directory", path), lambda: action(path))

    def sync_directory(self, path: Path) -> None:
        action = super().sync_directory
        self._do(Operation("sync_directory", path), lambda: action(path))

    def open_shared(self, path: Path, length: int) -> int:
        action = super().open_shared
        return self._do(Operation("open_shared", path, length=length), lambda: action(path, length))

    def reserve_shared(self, path: Path, offset: int, length: int) -> None:
        action = super().reserve_shared
        operation = Operation("reserve_shared", path, offset=offset, length=length)
        self._do(operation, lambda: action(path, offset, length))

    def discard(self, path: Path, offset: int, length: int) -> None:
        action = super().discard
        operation = Operation("discard", path, offset=offset, data=bytes(length))
        self._do(operation, lambda: action(path, offset, length))

    def store(self, path: Path, offset: int, memory: NDArray[Any], value: Any) -> None:
        content = np.empty_like(memory)
        content[...] = value
        action = super().store
        operation = Operation("store", path, offset=offset, data=content.tobytes())
        self._do(operation, lambda: action(path, offset, memory, value))

    def stored(self, path: Path, offset: int, memory: NDArray[Any]) -> None:
        operation = Operation("stored", path, offset=offset, data=memory.tobytes())
        self._do(operation, lambda: None)


class RecordingDisk(_Watched):
    """Does everything and keeps a list of it, in the order in which it took effect."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def _do(self, operation: Operation, action: Callable[[], _T]) -> _T:
        with self._lock:
            result = action()
            if operation.kind == "write" and result != len(operation.data):
                raise OSError(errno.EIO, "a short write cannot be recorded", str(operation.path))
            self.operations.append(operation)
        return result


class FaultyDisk(_Watched):
    """Lets chosen operations fail.

    A refused one has no effect, except that half of a write has reached the file.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        """Operations that could have failed since the last `fail` or `heal`."""
        self.fired = 0
        """Operations that did fail."""
        self._error = 0
        self._at, self._forever = 0, False
        self._kinds: Collection[str] = ()

    def fail(
        self,
        error: int,
        at: int = 1,
        *,
        forever: bool = False,
        kinds: Collection[str] = CONTENT | NAMES,
    ) -> None:
        """Let an operation fail.

        Args:
            error: errno, such as `errno.ENOSPC`; 0: a write takes half of its bytes, which is
                no error.
            at: which one, counted from now.
            forever: also all that follow, as on a disk that stays full.
            kinds: what is counted; names of `Disk` methods.
        """
        with self._lock:
            self._error, self._at, self._forever, self._kinds = error, at, forever, kinds
            self.calls = self.fired = 0

    def heal(self) -> None:
        """Let nothing fail any more."""
        self.fail(errno.EIO, 0, kinds=())

    def _do(self, operation: Operation, action: Callable[[], _T]) -> _T:
        with self._lock:
            if not self._strikes(operation.kind):
                return action()
            self.fired += 1
            if operation.kind == "write":
                half: Any = self._write_half(operation)
                return half  # type: ignore[no-any-return]
            if not self._error:
                return action()
            if operation.kind == "close":
                action()  # as the kernel: the descriptor is gone whatever is reported
            raise OSError(self._error, os.strerror(self._error), str(operation.path))

    def _strikes(self, kind: str) -> bool:
        if kind not in self._kinds:
            return False
        self.calls += 1
        return self.calls == self._at or (self._forever and self.calls > self._at > 0)

    def _write_half(self, operation: Operation) -> Any:
        fd = next(fd for fd, (_, file) in self._open.items() if file == operation.file)
        half = operation.data[: max(len(operation.data) // 2, 1)]
        written = Disk.write(self, fd, memoryview(half), operation.offset)
        if self._error:
            raise OSError(self._error, os.strerror(self._error), str(operation.path))
        return written
