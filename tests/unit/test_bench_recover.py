"""`bench recover`: a tiny run that really kills, and what it does when something is wrong."""

import json
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import engram_store
from engram_store.bench import RecoverWorkload, Workload, pauses, run_bench
from engram_store.bench.pauses import BESIDE, COMMIT, PAUSE, PROPORTION, SNAPSHOT, Snapshots
from engram_store.bench.recover import (
    CLOSED,
    IN_SEGMENTS,
    JOURNAL,
    KILLED,
    MAP,
    SEAL,
    SEGMENTS,
    TAKE_OVER,
    _Kills,
    bench_recover,
)
from engram_store.bench.reopening import Shop, fill_and_kill, fill_in_segments, reopen
from engram_store.bench.workplace import (
    FIRST_STEP,
    LAYER,
    Workplace,
    open_store,
    open_workplace,
    overlay_bytes,
)
from engram_store.cli import main
from engram_store.engine.placement import SHARED_MEMORY
from engram_store.engine.recovery import RecoveryKind
from engram_store.errors import ConfigError, EngramStoreError

TINY = RecoverWorkload(rows=50_000, tokens=256, repetitions=1, overlay_rows=5000)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the first test, used again by the others."""
    return tmp_path_factory.mktemp("bench")


@pytest.fixture
def place(directory: Path) -> Iterator[Workplace]:
    place = open_workplace(TINY, directory, lambda _: None)
    with place.store:
        yield place


@pytest.fixture
def shop(place: Workplace, tmp_path: Path) -> Shop:
    """The store of the workplace, closed; its memtables are in a directory of the test."""
    place.store.close()
    size = overlay_bytes(place.spec)
    return Shop(
        root=str(place.store.path), memtable_dir=str(tmp_path), overlay_bytes=size, rows=5000
    )


def left_behind() -> set[Path]:
    """Directories of benchmarks in shared memory."""
    return set(SHARED_MEMORY.glob("engram-store-bench-*"))


@pytest.mark.slow
def test_recover_measures_every_way_to_reopen_and_leaves_the_store_as_it_was(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line: JSON keys, all lines, targets; nothing stays in shared memory."""
    sizes = ("--rows", "50000", "--tokens", "256", "--steps", "1", "--overlay-rows", "5000")
    before = left_behind()

    with pytest.raises(SystemExit) as end:
        main(["bench", "recover", "--json", *sizes, "--dir", str(directory)])

    assert not end.value.code
    data = json.loads(capsys.readouterr().out)
    assert data["bench"] == "recover"
    results = {result["name"]: result for result in data["results"]}
    opened = [KILLED, TAKE_OVER, SEAL, MAP, CLOSED, IN_SEGMENTS, JOURNAL]
    assert [*results] == [*opened, COMMIT, BESIDE, PAUSE, SNAPSHOT]
    for name in opened:
        assert 0 < results[name]["median_ms"] <= results[name]["max_ms"]
        assert results[name]["repetitions"] == 1
    parts = sum(results[part]["median_ms"] for part in (TAKE_OVER, SEAL, MAP))
    assert parts == pytest.approx(results[KILLED]["median_ms"], abs=0.01)
    assert results[PAUSE]["max_ms"] <= results[BESIDE]["max_ms"]
    assert set(results[KILLED]["ratio_to"]) == {CLOSED}
    (proportion,) = data["quantities"]
    assert (proportion["name"], proportion["unit"]) == (PROPORTION, "x")
    assert proportion["min"] >= 1
    assert [(target["what"], target["target"]) for target in data["targets"]] == [
        ("reopening a killed store, 5,000 rows in shared memory", "<= 2 s"),
        ("pause of a snapshot, median", "<= 20 ms"),
        ("pause of a snapshot, longest", "<= 20 ms"),
        ("bytes of a snapshot, of rows touched, most", "<= 1.1 x"),
    ]
    assert all(target["met"] is not None for target in data["targets"])
    assert data["workload"]["overlay_rows"] == 5000
    assert left_behind() == before
    with engram_store.open(directory / "bench.engram") as store:
        assert store.step == FIRST_STEP


