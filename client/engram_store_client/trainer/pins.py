"""Pins on the snapshots that a Trainer's checkpoints name, so that no collection removes them."""

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from engram_store import snapshots
from engram_store.errors import EngramStoreError
from engram_store.session import Session, SnapshotRef

if TYPE_CHECKING:
    from engram_store_client.remote.session import RemoteSession

_LOG = logging.getLogger(__name__)
_CHECKPOINT = "checkpoint-"
"""Of a Trainer's directories; the global step follows."""


class PinBoard(Protocol):
    """Where a store keeps its pins."""

    def pin(self, snapshot: SnapshotRef, name: str) -> None:
        """Pin a snapshot; a pin of that name moves."""
        ...

    def unpin(self, name: str) -> None:
        """Take a pin away."""
        ...

    def pinned(self) -> Mapping[str, SnapshotRef]:
        """Every pin."""
        ...


class _InDirectory:
    """Of a store that this process has open."""

    def __init__(self, path: Path, store_id: str) -> None:
        self._path, self._store_id = path, store_id

    def pin(self, snapshot: SnapshotRef, name: str) -> None:
        snapshots.pin(self._path, snapshot, name, move=True)

    def unpin(self, name: str) -> None:
        snapshots.unpin(self._path, name)

    def pinned(self) -> Mapping[str, SnapshotRef]:
        return _by_name(self._store_id, snapshots.describe(self._path))


class _OfProcess:
    """Of a store process."""

    def __init__(self, session: "RemoteSession") -> None:
        self._session = session

    def pin(self, snapshot: SnapshotRef, name: str) -> None:
        with self._session.administration() as admin:
            admin.pin(snapshot, name, self._session.store_name, move=True)

    def unpin(self, name: str) -> None:
        with self._session.administration() as admin:
            admin.unpin(name, self._session.store_name)

    def pinned(self) -> Mapping[str, SnapshotRef]:
        with self._session.administration() as admin:
            described = admin.describe_snapshots(self._session.store_name)
        return _by_name(self._session.store_id, described)


def _by_name(store_id: str, described: list[snapshots.SnapshotInfo]) -> dict[str, SnapshotRef]:
    return {
        name: SnapshotRef(store_id=store_id, step=info.step, digest=info.digest)
        for info in described
        for name in info.pins
    }


def board_of(session: Session) -> PinBoard | None:
    """Where a session's store keeps its pins; None: it keeps none, or not for this session."""
    if hasattr(session, "administration"):
        return _OfProcess(cast("RemoteSession", session))
    path = getattr(session, "path", None)
    return None if path is None else _InDirectory(Path(path), session.store_id)


class CheckpointPins:
    """The pins of one Trainer's checkpoints: one for each that is still there.

    They are a help, not a promise: a store that cannot be asked is reported, and training goes on.

    Args:
        board: of the store; None: nothing is pinned.
        run: the Trainer's output directory.
        memory: name of the memory whose tables they are.
    """

    def __init__(self, board: PinBoard | None, run: Path, memory: str) -> None:
        digest = hashlib.sha256(f"{run.resolve()}\n{memory}".encode()).hexdigest()[:12]
        self._board, self._run, self._prefix = board, run, f"trainer-{digest}-"

    def follow(self, saved: tuple[int, SnapshotRef] | None = None) -> None:
        """Pin what was saved; unpin what belongs to checkpoints that are gone.

        Args:
            saved: a checkpoint's global step and its snapshot.
        """
        if self._board is None:
            return
        try:
            if saved is not None:
                self._board.pin(saved[1], f"{self._prefix}{saved[0]}")
            for name in self._ours():
                number = name.removeprefix(self._prefix)
                if not (self._run / f"{_CHECKPOINT}{number}").is_dir():
                    self._board.unpin(name)
        except EngramStoreError as error:
            _LOG.warning("snapshots of checkpoints cannot be pinned: %s", error)

    @contextlib.contextmanager
    def released_after(self, snapshot: SnapshotRef) -> Iterator[list[int]]:
        """Let a restore forget what is newer than a snapshot, which pins would forbid.

        Yields:
            Global steps of the checkpoints whose tables go. If the body fails their pins are
            there again.
        """
        newer = {n: ref for n, ref in self._ours().items() if ref.step > snapshot.step}
        board = self._board
        for name in newer:
            assert board is not None
            board.unpin(name)
        try:
            yield sorted(int(name.removeprefix(self._prefix)) for name in newer)
        except BaseException:
            for name, ref in newer.items():
                assert board is not None
                with contextlib.suppress(EngramStoreError):
                    board.pin(ref, name)
            raise

    def _ours(self) -> dict[str, SnapshotRef]:
        if self._board is None:
            return {}
        ours = re.compile(re.escape(self._prefix) + r"\d+")
        return {n: ref for n, ref in self._board.pinned().items() if ours.fullmatch(n)}
