"""The scrubber: what it finds, whose rows are refused then, and what is served as ever."""

import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engram_store
from engram_store.engine import Engine
from engram_store.errors import ChecksumError
from engram_store.layout import arrays
from engram_store.layout.arrays import table_arrays
from engram_store.layout.verify import verify_store
from engram_store.recipes import Recipe
from engram_store.store import Store
from engram_store.types import RowIds
from tests.damage import changed, flip
from tests.pairs import MakePair, Pair, specs_of, tables_of, tiny_overlay_bytes

CHUNK_ROWS = 1024


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of 16 chunks, each file one block."""
    monkeypatch.setattr(arrays, "MAX_CHUNK_BYTES", 1 << 10)


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    """A base with state, a segment of two steps over it, and one step in memory."""
    pair = make_pair(options={"fold_ratio": 1e6})
    pair.train(3)
    pair.store.fold()
    pair.store.seal()
    pair.store.fold()
    pair.train(2, windows=1, shape=(1, 20))
    pair.store.seal()
    pair.train(1, windows=1, shape=(1, 20))
    return pair


def engine_of(store: Store) -> Engine:
    assert isinstance(store._engine, Engine)
    return store._engine


def scrub(store: Store) -> None:
    """One pass."""
    engine_of(store)._scrubber.scrub()


def newest(path: Path, what: str, layer: int = 1) -> Path:
    """The newest base generation or segment of a table."""
    directory = path / "layers" / str(layer) / what
    return sorted(entry for entry in directory.iterdir() if entry.is_dir())[-1]


def places_of(store: Store) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where each row of layer 1 is: 0 base, 1 segment, 2 memtable."""
    table = engine_of(store).tables[1]
    remap = table.remap.astype(np.int64)
    return np.where(remap == 0, 0, np.where(remap <= 2 * table.capacity, 2, 1))


FILES = ["base rows", "base state", "row_ids", "rows", "state"]


