"""Going back to a snapshot while the store is open.

Once the snapshot's manifest is published, in a new lineage, the store is at the snapshot: nothing
that the disk refuses afterwards makes that untrue, nor is it an error for whoever asked. It is
owed, and done before anything is built upon the snapshot. A process that dies in between owes
nothing: its memtables are of the lineage that ended, and opening does the rest.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

from engram_store.engine.catalog import Catalog, TableParts, check_files, fill_table
from engram_store.engine.memtable import Commit, Memtable
from engram_store.engine.sealed import find_again
from engram_store.engine.table import Table
from engram_store.failpoints import failpoint
from engram_store.layout.manifest import Manifest

_logger = logging.getLogger(__name__)
Parts: TypeAlias = Mapping[int, TableParts]
"""Files of every table, by layer."""


def start_from(
    manifest: Manifest, parts: Parts, tables: Iterable[Table], memtables: list[Memtable]
) -> Commit:
    """Let tables read a manifest's files, with an empty memtable on top.

    Args:
        manifest: the working one.
        parts: its files, checked.
        tables: of the store, in the order of the memtables' arrays.
        memtables: both; what is in them is forgotten.

    Returns:
        What the first memtable, now open, says: the manifest's step, and no slot used.
    """
    for memtable in memtables:
        memtable.release()
    count = 0
    for number, table in enumerate(tables):
        # Windows that are only read may be gathered by other threads meanwhile.
        with table.lock:
            known = table.damages
            replaced = [*table.forget(), *fill_table(table, parts[table.spec.layer])]
            for index, memtable in enumerate(memtables):
                table.map_memtable(index, memtable.addresses[number])
        # Somebody may be copying rows out of what is unmapped, or about to be written again.
        table.wait_for_readers()
        table.unmap(replaced)
        table.look_at_files()
        find_again(table, known)
        count += 1
    commit = Commit(manifest.step, (0,) * count, manifest.marks)
    memtables[0].open_as(manifest.sealed + 1, manifest.store_id, manifest.lineage, commit)
    return commit


class Restoring:
    """Restores of one open store. Hold the engine's commit lock for every call."""

    def __init__(self, catalog: Catalog, mark_open: Callable[[], None]) -> None:
        """`mark_open`: says in the working manifest that the store is open."""
        self._catalog, self._mark_open = catalog, mark_open
        self._owes = False
        """A restore went through, or was refused by the disk, and what belongs to it is open."""

    def go_back(
        self,
        manifest: Manifest,
        newest: int,
        *,
        forget_newer: Callable[[int], None],
        start_over: Callable[[Parts], None],
    ) -> None:
        """Go back to a snapshot. Nothing may be sealed, folded or merged meanwhile.

        Args:
            manifest: the snapshot's, held by `Catalog.goal`.
            newest: number of the newest memtable.
            forget_newer: called with the snapshot's step once the store is at the snapshot: what
                was durable beyond it is not any more.
            start_over: then called with the snapshot's files, for `start_from`.

        Raises:
            StoreFileError, DiskFullError: nothing changed; `settle` before the next commit.
        """
        catalog = self._catalog
        parts = check_files(catalog.paths, catalog.metadata, manifest)
        self._owes = True
        catalog.roll_back(manifest, newest)
        failpoint("restore.published")
        forget_newer(manifest.step)
        with _done_later():
            catalog.drop_newer_snapshots()
        failpoint("restore.snapshots_dropped")
        catalog.adopt(parts)
        start_over(parts)
        with _done_later():
            self.settle()
        catalog.collect_garbage()

    def settle(self) -> None:
        """Before anything is built upon a restore: finish it, or undo one that was refused.

        Raises:
            DiskFullError, DiskFaultError: nothing changed.
        """
        if self._owes:
            self._catalog.settle()
            # A later step with the number of a forgotten snapshot must not be taken for it.
            self._catalog.drop_newer_snapshots()
            self._mark_open()
            self._owes = False


@contextlib.contextmanager
def _done_later() -> Iterator[None]:
    """The store went back already: what the disk refuses now is done before the next commit."""
    try:
        yield
    except OSError as error:
        _logger.warning("the restore is finished before the next commit: %s", error)
