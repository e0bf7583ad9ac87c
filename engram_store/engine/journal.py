"""The journal at work: what commits add is made to outlive the host before its memtable is sealed.

Two ways. `step`: a commit writes and syncs its record before it becomes visible, so an applied
step is a durable one. `group`: commits go on at once, and a thread writes and syncs what has
gathered, every few milliseconds. A journal that could not be written is never written to again:
after a failed sync nobody knows what the disk has. Then the memtable is sealed instead, and the
next memtable begins a new journal.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from engram_store.engine.memtable import Commit, TableSlots
from engram_store.errors import EngramStoreError, StoreFileError
from engram_store.layout.disk import Disk
from engram_store.layout.files import disk_errors, make_directory, remove_file
from engram_store.layout.journal import StepRecord, file_header, record_parts
from engram_store.layout.paths import StorePaths
from engram_store.types import Durability, TableSpec

_RETRY_SECONDS = 1.0
_logger = logging.getLogger(__name__)


class Journal:
    """Writes records in the order of the steps; one thread commits, one seals.

    Args:
        paths, store_id, specs: of the store.
        lineage: gives the store's lineage now.
        durability: journaled.
        disk: what changes files.
        on_durable: called after more steps became durable, on whatever thread it happened.
        seal: asked for when the journal broke: freezes and seals the memtable; returns when its
            steps are durable by that.
    """

    def __init__(
        self,
        paths: StorePaths,
        store_id: str,
        specs: Sequence[TableSpec],
        lineage: Callable[[], int],
        durability: Durability,
        disk: Disk,
        on_durable: Callable[[int], None],
        seal: Callable[[], None],
    ) -> None:
        self._paths, self._store_id, self._specs = paths, store_id, specs
        self._lineage, self._durability, self._disk = lineage, durability, disk
        self._on_durable, self._seal = on_durable, seal
        self._number, self._fd, self._offset = 0, -1, 0
        self._broken = 0
        """Number of the newest memtable with steps that no journal has, or 0. Until it is sealed
        nothing is recorded: a journal must not skip a step, nor hold another one in its place."""
        self._changed = threading.Condition()
        self._pending: list[tuple[int, StepRecord]] = []
        self._writing = self._stopped = False
        self._thread: threading.Thread | None = None
        make_directory(paths.journal, disk)
        if durability.group_seconds:
            self._thread = threading.Thread(target=self._run, name="engram-journal", daemon=True)
            self._thread.start()

    # ------------------------------------------------------------------ commits

    @property
    def refused_in(self) -> int:
        """In `step` mode the memtable whose journal broke, or 0: seal it before committing."""
        return 0 if self._durability.group_seconds else self._broken

    def record(
        self, number: int, tables: Sequence[TableSlots], firsts: Sequence[int], commit: Commit
    ) -> None:
        """Record a commit: before it is published in `step` mode, afterwards in `group` mode.

        Args:
            number: of the memtable.
            tables: its slots.
            firsts: the first new slot of each table.
            commit: with the counts after it.

        Raises:
            DiskFullError, StoreFileError: in `step` mode; the commit must not be published.
        """
        columns = tuple(
            (slots.ids[first:count], slots.state[first:count], slots.rows[first:count])
            for slots, first, count in zip(tables, firsts, commit.counts, strict=True)
        )
        record = StepRecord(commit.step, commit.marks, columns)
        if not self._durability.group_seconds:
            with self._changed:  # a seal that ends now must not close the file meanwhile
                self._write([(number, record)])
            self._on_durable(record.step)
            return
        with self._changed:
            self._pending.append((number, record))
            self._changed.notify_all()

    def _write(self, records: Sequence[tuple[int, StepRecord]]) -> None:
        """Append records and sync. Raises: DiskFullError, StoreFileError: the journal is broken."""
        path = self._paths.journal
        try:
            with disk_errors(path):
                for number, record in records:
                    if number != self._number:
                        self._open(number)
                    path = self._paths.journal_file(number)
                    for part in record_parts(self._store_id, number, record):
                        self._append(part.data)
                self._disk.sync(self._fd)
        except OSError as error:
            self._broken = records[-1][0]
            if isinstance(error, EngramStoreError):
                raise
            raise StoreFileError(
                path, f"could not be made durable ({error.strerror}); see the host's log"
            ) from error

    def _append(self, data: memoryview) -> None:
        while data:
            written = self._disk.write(self._fd, data, self._offset)
            data, self._offset = data[written:], self._offset + written

    def _open(self, number: int) -> None:
        """Begin the journal of a memtable, in place of a leftover of that number."""
        if self._fd >= 0:
            self._disk.sync(self._fd)  # what was written before, by this very call
        self._close()
        path = self._paths.journal_file(number)
        remove_file(path, self._disk)
        self._fd, self._number, self._offset = self._disk.create(path), number, 0
        header = file_header(self._store_id, self._lineage(), number, self._specs)
        self._append(memoryview(header))
        self._disk.sync_directory(path.parent)

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd, self._number = self._fd, -1, 0
            with contextlib.suppress(OSError):  # what counts was synced, or was not acknowledged
                self._disk.close(fd)

    # ------------------------------------------------------------------ the group's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._stopped)
                if not self._pending:
                    return
                if not self._stopped:
                    # More may come; a seal or the end need not be waited for.
                    self._changed.wait_for(lambda: self._stopped, self._durability.group_seconds)
                if not self._pending:
                    continue  # a seal has made them durable meanwhile
                records, self._pending = self._pending, []
                if not records:  # a seal came first
                    continue
                self._writing = True
            try:
                self._write_or_seal(records)
            finally:
                with self._changed:
                    self._writing = False
                    self._changed.notify_all()

    def _write_or_seal(self, records: list[tuple[int, StepRecord]]) -> None:
        if not self._broken:
            try:
                self._write(records)
                self._on_durable(records[-1][1].step)
                return
            except OSError as error:
                _logger.warning("the memtable is sealed instead of the journal: %s", error)
        with self._changed:
            # Nothing holds on to their slots any more: the seal makes them durable.
            self._broken = max(self._broken, records[-1][0])
            self._writing = False
            self._changed.notify_all()
        try:
            self._seal()
        except Exception as error:
            with self._changed:
                if self._stopped:
                    return
                _logger.warning("steps are not durable yet, trying again: %s", error)
                if self._broken:
                    self._pending[:0] = records[-1:]
                self._changed.wait_for(lambda: self._stopped, _RETRY_SECONDS)

    # ------------------------------------------------------------------ seals and the end

    def sealed(self, number: int) -> None:
        """Memtables up to this one are durable otherwise; returns when none of them is read."""
        with self._changed:
            self._changed.wait_for(lambda: not self._writing)
            self._pending = [entry for entry in self._pending if entry[0] > number]
            if self._broken <= number:
                self._broken = 0
            if self._number and self._number <= number:
                self._close()
            _remove_leftovers(self._paths.journal_files(up_to=number), self._disk)
            self._changed.notify_all()

    def forget(self) -> None:
        """The store went back to a snapshot, or is closed and whole: nothing is to be replayed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._writing)
            self._pending, self._broken = [], 0
            self._close()
            _remove_leftovers(self._paths.journal_files(), self._disk)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything recorded is durable, or the journal broke."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending and not self._writing)

    def stop(self) -> None:
        """End the thread after what is under way; the file stays as it is."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._close()


def remove_journals(paths: StorePaths, disk: Disk) -> None:
    """Everything in them is in segments: remove the files."""
    _remove_leftovers(paths.journal_files(), disk)


def _remove_leftovers(files: Sequence[Path], disk: Disk) -> None:
    """Files that no replay looks at: one that cannot be removed now is removed at an opening."""
    for path in files:
        try:
            remove_file(path, disk)
        except OSError as error:
            _logger.warning("a journal that nobody needs stays for now: %s", error)
