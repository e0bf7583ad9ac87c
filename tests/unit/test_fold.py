"""Folds beside training: room on the disk, speed, what they read and what they leave."""

import errno
import logging
import os
import shutil
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engram_store
from engram_store import failpoints
from engram_store.engine import maintenance, merge, pieces
from engram_store.engine.fold import Fold, plan_fold
from engram_store.engine.memory import PAGE_BYTES, Mapping
from engram_store.engine.pieces import Throttle, piece_rows, resident_pages
from engram_store.errors import ChecksumError, DiskFullError
from engram_store.layout import arrays
from engram_store.layout.arrays import ArrayLayout, table_arrays
from engram_store.layout.checksums import BLOCK_BYTES, block_checksums
from engram_store.layout.disk import Disk
from engram_store.layout.verify import verify_store
from engram_store.recipes import Recipe
from tests.damage import changed, flip
from tests.pairs import MakePair, Pair, files_of, specs_of, tiny_overlay_bytes

NEVER = 1e6
"""A fold ratio."""


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of 16 chunks of 1,024 rows."""
    monkeypatch.setattr(arrays, "MAX_CHUNK_BYTES", 1 << 10)


@pytest.fixture
def no_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments stay as they are until they are folded."""
    monkeypatch.setattr(merge, "FAN_IN", 10**6)


def overlay(recipe: Recipe) -> dict[str, Any]:
    return {"overlay_bytes": tiny_overlay_bytes(specs_of(recipe))}


def newest(path: Path, what: str, layer: int = 1) -> Path:
    """The newest base generation or segment of a table."""
    directory = path / "layers" / str(layer) / what
    return sorted(entry for entry in directory.iterdir() if entry.is_dir())[-1]


# ---------------------------------------------------------------------- room


def test_the_room_that_a_fold_needs_covers_what_it_writes(make_pair: MakePair) -> None:
    """Known before it starts, and not much more."""
    pair = make_pair()
    pair.train(2)
    pair.store.seal()
    table = pair.store._engine.tables[1]
    plan = Fold(table, Disk(), Throttle(None)).prepare()
    pair.store.fold()
    written = sum(p.stat().st_size for p in newest(pair.path, "base").rglob("*") if p.is_file())
    assert 0.8 * plan.needed_bytes <= written <= plan.needed_bytes


def test_only_changed_chunks_need_room() -> None:
    """The others are hard links."""
    layout = ArrayLayout(name="rows", rows=10_000, width=32, dtype=np.dtype("<f4"), chunk_rows=1024)
    plan = plan_fold([layout], [np.array([5, 1023, 2048]), np.array([2050, 9_999])])
    assert plan.changed == {0, 2, 9}
    assert 3 * layout.chunk_bytes <= plan.needed_bytes < 4 * layout.chunk_bytes
    assert plan_fold([layout], []).changed == frozenset()


class Room:
    """Says how much room the disk has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 1 << 60
        usage = shutil.disk_usage

        def disk_usage(path: Any) -> Any:
            return usage(path)._replace(free=self.free)

        monkeypatch.setattr(shutil, "disk_usage", disk_usage)


def test_a_fold_that_would_not_fit_is_not_begun(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what it needs and what there is; not one file changes, and training goes on."""
    pair = make_pair()
    pair.train(2)
    pair.snapshot()
    room = Room(monkeypatch)
    room.free = 1_000
    before = files_of(pair.path)

    with pytest.raises(DiskFullError, match=r"fold of layer 1 needs [\d,]+ bytes .* has 1,000"):
        pair.store.fold()

    assert files_of(pair.path) == before
    pair.train(1)
    room.free = 1 << 60
    pair.store.fold()
    pair.check()


