"""Windows that are staged ahead of their step: the same bits, bounded memory, counted reasons."""

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import engram_store
from engram_store.engine import Engine
from engram_store.engine.fetch import Fetcher
from engram_store.engine.memtable import Memtable
from engram_store.engine.table import Table
from engram_store.errors import (
    ConfigError,
    DiskFullError,
    DuplicateStepError,
    StepGapError,
    WindowClosedError,
)
from engram_store.recipes import Recipe
from engram_store.store import Store
from engram_store.window import Phase, StoreWindow
from tests.pairs import MakePair, MakeStore, Pair, TwinWindow, random_tokens, tiny_overlay_bytes


def engine(store: Store) -> Engine:
    """Of a store that is trained."""
    assert isinstance(store._engine, Engine)
    return store._engine


@pytest.fixture
def make_pair(make_pair: MakePair) -> MakePair:
    """Pairs whose windows are staged ahead also when nothing is cold."""

    def make(*args: Any, **settings: Any) -> Pair:
        pair = make_pair(*args, **settings)
        pair.store._announced.ahead.stages_warm = True
        return pair

    return make


def staged(store: Store, windows: list[Any]) -> None:
    """Wait until the look-ahead threads have nothing left to do."""
    store._announced.ahead.drain()
    assert all(
        lookup.phase in (Phase.STAGED, Phase.STARTED)
        for window in windows
        for lookup in window.lookups.values()
    )


def make_cold(store: Store) -> None:
    """Push every file's pages out of memory, and let the store know nothing of it."""
    for path in store.path.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
    for table in store._engine.tables.values():
        with table.lock:
            assert table.paging is not None
            for residency in table.paging._watched.values():
                residency.pages[:] = 0


def train_ahead(pair: Pair, steps: int, ahead: int, between: Callable[[int], None]) -> None:
    """Train with every window announced `ahead` steps before its own."""
    windows: dict[int, list[TwinWindow]] = {}
    first = pair.step
    for step in range(first, first + steps):
        for later in range(step, step + ahead + 1):
            if later not in windows and later < first + steps:
                windows[later] = [
                    pair.announce(random_tokens(pair.rng, (2, 30)), later) for _ in range(2)
                ]
        between(step)
        for window in windows.pop(step):
            window.push_random(pair.rng)
        pair.commit()


@pytest.mark.parametrize("ahead", [0, 1, 4])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam", "sgd"])
def test_tables_are_the_same_however_far_ahead_windows_are_announced(
    make_pair: MakePair, recipe: Recipe, ahead: int, optimizer: str
) -> None:
    """Seals, folds and merges go on meanwhile, in memtables that are used again every few steps."""
    from tests.pairs import specs_of

    overlay = tiny_overlay_bytes(specs_of(recipe, optimizer=optimizer))
    pair = make_pair(optimizer=optimizer, options={"overlay_bytes": overlay})
    chance = random.Random(ahead)

    def disturb(step: int) -> None:
        if step % 3 == 0:
            make_cold(pair.store)
        if step % 7 == 3:
            pair.store.seal()
        if step % 11 == 5:
            pair.store.fold()
        if step % 13 == 6:
            engine(pair.store).merge()
        time.sleep(chance.random() * 0.01)

    train_ahead(pair, 24, ahead, disturb)
    pair.check()
    tables = pair.store.stats().tables.values()
    assert all((table.rows_copied_again > 0) == (ahead > 0) for table in tables)
    assert all(table.pages_read > 0 for table in tables)


def test_a_slot_that_was_used_again_is_not_taken_for_the_row_it_held(make_pair: MakePair) -> None:
    """Rows that come back to the place where they were staged from, with another value."""
    pair = make_pair()
    table: Table = pair.store._engine.tables[1]
    tokens = random_tokens(pair.rng)
    for _ in range(2):
        window = pair.announce(tokens, pair.step)
        window.push_random(pair.rng)
        pair.commit()
        pair.store.seal()
    later = pair.announce(tokens, pair.step + 3)
    staged(pair.store, [later.store])
    assert isinstance(later.store, StoreWindow)
    fetched = later.store.lookups[1].fetched
    assert fetched is not None
    before = fetched.places.copy()
    for _ in range(3):
        window = pair.announce(tokens, pair.step)
        window.push_random(pair.rng)
        pair.commit()
        if _ < 2:
            pair.store.seal()
    table.locate(fetched.rows, now := np.empty_like(before))
    assert not np.array_equal(now, before)
    later.push_random(pair.rng)
    pair.commit()
    pair.check()


