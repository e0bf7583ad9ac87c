"""Merging segments: which, what is kept, in what order, and that nothing is lost by it."""

import errno
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engram_store
from engram_store import failpoints
from engram_store.engine import Engine, maintenance, merge
from engram_store.engine.merge import FAN_IN, MAX_FAN_IN, MERGED, WriteBudget, live_rows, plan_merge
from engram_store.engine.rewind import rewind
from engram_store.errors import ChecksumError
from engram_store.layout.disk import Disk
from engram_store.layout.manifest import read_manifest
from engram_store.layout.paths import StorePaths
from engram_store.layout.verify import verify_store
from engram_store.recipes import Recipe
from tests.damage import changed, flip
from tests.pairs import MakePair, Pair, specs_of, tables_of, tiny_overlay_bytes

NEVER = 1e6
"""A fold ratio."""


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    """Seals and folds when it is told to."""
    return make_pair(options={"fold_ratio": NEVER})


def engine_of(pair: Pair) -> Engine:
    assert isinstance(pair.store._engine, Engine)
    return pair.store._engine


def train_and_seal(pair: Pair, times: int) -> None:
    """So many more segments per table."""
    for _ in range(times):
        pair.train(1, windows=1, shape=(1, 20))
        pair.store.seal()


def numbers_of(path: Path, layer: int = 1, step: int | None = None) -> list[int]:
    """Numbers of the segments that a manifest names."""
    manifest, _ = read_manifest(StorePaths(path), step)
    return [ref.number for ref in manifest.table(layer).segments]


def directories_of(path: Path, layer: int = 1) -> set[int]:
    return {int(entry.name) for entry in (path / "layers" / str(layer) / "segments").iterdir()}


# ---------------------------------------------------------------------- which


def test_many_segments_of_one_size_are_merged() -> None:
    """From eight on, at most sixteen, the newest ones."""
    assert plan_merge([1000] * 7) is None
    assert plan_merge([1000] * 8) == range(8)
    assert plan_merge([1000] * 20) == range(4, 20)
    assert plan_merge([900, 1100] * 4) == range(8)


def test_a_large_segment_is_not_written_again_for_a_few_small_ones() -> None:
    """Small ones beside it are merged without it, and small ones between larger ones with them."""
    assert plan_merge([10**6] + [10] * 7) is None
    assert plan_merge([10**6] + [10] * 8) == range(1, 9)
    assert plan_merge([2**n for n in range(20, 0, -1)]) is None
    assert plan_merge([1000, 3, 1000, 5, 1000, 1000, 7, 1000]) == range(8)
    assert plan_merge([]) is None


@given(st.lists(st.integers(1, 1 << 24), max_size=40))
def test_a_plan_is_a_run_that_none_outweighs(slots: list[int]) -> None:
    run = plan_merge(slots)
    if run is not None:
        sizes = slots[run.start : run.stop]
        assert FAN_IN <= len(sizes) <= MAX_FAN_IN
        assert 2 * max(sizes) <= sum(sizes)


def test_segments_stay_few_and_rows_are_written_seldom() -> None:
    """Ten thousand seals without one row in common: the worst that there is."""
    slots: list[int] = []
    written = most = 0
    for _ in range(10_000):
        slots.append(1000)
        while (run := plan_merge(slots)) is not None:
            size = sum(slots[run.start : run.stop])
            slots[run.start : run.stop] = [size]
            written += size
        most = max(most, len(slots))
    assert most < 40
    assert written <= 8 * sum(slots)


def test_numbers_of_merged_segments_tell_their_order() -> None:
    """By the newest memtable in them; none is a memtable's, none is used twice."""
    first = merge.merged_number([3, 4, 5])
    again = merge.merged_number([first, 6, 7])
    assert first == MERGED + 5
    assert again == 2 * MERGED + 7
    assert merge.merged_number([1, first]) == 2 * MERGED + 5


def test_merges_may_write_what_seals_saved() -> None:
    budget = WriteBudget()
    assert budget.left == 0
    budget.sealed(updated=1_000, written=600)
    assert budget.left == 450
    budget.merged(500)
    assert budget.left == -50


# ---------------------------------------------------------------------- what is kept

Segments = list[list[int]]
segments = st.lists(st.lists(st.integers(0, 12), unique=True, max_size=8), min_size=1, max_size=5)


