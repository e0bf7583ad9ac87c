"""What a store tells about itself, compared with what was done to it."""

from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import engram_store
from engram_store.engine.fetch import Fetched, Reads
from engram_store.engine.statistics import StoreCounters, TableCounters
from engram_store.engine.table import Table
from engram_store.paging import Residency
from engram_store.recipes import Recipe
from engram_store.stats import StoreStats, TableStats
from engram_store.store import Store
from engram_store.window import LayerLookup, StoreWindow
from tests.pairs import MakePair, MakeStore, Pair, random_tokens, specs_of, tiny_overlay_bytes
from tests.unit.test_lookahead import make_cold, train_behind


def quiet(store: Store) -> StoreStats:
    """Statistics when everything that is counted behind a window has been."""
    for stream in store._engine.streams.values():
        stream.submit(int).result()
    return store.stats()


def head_sums(table: TableStats) -> dict[str, int]:
    names = ("lookups", "unique_rows", "overlay_hits", "page_hits", "page_misses", "touched_rows")
    return {name: sum(getattr(order, name) for order in table.orders) for name in names}


# ---------------------------------------------------------------------- where rows were found


def test_heads_and_orders_add_up_to_their_table(pair: Pair, recipe: Recipe) -> None:
    """Whatever was in memory, in files and on the disk."""
    pair.train(6)
    pair.store.seal()
    pair.train(6)
    make_cold(pair.store)
    pair.train(8)

    for layer, table in quiet(pair.store).tables.items():
        assert table.windows == 40
        assert table.sampled_windows == 2
        assert table.overlay_hits + table.page_hits + table.page_misses == table.unique_rows
        assert min(table.overlay_hits, table.page_hits, table.page_misses) > 0
        assert [order.order for order in table.orders] == list(recipe.orders)
        for order, moduli in zip(table.orders, recipe.layer(layer).moduli, strict=True):
            assert tuple(head.rows for head in order.heads) == moduli
            assert all(head.lookups == table.lookups // 8 for head in order.heads)
        sums = head_sums(table)
        for name in ("lookups", "unique_rows", "overlay_hits", "page_hits"):
            assert sums[name] == pytest.approx(getattr(table, name), abs=12), name


def test_heads_whose_rows_are_read_say_so(pair: Pair) -> None:
    """The first window is sampled; all its rows come from the disk."""
    make_cold(pair.store)
    with pair.announce(random_tokens(pair.rng)).store as window:
        rows = {layer: window.rows(layer)[0].shape[0] for layer in (1, 2)}

    for layer, table in quiet(pair.store).tables.items():
        assert table.page_misses == table.unique_rows == rows[layer]
        assert table.page_hit_rate == 0
        assert head_sums(table)["page_misses"] == rows[layer]
        assert table.window_bytes_read == table.bytes_read == 4096 * table.pages_read
        assert table.cold_bytes == 32 * rows[layer]
        assert table.read_amplification == table.bytes_read / table.cold_bytes
        assert 0 < table.longest_read_seconds <= table.read_seconds


def test_what_commits_read_counts_but_is_no_window(pair: Pair) -> None:
    """Nor is it part of what windows read for each byte of theirs."""
    before = quiet(pair.store).tables[1]
    assert before.read_amplification is None
    make_cold(pair.store)
    pair.store.read_rows(1, np.arange(0, 4_000, 200, dtype=np.int32))

    table = quiet(pair.store).tables[1]
    assert table.pages_read >= 10
    assert table.read_seconds > 0
    assert (table.windows, table.unique_rows, table.cold_rows, table.window_bytes_read) == (0,) * 4


def test_page_faults_of_commits_count(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever copies rows meets them."""
    from engram_store.engine import fetch

    faults = iter(range(0, 1_000, 3))
    monkeypatch.setattr(fetch, "major_faults", lambda: next(faults))
    pair.store.read_rows(1, np.arange(50, dtype=np.int32))

    table = quiet(pair.store).tables[1]
    assert table.page_faults > 0
    assert table.page_faults % 3 == 0
    assert table.read_seconds > 0


def test_memory_of_files_is_what_is_believed_of_their_pages(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is asked neither for pages nor for files while residency is known."""
    engine = pair.store._engine
    assert engine.paging is not None
    watched = dict(engine.paging._watched)
    for residency in watched.values():
        residency.refresh()
        residency.pages[:] = 0
    monkeypatch.setattr(Residency, "refresh", lambda *_: None)  # in the background
    asked: list[Any] = []
    monkeypatch.setattr("engram_store.engine.statistics.cached_bytes", asked.append)
    assert pair.store.stats().tables[1].resident_bytes == 0

    mapping = engine.tables[1].mapped_files()[0]
    watched[mapping].pages[:3] = (1, 2, 1)

    assert pair.store.stats().tables[1].resident_bytes == min(2 * 4096, mapping.bytes.size)
    assert asked == []


def test_memory_of_files_that_nothing_is_known_of_is_asked_for(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File by file; what is not told counts as not in memory, nor do files that are gone."""
    monkeypatch.setattr(Residency, "known", property(lambda _: False))
    answers: dict[str, Any] = {"now": 4096}

    def answer(_: object) -> Any:
        if answers["now"] is FileNotFoundError:
            raise FileNotFoundError
        return answers["now"]

    monkeypatch.setattr("engram_store.engine.statistics.cached_bytes", answer)
    files = pair.store._engine.tables[1].mapped_files()
    found = [pair.store.stats().tables[1].resident_bytes]
    for answers["now"] in (None, FileNotFoundError):
        found.append(pair.store.stats().tables[1].resident_bytes)

    assert found == [sum(min(4096, file.bytes.size) for file in files), 0, 0]


# ---------------------------------------------------------------------- rows touched


def test_touched_rows_are_the_distinct_rows_of_all_sealed_steps(
    make_pair: MakePair, recipe: Recipe
) -> None:
    """Through many seals, folds and memtables that are used again."""
    pair = make_pair(options={"overlay_bytes": tiny_overlay_bytes(specs_of(recipe))})
    truth: dict[int, set[int]] = {1: set(), 2: set()}
    counts: dict[int, dict[int, int]] = {1: {}, 2: {}}
    for step in range(30):
        window = pair.announce(random_tokens(pair.rng), step)
        for layer, rows in truth.items():
            rows |= set(window.store.row_ids(layer).tolist())
            counts[layer][step + 1] = len(rows)
        window.push_random(pair.rng)
        pair.commit()
        if step == 20:
            pair.store.fold()
    pair.store.seal()

    stats = pair.store.stats()
    assert stats.seals > 3
    for layer, table in stats.tables.items():
        assert table.touched_rows == len(truth[layer]) == head_sums(table)["touched_rows"]
        assert table.growth[-1] == (30, table.touched_rows)
        assert dict(table.growth).items() <= counts[layer].items()
        head = table.orders[0].heads[0]
        first = np.array([*truth[layer]]) < head.rows
        assert head.touched_rows == np.count_nonzero(first)
        assert head.touched_share == head.touched_rows / head.rows


def test_steps_taken_back_leave_the_curve_but_not_the_count(pair: Pair) -> None:
    """Rows of an abandoned history were updated all the same."""
    pair.train(2)
    snapshot = pair.snapshot()
    first = pair.store.stats().tables[1].touched_rows
    pair.train(2)
    pair.snapshot()
    before = pair.store.stats().tables[1].touched_rows
    pair.restore(snapshot)
    pair.train(1)
    pair.store.seal()

    table = pair.store.stats().tables[1]
    assert table.growth == ((2, first), (3, table.touched_rows))
    assert table.touched_rows >= before > first


# ---------------------------------------------------------------------- who waited, and why


def test_late_windows_say_why(pair: Pair) -> None:
    """Announced too late; or in time, with rows to be read; or in time and behind a commit."""
    for is_staged, is_cold in ((False, False), (False, True), (True, True), (True, False)):
        lookup = LayerLookup(staged=is_staged, cold=is_cold)
        pair.store.count_wait(1, 0.25, lookup.why_late)
    pair.store.count_wait(2, 0.25, None)

    stats = pair.store.stats()
    first, second = stats.tables[1], stats.tables[2]
    assert (first.late_windows, first.late_unstaged, first.late_cold) == (4, 2, 1)
    assert (second.late_windows, second.late_unstaged, second.late_cold) == (0, 0, 0)
    assert stats.late_windows == 4
    assert (first.waits.total, second.waits.total, stats.waits.total) == (4, 1, 5)
    assert stats.waits.seconds == stats.wait_seconds == 1.25


@pytest.mark.parametrize(("ahead", "cold"), [(0, False), (1, False), (1, True)])
def test_a_window_knows_whether_it_was_staged_and_cold(pair: Pair, ahead: int, cold: bool) -> None:
    """That is what its lateness is put down to."""
    pair.store._announced.ahead.stages_warm = True
    if cold:
        make_cold(pair.store)
    window = pair.announce(random_tokens(pair.rng), ahead)
    if not cold:
        pair.store.read_rows(1, window.store.row_ids(1))
        pair.store.read_rows(2, window.store.row_ids(2))
    pair.store._announced.ahead.drain()
    if ahead:
        pair.commit()
    window.rows(1)

    assert isinstance(window.store, StoreWindow)
    lookup = window.store.lookups[1]
    assert lookup.staged == (ahead > 0)
    assert lookup.cold or not cold


def test_a_window_that_waits_for_its_stream_is_late(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is asked for again is not counted again; one that is only read is never late."""
    store = pair.store
    gate: Future[None] = Future()
    store._engine.streams[1].submit(gate.result)
    window = pair.announce(random_tokens(pair.rng), 0)
    wait_for_commit = store.wait_for_commit

    def open_the_gate(*arguments: Any) -> None:
        if not gate.done():  # by now it was found late
            gate.set_result(None)
        wait_for_commit(*arguments)

    monkeypatch.setattr(store, "wait_for_commit", open_the_gate)
    window.rows(1)
    window.rows(1)
    with store.announce(random_tokens(pair.rng)) as other:
        other.rows(1)

    table = quiet(store).tables[1]
    assert (table.late_windows, table.late_unstaged) == (1, 1)
    assert table.waits.total == 2


def test_windows_that_nobody_used_are_counted(pair: Pair) -> None:
    """Those of a step; windows that are only read owe nobody anything."""
    unused = [pair.announce(random_tokens(pair.rng), 3).store for _ in range(2)]
    used = pair.announce(random_tokens(pair.rng), 0)
    pair.store.announce(random_tokens(pair.rng)).close()
    used.push_random(pair.rng)
    pair.commit()
    for window in unused:
        window.close()

    assert pair.store.stats().windows_unused == 2


def test_rows_that_a_commit_hands_out_are_looked_at_too(make_pair: MakePair) -> None:
    """Every window is counted once, whoever gathered it; one in 16 is sampled."""
    pair = make_pair()
    train_behind(pair, 40, 2, lambda _: None)

    for table in quiet(pair.store).tables.values():
        assert table.windows == pair.store.stats().windows
        assert table.sampled_windows >= table.windows // 16 - 1
        assert table.orders[0].sampled_ngrams > 0


def test_nothing_is_looked_at_before_its_rows_are_handed_out(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a stream gathers them, or a commit has them first."""
    look_at, handed_out = TableCounters.look_at, []

    def watch(counters: TableCounters, window: StoreWindow, table: Table, fetched: Fetched) -> None:
        lookup = window.lookups[table.spec.layer]
        handed_out.append((lookup.gathered.done(), not window.closed))
        look_at(counters, window, table, fetched)

    monkeypatch.setattr(TableCounters, "look_at", watch)
    pair = make_pair()
    train_behind(pair, 12, 2, lambda _: None)
    quiet(pair.store)

    assert len(handed_out) >= 12
    assert set(handed_out) == {(True, True)}


def test_a_device_that_stalls_shows_in_what_was_read(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five seconds for one slice of rows, in time as well as in the worst case."""
    from engram_store.engine import fetch

    now = [100.0]
    monkeypatch.setattr(fetch, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    paging = pair.store._engine.paging
    assert paging is not None
    start = paging.reader.start

    def stall(ranges: Any) -> None:
        now[0] += 5
        start(ranges)

    monkeypatch.setattr(paging.reader, "start", stall)
    for _ in range(2):
        make_cold(pair.store)
        pair.store.read_rows(1, np.arange(50, dtype=np.int32))

    table = pair.store.stats().tables[1]
    assert (table.read_seconds, table.longest_read_seconds) == (10, 5)
    assert pair.store.stats().tables[2].read_seconds == 0


def test_a_store_that_is_only_read_counts_what_it_can(make_store: MakeStore) -> None:
    """It never updates anything, and its windows are sampled as any."""
    with engram_store.open(make_store(), "read") as store:
        for seed in range(30):
            with store.announce(random_tokens(np.random.default_rng(seed))) as window:
                window.rows(1)
        stats = quiet(store)

    table = stats.tables[1]
    assert (table.windows, table.sampled_windows) == (30, 2)
    assert table.overlay_hits == table.touched_rows == 0
    assert table.growth == ()
    assert head_sums(table)["unique_rows"] == pytest.approx(table.unique_rows, abs=8)
    assert table.orders[1].ngrams_per_row is not None
    assert (stats.late_windows, table.waits.total) == (0, 30)


def test_counts_of_many_threads_are_all_there() -> None:
    """Waits are counted by whoever waits."""
    counters, reads = StoreCounters(), Reads()

    def count(_: int) -> None:
        for _ in range(500):
            counters.count_unused()
            reads.count(2, 1, 0.0)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(count, range(8)))

    assert (counters.unused_windows, reads.pages, reads.faults) == (4_000, 8_000, 4_000)
