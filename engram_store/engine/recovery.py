"""Opening a store for training: take over what the last process left, then start clean.

Three cases. Closed properly: nothing to do. Killed: the memtables in shared memory are intact and
are sealed now; not one applied step is lost. Host lost, or its shared memory: the store goes back
to its newest snapshot, which is where the trainer's checkpoint is too.
"""

import contextlib
import enum
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from engram_store.engine.catalog import Catalog
from engram_store.engine.memtable import Memtable, memtable_bytes, stored_capacity
from engram_store.engine.placement import disk_directory, shared_directory
from engram_store.engine.seal import write_segments
from engram_store.errors import StoreFileError
from engram_store.types import TableSpec

_logger = logging.getLogger(__name__)


class RecoveryKind(enum.StrEnum):
    """How a store was found."""

    CLEAN = "clean"
    """Closed properly."""
    RECOVERED = "recovered"
    """Its process died; every applied step was recovered."""
    ROLLED_BACK = "rolled back"
    """Its shared memory is gone; the tables are those of the newest snapshot."""


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What opening a store found and did."""

    kind: RecoveryKind
    step: int
    """Steps applied, as the store is now."""
    sealed_rows: int
    """Rows taken over from shared memory."""


def recover(catalog: Catalog, chosen: Path | None) -> RecoveryReport:
    """Bring the files up to date with what the last process left in shared memory.

    Args:
        catalog: just opened.
        chosen: directory for memtables, if one was asked for.

    Raises:
        DiskFullError: the memtables stay where they are, for the next attempt.
        StoreFileError: the snapshot to go back to is damaged.
    """
    paths, store_id = catalog.paths, catalog.metadata.store_id
    specs = list(catalog.metadata.tables.values())
    directories = [shared_directory(paths, store_id, chosen), disk_directory(paths)]
    if catalog.manifest.memtables:
        directories.append(shared_directory(paths, store_id, Path(catalog.manifest.memtables)))
    rows, alive = 0, False
    for directory in directories:
        for memtable in _left_behind(catalog, specs, directory):
            alive = True
            rows += _seal_now(catalog, specs, memtable)
            memtable.close()
    kind = RecoveryKind.RECOVERED if alive else RecoveryKind.CLEAN
    catalog.drop_newer_snapshots()
    if alive:
        # Before the memtables go: until the store is open again nothing else tells a later
        # recovery that no step is missing.
        catalog.snapshot()
        catalog.mark(closed=True)
    snapshots = catalog.snapshots()
    if not snapshots:
        raise StoreFileError(paths.snapshots, "holds no snapshot; a store always has one")
    newest = snapshots[-1]
    if not alive and not catalog.manifest.closed:
        lost_from = catalog.manifest.step
        catalog.roll_back(catalog.find_snapshot(newest), catalog.manifest.sealed)
        kind = RecoveryKind.ROLLED_BACK
        _logger.warning(
            "shared memory of the last run is gone (host restarted?): the tables go back from "
            "step %d or later to the snapshot at step %d",
            lost_from,
            newest,
        )
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
    catalog.collect_garbage()
    return RecoveryReport(kind, catalog.manifest.step, rows)


def _left_behind(catalog: Catalog, specs: list[TableSpec], directory: Path) -> list[Memtable]:
    """Trusted memtables that continue the working manifest, oldest first.

    The first may be the one that the manifest ends with: a recovery sealed it and was killed.
    """
    manifest = catalog.manifest
    found = []
    for path in (directory / "memtable-0", directory / "memtable-1"):
        capacity = stored_capacity(path)
        if capacity is None or path.stat().st_size != memtable_bytes(specs, capacity):
            continue
        memtable = Memtable(path, specs, capacity)
        if memtable.trusted(manifest.store_id, manifest.lineage):
            found.append(memtable)
        else:
            memtable.close()
    found.sort(key=lambda memtable: memtable.number)
    expected = manifest.sealed + 1
    chain = []
    for memtable in found:
        if memtable.number in (expected, manifest.sealed):
            chain.append(memtable)
            expected = memtable.number + 1
        else:
            memtable.close()
    return chain


def _seal_now(catalog: Catalog, specs: list[TableSpec], memtable: Memtable) -> int:
    """Seal a memtable that was left behind; returns its rows."""
    commit = memtable.committed()
    sealed_before = memtable.number == catalog.manifest.sealed
    if sealed_before or (commit.step == catalog.manifest.step and not any(commit.counts)):
        return 0
    written = write_segments(
        catalog.paths,
        catalog.metadata.store_id,
        specs,
        memtable.tables,
        memtable.number,
        commit,
        catalog.counter,
    )
    refs = {layer: ref for layer, (ref, _) in written.items()}
    catalog.append_segments(memtable.number, commit, refs)
    return sum(ref.slots for ref in refs.values())


def remove_memtables(memtables: list[Memtable]) -> None:
    """Everything in them is sealed: give the shared memory back."""
    directory = memtables[0].path.parent
    for memtable in memtables:
        memtable.path.unlink(missing_ok=True)
        memtable.close()
    with contextlib.suppress(OSError):
        directory.rmdir()