@given(segments, st.lists(st.lists(st.integers(0, 12), unique=True), max_size=2))
def test_only_the_newest_version_of_live_rows_is_kept(merged: Segments, newer: Segments) -> None:
    """Rows that newer segments have are left out; those that most segments have come first."""
    firsts = [100 * (i + 1) for i in range(len(merged))]
    places = {
        row: first + slot + 1
        for rows, first in zip(merged, firsts, strict=True)
        for slot, row in enumerate(rows)
    }
    for rows in newer:
        for row in rows:
            places.pop(row, None)

    live = live_rows(
        [np.array(rows, np.int32) for rows in merged],
        firsts,
        [np.array(rows, np.int32) for rows in newer],
    )

    assert dict(zip(live.rows.tolist(), live.places.tolist(), strict=True)) == places
    assert live.rows.size == len(places)
    touches = [sum(row in rows for rows in merged) for row in live.rows.tolist()]
    assert live.touches.tolist() == touches == sorted(touches, reverse=True)


# ---------------------------------------------------------------------- at work


def test_segments_become_one_and_nothing_changes(pair: Pair) -> None:
    """Rows and state, now, after more training, and after reopening; old files are gone."""
    train_and_seal(pair, 5)
    engine_of(pair).merge()
    pair.check()
    assert pair.store.stats().merges == 2
    (number,) = numbers_of(pair.path)
    assert number == MERGED + 5
    assert directories_of(pair.path) == {number}

    train_and_seal(pair, 3)
    pair.check()
    engine_of(pair).merge()
    pair.check()
    assert numbers_of(pair.path) == [2 * MERGED + 8]
    pair.train(1)
    pair.store.close()
    assert verify_store(StorePaths(pair.path)).ok
    with engram_store.open(pair.path, "train") as store:
        Pair(store, pair.oracle).check()
        store.fold()
        Pair(store, pair.oracle).check()
    assert directories_of(pair.path) >= set(numbers_of(pair.path))


def test_rows_that_most_segments_have_come_first(pair: Pair) -> None:
    """On disk, so that they share pages."""
    tokens = pair.rng.integers(0, 500, (1, 40))
    for step in range(4):
        window = pair.announce(tokens[:, : 10 * (step + 1)], step)
        window.push_random(pair.rng)
        pair.commit()
        pair.store.seal()
    counts: dict[int, int] = {}
    for directory in sorted((pair.path / "layers" / "1" / "segments").iterdir()):
        for row in np.fromfile(directory / "row_ids", "<i4").tolist():
            counts[row] = counts.get(row, 0) + 1

    engine_of(pair).merge()

    (number,) = directories_of(pair.path)
    rows = np.fromfile(pair.path / f"layers/1/segments/{number}/row_ids", "<i4").tolist()
    assert sorted(rows) == sorted(counts)
    touches = [counts[row] for row in rows]
    assert touches == sorted(touches, reverse=True)
    assert touches[0] == 4


def test_segments_without_a_live_row_vanish(pair: Pair) -> None:
    """Every row of theirs has a newer version in a segment that stays."""
    tokens = pair.rng.integers(0, 500, (1, 40))
    for _ in range(3):
        window = pair.announce(tokens, pair.step)
        window.push_random(pair.rng)
        pair.commit()
        pair.store.seal()
    engine = engine_of(pair)
    table = engine.tables[1]
    engine._background.maintenance._merge(table, table.segments[:2], force=True)
    assert numbers_of(pair.path) == [3]
    pair.check()
    pair.store.close()
    with engram_store.open(pair.path, "train") as store:
        Pair(store, pair.oracle).check()


def test_snapshots_keep_the_segments_that_they_name(pair: Pair) -> None:
    """Going back to before a merge, or reading from there, is as if it had never been."""
    train_and_seal(pair, 3)
    ref = pair.snapshot()
    expected = tables_of(pair.store)
    train_and_seal(pair, 2)
    engine_of(pair).merge()
    assert {1, 2, 3} < directories_of(pair.path)
    with engram_store.open(pair.path, snapshot=ref) as reader:
        for layer, (rows, _) in tables_of(reader).items():
            assert rows.tobytes() == expected[layer][0].tobytes()
    after = pair.snapshot()
    assert numbers_of(pair.path, step=after.step) == [MERGED + 5]

    pair.restore(ref)

    pair.check()
    assert directories_of(pair.path) == {1, 2, 3}
    train_and_seal(pair, 2)
    engine_of(pair).merge()
    pair.check()


def test_memtables_are_numbered_on_after_merges_and_a_rewind(pair: Pair) -> None:
    """Numbers of merged segments are never taken for those of memtables."""
    train_and_seal(pair, 3)
    engine_of(pair).merge()
    pair.snapshot()
    train_and_seal(pair, 1)
    pair.store.close()
    paths = StorePaths(pair.path)
    paths.current.write_bytes(b"{}")

    assert rewind(paths, pair.store.metadata, 3, Disk()) is not None

    pair.oracle.restore(3)
    with engram_store.open(pair.path, "train", fold_ratio=NEVER) as store:
        again = Pair(store, pair.oracle, pair.rng)
        again.check()
        train_and_seal(again, 2)
        again.check()
        numbers = numbers_of(pair.path)
        assert numbers[0] == MERGED + 3
        assert 4 < numbers[1] < numbers[2] < 100


