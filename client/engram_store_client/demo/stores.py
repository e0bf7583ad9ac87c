"""How the demo's trainers reach their stores: through a store process, or as files of their own."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engram_store.errors import ConfigError
from engram_store.session import Session
from engram_store.slots import slot_door
from engram_store_client.demo.process import StoreProcess, serve
from engram_store_client.transport import connect

_SOCKET_BYTES = 107
"""Linux's limit on the path of a Unix socket."""
_NOT_IN_ADDRESSES = "%?#"
"""gRPC's addresses give them a meaning of their own."""
_EMBEDDED = "one process"


@dataclass(frozen=True, slots=True)
class ServedStore:
    """A store that trainers can connect to."""

    address: str | Path
    """For `connect`."""
    process: StoreProcess | None
    """None: whoever connects opens the store itself."""

    @contextmanager
    def train(self) -> Iterator[Session]:
        """A session of this process. Raises: see `connect`."""
        with connect(self.address) as session:
            if self.process is not None:
                self.process.on_failure = session.close  # nobody need wait for it to come back
            yield session


class Stores:
    """Serves one store after the other.

    Args:
        log: gets the log lines of store processes.
        sockets: directory of their sockets; None: no processes, stores are opened where they
            are used.
    """

    def __init__(self, log: Path, sockets: Path | None) -> None:
        self._log, self._sockets = log, sockets

    @property
    def embedded(self) -> bool:
        """Whether there are no store processes."""
        return self._sockets is None

    @contextmanager
    def serve(self, path: Path) -> Iterator[ServedStore]:
        """Serve a store for the length of a block. Raises: StoreProcessError."""
        if self._sockets is None:
            yield ServedStore(path, None)
            return
        with serve(path, self._sockets / f"{path.stem}.sock", self._log) as process:
            yield ServedStore(process.url, process)


def transport(session: Session) -> str:
    """How rows reach this trainer, for people."""
    return str(getattr(session, "transport", _EMBEDDED))


@contextmanager
def socket_directory(wanted: Path, longest: str) -> Iterator[Path]:
    """A directory for sockets: the wanted one, or a temporary one if its name does not do.

    Args:
        wanted: absolute; need not exist.
        longest: the longest name that a socket will have there.

    Raises:
        ConfigError: the name of the temporary one does not do either.
    """
    if usable(wanted / longest):
        yield wanted
        return
    with tempfile.TemporaryDirectory(prefix="engram-") as name:
        path = Path(name) / longest
        if not usable(path):
            raise ConfigError(
                f"{path} cannot be a socket: allowed are paths of at most {_SOCKET_BYTES} bytes "
                f"(with .slots) without {' '.join(_NOT_IN_ADDRESSES)}. Name a shorter directory "
                "by --dir, or set TMPDIR to one"
            )
        yield path.parent


def usable(socket: Path) -> bool:
    """Whether a store process can listen there, and on the second socket beside it. Pure."""
    name = os.fsencode(slot_door(socket))
    return len(name) <= _SOCKET_BYTES and not set(_NOT_IN_ADDRESSES) & set(str(socket))