def test_equal_places_with_other_contents_are_copied_again(make_pair: MakePair) -> None:
    pair = make_pair()
    tokens = random_tokens(pair.rng)
    table: Table = pair.store._engine.tables[1]
    first = pair.announce(tokens, 0)
    first.push_random(pair.rng)
    pair.commit()
    rows = np.unique(pair.oracle.announce(tokens).row_ids(1))
    spec = pair.store.tables[1]
    out = np.empty((rows.size, spec.dim), spec.dtype.storage)
    fetcher = Fetcher(table)
    fetched = fetcher.begin(rows, [out], np.empty(rows.size, np.int32))
    places = fetched.places.copy()
    # Twice round both memtables: the same rows, in the same order, in the same slots.
    for _ in range(2):
        pair.store.seal()
        window = pair.announce(tokens, pair.step)
        window.push_random(pair.rng)
        pair.commit()
    now = np.empty_like(places)
    with table.lock:
        table.locate(rows, now)
    np.testing.assert_array_equal(now, places)
    assert fetcher.refresh(fetched, [out]) == rows.size
    np.testing.assert_array_equal(out, pair.oracle.contents[1].rows[rows])
    assert fetcher.refresh(fetched, [out]) == 0


def test_only_rows_that_a_commit_changed_are_copied_again(make_pair: MakePair) -> None:
    pair = make_pair()
    same, other = random_tokens(pair.rng), random_tokens(pair.rng)
    later = pair.announce(same, 1)
    now = pair.announce(other, 0)
    staged(pair.store, [later.store])
    shared = {
        layer: np.intersect1d(now.oracle.row_ids(layer), later.oracle.row_ids(layer)).size
        for layer in (1, 2)
    }
    now.push_random(pair.rng)
    pair.commit()
    later.push_random(pair.rng)
    copied = {layer: t.rows_copied_again for layer, t in pair.store.stats().tables.items()}
    assert copied == shared


def test_readers_see_one_moment_while_commits_and_moves_go_on(make_pair: MakePair) -> None:
    """Every row of a step gets the same value, so a window of two steps would show it."""
    pair = make_pair(initial=None, optimizer="sgd", dtype="float32")
    store = pair.store
    tokens = random_tokens(pair.rng, (4, 60))
    seen: list[int] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            with store.announce(tokens) as window:
                rows, _ = window.rows(1)
                values = np.unique(rows)
                assert values.size == 1, values
                seen.append(int(values[0]))

    with ThreadPoolExecutor(2) as threads:
        readers = [threads.submit(read) for _ in range(2)]
        try:
            for step in range(60):
                window = store.announce(tokens, step)
                for layer in (1, 2):
                    window.push(layer, -np.ones(window.rows(layer)[0].shape, np.float32))
                store.commit(step, 1.0)
                if step % 9 == 4:
                    store.seal()
                if step % 20 == 13:
                    store.fold()
        finally:
            stop.set()
        for reader in readers:
            reader.result()
    assert seen == sorted(seen) or len(set(seen)) > 2


# ------------------------------------------------------------------ bounds


def test_look_ahead_takes_no_more_than_it_may(make_pair: MakePair) -> None:
    """Windows beyond the room wait as tokens, are counted, and come in time all the same."""
    pair = make_pair(options={"lookahead_bytes": 200_000})
    windows = [pair.announce(random_tokens(pair.rng), step) for step in range(30)]
    announced = pair.store._announced
    staged_now = [
        w for w in announced._training if w.lookups[1].phase in (Phase.AHEAD, Phase.STAGED)
    ]
    assert len(staged_now) < 20
    for window in windows:
        assert 0 <= announced.ahead.room <= 200_000
        window.push_random(pair.rng)
        pair.commit()
    pair.check()
    stats = pair.store.stats()
    assert stats.windows_held > 0
    assert announced.ahead.room == 200_000


