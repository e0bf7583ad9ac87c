"""What probably keeps memory from being pinned here, and what to do about it."""

import resource
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What is known to get in the way of pinning."""

    memlock_bytes: int | None
    """Soft limit of locked memory; None: unlimited."""
    wsl: bool = False
    container: bool = False
    integrated: bool = False
    """The GPU shares the host's memory."""


def look_around(*, integrated: bool = False) -> Surroundings:
    """The surroundings of this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    marks = (Path("/.dockerenv"), Path("/run/.containerenv"))
    return Surroundings(
        memlock_bytes=None if soft == resource.RLIM_INFINITY else soft,
        wsl="microsoft" in _read("/proc/version").lower(),
        container=any(mark.exists() for mark in marks),
        integrated=integrated,
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def advise(length: int, around: Surroundings) -> str:
    """Why a registration of `length` bytes probably failed, and what to do. Pure."""
    found = []
    if around.wsl:
        found.append(
            "WSL pins only part of the memory: raise `memory` in .wslconfig, or train on Linux"
        )
    if around.memlock_bytes is not None and around.memlock_bytes < length:
        where = "docker run --ulimit memlock=-1" if around.container else "ulimit -l unlimited"
        found.append(
            f"the limit of locked memory is {around.memlock_bytes:,} bytes: raise it ({where}; "
            "LimitMEMLOCK=infinity in a systemd unit)"
        )
    elif around.container:
        found.append("a container may hold too little memory: raise its limit")
    if around.integrated:
        found.append("this GPU shares the host's memory, where little can be pinned")
    if not found:
        found.append("free host memory, or announce windows of fewer tokens")
    return "; ".join(found)
