"""A killed store loses no acknowledged step and never shows a mixture; a lost host rolls back.

Real processes and a real SIGKILL. The oracle does the same actions in numpy: what is found after
a kill must be its tables after the last acknowledged action, or after the one under way.
"""

import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import engram_store
from engram_store import failpoints
from engram_store.engine.memtable import _IDENTITY
from engram_store.engine.recovery import RecoveryKind, RecoveryReport
from engram_store.errors import SharedMemoryFullError
from engram_store.recipes import Recipe
from engram_store.testing import MemorySession
from tests.crash.actions import RUN, Action, do, steps
from tests.crash.killing import KILLED, Crash, Told, other_boot, read_told
from tests.pairs import MakeStore, assert_same_tables

HITS = {
    "commit.computed": (1, 4, 9),
    "commit.published": (1, 6, 12),
    "freeze.switched": (1, 2, 4),
    "seal.segment_written": (1, 2, 5),
    "seal.segments_written": (1, 3),
    "seal.published": (1, 2, 4),
    "seal.patched": (1, 3),
    "snapshot.published": (1, 2),
    "fold.chunk_written": (1, 4),
    "fold.base_written": (1, 2),
    "fold.published": (1, 3),
    "fold.swapped": (1, 4),
    "merge.segment_written": (1, 4),
    "merge.published": (1, 3),
    "merge.swapped": (1, 4),
    "restore.published": (1,),
    "restore.snapshots_dropped": (1,),
}
"""The times at which the store is killed at each point."""


@pytest.fixture
def crash(make_store: MakeStore, recipe: Recipe) -> Crash:
    return Crash(make_store(), recipe)


def test_the_run_reaches_every_failpoint(crash: Crash) -> None:
    """At least as often as it is killed there, and every point is killed at."""
    assert set(HITS) == set(failpoints.POINTS)
    failpoints.arm("commit.computed", hit=10**9)
    try:
        with engram_store.open(
            crash.path, "train", overlay_bytes=crash.overlay_bytes, fold_ratio=100
        ) as store:
            for action in RUN:
                do(store, action)
        reached = dict(failpoints._hits)
    finally:
        failpoints.disarm()

    assert {name: min(reached.get(name, 0), max(hits)) for name, hits in HITS.items()} == {
        name: max(hits) for name, hits in HITS.items()
    }


@pytest.mark.parametrize(
    ("point", "hit"), [(point, hit) for point, hits in HITS.items() for hit in hits]
)
def test_a_kill_at_any_point_loses_no_acknowledged_action(
    crash: Crash, point: str, hit: int
) -> None:
    """Old or new, never a mixture; then training goes on as if nothing had happened."""
    acknowledged = crash.run(RUN, kill=(point, hit))

    report = crash.check(RUN, acknowledged)

    # After a restore the shared memory is of a forgotten way: there is nothing to take over.
    restoring = point.startswith("restore.")
    assert report.kind is (RecoveryKind.CLEAN if restoring else RecoveryKind.RECOVERED)


@pytest.mark.parametrize("after", [0, 1, 4, 7, 10, 12, 14])
def test_a_kill_at_any_time_loses_no_acknowledged_action(crash: Crash, after: int) -> None:
    """From outside, while the trainer is busy with whatever follows action number `after`."""
    with crash.start(RUN) as process:
        assert process.stdout is not None
        seen = 0
        for _ in process.stdout:
            seen += 1
            if seen == after + 1:
                process.kill()
    assert process.returncode == KILLED
    assert seen <= len(RUN)

    assert crash.check(RUN, seen - 1).kind is not RecoveryKind.ROLLED_BACK