def test_merging_in_the_background_is_exact(
    make_pair: MakePair, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While training commits, seals, folds and reads."""
    monkeypatch.setattr(merge, "FAN_IN", 2)
    monkeypatch.setattr(merge, "_WRITTEN_PER_UPDATED", 10)
    size = tiny_overlay_bytes(specs_of(recipe))
    pair = make_pair(options={"overlay_bytes": size, "fold_ratio": 1.5})
    pair.train(30)
    engine_of(pair)._background.drain()
    stats = pair.store.stats()
    assert stats.merges >= 2
    pair.check()
    pair.store.close()
    assert verify_store(StorePaths(pair.path)).ok
    with engram_store.open(pair.path, "train") as store:
        Pair(store, pair.oracle).check()


def test_merges_stay_within_what_may_be_written(
    make_pair: MakePair, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes written are at most a tenth more than bytes of updated rows."""
    monkeypatch.setattr(merge, "FAN_IN", 3)
    size = tiny_overlay_bytes(specs_of(recipe))
    pair = make_pair(options={"overlay_bytes": size, "fold_ratio": NEVER})
    for _ in range(80):
        window = pair.announce(pair.rng.integers(0, 12, (2, 40)), pair.step)
        window.push_random(pair.rng)
        pair.commit()
    engine_of(pair)._background.drain()
    stats = pair.store.stats()
    assert stats.merges >= 1
    assert stats.write_amplification is not None
    assert stats.write_amplification < 1.1
    pair.check()


@pytest.mark.parametrize("point", ["merge.segment_written", "merge.published", "merge.swapped"])
def test_a_merge_that_fails_loses_nothing(pair: Pair, point: str) -> None:
    """Wherever it failed; the next one succeeds, and what was left behind is removed."""
    train_and_seal(pair, 3)
    failpoints.arm(point, failpoints.fail_with_full_disk)
    if point == "merge.segment_written":
        with pytest.raises(OSError, match="No space"):
            engine_of(pair).merge()
        assert numbers_of(pair.path) == [1, 2, 3]
        assert directories_of(pair.path) == {1, 2, 3, MERGED + 3}
        # Garbage, but what could tell that from a segment being written?
        pair.store.keep_snapshots(1)
        assert directories_of(pair.path) == {1, 2, 3, MERGED + 3}
    else:
        with pytest.raises(OSError, match="No space"):
            engine_of(pair).merge()
    pair.check()
    failpoints.disarm()
    train_and_seal(pair, 2)
    engine_of(pair).merge()
    pair.check()
    pair.store.close()
    with engram_store.open(pair.path, "train") as store:
        Pair(store, pair.oracle).check()
        store.keep_snapshots(1)
    assert directories_of(pair.path) == set(numbers_of(pair.path))


@pytest.mark.parametrize("what", ["row_ids", "rows", "state"])
def test_a_damaged_block_is_never_merged(
    pair: Pair, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor are rows left out because of a newer segment whose row ids are damaged."""
    train_and_seal(pair, 3)
    file = pair.path / "layers/1/segments/000002" / what
    with changed(file, flip(40)), caplog.at_level(logging.ERROR):
        with pytest.raises(ChecksumError, match=r"block 0 \(layer 1, slots 0 to"):
            engine_of(pair).merge()
        assert str(file) in caplog.text
    assert numbers_of(pair.path) == [1, 2, 3]
    stats = pair.store.stats()
    assert (stats.merges, stats.damaged_blocks) == (0, 1)


def test_row_ids_of_newer_segments_are_checked_too(pair: Pair) -> None:
    train_and_seal(pair, 3)
    engine = engine_of(pair)
    table = engine.tables[1]
    with (
        changed(pair.path / "layers/1/segments/000003/row_ids", flip(40)),
        pytest.raises(ChecksumError, match="block 0"),
    ):
        engine._background.maintenance._merge(table, table.segments[:2], force=True)
    assert numbers_of(pair.path) == [1, 2, 3]


def test_merging_that_always_fails_fails_no_commit(
    make_pair: MakePair, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many segments or not."""
    monkeypatch.setattr(merge, "FAN_IN", 2)
    monkeypatch.setattr(maintenance, "MAX_SEGMENTS", 3)

    def write(*_: Any) -> None:
        raise OSError(errno.EIO, "the disk fails")

    monkeypatch.setattr(merge.Merge, "write", write)
    size = tiny_overlay_bytes(specs_of(recipe))
    pair = make_pair(options={"overlay_bytes": size, "fold_ratio": NEVER})
    pair.train(25)
    pair.check()
    assert pair.store.stats().merges == 0
