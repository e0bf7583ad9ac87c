"""The Unix socket's place on disk: in a directory of its own, and listened on by one process."""

import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engram_store.errors import ConfigError


@contextmanager
def claim_socket(path: Path) -> Iterator[None]:
    """Make a path free to listen on, for this process alone; remove the socket afterwards.

    gRPC replaces a socket that is already there without asking, so a lock file beside it decides
    who may. The lock ends with the process, however it ends; the file stays, because removing it
    could take it from a process that just opened it.

    Raises:
        ConfigError: others can enter the directory, another process listens there, or there is a
            file that is no socket. Nothing was removed.
    """
    _make_private_directory(path.parent)
    descriptor = _lock(path)
    try:
        _remove_stale(path)
        yield
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _make_private_directory(directory: Path) -> None:
    """Raises: ConfigError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except OSError as error:
        raise ConfigError(f"the socket's directory cannot be made: {error}") from None
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{directory} has mode {stat.S_IMODE(found.st_mode):04o} and belongs to user "
            f"{found.st_uid}; the socket's directory must be this user's own and closed to others "
            "(0700), because whoever reaches the socket can train the store. Run chmod 700, or "
            "choose another place for --socket"
        )


def _lock(path: Path) -> int:
    """Raises: ConfigError."""
    name = path.with_name(path.name + ".lock")
    try:
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"the socket's lock file cannot be opened: {error}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"{path}: {_IN_USE}") from None
    return descriptor


_IN_USE = "another process listens on this socket; stop it, or choose another --socket"


def _remove_stale(path: Path) -> None:
    """Raises: ConfigError."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} is not a socket; move it away, or choose another --socket")
    with socket.socket(socket.AF_UNIX) as probe, suppress(ConnectionRefusedError):
        probe.connect(str(path))
        raise ConfigError(f"{path}: {_IN_USE}")
    path.unlink()
