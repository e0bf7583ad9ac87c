"""File systems whose power can be cut: loop mounts, shut down without writing their log."""

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

_SHUTDOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN."""
_WITHOUT_LOG = 2
"""What is in memory is gone, as with the power: neither data nor the log is written any more."""
IMAGE_BYTES = {"ext4": 96 << 20, "xfs": 320 << 20}
"""The least that mkfs takes, and room for a small store."""
_MKFS = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}


class NoPowerCutError(Exception):
    """Why the power cannot be cut on this machine."""


class PoweredDisk:
    """A file system in a file, mounted; made by `powered_disk`."""

    def __init__(self, kind: str, directory: Path) -> None:
        """Raises: NoPowerCutError."""
        self.kind, self.image, self.mounted = kind, directory / "image", directory / "mounted"
        if os.geteuid() != 0:
            raise NoPowerCutError("only root may mount file systems")
        if shutil.which(_MKFS[kind][0]) is None:
            raise NoPowerCutError(f"{_MKFS[kind][0]} is not installed")
        self.mounted.mkdir()
        with self.image.open("wb") as file:
            file.truncate(IMAGE_BYTES[kind])
        _run([*_MKFS[kind], str(self.image)])
        self.mount()

    def mount(self) -> None:
        """Mount; after a cut the kernel recovers the file system by its log."""
        _run(["mount", "-o", "loop", "-t", self.kind, str(self.image), str(self.mounted)])

    def cut(self) -> None:
        """Cut the power. Raises: NoPowerCutError."""
        fd = os.open(self.mounted, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _WITHOUT_LOG))
        except OSError as error:
            raise NoPowerCutError(f"{self.kind} cannot be shut down here: {error}") from error
        finally:
            os.close(fd)

    def unmount(self) -> None:
        """Let go of it; nobody may use it."""
        _run(["umount", str(self.mounted)])


def _run(command: list[str]) -> None:
    """Raises: NoPowerCutError."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoPowerCutError(f"{command[0]}: {done.stderr.strip() or done.returncode}")


@contextlib.contextmanager
def powered_disk(kind: str, directory: Path) -> Iterator[PoweredDisk]:
    """A new file system, removed in the end.

    Args:
        kind: 'ext4' or 'xfs'.
        directory: where the image and the mount point are.

    Raises:
        NoPowerCutError: root, mkfs, loop devices or the ioctl are missing.
    """
    disk = PoweredDisk(kind, directory)
    try:
        (disk.mounted / "probe").write_bytes(b"not synced")
        disk.cut()
        disk.unmount()
        disk.mount()
        if (disk.mounted / "probe").exists() and (disk.mounted / "probe").read_bytes():
            raise NoPowerCutError(f"{kind} kept what was never synced: that was no power cut")
        yield disk
    finally:
        if os.path.ismount(disk.mounted):
            disk.unmount()
        disk.image.unlink()
