"""How many bytes reach a disk, and a limit on the memory of a process: what the kernel tells."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

_SECTOR_BYTES = 512
"""Of the kernel's counters, whatever the device has."""
_WRITTEN_SECTORS = 6
"""Where they are in a block device's `stat`."""
_CGROUPS = Path("/sys/fs/cgroup")
_EMPTY_SECONDS = 10.0


def device_of(directory: Path) -> Path | None:
    """The counters of the block device below a directory; None: there is none, or it is hidden."""
    number = directory.stat().st_dev
    counters = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")
    return counters if counters.is_file() else None


def device_bytes(counters: Path) -> int:
    """Bytes written to a block device since it was there, by everybody."""
    return int(counters.read_text().split()[_WRITTEN_SECTORS]) * _SECTOR_BYTES


def process_bytes() -> int:
    """Bytes this process caused to be written: pages made dirty, less those dropped unwritten."""
    lines = Path("/proc/self/io").read_text().splitlines()
    values = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return values["write_bytes"] - values["cancelled_write_bytes"]


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A memory cgroup with a limit, for a process that enters it by `enter`; gone afterwards.

    Raises:
        OSError: this user may not make one here.
    """
    parent, limit = _parent()
    group = parent / f"engram-store-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / limit).write_text(str(limit_bytes))
        yield group
    finally:
        _remove(group)


def _parent() -> tuple[Path, str]:
    """Where a group can be made, and the name of its limit.

    Version 1 below this process's own. Version 2 below the root, because a group that has
    processes cannot have others with limits below it.
    """
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            return _CGROUPS / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
    return _CGROUPS, "memory.max"


def enter(group: str) -> None:
    """Move this process into a cgroup; memory that it has already stays where it was counted."""
    (Path(group) / "cgroup.procs").write_text(str(os.getpid()))


def _remove(group: Path) -> None:
    """A process that has just ended is still in it for a moment."""
    until = time.monotonic() + _EMPTY_SECONDS
    while True:
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return
