"""Going back to a snapshot without opening the store as it is.

What the store is now may be the very reason to go back: a working manifest that is damaged, or a
file that only it names. Nothing of it has to be sound here.
"""

import contextlib
import re
import secrets
from dataclasses import replace
from pathlib import Path

from engram_store.engine.catalog import Catalog, check_files, check_pins
from engram_store.engine.journal import remove_journals
from engram_store.engine.placement import StoreLock, disk_directory, shared_directory
from engram_store.errors import StoreFileError
from engram_store.layout.disk import Disk
from engram_store.layout.files import remove_tree, sync_directory
from engram_store.layout.manifest import (
    Manifest,
    check_owner,
    read_manifest,
    write_current,
)
from engram_store.layout.metadata import StoreMetadata
from engram_store.layout.paths import StorePaths
from engram_store.layout.snapshots import Wanted, find_snapshot

_SEGMENT = re.compile("[0-9]{6,15}")
_LINEAGE_BITS = 40
"""Of the leap to a lineage that no memtable or journal can be of, when the last one is unknown."""


def rewind(
    paths: StorePaths, metadata: StoreMetadata, snapshot: Wanted, disk: Disk
) -> StoreFileError | None:
    """Make a snapshot the store's state; everything newer is forgotten.

    Returns:
        What was wrong with the working manifest; None: nothing.

    Raises:
        StoreLockedError, SnapshotMismatchError, ProtocolError (newer snapshots are pinned):
            nothing changed.
        StoreFileError: the snapshot, or a file that it names, is damaged; nothing changed.
        DiskFullError: the store is as it was, or at the snapshot.
    """
    lock = StoreLock(paths)
    try:
        return _rewind(paths, metadata, snapshot, disk)
    finally:
        lock.release()


def _rewind(
    paths: StorePaths, metadata: StoreMetadata, snapshot: Wanted, disk: Disk
) -> StoreFileError | None:
    problem, current, steps = None, None, paths.snapshot_steps()
    try:
        current, _ = read_manifest(paths)
        check_owner(paths.current, current, metadata.store_id)
        # Later ones than the store itself never happened.
        steps = [known for known in steps if known <= current.step]
    except StoreFileError as error:
        problem, current = error, None
    wanted = find_snapshot(paths, metadata, steps, snapshot)
    check_pins(paths, metadata.store_id, steps, wanted.step)
    check_files(paths, metadata, wanted)
    sync_directory(paths.snapshots, disk)  # a killed process may have named it just now
    memtables = current.memtables if current is not None else ""
    goal = replace(
        wanted,
        lineage=_next_lineage(paths, steps, current),
        # There may be two memtables beyond the newest that was sealed. Numbers never repeat.
        sealed=_newest_sealed(paths, metadata, wanted, current) + 2,
        closed=True,
        memtables=memtables,
    )
    write_current(paths, goal, disk)
    # From here on the store is at the snapshot; an opening would do the rest as well.
    catalog = Catalog(paths, metadata, disk)
    catalog.drop_newer_snapshots()
    directories = [shared_directory(paths, metadata.store_id, None), disk_directory(paths)]
    if memtables:
        directories.append(shared_directory(paths, metadata.store_id, Path(memtables)))
    for directory in directories:
        with contextlib.suppress(OSError):  # they are of another lineage: nobody will use them
            remove_tree(directory, disk)
    remove_journals(paths, disk)
    catalog.mark(closed=True)
    catalog.collect_garbage()
    return problem


def _next_lineage(paths: StorePaths, steps: list[int], current: Manifest | None) -> int:
    """A lineage that never was: what was left behind in memory or journals must not be taken."""
    if current is not None:
        return current.lineage + 1
    known = [manifest.lineage for manifest in _readable(paths, steps)]
    return max(known, default=1) + 1 + secrets.randbits(_LINEAGE_BITS)


def _newest_sealed(
    paths: StorePaths, metadata: StoreMetadata, wanted: Manifest, current: Manifest | None
) -> int:
    """The highest number of a memtable whose segments are, or may be, among the files."""
    known = [wanted.sealed, 0 if current is None else current.sealed]
    for layer in metadata.tables:
        directory = paths.segment(layer, 0).parent
        if directory.is_dir():
            names = (entry.name for entry in directory.iterdir())
            known += [int(name) for name in names if _SEGMENT.fullmatch(name)]
    return max(known)


def _readable(paths: StorePaths, steps: list[int]) -> list[Manifest]:
    manifests = []
    for step in steps:
        with contextlib.suppress(StoreFileError):
            manifests.append(read_manifest(paths, step)[0])
    return manifests
