"""Snapshots by step, by reference or by name, and how they are kept while they are read.

Whoever reads a snapshot's files holds it: a shared lock (flock) on its manifest. Who removes
snapshots takes that lock alone, for the moment of the removal, and leaves those that are held.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from engram_store.errors import SnapshotMismatchError, StoreFileError
from engram_store.layout.disk import Disk
from engram_store.layout.files import remove_file
from engram_store.layout.manifest import (
    Manifest,
    Origin,
    check_layers,
    check_owner,
    read_manifest,
)
from engram_store.layout.metadata import StoreMetadata
from engram_store.layout.paths import StorePaths
from engram_store.layout.pins import NEWEST, pins_by_step, read_pin, read_pins
from engram_store.session import SnapshotRef

Wanted = SnapshotRef | int | str
"""A snapshot: beyond doubt, by its step, or by the name of a pin (or 'newest')."""


def counted_steps(paths: StorePaths) -> list[int]:
    """Steps of the snapshots that count, ascending.

    Later ones than the store itself never happened: a restore is about to remove them. Where the
    working manifest is damaged, all count.
    """
    steps = paths.snapshot_steps()
    try:
        current, _ = read_manifest(paths)
    except StoreFileError:
        return steps
    return [step for step in steps if step <= current.step]


def find_snapshot(
    paths: StorePaths, metadata: StoreMetadata, steps: list[int], wanted: Wanted
) -> Manifest:
    """The manifest of a snapshot; see `locate_snapshot`."""
    return locate_snapshot(paths, metadata, steps, wanted)[0]


def locate_snapshot(
    paths: StorePaths, metadata: StoreMetadata, steps: list[int], wanted: Wanted
) -> tuple[Manifest, SnapshotRef]:
    """The manifest of a snapshot, and its name in this store.

    Args:
        paths, metadata: of the store.
        steps: snapshots that count.
        wanted: of another store too, if this store was exported from exactly that snapshot.

    Raises:
        SnapshotMismatchError: it is of another store, does not exist, or is another one.
        StoreFileError: its manifest, or the pin, is damaged.
    """
    store_id, ref = metadata.store_id, named_snapshot(paths, metadata, steps, wanted)
    step = ref if isinstance(ref, int) else ref.step
    if isinstance(ref, SnapshotRef) and ref.store_id != store_id:
        _check_origin(paths, store_id, steps, ref)
        ref = ref.step
    have = ", ".join(map(str, steps)) or "none"
    absent = SnapshotMismatchError(
        f"asked for the snapshot at step {step}; store {store_id} has snapshots at steps {have}. "
        "If it was removed, to keep fewer or by going back past it, nothing brings it back; pin "
        "those that checkpoints name"
    )
    if step not in steps:
        raise absent
    try:
        manifest, digest = read_manifest(paths, step)
    except StoreFileError:
        if os.path.lexists(paths.snapshot(step)):
            raise
        raise absent from None  # removed since the steps were listed
    check_owner(paths.snapshot(step), manifest, store_id)
    check_layers(paths.snapshot(step), manifest, metadata.tables)
    if isinstance(ref, SnapshotRef) and ref.digest != digest:
        raise SnapshotMismatchError(
            f"the checkpoint names snapshot {ref.digest[:16]} at step {step}, this store's "
            f"snapshot there is {digest[:16]}: the tables were trained on another way since; use "
            f"the checkpoint saved with it (snapshots at steps {have})"
        )
    return manifest, SnapshotRef(store_id=store_id, step=step, digest=digest)


def named_snapshot(
    paths: StorePaths, metadata: StoreMetadata, steps: list[int], wanted: Wanted
) -> SnapshotRef | int:
    """The snapshot that a name stands for; anything else is returned as it is.

    Raises:
        SnapshotMismatchError: nothing has that name. StoreFileError: the pin is damaged.
    """
    if not isinstance(wanted, str):
        return wanted
    if wanted == NEWEST:
        return max(steps, default=0)
    pin = read_pin(paths, metadata.store_id, wanted)
    return SnapshotRef(store_id=metadata.store_id, step=pin.step, digest=pin.digest)


def _check_origin(paths: StorePaths, store_id: str, steps: list[int], ref: SnapshotRef) -> None:
    """Raises: SnapshotMismatchError: this store was not exported from that very snapshot."""
    origins: dict[int, tuple[Origin, ...]] = {}
    for step in steps:
        with contextlib.suppress(StoreFileError):
            origins[step] = read_manifest(paths, step)[0].origins
    asked = Origin(store_id=ref.store_id, step=ref.step, digest=ref.digest)
    if asked in origins.get(ref.step, ()):
        return
    related = [o for found in origins.values() for o in found if o.store_id == ref.store_id]
    if related:
        known = " and ".join(f"step {o.step} ({o.digest[:16]})" for o in related)
        problem = (
            f"an export of it from {known}, and the checkpoint names snapshot {ref.digest[:16]} at "
            f"step {ref.step}. Use the checkpoint of the step that was exported, or the store that "
            "the checkpoint was saved with"
        )
    else:
        problem = f"{store_id}; open the store that was trained with it"
    raise SnapshotMismatchError(
        f"the checkpoint belongs to store {ref.store_id} (step {ref.step}), this is store {problem}"
    )


@contextlib.contextmanager
def hold_snapshot(paths: StorePaths, step: int) -> Iterator[None]:
    """Keep a snapshot, and with it the files that it names, from being removed as garbage.

    A restore to an earlier step removes it nevertheless. One that does not exist cannot be held:
    find it (again) inside.
    """
    path, fd = paths.snapshot(step), -1
    try:
        while fd < 0:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                break
            with contextlib.suppress(OSError):  # a file system without locks holds nothing
                fcntl.flock(fd, fcntl.LOCK_SH)
            if not _is_open_as(fd, path):  # removed or replaced before it was locked
                os.close(fd)
                fd = -1
        yield
    finally:
        if fd >= 0:
            os.close(fd)


@contextlib.contextmanager
def held_snapshot(
    paths: StorePaths,
    metadata: StoreMetadata,
    wanted: Wanted,
    list_steps: Callable[[StorePaths], list[int]] = counted_steps,
) -> Iterator[tuple[Manifest, SnapshotRef]]:
    """Find a snapshot and hold it; see `locate_snapshot` and `hold_snapshot`.

    Args:
        paths, metadata: of the store.
        wanted: the snapshot; 'newest' is looked for again where it was removed meanwhile.
        list_steps: the snapshots that count.
    """
    while True:
        _, ref = locate_snapshot(paths, metadata, list_steps(paths), wanted)
        with contextlib.ExitStack() as held:
            held.enter_context(hold_snapshot(paths, ref.step))
            try:  # again: it may have been removed before it was held
                found = locate_snapshot(paths, metadata, list_steps(paths), ref)
            except SnapshotMismatchError:
                if wanted == NEWEST:
                    continue
                raise
            yield found
            return


def _is_open_as(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def remove_snapshot(paths: StorePaths, store_id: str, step: int, disk: Disk) -> bool:
    """Remove a snapshot unless it is pinned or held now; returns whether it is gone.

    Durable once the directory is synced; until then the files that it names must stay.

    Raises:
        StoreFileError: a pin is damaged, and may be of this snapshot.
    """
    try:
        # For writing, which nothing does: network file systems lock alone only what is.
        fd = os.open(paths.snapshot(step), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # no locks there, so that nobody holds it
            pass
        # Under the lock: who pins holds the snapshot, so that no pin comes after this look.
        if step in pins_by_step(read_pins(paths, store_id)):
            return False
        remove_file(paths.snapshot(step), disk)
        return True
    finally:
        os.close(fd)
