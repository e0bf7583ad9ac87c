"""What people do with the snapshots of a store directory; the store may be at work.

from engram_store import snapshots

snapshots.pin("my.engram", "newest", "before-lr-change")
snapshots.export("my.engram", "before-lr-change", "copy.engram")
"""

from pathlib import Path

from engram_store.engine.catalog import Catalog
from engram_store.engine.garbage import GarbageReport, check_keep, collect
from engram_store.engine.placement import StoreLock
from engram_store.errors import ConfigError
from engram_store.layout.create import Progress
from engram_store.layout.disk import Disk
from engram_store.layout.export import ExportReport, export_snapshot
from engram_store.layout.manifest import read_manifest
from engram_store.layout.metadata import read_metadata
from engram_store.layout.paths import StorePaths
from engram_store.layout.pins import (
    Pin,
    check_pin_name,
    pin_names,
    read_pin,
    remove_pin,
    write_pin,
)
from engram_store.layout.snapshots import Wanted, held_snapshot
from engram_store.layout.usage import SnapshotInfo, list_snapshots
from engram_store.session import SnapshotRef

__all__ = [
    "ExportReport",
    "GarbageReport",
    "SnapshotInfo",
    "collect_garbage",
    "describe",
    "export",
    "pin",
    "unpin",
]


def describe(path: str | Path) -> list[SnapshotInfo]:
    """The snapshots of a store with their sizes and pins, oldest first.

    Args:
        path: the store's directory.

    Returns:
        Damaged ones too; they say so in `problem`.

    Raises:
        StoreNotFoundError, StoreFileError: what the store is cannot be read.
    """
    paths = StorePaths(Path(path))
    return list_snapshots(paths, read_metadata(paths))


def pin(
    path: str | Path, snapshot: Wanted, name: str, *, move: bool = False, disk: Disk | None = None
) -> SnapshotRef:
    """Keep a snapshot from being removed, under a name that can be used in place of its step.

    Args:
        path: the store's directory.
        snapshot: which one; `'newest'` too.
        name: at most 64 letters, digits, dots, dashes and underscores, a letter first.
        move: take the name away from the snapshot that has it now.
        disk: what changes files.

    Returns:
        The pinned snapshot. Pinning it twice under one name is fine.

    Raises:
        ConfigError: not a name, or another snapshot has it.
        SnapshotMismatchError: there is no such snapshot.
        StoreFileError, DiskFullError. Nothing changed, here as above.
    """
    check_pin_name(name)
    paths = StorePaths(Path(path))
    metadata = read_metadata(paths)
    with held_snapshot(paths, metadata, snapshot) as (_, ref):
        if not move and name in pin_names(paths):
            known = read_pin(paths, metadata.store_id, name)
            if (known.step, known.digest) != (ref.step, ref.digest):
                raise ConfigError(
                    f"{name!r} is the snapshot at step {known.step}; nothing was changed. Choose "
                    "another name, or move it (--move, move=True)"
                )
        wanted = Pin(name=name, step=ref.step, digest=ref.digest)
        write_pin(paths, metadata.store_id, wanted, disk or Disk())
    return ref


def unpin(path: str | Path, name: str, *, disk: Disk | None = None) -> None:
    """Take a pin away; its snapshot stays until something removes it.

    Raises:
        ConfigError: no name of a pin. SnapshotMismatchError: nothing is pinned under it.
    """
    paths = StorePaths(Path(path))
    remove_pin(paths, read_metadata(paths).store_id, name, disk or Disk())


def collect_garbage(
    path: str | Path,
    keep: int | None = None,
    *,
    dry_run: bool = False,
    disk: Disk | None = None,
) -> GarbageReport:
    """Remove older snapshots of a store that nobody trains, and files that nothing needs.

    A store that is open for training does it itself: `Store.collect_garbage`.

    Args:
        path: the store's directory.
        keep: how many of the newest snapshots stay, beside the pinned; None: all.
        dry_run: only tell what would go; then the store may be at work.
        disk: what changes files.

    Raises:
        StoreLockedError: a process trains it.
        ConfigError: `keep` is less than 1.
        StoreFileError: a snapshot or a pin is damaged; files stay where that is so.
    """
    check_keep(keep)
    paths, disk = StorePaths(Path(path)), disk or Disk()
    metadata = read_metadata(paths)
    if dry_run:
        current, _ = read_manifest(paths)
        return collect(paths, metadata, current, disk, keep=keep, dry_run=True)
    lock = StoreLock(paths)
    try:
        return Catalog(paths, metadata, disk).collect(keep=keep)
    finally:
        lock.release()


def export(
    path: str | Path,
    snapshot: Wanted,
    target: str | Path,
    *,
    copy: bool = False,
    progress: Progress | None = None,
    disk: Disk | None = None,
) -> ExportReport:
    """Make a new, independent store of one snapshot; a process may go on training the old one.

    Data files are hard links where the file system allows, which takes no space and no time to
    write; they are never changed, so that the stores share them safely. Every block is compared
    with its checksum. The new store has an id of its own, one snapshot, and no pins; checkpoints
    that name the exported snapshot go with it too.

    Args:
        path: the store's directory.
        snapshot: which one: its step, its reference, a pin's name, or 'newest'.
        target: directory to make.
        copy: share nothing with the old store, as a backup should.
        progress: told (bytes read, bytes to read).
        disk: what changes files.

    Raises:
        SnapshotMismatchError: no such snapshot, or a restore removed it meanwhile.
        StoreExistsError: something is at the target.
        ConfigError: the target is inside the store.
        StoreFileError: a file of the snapshot is damaged.
        DiskFullError. Nothing is at the target then, here as above.
    """
    paths = StorePaths(Path(path))
    return export_snapshot(
        paths,
        read_metadata(paths),
        snapshot,
        Path(target),
        copy=copy,
        progress=progress,
        disk=disk or Disk(),
    )
