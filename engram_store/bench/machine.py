"""What the numbers were measured on."""

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from engram_store.engine.memory import memory_limit_bytes

_DISTRIBUTIONS = ("engram-store", "numpy", "numba", "llvmlite", "torch", "grpcio", "protobuf")
_PROJECT = Path(__file__).parents[2]
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
_GIT_SECONDS = 10.0


def describe_machine() -> dict[str, Any]:
    """Processor, memory, kernel, versions, load and date, before anything is measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _first_value("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "memory_limit_bytes": memory_limit_bytes(),
        "kernel": f"{platform.system()} {platform.release()}",
        "transparent_huge_pages": {
            "anonymous": chosen(_HUGE_PAGES / "enabled"),
            "shared": chosen(_HUGE_PAGES / "shmem_enabled"),
        },
        "python": platform.python_version(),
        "versions": {name: found for name in _DISTRIBUTIONS if (found := version_of(name))},
        "revision": revision_of(_PROJECT),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def describe_directory(directory: Path) -> dict[str, Any]:
    """File system and device below the directory in which is measured; None: not known."""
    number = directory.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    found = _mount_of(device, Path("/proc/self/mountinfo").read_text())
    kind, source, options = found or (None, None, None)
    return {"file_system": kind, "mount_options": options, "device": source}


def _mount_of(device: str, mounts: str) -> tuple[str, str, str] | None:
    """(file system, device, options) of a device number "major:minor" in a mountinfo.

    Only the options of the mount: those of the file system may hold paths of the host.
    """
    for line in mounts.splitlines():
        place, _, kind = line.partition(" - ")
        fields, (file_system, source, *_) = place.split(), kind.split()
        if fields[2] == device:
            return file_system, source, fields[5]
    return None


def chosen(setting: Path) -> str | None:
    """The word in brackets of a kernel setting such as `always [madvise] never`."""
    try:
        words = setting.read_text().split()
    except OSError:
        return None
    return next((word.strip("[]") for word in words if word.startswith("[")), None)


def revision_of(project: Path) -> str | None:
    """Commit of a checkout, with "-dirty" when it was changed since; None: it is none."""
    git = shutil.which("git")
    if git is None or not (project / ".git").exists():
        return None
    command = [git, "-C", str(project), "describe", "--always", "--abbrev=12", "--dirty"]
    try:
        run = subprocess.run(  # noqa: S603 - arguments are our own
            command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None


def version_of(distribution: str) -> str | None:
    """Its version; None: it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _first_value(path: str, key: str) -> str | None:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
