"""A journal is written by the thread that commits while another one seals."""

import threading
from pathlib import Path

import numpy as np

from engram_store.engine.journal import Journal
from engram_store.engine.memtable import Commit, TableSlots
from engram_store.layout.disk import Disk
from engram_store.layout.journal import read_records
from engram_store.layout.paths import StorePaths
from engram_store.types import Durability, TableSpec

STORE = "ab" * 16
SPECS = [TableSpec(layer=1, rows=50, dim=4)]


class _SealEndsNow(Disk):
    """In a chosen sync, a seal of the memtable before ends on another thread."""

    def __init__(self) -> None:
        super().__init__()
        self.seal: threading.Thread | None = None

    def sync(self, fd: int) -> None:
        seal, self.seal = self.seal, None
        if seal is not None:
            seal.start()
            # Long enough for it to close the file, if nothing holds it back.
            seal.join(0.2)
        super().sync(fd)


def test_a_seal_that_ends_does_not_close_the_journal_that_is_being_written(tmp_path: Path) -> None:
    """The first commit after a freeze begins a journal and may meet the end of that seal."""
    paths, disk = StorePaths(tmp_path), _SealEndsNow()
    journal = Journal(
        paths,
        STORE,
        SPECS,
        lambda: 1,
        Durability.parse("step"),
        disk,
        on_durable=lambda step: None,
        seal=lambda: None,
    )
    slots = TableSlots(
        ids=np.arange(8, dtype=np.int32),
        rows=np.zeros((8, 4), np.uint16),
        state=np.ones((8, 1), np.float32),
    )
    journal.record(1, [slots], [0], Commit(1, (3,), ()))
    seal = disk.seal = threading.Thread(target=lambda: journal.sealed(1))

    journal.record(2, [slots], [0], Commit(2, (2,), ()))

    seal.join()
    assert paths.journal_files() == [paths.journal_file(2)]
    (record,) = read_records(paths.journal_file(2), STORE, 2, SPECS)
    assert record.step == 2
    journal.stop()