@pytest.mark.slow
def test_recover_prints_what_it_measured(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --json, lines, targets and notes; --quick gives the sizes."""
    monkeypatch.setattr("engram_store.cli.bench._QUICK_ROWS", 20_000)
    monkeypatch.setattr("engram_store.cli.bench._QUICK_TOKENS", 64)
    monkeypatch.setattr(pauses, "_SNAPSHOTS", 1)

    with pytest.raises(SystemExit) as end:
        main(["bench", "recover", "--quick", "--dir", str(directory / "quick")])

    assert not end.value.code
    out = capsys.readouterr().out
    assert "reopening a killed store, 5,000 rows in shared memory" in out.replace("\n", " ")
    for line in (KILLED, TAKE_OVER, JOURNAL, PAUSE):
        assert f"\n{line} " in out


def test_rows_survive_every_kill_that_is_measured(shop: Shop) -> None:
    """What is timed is a real recovery: all steps are there, and all parts took some time."""
    fill_and_kill(shop, "snapshot")

    killed = reopen(shop, go_back=False)
    closed = reopen(shop, go_back=False)

    assert (killed.kind, killed.sealed_rows) == ("recovered", shop.rows)
    parts = (killed.take_over_ms, killed.seal_ms, killed.map_ms)
    assert all(part is not None and part > 0 for part in parts)
    assert (closed.kind, closed.sealed_rows, closed.seal_ms) == ("clean", 0, None)
    with engram_store.open(shop.root) as store:
        assert store.step > FIRST_STEP
    assert reopen(shop, go_back=True).kind == "clean"
    with engram_store.open(shop.root) as store:
        assert store.step == FIRST_STEP


def test_a_lost_host_is_one_without_shared_memory(shop: Shop) -> None:
    """What is read then is the journal, and the store goes back afterwards."""
    kills = _Kills(shop)

    kills.lose_the_host()

    (reopened,) = kills.found[JOURNAL]
    assert (reopened.kind, reopened.sealed_rows) == ("replayed", shop.rows)
    with engram_store.open(shop.root) as store:
        assert store.step == FIRST_STEP


def test_rows_are_spread_over_as_many_segments_as_wanted(shop: Shop) -> None:
    """Beside those that were there."""
    before = engram_store.inspect(shop.root).tables[LAYER].segments

    fill_in_segments(shop, SEGMENTS)

    assert engram_store.inspect(shop.root).tables[LAYER].segments == before + SEGMENTS


def test_an_opening_that_finds_something_else_is_no_measurement(shop: Shop) -> None:
    """A store that was closed must not be timed as one that was killed."""
    with pytest.raises(EngramStoreError, match="recovered with 5,000 rows, and found clean with 0"):
        _Kills(shop)._reopen(KILLED, RecoveryKind.RECOVERED, go_back=False)


def test_a_trainer_that_cannot_be_filled_says_why(place: Workplace, tmp_path: Path) -> None:
    """Not killed silently, and not measured."""
    shop = Shop(
        root=str(place.store.path),
        memtable_dir=str(tmp_path),
        overlay_bytes=overlay_bytes(place.spec),
        rows=5000,
    )

    with pytest.raises(
        EngramStoreError, match=r"(?s)ended before it was full.*is open for training"
    ):
        fill_and_kill(shop, "snapshot")


def test_a_trainer_that_does_not_get_full_is_killed_all_the_same(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would wait for ever, with the store locked."""
    monkeypatch.setattr("engram_store.bench.reopening._SECONDS", 0.01)
    with pytest.raises(EngramStoreError, match=r"was not full in 0\.01 s; is the disk slow"):
        fill_and_kill(shop, "snapshot")
    monkeypatch.undo()

    reopen(shop, go_back=True)  # or: StoreLockedError


def test_an_overlay_larger_than_the_table_is_refused(place: Workplace) -> None:
    """Rows that are killed are all different; nothing is trained then."""
    place.workload = replace(TINY, overlay_rows=1_000_000)

    with pytest.raises(ConfigError, match=r"overlay rows are 1,000,000.*fewer --overlay-rows"):
        bench_recover(place, lambda _: None)

    assert place.store.step == FIRST_STEP


def test_an_overlay_larger_than_shared_memory_is_refused(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a process is killed by the kernel."""
    small = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("engram_store.bench.recover.shutil.disk_usage", lambda _: small)

    with pytest.raises(ConfigError, match=r"of shared memory, and /dev/shm has 1,000"):
        bench_recover(place, lambda _: None)


def test_each_benchmark_wants_its_own_workload(tmp_path: Path) -> None:
    """Before anything is made."""
    workload = Workload(rows=50_000, tokens=256, repetitions=1)

    for which in ("recover", "writes"):
        with pytest.raises(ConfigError, match=f"bench {which} measures a {which.title()}Workload"):
            run_bench(which, workload, tmp_path, lambda _: None)

    assert not list(tmp_path.iterdir())


def test_commits_go_on_until_the_snapshot_is_made_or_the_memtable_full(place: Workplace) -> None:
    """One at least; never so many that they would wait for the disk instead."""
    snapshots = Snapshots(place)
    made: Future[None] = Future()

    snapshots._commits_until(made)

    free = place.engine.capacity - snapshots.slots
    assert 0 <= free < snapshots._rows().size
    made.set_result(None)
    first = snapshots.turn
    snapshots._commits_until(made)
    assert snapshots.turn == first + 1
    place.store.restore(FIRST_STEP)


def test_bytes_of_a_snapshot_are_compared_with_distinct_rows(place: Workplace) -> None:
    """Steps of one text repeat rows, which a snapshot has once."""
    open_rows = np.unique(np.concatenate([b.rows for b in place.batches[:4]])).size
    all_rows = sum(batch.rows.size for batch in place.batches[:4])
    assert open_rows < all_rows

    quantity = Snapshots(place).proportion()

    assert quantity.samples.size == 3
    assert (quantity.samples >= 1).all()
    place.store.restore(FIRST_STEP)
    place.store.close()
    with open_store(place.store.path) as store:
        assert store.step == FIRST_STEP
