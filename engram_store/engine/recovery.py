"""Opening a store for training: take over what the last process left, then start clean.

Four cases. Closed properly: nothing to do. Killed: the memtables in shared memory are intact and
are sealed now; not one applied step is lost. Host lost, or its shared memory, with a journal: what
the journal holds is sealed, so not one durable step is lost. Without a journal: the store goes back
to its newest snapshot, which is where the trainer's checkpoint is too.
"""

import enum
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_store.engine.catalog import Catalog
from engram_store.engine.journal import remove_journals
from engram_store.engine.memtable import (
    Commit,
    Memtable,
    TableSlots,
    memtable_bytes,
    stored_capacity,
)
from engram_store.engine.placement import (
    memtable_files,
    memtable_places,
    remove_memtables,
    shared_directory,
)
from engram_store.engine.seal import write_segments
from engram_store.errors import StoreFileError
from engram_store.layout.files import make_directory, sync_directory
from engram_store.layout.journal import StepRecord, journal_number, read_records
from engram_store.types import TableSpec

_logger = logging.getLogger(__name__)


class RecoveryKind(enum.StrEnum):
    """How a store was found."""

    CLEAN = "clean"
    """Closed properly."""
    RECOVERED = "recovered"
    """Its process died; every applied step was recovered."""
    REPLAYED = "replayed"
    """Its shared memory is gone; every durable step was read from the journal."""
    ROLLED_BACK = "rolled back"
    """Its shared memory is gone; the tables are those of the newest snapshot."""


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What opening a store found and did."""

    kind: RecoveryKind
    step: int
    """Steps applied, as the store is now."""
    sealed_rows: int
    """Rows taken over from shared memory or from the journal."""


def recover(catalog: Catalog, chosen: Path | None) -> RecoveryReport:
    """Bring the files up to date with what the last process left in shared memory.

    Nothing in a memtable is needed then. Those in the two places where this process may make
    its own stay, for `make_memtables` to use their files again or to remove them.

    Args:
        catalog: just opened.
        chosen: directory for memtables, if one was asked for.

    Raises:
        DiskFullError: the memtables stay where they are, for the next attempt.
        StoreFileError: the snapshot to go back to is damaged.
    """
    paths, store_id = catalog.paths, catalog.metadata.store_id
    specs = list(catalog.metadata.tables.values())
    _keep_names(catalog)
    _make_directories(catalog, specs)
    own = memtable_places(paths, store_id, chosen)
    directories = list(own)
    if catalog.manifest.memtables:
        directories.append(shared_directory(paths, store_id, Path(catalog.manifest.memtables)))
    rows, alive = 0, False
    directories = list(dict.fromkeys(directories))
    for directory in directories:
        for memtable in _left_behind(catalog, specs, directory):
            alive = True
            rows += _seal_now(catalog, specs, memtable)
            memtable.close()
    kind = RecoveryKind.RECOVERED if alive else RecoveryKind.CLEAN
    if not alive and not catalog.manifest.closed and catalog.manifest.journaled:
        kind, rows = RecoveryKind.REPLAYED, _replay(catalog, specs)
    catalog.drop_newer_snapshots()
    if kind in (RecoveryKind.RECOVERED, RecoveryKind.REPLAYED):
        # Before the memtables go: until the store is open again nothing else tells a later
        # recovery that no step is missing.
        catalog.snapshot()
        catalog.mark(closed=True)
    snapshots = catalog.snapshots()
    if not snapshots:
        raise StoreFileError(paths.snapshots, "holds no snapshot; a store always has one")
    newest = snapshots[-1]
    if not catalog.manifest.closed:
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
        if directory not in own:
            remove_memtables(directory, catalog.disk)
    remove_journals(paths, catalog.disk)
    catalog.collect_garbage()
    return RecoveryReport(kind, catalog.manifest.step, rows)


def _keep_names(catalog: Catalog) -> None:
    """Make the manifests found durable, before anything that older ones name is removed.

    A process that was killed may have renamed one and not have synced the name.
    """
    for directory in (catalog.paths.root, catalog.paths.snapshots):
        if directory.is_dir():
            sync_directory(directory, catalog.disk)


def _make_directories(catalog: Catalog, specs: list[TableSpec]) -> None:
    """Seals find the directories they write to, and know that a lost host has them too."""
    for spec in specs:
        segments = catalog.paths.segment(spec.layer, 0).parent
        make_directory(segments, catalog.disk)
        # It may be there because a process was killed, or failed, before this.
        sync_directory(segments.parent, catalog.disk)


def _left_behind(catalog: Catalog, specs: list[TableSpec], directory: Path) -> list[Memtable]:
    """Trusted memtables that continue the working manifest, oldest first.

    The first may be the one that the manifest ends with: a recovery sealed it and was killed.
    """
    manifest = catalog.manifest
    found = []
    for path in memtable_files(directory):
        capacity = stored_capacity(path)
        if capacity is None or path.stat().st_size != memtable_bytes(specs, capacity):
            continue
        memtable = Memtable(path, specs, capacity, catalog.disk)
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
        catalog.disk,
    )
    refs = {layer: ref for layer, (ref, _) in written.items()}
    catalog.append_segments(memtable.number, commit, refs)
    return sum(ref.slots for ref in refs.values())


def _replay(catalog: Catalog, specs: list[TableSpec]) -> int:
    """Seal what the journals hold, memtable by memtable; returns the rows.

    A journal continues the files or the journal before it; what does not was never durable, or is
    of a lineage that a restore has ended.
    """
    paths, store_id, rows = catalog.paths, catalog.metadata.store_id, 0
    for path in paths.journal_files():
        manifest = catalog.manifest
        number = journal_number(path, store_id, manifest.lineage, specs)
        if number is None or number <= manifest.sealed or path != paths.journal_file(number):
            continue
        records: list[StepRecord] = []
        for record in read_records(path, store_id, number, specs):
            if record.step != manifest.step + len(records) + 1:
                break
            records.append(record)
        if not records:
            break
        tables = [
            TableSlots(*(np.concatenate(arrays) for arrays in _transposed(records, index)))
            for index in range(len(specs))
        ]
        counts = tuple(slots.ids.size for slots in tables)
        commit = Commit(records[-1].step, counts, records[-1].marks)
        written = write_segments(paths, store_id, specs, tables, number, commit, catalog.disk)
        refs = {layer: ref for layer, (ref, _) in written.items()}
        catalog.append_segments(number, commit, refs)
        rows += sum(ref.slots for ref in refs.values())
    return rows


def _transposed(records: list[StepRecord], table: int) -> tuple[Any, Any, Any]:
    """Ids, rows and state of one table, each a list with an array for every record."""
    ids, state, rows = zip(*(record.tables[table] for record in records), strict=True)
    return ids, rows, state
