"""verify beside a process that trains: no false alarm, nothing evicted, nothing missed."""

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from engram_store.layout.checksums import BLOCK_BYTES, block_checksums
from engram_store.layout.paths import StorePaths
from engram_store.layout.verify import FileKind, memtables, verify_store
from engram_store.layout.verify import blocks as reading
from tests.damage import changed, files_of, flip, verify
from tests.pairs import MakePair, memtable_directory


def test_nothing_is_changed_and_no_lock_is_needed(make_pair: MakePair) -> None:
    """A store that is open for training is checked, and says what is left out."""
    pair = make_pair()
    pair.train(2)
    before = {file: (pair.path / file).read_bytes() for file in files_of(pair.path)}

    report = verify(pair.path)

    assert report.ok
    assert any("commit records" in note for note in report.notes)
    assert before == {file: (pair.path / file).read_bytes() for file in files_of(pair.path)}


@pytest.mark.parametrize("moment", [1, 5, 12, 16, 20])
def test_files_that_a_fold_replaces_meanwhile_are_no_damage(
    make_pair: MakePair, moment: int
) -> None:
    """Segments and a generation vanish between reading the manifest and reading them."""
    pair = make_pair()
    pair.train(2)
    pair.snapshot()
    before = set(files_of(pair.path))
    calls = []

    def fold(done: int, total: int) -> None:
        calls.append((done, total))
        if len(calls) == moment:
            pair.store.fold()
            pair.train(1)
            pair.snapshot()
            pair.store._engine.catalog.keep_snapshots(1)  # type: ignore[union-attr]

    report = verify_store(StorePaths(pair.path), progress=fold)

    assert len(calls) > moment
    assert before - set(files_of(pair.path))
    assert report.ok, report.damages
    assert all(0 < done <= total for done, total in calls)


def test_real_damage_is_found_although_the_store_changes(make_pair: MakePair) -> None:
    """Reading the manifests again takes nothing back that is still needed."""
    pair = make_pair()
    pair.train(1)
    pair.snapshot()
    chunk = pair.path / "layers" / "2" / "base" / "g0001" / "rows" / "c" / "0" / "0"
    calls = []

    def progress(_done: int, _total: int) -> None:
        calls.append(1)
        if len(calls) == 5:
            pair.train(1)
            pair.snapshot()

    with changed(chunk, flip(100_000)):
        report = verify_store(StorePaths(pair.path), progress=progress)

    assert [(d.file, d.block) for d in report.damages] == [
        (str(chunk.relative_to(pair.path)), 100_000 // BLOCK_BYTES)
    ]
    assert report.damages[0].snapshots == (0, 1, 2)


def test_a_broken_commit_record_of_an_open_store_is_found(make_pair: MakePair) -> None:
    """The one in force only: the other is being filled."""
    pair = make_pair()
    pair.train(1)
    memtable = next(m for m in pair.store._engine._memtables if m.number)  # type: ignore[union-attr]
    published = int.from_bytes(memtable.path.read_bytes()[512:520], "little")
    for which, found in ((published, 1), (published + 1, 0)):
        offset = 4096 * (1 + which % 2) + 8
        with memtable.path.open("r+b") as file:
            for _ in range(2):  # damaged, then as it was
                file.seek(offset)
                byte = file.read(1)[0]
                file.seek(offset)
                file.write(bytes([byte ^ 1]))
                file.flush()
                damages = verify(pair.path).damages
                assert len(damages) == found
                assert all(d.kind is FileKind.MEMTABLE for d in damages)
                found = 0


def test_lost_memtables_are_a_note(make_pair: MakePair, tmp_path: Path) -> None:
    """A copy of an open store has none: it goes back to its newest snapshot."""
    pair = make_pair()
    pair.train(1)
    shutil.copytree(pair.path, tmp_path / "copy.engram")

    report = verify(tmp_path / "copy.engram")

    assert report.ok
    assert any("goes back to the newest snapshot" in note for note in report.notes)


@pytest.mark.parametrize("cached", [True, False])
def test_only_pages_that_were_not_cached_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """A trainer's rows stay in memory; a verification leaves none behind."""
    file = tmp_path / "file"
    size = 2 * reading.PIECE_BYTES + 5_000
    file.write_bytes(np.random.default_rng(0).bytes(size))
    real, forgotten = os.preadv, []

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT and not cached and offset:
            raise BlockingIOError(errno.EAGAIN, "not cached")
        return real(fd, buffers, offset)

    def fadvise(_fd: int, offset: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            forgotten.append((offset, length))

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    reader = reading.BlockReader(lambda _: None)
    sums = reader.sums_of(file, size, 7)

    expected = block_checksums(np.fromfile(file, np.uint8), 7)
    np.testing.assert_array_equal(sums.sums, expected)
    pieces = [(reading.PIECE_BYTES, reading.PIECE_BYTES), (2 * reading.PIECE_BYTES, 5_000)]
    assert forgotten == ([] if cached else pieces)


def test_memtables_are_looked_for_where_the_engine_puts_them(
    make_pair: MakePair,
) -> None:
    """The reader of commit records states the layout on its own."""
    pair = make_pair()
    directory = memtable_directory(pair.path, pair.store.store_id)
    working = pair.store._engine.catalog.manifest  # type: ignore[union-attr]
    files = memtables._files(StorePaths(pair.path), pair.store.store_id, working)
    assert {directory / "memtable-0", directory / "memtable-1"} <= set(files)
    numbers = {memtables._look(f, pair.store.store_id, working.lineage) for f in files}
    assert (working.sealed + 1, True) in numbers