def test_a_window_larger_than_all_the_room_is_gathered_when_it_is_due(make_pair: MakePair) -> None:
    pair = make_pair(options={"lookahead_bytes": 0})
    windows = [pair.announce(random_tokens(pair.rng), step) for step in range(3)]
    ids = windows[2].store.row_ids(1)  # also before its step
    np.testing.assert_array_equal(ids, windows[2].oracle.row_ids(1))
    for window in windows:
        window.push_random(pair.rng)
        pair.commit()
    pair.check()


def test_windows_that_are_never_used_give_their_room_back(make_pair: MakePair) -> None:
    pair = make_pair()
    room = pair.store._announced.ahead.room
    for _ in range(20):
        window = pair.store.announce(random_tokens(pair.rng), 5)
        window.close()
    pair.train(2)
    pair.store._announced.end_all()
    assert pair.store._announced.ahead.room == room
    assert not pair.store._announced._training


def test_closing_a_window_while_it_is_worked_on(make_pair: MakePair) -> None:
    pair = make_pair()
    for round_ in range(50):
        window = pair.store.announce(random_tokens(pair.rng, (4, 100)), pair.step + 1 + round_ % 2)
        if round_ % 3:
            time.sleep(0.0005 * (round_ % 4))
        window.close()
        with pytest.raises(WindowClosedError):
            window.rows(1)
    pair.train(3)
    pair.check()


def test_a_store_closes_while_windows_are_staged(make_pair: MakePair) -> None:
    pair = make_pair()
    for step in range(6):
        pair.store.announce(random_tokens(pair.rng, (4, 200)), step)
    pair.store.close()


# ------------------------------------------------------------------ staleness


@pytest.fixture
def stale(make_store: MakeStore) -> Iterator[Store]:
    path = make_store(initial=None, optimizer="sgd", dtype="float32")
    with engram_store.open(path, mode="train", staleness=2) as store:
        yield store


def one_step(store: Store, window: Any) -> None:
    for layer in (1, 2):
        window.push(layer, -np.ones(window.rows(layer)[0].shape, np.float32))
    store.commit(store.step, 1.0)


def values(rows: NDArray[Any]) -> list[float]:
    return [float(value) for value in np.unique(rows)]


def test_staleness_hands_rows_out_early_and_counts_what_changed(stale: Store) -> None:
    tokens = np.arange(80).reshape(2, 40)
    windows = [stale.announce(tokens, step) for step in range(5)]
    assert values(windows[2].rows(1)[0]) == [0.0]  # two steps before its own
    with pytest.raises(StepGapError):
        windows[3].rows(1)
    one_step(stale, windows[0])
    one_step(stale, windows[1])
    assert values(windows[2].rows(1)[0]) == [0.0]
    stale._announced.ahead.drain()
    counted = stale.stats().tables[1].stale_rows
    assert counted >= windows[2].row_ids(1).size
    one_step(stale, windows[2])
    one_step(stale, windows[3])
    assert min(values(windows[4].rows(1)[0])) >= 2.0  # never more than two steps behind


def test_exact_mode_never_counts_stale_rows(make_pair: MakePair) -> None:
    pair = make_pair()
    train_ahead(pair, 6, 2, lambda _: None)
    assert all(table.stale_rows == 0 for table in pair.store.stats().tables.values())