def file_and_rows(pair: Pair, what: str) -> tuple[Path, RowIds]:
    """A file of layer 1 and the rows in its first block that are read from it."""
    places = places_of(pair.store)
    rows = np.arange(places.size, dtype=np.int32)
    if what.startswith("base"):
        array = table_arrays(pair.store.tables[1])[what == "base state"]
        chunks = newest(pair.path, "base") / array.name / "c"
        chunk = min(int(path.name) for path in chunks.iterdir())
        file = array.chunk_file(newest(pair.path, "base"), chunk)
        return file, rows[(rows // CHUNK_ROWS == chunk) & (places == 0)]
    file = newest(pair.path, "segments") / what
    return file, rows[places == 1]


@pytest.mark.parametrize("what", FILES)
def test_rows_of_a_damaged_block_are_refused_and_no_others(
    pair: Pair, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The error names file, block and rows; newer versions and other rows are served as ever."""
    file, lost = file_and_rows(pair, what)
    assert lost.size
    everything = np.arange(pair.store.tables[1].rows, dtype=np.int32)
    others = np.setdiff1d(everything, lost)
    expected = pair.oracle.contents[1].rows

    with changed(file, flip(50)), caplog.at_level(logging.ERROR):
        scrub(pair.store)

        assert str(file) in caplog.text
        stats = pair.store.stats()
        assert stats.damaged_blocks == 1
        assert f"{file}: block 0 (layer 1, " in stats.damages
        for row in (lost[:1], lost[-1:], lost):
            with pytest.raises(ChecksumError, match=r"block 0 \(layer 1, ") as caught:
                pair.store.read_rows(1, row)
            assert caught.value.path == file
            assert f"{row[0]:,}" in str(caught.value)
        np.testing.assert_array_equal(pair.store.read_rows(1, others), expected[others])
        rows_of_2 = np.arange(pair.store.tables[2].rows, dtype=np.int32)
        read = pair.store.read_rows(2, rows_of_2)
        np.testing.assert_array_equal(read, pair.oracle.contents[2].rows)
        scrub(pair.store)
        assert pair.store.stats().damaged_blocks == 1


@pytest.mark.parametrize("what", ["base state", "rows"])
def test_a_commit_that_needs_a_damaged_block_changes_nothing(pair: Pair, what: str) -> None:
    """In no table, and also if its rows were gathered before the damage was found."""
    file, lost = file_and_rows(pair, what)
    store, step = pair.store, pair.step
    rng = np.random.default_rng(5)
    while True:
        window = store.announce(rng.integers(0, 500, (2, 40)), step)
        if np.isin(window.row_ids(1), lost).any():
            break
        window.close()
    for layer in store.tables:
        window.push(layer, np.ones(window.rows(layer)[0].shape, np.float32))

    with changed(file, flip(50)):
        scrub(store)
        with pytest.raises(ChecksumError, match="block 0"):
            store.commit(step, 0.1)

    assert store.step == step
    window.close()
    engine_of(store).tables[1].damages = []  # the file is as it was
    pair.check()


def test_a_trainer_goes_back_to_a_sound_snapshot(make_pair: MakePair) -> None:
    """One without the damaged block; training goes on from there, folds included."""
    pair = make_pair(options={"fold_ratio": 1e6})
    pair.train(2)
    sound = pair.snapshot()
    pair.store.fold()
    pair.train(1)
    shared = pair.snapshot()
    pair.train(1)
    array = table_arrays(pair.store.tables[1])[0]
    file = array.chunk_file(newest(pair.path, "base"), 3)
    with changed(file, flip(9)):
        scrub(pair.store)
        assert not verify_store(engine_of(pair.store).paths).ok
        rows = np.array([3 * CHUNK_ROWS + 5])

        # This one has the same base: going back there must not serve what is known to be wrong.
        pair.restore(shared)
        assert pair.store.stats().damaged_blocks == 1
        lost = np.flatnonzero(places_of(pair.store) == 0).astype(np.int32)
        lost = lost[lost // CHUNK_ROWS == 3]
        with pytest.raises(ChecksumError, match="block 0"):
            pair.store.read_rows(1, lost[:1])

        pair.restore(sound)
        assert pair.store.stats().damaged_blocks == 0
        pair.store.read_rows(1, rows)
        pair.check()
        pair.train(2)
        pair.store.fold()
        scrub(pair.store)
        pair.check()
        assert pair.store.stats().damages == ""


def test_a_sound_store_is_scrubbed_without_a_word(pair: Pair) -> None:
    """Every block of every file in use is counted, once a pass."""
    blocks = 0
    for layer, spec in pair.store.tables.items():
        for array in table_arrays(spec):
            for chunk in (newest(pair.path, "base", layer) / array.name / "c").iterdir():
                blocks += -(-(chunk / "0").stat().st_size // (1 << 16))
        for file in newest(pair.path, "segments", layer).iterdir():
            if file.name in ("row_ids", "rows", "state"):
                blocks += -(-file.stat().st_size // (1 << 16))
    for passes in (1, 2):
        scrub(pair.store)
        stats = pair.store.stats()
        assert (stats.scrub_passes, stats.scrubbed_blocks) == (passes, passes * blocks)
        assert stats.scrubbed_at > 1e9
    assert stats.damages == ""


@pytest.mark.parametrize(
    ("what", "name", "position"),
    [
        ("segments", "checksums", 2),
        ("segments", "segment.json", 60),
        ("base", "checksums", 9),
        ("base", "base.json", 60),
    ],
)
def test_a_damaged_description_is_told_of(pair: Pair, what: str, name: str, position: int) -> None:
    """The rows that it is about may well be right, so they are served."""
    file = newest(pair.path, what) / name
    with changed(file, flip(position)):
        scrub(pair.store)
        scrub(pair.store)
        stats = pair.store.stats()
        assert stats.damaged_blocks == 0
        assert stats.damages.count(str(file)) == 1
        pair.check()


def test_files_that_vanish_meanwhile_are_no_damage(pair: Pair) -> None:
    """Folded away between the listing and the reading."""
    engine = engine_of(pair.store)
    table = engine.tables[1]
    files = engine._scrubber._files(table)
    pair.store.seal()
    pair.store.fold()
    for file in files:
        engine._scrubber._check(table, file)
    assert pair.store.stats().damages == ""


def test_the_thread_finds_damage_by_itself_while_training_goes_on(
    make_pair: MakePair, recipe: Recipe
) -> None:
    """No false alarm while files come and go; a flipped bit is found in the end."""
    size = tiny_overlay_bytes(specs_of(recipe))
    options = {"overlay_bytes": size, "fold_ratio": 0.5, "scrub_bytes_per_second": 1e9}
    pair = make_pair(options=options)
    pair.train(16)
    pair.store.seal()
    pair.store.fold()
    stats = pair.store.stats()
    assert (stats.damages, stats.damaged_blocks) == ("", 0)
    assert stats.scrubbed_blocks > 0
    array = table_arrays(pair.store.tables[2])[0]
    file = array.chunk_file(newest(pair.path, "base", 2), 0)
    never = threading.Event()
    with changed(file, flip(7)):
        while not pair.store.stats().damaged_blocks:
            never.wait(0.05)
    with pytest.raises(ChecksumError, match="layer 2"):
        pair.store.read_rows(2, np.arange(CHUNK_ROWS, dtype=np.int32))


def test_a_store_that_is_opened_for_reading_has_nothing_to_scrub(pair: Pair) -> None:
    pair.snapshot()
    with engram_store.open(pair.path, scrub_bytes_per_second=1e9) as reader:
        assert len(tables_of(reader)) == 2
        assert reader.stats().scrubbed_blocks == 0
