"""Named places at which a test may make the store fail.

Nothing happens at a point unless a test armed it in this process. Points are listed here so that
a test can go through all of them.
"""

import errno
import os
import signal
from collections.abc import Callable

POINTS = (
    "commit.computed",
    "commit.published",
    "freeze.switched",
    "seal.segment_written",
    "seal.segments_written",
    "seal.published",
    "seal.patched",
    "snapshot.published",
    "fold.chunk_written",
    "fold.base_written",
    "fold.published",
    "fold.swapped",
    "merge.segment_written",
    "merge.published",
    "merge.swapped",
    "restore.published",
    "restore.snapshots_dropped",
)
_armed: dict[str, tuple[int, Callable[[], None]]] = {}
_hits: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Do what was armed for this point, if anything."""
    if not _armed:
        return
    _hits[name] = _hits.get(name, 0) + 1
    armed = _armed.get(name)
    if armed is not None and _hits[name] == armed[0]:
        armed[1]()


def kill() -> None:
    """Die like kill -9: no handler, no cleanup."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail_with_full_disk() -> None:
    """Fail as a write on a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def arm(name: str, action: Callable[[], None] = kill, *, hit: int = 1) -> None:
    """Do `action` when the point is reached for the `hit`-th time from now on."""
    if name not in POINTS:
        raise ValueError(f"no failpoint {name!r}; there are {', '.join(POINTS)}")
    _hits.pop(name, None)
    _armed[name] = (hit, action)


def disarm() -> None:
    """Forget everything armed."""
    _armed.clear()
    _hits.clear()