@pytest.mark.parametrize("wrong", [{"staleness": -1}, {"lookahead_bytes": -1}, {"staleness": 1.5}])
def test_settings_that_make_no_sense(make_store: MakeStore, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        engram_store.open(make_store(), mode="train", **wrong)


# ------------------------------------------------------------------ cold rows


def test_cold_rows_are_read_in_slices_and_are_the_same(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engram_store.engine.fetch.SLICE_ROWS", 37)
    pair = make_pair()
    for _ in range(5):
        make_cold(pair.store)
        pair.train(1)
    pair.check()
    assert all(table.cold_rows > 0 for table in pair.store.stats().tables.values())


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_commit_does_not_read_again_what_its_windows_read(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch, windows: int, ahead: int
) -> None:
    """Pages that were read for a window may be gone by the time of its commit."""
    pair = make_pair(optimizer="adam")
    make_cold(pair.store)
    pair.train(1)
    paging = pair.store._engine.paging
    assert paging.cold
    announced = [pair.announce(random_tokens(pair.rng), 1 + ahead) for _ in range(windows)]
    staged(pair.store, [window.store for window in announced])
    if ahead:
        pair.train(1)
    for window in announced:
        window.push_random(pair.rng)
    make_cold(pair.store)
    reader, asked = paging.reader, 0

    class Counts:
        name = "counts"

        def start(self, ranges: NDArray[np.int64]) -> None:
            nonlocal asked
            asked += len(ranges)
            reader.start(ranges)

    monkeypatch.setattr(paging, "reader", Counts())
    pair.commit()
    assert asked == 0
    pair.check()
    assert asked > 0  # and somebody else would have had to


def test_files_that_go_away_between_two_slices(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A fold replaces the base while a cold window is read: the rest is looked for again."""
    monkeypatch.setattr("engram_store.engine.fetch.SLICE_ROWS", 16)
    pair = make_pair()
    pair.train(3)
    pair.store.seal()
    table: Table = pair.store._engine.tables[1]
    assert table.paging is not None
    reader, folded = table.paging.reader, list[int]()

    class FoldsOnce:
        name = "folds once"

        def start(self, ranges: NDArray[np.int64]) -> None:
            if not folded:
                folded.append(table.generation)
                pair.store.fold()
            reader.start(ranges)

    monkeypatch.setattr(table.paging, "reader", FoldsOnce())
    make_cold(pair.store)
    rows = np.arange(2_000, dtype=np.int32)
    out = np.empty((rows.size, pair.store.tables[1].dim), pair.store.tables[1].dtype.storage)
    Fetcher(table).fetch(rows, [out])
    assert table.generation == folded[0] + 1
    np.testing.assert_array_equal(out, pair.oracle.contents[1].rows[rows])


# ------------------------------------------------------------------ rows before a commit is done


def train_behind(pair: Pair, steps: int, ahead: int, between: Callable[[int], None]) -> None:
    """Train with commits in the background; the oracle's are done when they are begun."""
    windows: dict[int, list[TwinWindow]] = {}
    first = pair.step
    last = first + steps
    for step in range(first, last):
        for later in range(step, min(step + ahead + 1, last)):
            if later not in windows:
                windows[later] = [
                    pair.announce(random_tokens(pair.rng, (2, 30)), later)
                    for _ in range(1 + later % 2)
                ]
        between(step)
        for window in windows.pop(step):
            window.push_random(pair.rng)
        applied = pair.session.begin_commit(step, 0.1)
        expected = pair.oracle.commit(step, 0.1)
        assert pair.session.step == step + 1
        if step % 3 == 1:
            assert applied.result() == expected
    assert applied.result() == expected


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam", "sgd"])
def test_rows_handed_out_before_a_commit_is_done_are_those_after_it(
    make_pair: MakePair, recipe: Recipe, ahead: int, optimizer: str
) -> None:
    from tests.pairs import specs_of

    overlay = tiny_overlay_bytes(specs_of(recipe, optimizer=optimizer))
    pair = make_pair(optimizer=optimizer, options={"overlay_bytes": overlay})

    def disturb(step: int) -> None:
        if step % 5 == 2:
            make_cold(pair.store)
        if step % 7 == 3:
            pair.store.seal()
        if step % 11 == 5:
            pair.store.fold()

    train_behind(pair, 24, ahead, disturb)
    pair.check()


def test_the_next_window_does_not_wait_for_the_rest_of_a_commit(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are there while the commit is held up, and are those of after the commit."""
    pair = make_pair()
    train_behind(pair, 2, 1, lambda _: None)
    now, later = (pair.announce(random_tokens(pair.rng), step) for step in (2, 3))
    now.push_random(pair.rng)
    staged(pair.store, [later.store])
    go_on, publish = threading.Event(), Memtable.publish

    def held_up(memtable: Memtable, commit: Any) -> None:
        assert go_on.wait(30)
        publish(memtable, commit)

    monkeypatch.setattr(Memtable, "publish", held_up)
    applied = pair.session.begin_commit(2, 0.1)
    pair.oracle.commit(2, 0.1)
    later.rows(1)
    later.rows(2)
    assert not applied.done()
    assert pair.store._engine.step == 2
    go_on.set()
    assert applied.result().step == 2
    later.push_random(pair.rng)
    pair.commit()
    pair.check()


def test_a_commit_that_fails_takes_back_what_it_handed_out(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair()
    train_behind(pair, 2, 1, lambda _: None)
    now, later = (pair.announce(random_tokens(pair.rng), step) for step in (2, 3))
    now.push_random(pair.rng)
    staged(pair.store, [later.store])
    publish = Memtable.publish

    def refused(memtable: Memtable, commit: Any) -> None:
        monkeypatch.setattr(Memtable, "publish", publish)
        raise DiskFullError(errno.ENOSPC, "no room")

    monkeypatch.setattr(Memtable, "publish", refused)
    applied = pair.session.begin_commit(2, 0.1)
    assert isinstance(applied.exception(), DiskFullError)
    assert pair.session.step == 2
    with pytest.raises(WindowClosedError):
        later.store.rows(1)
    # The step can still be committed, and training goes on.
    later.oracle.close()
    pair.commit()
    pair.train(2)
    pair.check()


def test_rows_of_a_commit_that_failed_early_are_not_waited_for(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair()
    train_behind(pair, 2, 1, lambda _: None)
    now, later = (pair.announce(random_tokens(pair.rng), step) for step in (2, 3))
    now.push_random(pair.rng)
    staged(pair.store, [later.store])
    make_room = engine(pair.store)._make_room

    def refused(updates: Any) -> None:
        monkeypatch.setattr(engine(pair.store), "_make_room", make_room)
        raise DiskFullError(errno.ENOSPC, "no room")

    monkeypatch.setattr(engine(pair.store), "_make_room", refused)
    applied = pair.session.begin_commit(2, 0.1)
    with pytest.raises(DiskFullError):
        later.store.rows(1)
    assert isinstance(applied.exception(), DiskFullError)
    pair.commit()
    later.push_random(pair.rng)
    pair.commit()
    pair.check()


def test_a_window_that_is_closed_while_a_commit_has_to_do_with_it(make_pair: MakePair) -> None:
    pair = make_pair()
    for _ in range(10):
        train_behind(pair, 1, 0, lambda _: None)
        step = pair.step
        now, later = (pair.announce(random_tokens(pair.rng), s) for s in (step, step + 1))
        now.push_random(pair.rng)
        staged(pair.store, [later.store])
        pair.session.begin_commit(step, 0.1)
        later.store.close()
        later.oracle.close()
        pair.oracle.commit(step, 0.1)
    pair.session.snapshot()  # waits
    pair.check()
    assert isinstance(later.store, StoreWindow)
    assert all(not lookup.buffers for lookup in later.store.lookups.values())


def test_what_is_asked_while_a_commit_is_under_way(make_pair: MakePair) -> None:
    pair = make_pair()
    window = pair.announce(random_tokens(pair.rng), 0)
    window.push_random(pair.rng)
    applied = pair.session.begin_commit(0, 0.1)
    pair.oracle.commit(0, 0.1)
    assert pair.session.step == 1
    with pytest.raises(DuplicateStepError):
        pair.session.announce(random_tokens(pair.rng), 0)
    with pytest.raises(DuplicateStepError):
        pair.session.begin_commit(0, 0.1)
    assert pair.snapshot().step == 1
    assert applied.done()
    with pytest.raises(StepGapError):
        pair.session.begin_commit(2, 0.1)
    pair.store.close()


def test_a_commit_that_fails_before_it_begins_lets_go_of_the_next_window(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair()
    train_behind(pair, 2, 1, lambda _: None)
    now, later = (pair.announce(random_tokens(pair.rng), step) for step in (2, 3))
    now.push_random(pair.rng)
    staged(pair.store, [later.store])
    with monkeypatch.context() as patch:

        def refused(*_: Any) -> None:
            raise ConfigError("no such rule")

        patch.setattr("engram_store.committing.rule_step", refused)
        applied = pair.session.begin_commit(2, 0.1)
        assert isinstance(applied.exception(), ConfigError)
    assert isinstance(later.store, StoreWindow)
    assert all(lookup.phase is Phase.STAGED for lookup in later.store.lookups.values())
    pair.commit()
    later.push_random(pair.rng)
    pair.commit()
    pair.check()
