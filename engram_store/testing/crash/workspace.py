"""One directory that becomes image after image, changing only what differs."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from engram_store.layout.disk import Disk
from engram_store.testing.crash.nodes import Image


class _TrackingDisk(Disk):
    """Remembers which paths were changed through it, so that they can be put back."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: set[str] = set()

    def create(self, path: Path) -> int:
        self.touched.add(str(path))
        return super().create(path)

    def rename(self, old: Path, new: Path) -> None:
        self.touched |= {str(old), str(new)}
        super().rename(old, new)

    def link(self, existing: Path, new: Path) -> None:
        self.touched.add(str(new))
        super().link(existing, new)

    def unlink(self, path: Path) -> None:
        self.touched.add(str(path))
        super().unlink(path)

    def make_directory(self, path: Path) -> None:
        self.touched.add(str(path))
        super().make_directory(path)

    def remove_directory(self, path: Path) -> None:
        self.touched.add(str(path))
        super().remove_directory(path)

    def sync(self, fd: int) -> None:
        pass  # what recovery writes is not meant to last

    def sync_directory(self, path: Path) -> None:
        pass


class Workspace:
    """A directory for images of one store; give it a tmpfs.

    Recovery may change files through `disk`, and shared memory in any way. What is not below the
    store's directory is memory.

    Args:
        root: the directory; `root/store` is the store and keeps its inode.
        store: name of the store's directory below it.
        ignored: files of the store that are no part of any image and stay.
    """

    def __init__(self, root: Path, store: str, ignored: tuple[str, ...] = ()) -> None:
        self.root, self.store = root, store
        self._tracking = _TrackingDisk()
        self.disk: Disk = self._tracking
        self._ignored = ignored
        self._files: dict[str, int] = {}
        self._directories: set[str] = {store}
        self._memory: set[str] = set()
        self._look()

    @property
    def touched(self) -> set[str]:
        """Paths below the root that were changed through `disk` since the last `put`."""
        return {path[len(str(self.root)) + 1 :] for path in self._tracking.touched}

    def _look(self) -> None:
        """Find out what is there, once; unknown content is written again."""
        for path in (self.root / self.store).rglob("*"):
            name = str(path.relative_to(self.root))
            if path.is_dir():
                self._directories.add(name)
            elif path.name not in self._ignored:
                self._files[name] = -1

    def put(self, image: Image) -> None:
        """Make the directory this image."""
        self._take_back()
        wanted = set(image.directories)
        for name in [n for n in self._files if n not in image.files]:
            os.unlink(f"{self.root}/{name}")  # noqa: PTH108 - strings: this runs a million times
            del self._files[name]
        for name in sorted(self._directories - wanted, reverse=True):
            os.rmdir(f"{self.root}/{name}")  # noqa: PTH106
        for name in sorted(wanted - self._directories):
            os.mkdir(f"{self.root}/{name}")  # noqa: PTH102
        self._directories = wanted
        for name, blob in image.files.items():
            if self._files.get(name) != blob.key:
                self._write(name, blob.data)
                self._files[name] = blob.key
        self._put_memory(image)

    def _take_back(self) -> None:
        """What recovery touched is unknown now: files go, directories are as they are."""
        for name in self.touched:
            path = f"{self.root}/{name}"
            if os.path.isdir(path):  # noqa: PTH112
                self._directories.add(name)
                continue
            self._directories.discard(name)
            self._files.pop(name, None)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(path)  # noqa: PTH108
        self._tracking.touched.clear()

    def _put_memory(self, image: Image) -> None:
        tops = {name.partition("/")[0] for name in image.memory} | self._memory
        for top in tops:
            shutil.rmtree(self.root / top, ignore_errors=True)
        self._memory = tops
        for name, data in image.memory.items():
            os.makedirs(os.path.dirname(f"{self.root}/{name}"), mode=0o700, exist_ok=True)  # noqa: PTH103, PTH120
            self._write(name, data)

    def _write(self, name: str, data: bytes) -> None:
        path = f"{self.root}/{name}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108 - it may have another name
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            view: Any = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        finally:
            os.close(fd)

    def difference(self, image: Image) -> str | None:
        """What is there and should not be, or the other way round, in words; None: nothing."""
        found = {}
        for path in (self.root / self.store).rglob("*"):
            if path.is_file() and path.name not in self._ignored:
                found[str(path.relative_to(self.root))] = path.read_bytes()
        for name in sorted(found.keys() | image.files.keys()):
            wanted = image.files.get(name)
            if wanted is None or found.get(name) != wanted.data:
                return f"{name} is {'not ' if name not in found else ''}there, or another"
        return None
