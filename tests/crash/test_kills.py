"""A killed store loses no acknowledged step and never shows a mixture; a lost host rolls back.

Real processes and a real SIGKILL. The oracle does the same actions in numpy: what is found after
a kill must be its tables after the last acknowledged action, or after the one under way.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import engram_store
from engram_store import failpoints
from engram_store.engine.memtable import _IDENTITY
from engram_store.engine.recovery import RecoveryKind, RecoveryReport
from engram_store.errors import SharedMemoryFullError
from engram_store.recipes import Recipe
from engram_store.store import Store
from engram_store.testing import MemorySession
from tests.crash.actions import RUN, Action, do, steps
from tests.pairs import (
    INITIAL,
    MakeStore,
    assert_same_tables,
    make_oracle,
    memtable_directory,
    specs_of,
    tiny_overlay_bytes,
)

TRAINER = Path(__file__).with_name("trainer.py")
KILLED = -9
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
    "restore.published": (1,),
    "restore.snapshots_dropped": (1,),
}
"""The times at which the store is killed at each point."""


class Crash:
    """A store whose trainer is killed, and what it had acknowledged."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path, self.recipe = path, recipe
        self.overlay_bytes = tiny_overlay_bytes(specs_of(recipe))
        self.store_id = engram_store.inspect(path).metadata.store_id
        self.memtable_dir: Path | None = None

    @property
    def shared_memory(self) -> Path:
        return memtable_directory(self.path, self.store_id)

    def start(
        self,
        actions: Sequence[Action],
        *,
        kill: tuple[str, int] | None = None,
        kill_after: str | None = None,
    ) -> "subprocess.Popen[bytes]":
        plan = {
            "overlay_bytes": self.overlay_bytes,
            "actions": actions,
            "kill": kill,
            "kill_after": kill_after,
            "memtable_dir": self.memtable_dir and str(self.memtable_dir),
        }
        command = [sys.executable, str(TRAINER), str(self.path), json.dumps(plan)]
        return subprocess.Popen(command, stdout=subprocess.PIPE)

    def run(
        self,
        actions: Sequence[Action],
        *,
        kill: tuple[str, int] | None = None,
        kill_after: str | None = None,
    ) -> int:
        """Run until the kill; returns how many actions were acknowledged."""
        with self.start(actions, kill=kill, kill_after=kill_after) as process:
            lines = process.communicate()[0].split()
        assert process.returncode == KILLED, "the point was never reached"
        return len(lines) - 1

    def open(self) -> Store:
        return engram_store.open(self.path, "train", overlay_bytes=self.overlay_bytes)

    def oracle_after(self, actions: Sequence[Action]) -> MemorySession:
        oracle: MemorySession = make_oracle(self.recipe, INITIAL)
        oracle.snapshot()
        for action in actions:
            do(oracle, action)
        return oracle

    def check(self, actions: Sequence[Action], acknowledged: int) -> RecoveryReport:
        """Reopen, compare with the oracle, finish the run, compare again."""
        oracle = self.oracle_after(actions[:acknowledged])
        with self.open() as store:
            report = store.recovery
            assert report is not None
            assert report.step == store.step
            remaining = list(actions[acknowledged:])
            if remaining and store.step != oracle.step:
                do(oracle, remaining.pop(0))
            assert store.step == oracle.step
            assert_same_tables(store, oracle)
            for action in [*remaining, *steps(11, 13)]:
                do(store, action)
                do(oracle, action)
            assert_same_tables(store, oracle)
        with self.open() as store:
            assert store.recovery == RecoveryReport(RecoveryKind.CLEAN, oracle.step, 0)
            assert_same_tables(store, oracle)
        return report


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


def other_boot(data: bytearray) -> None:
    offset = _IDENTITY.fields["boot_id"][1]  # type: ignore[index]
    data[offset : offset + 8] = b"deadbeef"


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
