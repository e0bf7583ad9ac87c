"""Memory cgroups for processes under test, version 1 and 2."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_ROOT = Path("/sys/fs/cgroup")
_EMPTY_SECONDS = 30.0
_ENTER = (
    "import os, sys, pathlib; "
    "pathlib.Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid())); "
    "os.execv(sys.argv[2], sys.argv[2:])"
)


@dataclass(frozen=True, slots=True)
class Group:
    """A memory cgroup with a limit."""

    path: Path
    version: int

    def command(self, *command: str | Path) -> list[str]:
        """A command line that runs another, given with its full path, in the group."""
        return [sys.executable, "-c", _ENTER, str(self.path), *map(str, command)]

    def held_bytes(self) -> int:
        """Anonymous and shared memory: what no page of a file makes room for."""
        return held_bytes(self.path)

    @property
    def peak_bytes(self) -> int:
        """The most that was used, page cache included."""
        name = "memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"
        return int((self.path / name).read_text())

    @property
    def reclaims(self) -> int:
        """How often the limit was met, and pages of files had to go."""
        if self.version == 1:
            return int((self.path / "memory.failcnt").read_text())
        events = dict(
            line.split() for line in (self.path / "memory.events").read_text().split("\n") if line
        )
        return int(events["max"])


def held_bytes(group: Path) -> int:
    """Anonymous and shared memory of a group."""
    lines = (group / "memory.stat").read_text().splitlines()
    stat = {name: int(value) for name, value in (line.split() for line in lines)}
    return stat.get("anon", stat.get("rss", 0)) + stat["shmem"]


@contextmanager
def memory_group(name: str, limit_bytes: int) -> Iterator[Group]:
    """A group for processes of a test; they must have ended on leaving. Skips where none can be."""
    parent, version = _parent()
    path = parent / f"engram-store-test-{os.getpid()}-{name}"
    limit = path / ("memory.limit_in_bytes" if version == 1 else "memory.max")
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        try:
            limit.write_text(str(limit_bytes))
        except OSError as error:
            pytest.skip(f"no limit can be set on a memory cgroup here: {error}")
        yield Group(path, version)
    finally:
        _remove(path)


def _parent() -> tuple[Path, int]:
    """Version 1 below this process's own group; 2 below the root, which may have others."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            return _ROOT / "memory" / path.lstrip("/"), 1
    return _ROOT, 2


def _remove(path: Path) -> None:
    """A process that has just ended is still in it for a moment."""
    until = time.monotonic() + _EMPTY_SECONDS
    while True:
        try:
            path.rmdir()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return