@pytest.mark.usefixtures("no_merges")
def test_a_fold_is_put_off_until_there_is_room(
    make_pair: MakePair, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tried once per table, not at every seal; commits notice nothing."""
    room = Room(monkeypatch)
    pair = make_pair(options={**overlay(recipe), "fold_ratio": 0.3})
    room.free = 1_000
    pair.train(14)
    pair.store._engine._background.drain()  # type: ignore[union-attr]
    stats = pair.store.stats()
    assert (stats.folds, stats.folds_postponed) == (0, 2)
    assert stats.seals >= 4

    room.free = 1 << 60
    pair.train(4)
    pair.store._engine._background.drain()  # type: ignore[union-attr]

    assert pair.store.stats().folds >= 2
    pair.check()


# ---------------------------------------------------------------------- pieces


@pytest.mark.parametrize("dim", [16, 7, 96])
def test_folding_piece_by_piece_is_exact(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch, dim: int
) -> None:
    """Many pieces to a chunk, each synced and forgotten, whatever the length of a row."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", BLOCK_BYTES)
    monkeypatch.setattr("engram_store.engine.fold.SYNC_BYTES", 3 * BLOCK_BYTES)
    pair = make_pair(dim=dim, optimizer="adagrad")
    for _ in range(2):
        pair.train(2)
        pair.store.fold()
        pair.check()
    pair.store.close()
    assert verify_store(pair.store._engine.paths).ok