@pytest.mark.parametrize("method", ["append_segments", "drop_newer_snapshots", "collect_garbage"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_kill_during_recovery_loses_nothing_either(crash: Crash, method: str, times: int) -> None:
    """Recovering is idempotent until the store is open again, however often it is killed."""
    acknowledged = crash.run(RUN, kill=("commit.published", 8))
    for _ in range(times):
        assert crash.run([], kill_after=method) <= 0

    crash.check(RUN, acknowledged)


def test_a_recovery_that_cannot_open_the_store_loses_nothing(crash: Crash) -> None:
    """A second attempt with other options still has every step."""
    acknowledged = crash.run(RUN, kill=("commit.published", 8))
    # A chosen directory has no fallback, so this is refused before anything is reserved.
    shared = crash.shared_memory.parent
    with pytest.raises(SharedMemoryFullError):
        engram_store.open(crash.path, "train", overlay_bytes=1 << 44, memtable_dir=shared)

    crash.check(RUN, acknowledged)


MODES = ("snapshot", "step", "group(5)")


@pytest.fixture
def make_crash(make_store: MakeStore, recipe: Recipe) -> Callable[[str], Crash]:
    return lambda durability: Crash(make_store(), recipe, durability)


@pytest.mark.parametrize("durability", MODES[1:])
@pytest.mark.parametrize("point", HITS)
def test_a_kill_at_any_point_loses_nothing_in_other_modes_either(
    make_crash: Callable[[str], Crash], point: str, durability: str
) -> None:
    """With a journal beside the memtables, which is not what is continued from."""
    crash = make_crash(durability)
    acknowledged = crash.run(RUN, kill=(point, HITS[point][len(HITS[point]) // 2]))

    assert crash.check(RUN, acknowledged).kind is not RecoveryKind.ROLLED_BACK


def kill_at_random(crash: Crash, seconds: float) -> Told:
    """Kill the trainer so long after its store is open, or later."""
    with crash.start(RUN) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first == b"open\n"
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        rest = process.stdout.read()
        process.wait()
        timer.cancel()
    return read_told(first + rest)


def check_random_kills(
    make_store: MakeStore, recipe: Recipe, durability: str, times: int, *, lose_host: bool
) -> None:
    """Many stores, each killed once; every other way to lose the host in turn."""
    rng = random.Random(f"{durability} {lose_host}")
    for number in range(times):
        crash = Crash(make_store(f"{number}"), recipe, durability)
        told = kill_at_random(crash, rng.uniform(0, 0.5))
        shared = crash.shared_memory
        if not shared.exists():  # it had closed the store already
            assert told.ended
        elif not lose_host:
            assert crash.check(RUN, told.actions).kind is not RecoveryKind.ROLLED_BACK
        else:
            if number % 2:
                crash.change_memtables()
            else:
                shutil.rmtree(shared)
            crash.check_lost(RUN, told)
        shutil.rmtree(crash.path)


@pytest.mark.parametrize("durability", MODES)
@pytest.mark.parametrize("lose_host", [False, True], ids=["kill", "host lost"])
def test_a_kill_at_a_random_time(
    make_store: MakeStore, recipe: Recipe, durability: str, *, lose_host: bool
) -> None:
    """Nothing is lost with the process, and nothing that was durable with the host."""
    check_random_kills(make_store, recipe, durability, 2, lose_host=lose_host)


@pytest.mark.torture
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("durability", MODES)
@pytest.mark.parametrize("lose_host", [False, True], ids=["kill", "host lost"])
def test_kills_at_many_random_times(
    make_store: MakeStore, recipe: Recipe, durability: str, *, lose_host: bool
) -> None:
    check_random_kills(make_store, recipe, durability, 200, lose_host=lose_host)


LOST = ("commit.computed", "commit.published", "seal.published", "fold.published")
"""Points at which the host is lost too: before and after a record, and between files."""


def check_host_lost_at(crash: Crash, point: str, hit: int, *, changed: bool) -> None:
    told = crash.run_until_killed(RUN, kill=(point, hit))
    if changed:
        crash.change_memtables()
    else:
        shutil.rmtree(crash.shared_memory)
    crash.check_lost(RUN, told)


@pytest.mark.parametrize("durability", MODES)
@pytest.mark.parametrize("point", LOST)
def test_a_host_lost_at_a_point_loses_no_durable_step(
    make_crash: Callable[[str], Crash], point: str, durability: str
) -> None:
    """Exactly the newest snapshot without a journal, and at least the durable step with one."""
    changed = durability == "group(5)"
    check_host_lost_at(make_crash(durability), point, HITS[point][-1], changed=changed)


@pytest.mark.torture
@pytest.mark.parametrize("changed", [False, True], ids=["no memory", "other boot"])
@pytest.mark.parametrize("durability", MODES)
@pytest.mark.parametrize(
    ("point", "hit"), [(point, hit) for point, hits in HITS.items() for hit in hits]
)
def test_a_host_lost_at_any_point_loses_no_durable_step(
    make_crash: Callable[[str], Crash], point: str, hit: int, durability: str, *, changed: bool
) -> None:
    check_host_lost_at(make_crash(durability), point, hit, changed=changed)


def killed_after_a_snapshot(crash: Crash) -> MemorySession:
    """Killed in step 10, sealed up to a later step than the newest snapshot; its oracle."""
    crash.run(RUN, kill=("commit.published", 11))
    assert engram_store.inspect(crash.path).step > 5
    return crash.oracle_after(RUN[:6])


def check_rolled_back(crash: Crash, oracle: MemorySession) -> None:
    with crash.open() as store:
        assert store.recovery == RecoveryReport(RecoveryKind.ROLLED_BACK, oracle.step, 0)
        assert store.step == oracle.step
        assert_same_tables(store, oracle)
        for action in steps(oracle.step, oracle.step + 4, seed=2):
            do(store, action)
            do(oracle, action)
        assert_same_tables(store, oracle)


def test_a_lost_host_leaves_exactly_the_newest_snapshot(crash: Crash) -> None:
    """Shared memory is gone: the tables are those of the snapshot, and training goes on."""
    oracle = killed_after_a_snapshot(crash)
    shutil.rmtree(crash.shared_memory)
    check_rolled_back(crash, oracle)


def test_a_lost_host_is_reported_even_when_nothing_was_sealed_since_the_snapshot(
    crash: Crash,
) -> None:
    """Three steps are gone; the kind must not say that the store was closed properly."""
    crash.run(RUN, kill=("commit.published", 8))
    assert engram_store.inspect(crash.path).step == 5
    shutil.rmtree(crash.shared_memory)
    check_rolled_back(crash, crash.oracle_after(RUN[:6]))


Spoil = Callable[[bytearray], None]


def other_lineage(data: bytearray) -> None:
    data[_IDENTITY.fields["lineage"][1]] += 1  # type: ignore[index]


def damaged_records(data: bytearray) -> None:
    for page in (1, 2):
        data[page * 4096 + 20] ^= 1


def no_magic(data: bytearray) -> None:
    data[:8] = b"SOMETHIN"


def cut_off(data: bytearray) -> None:
    del data[len(data) // 2 :]


@pytest.mark.parametrize("spoil", [other_boot, other_lineage, damaged_records, no_magic, cut_off])
def test_shared_memory_that_cannot_be_trusted_is_not(crash: Crash, spoil: Spoil) -> None:
    """Of another boot or lineage, damaged, foreign or short: as if the host had been lost."""
    oracle = killed_after_a_snapshot(crash)
    for path in crash.shared_memory.iterdir():
        data = bytearray(path.read_bytes())
        spoil(data)
        path.write_bytes(data)
    check_rolled_back(crash, oracle)


def test_a_copy_does_not_take_over_the_shared_memory_of_the_original(
    crash: Crash, tmp_path: Path, recipe: Recipe
) -> None:
    """The copy is at its newest snapshot; the original still recovers every step."""
    acknowledged = crash.run(RUN, kill=("commit.published", 11))
    copy = tmp_path / "copy.engram"
    shutil.copytree(crash.path, copy)

    check_rolled_back(Crash(copy, recipe), crash.oracle_after(RUN[:6]))

    assert crash.check(RUN, acknowledged).kind is RecoveryKind.RECOVERED


def test_a_moved_store_finds_its_shared_memory(crash: Crash, tmp_path: Path) -> None:
    """A store renamed between the kill and the recovery loses nothing."""
    acknowledged = crash.run(RUN, kill=("commit.published", 8))
    crash.path = crash.path.rename(tmp_path / "moved.engram")

    assert crash.check(RUN, acknowledged).kind is RecoveryKind.RECOVERED


def test_memtables_in_a_chosen_directory_are_found_without_choosing_it_again(
    crash: Crash, tmp_path: Path
) -> None:
    """A killed run with `memtable_dir` loses no step when the store is opened without it."""
    crash.memtable_dir = tmp_path / "memory"
    acknowledged = crash.run(RUN, kill=("commit.published", 8))
    assert not crash.shared_memory.exists()

    assert crash.check(RUN, acknowledged).kind is RecoveryKind.RECOVERED


def test_a_reader_after_a_kill_in_a_restore_does_not_see_the_forgotten_way(crash: Crash) -> None:
    """Snapshots newer than the one that was restored never happened, once it is."""
    run = [*steps(0, 2), Action("snapshot"), *steps(2, 4), Action("snapshot"), Action("restore", 2)]
    crash.run(run, kill=("restore.published", 1))

    with engram_store.open(crash.path) as reader:
        assert reader.step == 2
        rows = reader.read_rows(1, np.arange(reader.tables[1].rows, dtype=np.int32))
    assert rows.tobytes() == crash.oracle_after(run).contents[1].rows.tobytes()
