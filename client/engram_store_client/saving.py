"""Saving a memory into a directory, and attaching what was saved to a model."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from engram_store import snapshots
from engram_store.errors import (
    ConfigError,
    ReadOnlyError,
    SnapshotMismatchError,
    StoreExistsError,
    StoreNotFoundError,
)
from engram_store.layout.metadata import read_metadata
from engram_store.layout.paths import StorePaths
from engram_store.session import Session, SnapshotRef
from engram_store_client import card, checkpoint
from engram_store_client.checkpoint import Checkpoint
from engram_store_client.transport import connect

if TYPE_CHECKING:
    from engram_store_client.memory import Memory

Tables: TypeAlias = Literal["reference", "export"]
Access: TypeAlias = Literal["read", "train"]
_EXPORTED = "tables-"
"""With the snapshot's step and the start of its digest: names of exported stores."""


def save_memory(
    memory: "Memory",
    directory: Path,
    *,
    tables: Tables,
    store_directory: Path | str | None = None,
    tell_location: bool = True,
) -> None:
    """Write a checkpoint; see `Memory.save_pretrained`.

    Args:
        memory: attached, with no commit under way.
        directory: made if it is not there.
        tables: whether they go along.
        store_directory: where the store's files are, if the session does not say.
        tell_location: write down where the store is.
    """
    if tables not in ("reference", "export"):
        raise ConfigError(f"tables is 'reference' or 'export', not {tables!r}")
    _check_name(directory, memory.name)
    source = _directory_of(memory.session, store_directory)
    if tables == "export" and source is None:
        raise _cannot_export(directory)
    snapshot = memory.session.snapshot()
    exported = None
    if tables == "export" and source is not None:
        exported = _export(source, snapshot, directory)
    gates = {number: memory.gate(number) for number in memory.layers}
    description = checkpoint.describe(
        memory.session,
        gates,
        snapshot,
        name=memory.name,
        step=memory.step,
        exported=exported,
        location=None if source is None or not tell_location else str(source),
    )
    checkpoint.save(directory, gates, description)
    _forget_older(directory, exported, source)
    card.write_card(directory, description, memory.session, memory.model)


def _check_name(directory: Path, name: str) -> None:
    """Refuse to write over another memory's checkpoint. Raises: ConfigError."""
    try:
        other = checkpoint.read(directory).description.name
    except (OSError, ConfigError):
        return  # none, or none that could be used
    if other != name:
        raise ConfigError(
            f"{directory} holds a checkpoint of memory {other!r}, this is {name!r}; nothing was "
            "written. Give each memory a directory of its own"
        )


def _directory_of(session: Session, told: Path | str | None) -> Path | None:
    """Where this machine sees the files of a session's store; None: not known.

    Raises:
        StoreNotFoundError, StoreFileError: there is no store where the caller says.
        ConfigError: there is another one.
    """
    if told is None:
        path = getattr(session, "path", None)  # of a store within this process
        return path.absolute() if isinstance(path, Path) else None
    found = read_metadata(StorePaths(Path(told))).store_id
    if found != session.store_id:
        raise ConfigError(
            f"{told} is store {found!r}, the session is of {session.store_id!r}; "
            "store_directory names the directory that the store process serves"
        )
    return Path(told).absolute()


def _cannot_export(directory: Path) -> ConfigError:
    return ConfigError(
        "this session cannot export tables: a store process does not send its files. Where its "
        "directory can be read from here, pass store_directory=...; elsewhere save with "
        "tables='reference', run `engram-store export STORE newest OUT` on its machine, and pass "
        f"OUT to from_pretrained({str(directory)!r}, session=connect(OUT))"
    )


def _export(source: Path, snapshot: SnapshotRef, directory: Path) -> str:
    """Put a snapshot into the directory as a store; returns its name there."""
    if source.parent == directory.absolute() and source.name.startswith(_EXPORTED):
        return source.name  # it is trained in place: the snapshot is there already
    name = f"{_EXPORTED}{snapshot.step:09}-{snapshot.digest[:8]}"
    with contextlib.suppress(StoreExistsError):  # complete, because exports appear at once
        snapshots.export(source, snapshot, directory / name)
    return name


def _forget_older(directory: Path, exported: str | None, source: Path | None) -> None:
    """Remove tables that older checkpoints in the directory had along."""
    for path in directory.glob(f"{_EXPORTED}*"):
        if path.name != exported and path.absolute() != source:
            shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------- and back


def open_tables(saved: Checkpoint, access: Access) -> Session:
    """A session with the tables of a checkpoint, where it says that they are.

    Raises:
        SnapshotMismatchError: a checkpoint without its snapshot.
        StoreLockedError: somebody else trains that store.
        StoreFileError: it is damaged.
    """
    if access not in ("read", "train"):
        raise ConfigError(f"access is 'read' or 'train', not {access!r}")
    told = saved.description
    place = saved.path.parent / told.exported if told.exported is not None else told.location
    if place is None:
        raise SnapshotMismatchError(
            f"{_without(saved)}: it says nothing about where its store is. Pass session=connect"
            "(...) to the store, or save it with tables='export'"
        )
    try:
        if access == "read":
            return connect(Path(place), "read", snapshot=told.snapshot)
        return connect(Path(place), "train")
    except (StoreNotFoundError, SnapshotMismatchError) as error:
        raise SnapshotMismatchError(
            f"{_without(saved)}: {error}. Pass session=connect(...) to the store or to an export "
            "of that snapshot"
        ) from error


def take_back(saved: Checkpoint, session: Session) -> None:
    """Make a session's tables those of the checkpoint, or see that they are.

    Raises:
        SnapshotMismatchError: the store has no such snapshot, or a session that only reads is
            at another step. Nothing changed.
    """
    try:
        checkpoint.restore_tables(saved, session)
    except ReadOnlyError as error:
        if session.step != saved.snapshot.step:
            raise SnapshotMismatchError(
                f"{_without(saved)}: the session reads store {session.store_id!r} at step "
                f"{session.step}, the checkpoint is of step {saved.snapshot.step}. Open the store "
                "with snapshot=..., or for training, which goes back to the snapshot"
            ) from error


def _without(saved: Checkpoint) -> str:
    wanted = saved.snapshot
    return (
        f"{saved.path.parent} is a checkpoint without its snapshot (step {wanted.step} of store "
        f"{wanted.store_id!r})"
    )


@contextlib.contextmanager
def tables_of(saved: Checkpoint, session: Session | None, access: Access) -> Iterator[Session]:
    """The session that was given, or one that is opened, and closed again if the block fails."""
    if session is not None:
        yield session
        return
    opened = open_tables(saved, access)
    try:
        yield opened
    except BaseException:
        opened.close()
        raise