@given(st.integers(1, 5_000), st.integers(10, 20))
def test_pieces_are_whole_rows_and_whole_blocks(width: int, chunk_bits: int) -> None:
    """And divide a chunk, unless they are one."""
    row_bytes, chunk_rows = 2 * width, 1 << chunk_bits
    count = piece_rows(row_bytes, chunk_rows)
    assert chunk_rows % count == 0
    assert count == chunk_rows or count * row_bytes % BLOCK_BYTES == 0
    smaller = count * row_bytes <= 2 * pieces.PIECE_BYTES
    assert smaller or (count // 2) * row_bytes % BLOCK_BYTES


def test_a_fold_holds_one_piece_in_memory(make_pair: MakePair) -> None:
    """Not a chunk: those have up to 256 MiB."""
    pair = make_pair(dim=512, optimizer="sgd")
    chunk_bytes = table_arrays(pair.store.tables[1])[0].chunk_bytes
    assert chunk_bytes >= 16 << 20
    pair.train(1)
    pair.store.seal()
    tracemalloc.start()
    try:
        pair.store.fold()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < chunk_bytes // 2
    pair.check()


def test_a_fold_leaves_the_page_cache_to_rows_in_use(make_pair: MakePair) -> None:
    """A base that nobody read before is not cached afterwards, neither old nor new."""
    pair = make_pair(dim=512, optimizer="sgd")
    pair.store.close()
    chunk = next((newest(pair.path, "base") / "rows" / "c").iterdir()) / "0"
    assert chunk.stat().st_size >= 16 << 20
    fd = os.open(chunk, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if cached_share(chunk) > 0.1:
        pytest.skip("this file system does not let go of cached pages")
    with engram_store.open(pair.path, "train") as store:
        again = Pair(store, pair.oracle)
        again.train(1, windows=1, shape=(1, 20))
        store.fold()
        assert cached_share(newest(pair.path, "base") / chunk.relative_to(chunk.parents[3])) < 0.3


def cached_share(path: Path) -> float:
    mapping = Mapping.of_file(path)
    try:
        return float(resident_pages(mapping, 0, path.stat().st_size).mean())
    finally:
        mapping.close()


def test_pages_that_were_cached_stay_so(tmp_path: Path) -> None:
    """Reading a file piece by piece forgets what it brought in, and nothing else."""
    file = tmp_path / "a"
    data = np.random.default_rng(0).integers(0, 256, 3 * pieces.PIECE_BYTES, np.uint8)
    data.tofile(file)
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(opened.fileno(), PAGE_BYTES, 5 * PAGE_BYTES)
    if cached_share(file) > 0.1:
        pytest.skip("this file system does not let go of cached pages")
    sums = block_checksums(data, 7)
    sealed = sealed_file(file, data.size, sums)

    read = [piece.data.copy() for piece in pieces.read_pieces(sealed, Throttle(None))]

    np.testing.assert_array_equal(np.concatenate(read), data)
    mapping = Mapping.of_file(file)
    resident = resident_pages(mapping, 0, data.size)
    mapping.close()
    assert resident[5]
    assert resident.mean() < 0.1


def sealed_file(path: Path, length: int, sums: Any) -> pieces.SealedFile:
    return pieces.SealedFile(
        path=path,
        layer=1,
        sums=sums,
        identity=7,
        length=length,
        row_bytes=64,
        first_row=0,
        rows=length // 64,
        segment=None,
        source=None,
        array="rows",
    )


def test_a_file_that_was_cut_off_is_damaged_from_there_on(tmp_path: Path) -> None:
    """Read errors are damages of single blocks; the others are checked."""
    file = tmp_path / "a"
    data = np.random.default_rng(0).integers(0, 256, 4 * BLOCK_BYTES, np.uint8)
    data[: 3 * BLOCK_BYTES - 1].tofile(file)
    sealed = sealed_file(file, data.size, block_checksums(data, 7))

    found = [d for piece in pieces.read_pieces(sealed, Throttle(None)) for d in piece.damages]

    assert {damage.block for damage in found} == {2, 3}
    assert all("cannot be read" in damage.problem for damage in found)


# ---------------------------------------------------------------------- speed


class Clock:
    """Time that passes only where somebody waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_throttle_keeps_to_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over any time; time in which nothing was done is not saved up."""
    clock = Clock()
    throttle = Throttle(1_000, clock)
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        clock.now += seconds

    monkeypatch.setattr(throttle._hurry, "wait", wait)
    throttle.take(500)
    throttle.take(2_000)
    clock.now += 60
    throttle.take(1_000)
    np.testing.assert_allclose(waited, [0.5, 2.0, 1.0])
    assert throttle.bytes == 3_500


@pytest.mark.usefixtures("no_merges")
def test_a_commit_that_waits_for_a_slow_fold_lifts_its_limit(
    make_pair: MakePair, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one byte a second this test would never end; the counter tells of the waiting."""
    monkeypatch.setattr(maintenance, "MAX_SEGMENTS", 2)
    options = {**overlay(recipe), "fold_ratio": NEVER, "fold_bytes_per_second": 1.0}
    pair = make_pair(options=options)
    pair.train(20)
    stats = pair.store.stats()
    assert stats.commit_waits >= 1
    assert stats.folds >= 1
    pair.check()


@pytest.mark.usefixtures("no_merges")
def test_a_fold_that_always_fails_fails_no_commit(
    make_pair: MakePair, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a commit wait for what does not help."""
    monkeypatch.setattr(maintenance, "MAX_SEGMENTS", 2)

    def write(*_: Any) -> None:
        raise OSError(errno.EIO, "the disk fails")

    monkeypatch.setattr(Fold, "write", write)
    pair = make_pair(options={**overlay(recipe), "fold_ratio": NEVER})
    pair.train(20)
    pair.check()
    assert pair.store.stats().folds == 0
    with pytest.raises(OSError, match="the disk fails"):
        pair.store.fold()


def test_a_fold_that_is_asked_for_during_a_restore_comes_after_it(
    make_pair: MakePair, recipe: Recipe
) -> None:
    """Folds read mapped files, and a restore unmaps them."""
    pair = make_pair(options={**overlay(recipe), "fold_ratio": NEVER})
    pair.train(3)
    ref = pair.snapshot()
    pair.train(3)
    pair.store.seal()
    asked: list[threading.Thread] = []

    def ask() -> None:
        asked.append(threading.Thread(target=pair.store.fold))
        asked[0].start()

    failpoints.arm("restore.published", ask)
    pair.restore(ref)
    asked[0].join()
    assert pair.store.stats().folds == 2
    pair.check()


@pytest.mark.parametrize(
    "wrong", [{"fold_bytes_per_second": 0}, {"scrub_bytes_per_second": -1.0}], ids=str
)
def test_a_speed_that_is_none_is_refused(pair: Pair, wrong: dict[str, Any]) -> None:
    pair.store.close()
    with pytest.raises(engram_store.errors.ConfigError, match=next(iter(wrong))):
        engram_store.open(pair.path, "train", **wrong)


# ---------------------------------------------------------------------- damage


@pytest.mark.usefixtures("small_chunks", "no_merges")
@pytest.mark.parametrize("what", ["base rows", "base state", "row_ids", "rows", "state"])
def test_a_damaged_block_is_never_folded(
    make_pair: MakePair, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The fold ends and names it, leaves nothing behind, and the table trains on elsewhere."""
    pair = make_pair()
    pair.train(1, windows=1, shape=(1, 5))
    pair.snapshot()
    file = damaged_file(pair, what)
    before, bases = files_of(pair.path), sorted(pair.path.glob("layers/1/base/*"))
    folds = pair.store.stats().folds

    with changed(file, flip(100)), caplog.at_level(logging.ERROR):
        with pytest.raises(
            ChecksumError, match=r"block 0 \(layer 1, (rows|slots) [\d,]+ to"
        ) as caught:
            pair.store.fold()
        assert caught.value.path == file
        assert str(file) in caplog.text
        stats = pair.store.stats()
        assert (stats.folds, stats.damaged_blocks) == (folds, 1)
        assert str(file) in stats.damages
    assert files_of(pair.path) == before
    assert sorted(pair.path.glob("layers/1/base/*")) == bases
    # Known by now, whatever the file says.
    with pytest.raises(ChecksumError, match="block 0"):
        pair.store.fold()


def damaged_file(pair: Pair, what: str) -> Path:
    """A file of layer 1 that a fold reads; a chunk that has a row in a segment."""
    segment = newest(pair.path, "segments")
    if not what.startswith("base"):
        return segment / what
    chunk = int(np.fromfile(segment / "row_ids", "<i4").min()) // 1024
    array = table_arrays(pair.store.tables[1])[what == "base state"]
    if array.name != "rows":  # made by a fold: state of a new table has no file
        pair.store.fold()
        pair.train(1, windows=1, shape=(1, 5))
        pair.snapshot()
        ids = np.fromfile(newest(pair.path, "segments") / "row_ids", "<i4")
        present = newest(pair.path, "base") / array.name / "c"
        chunks = [int(path.name) for path in present.iterdir()]
        chunk = next(int(row) // 1024 for row in ids if int(row) // 1024 in chunks)
    return array.chunk_file(newest(pair.path, "base"), chunk)


@pytest.mark.usefixtures("no_merges")
def test_a_damaged_table_is_not_folded_again_and_again(
    make_pair: MakePair, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One attempt; training goes on, and the other table is folded as ever."""
    begun: list[int] = []
    prepare = Fold.prepare

    def count(fold: Fold) -> Any:
        begun.append(fold._table.spec.layer)
        return prepare(fold)

    monkeypatch.setattr(Fold, "prepare", count)
    pair = make_pair(options={**overlay(recipe), "fold_ratio": 0.3})
    # Of a segment's description: no row is refused for that.
    pair.train(1)
    pair.store.seal()
    sums = newest(pair.path, "segments") / "checksums"
    with changed(sums, flip(3)):
        pair.train(16)
        pair.store._engine._background.drain()  # type: ignore[union-attr]
    assert begun.count(1) == 1
    assert begun.count(2) >= 2
    stats = pair.store.stats()
    assert str(sums) in stats.damages
    assert stats.damaged_blocks == 0
    pair.check()
