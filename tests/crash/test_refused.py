"""Faults that once cost something: what a disk refused must not be built upon, nor promised.

Each test refuses chosen changes of files, not the n-th one; the sweeps go through all of them.
"""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

import engram_store
from engram_store.engine import Engine, journal
from engram_store.engine.recovery import RecoveryKind
from engram_store.errors import DiskFaultError
from engram_store.layout.paths import StorePaths
from engram_store.recipes import Recipe
from engram_store.testing import Operation
from tests.crash.faults import Subject, WatchingDisk, abandon, oracle_digest
from tests.pairs import MakeStore, Pair, memtable_directory, specs_of, tiny_overlay_bytes

_T = TypeVar("_T")
Refuse = Callable[[Operation], bool]


class ChoosyDisk(WatchingDisk):
    """Refuses what a test chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.refuse: Refuse = lambda _: False

    def _strikes(self, kind: str) -> bool:
        return False

    def _do(self, operation: Operation, action: Callable[[], _T]) -> _T:
        def fail() -> _T:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(operation.path))

        return super()._do(operation, fail if self.refuse(operation) else action)


class Choosy(Subject):
    """A subject with such a disk."""

    disk: ChoosyDisk

    def refuse(self, *kinds: str, below: str) -> None:
        """From now on, for what is below a directory of the store, or is it."""
        place = self.path / below

        def chosen(operation: Operation) -> bool:
            paths = {operation.path, operation.target or operation.path}
            return operation.kind in kinds and any(p.is_relative_to(place) for p in paths)

        self.disk.refuse = chosen

    def refuse_snapshots(self) -> None:
        """They get their names, which may not last, and cannot be removed either."""
        directory = self.path / "snapshots"
        self.disk.refuse = lambda operation: (
            (operation.kind == "sync_directory" and operation.path == directory)
            or (operation.kind == "unlink" and operation.path.match("snapshots/*.json"))
        )

    def heal(self) -> None:
        self.disk.refuse = lambda _: False

    def continue_after_kill(self) -> None:
        """Kill and open again: every step is there."""
        abandon(self.store)
        self.pair = Pair(self.reopen(), self.pair.oracle, self.pair.rng)
        assert self.store.recovery is not None
        assert self.store.recovery.kind is RecoveryKind.RECOVERED
        self.waiting = []
        self.pair.check()


@pytest.fixture
def make_choosy(
    make_store: MakeStore, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Choosy]:
    monkeypatch.setattr(journal, "_RETRY_SECONDS", 0.01)

    def make(durability: str) -> Choosy:
        path = make_store()
        shared = memtable_directory(path, engram_store.inspect(path).metadata.store_id)
        overlay = tiny_overlay_bytes(specs_of(recipe))
        return Choosy(path, recipe, durability, overlay, shared, ChoosyDisk())

    return make


def engine_of(subject: Subject) -> Engine:
    engine = subject.store._engine
    assert isinstance(engine, Engine)
    return engine


# ---------------------------------------------------------------------- failed syncs


@pytest.mark.parametrize("name", ["row_ids", "rows", "checksums", "segment.json.tmp"])
def test_a_segment_whose_sync_failed_is_written_anew(
    make_choosy: Callable[[str], Choosy], name: str
) -> None:
    """The kernel may have thrown away what it could not write: a second sync proves nothing."""
    subject = make_choosy("snapshot")
    subject.train(1)
    failed: list[int] = []

    def refuse(operation: Operation) -> bool:
        if failed or operation.kind != "sync" or operation.path.name != name:
            return False
        failed.append(operation.path.stat().st_ino)
        # Kept open, so that its number is not used again.
        failed.append(os.open(operation.path, os.O_RDONLY))
        return True

    subject.disk.refuse = refuse
    with pytest.raises(DiskFaultError, match=name):
        subject.store.seal()
    subject.store.seal()

    os.close(failed.pop())
    written = subject.path.glob("layers/*/segments/*/*")
    assert not set(failed) & {path.stat().st_ino for path in written}
    subject.check()
    subject.leave()


def test_a_manifest_whose_sync_failed_is_written_anew(
    make_choosy: Callable[[str], Choosy],
) -> None:
    """Also the segments that it names stay as they are: they are durable."""
    subject = make_choosy("snapshot")
    subject.train(1)
    subject.refuse("sync", below="CURRENT.json.tmp")
    before = subject.path.joinpath("CURRENT.json").read_bytes()
    with pytest.raises(DiskFaultError, match="CURRENT"):
        subject.store.seal()
    assert subject.path.joinpath("CURRENT.json").read_bytes() == before
    segments = {path: path.stat().st_ino for path in subject.path.glob("layers/*/segments/*/*")}
    subject.heal()

    subject.store.seal()

    assert segments == {path: path.stat().st_ino for path in segments}
    subject.check()
    subject.leave()


def test_the_watch_sees_a_file_that_is_used_after_its_sync_failed(tmp_path: Path) -> None:
    """What the sweeps rely on."""
    disk = ChoosyDisk()
    fd = disk.create(tmp_path / "a")
    disk.refuse = lambda operation: operation.kind == "sync"
    with pytest.raises(OSError, match="Input/output"):
        disk.sync(fd)
    disk.refuse = lambda _: False
    disk.sync(fd)
    disk.close(fd)
    disk.rename(tmp_path / "a", tmp_path / "b")
    assert disk.doubtful_names() == {tmp_path / "b"}

    assert len(disk.problems) == 2


# ---------------------------------------------------------------------- snapshots


def test_a_snapshot_that_was_refused_is_none_until_it_is_made_again(
    make_choosy: Callable[[str], Choosy],
) -> None:
    """Even if its file is there, whole, because it could not be removed either."""
    subject = make_choosy("snapshot")
    subject.train(1)
    subject.refuse_snapshots()
    with pytest.raises(DiskFaultError, match="snapshots"):
        subject.store.snapshot()
    assert subject.store.durable_step == 0
    with pytest.raises(DiskFaultError, match="snapshots"):
        subject.store.snapshot()
    left = StorePaths(subject.path).snapshot(1).stat().st_ino
    assert subject.store.durable_step == 0
    subject.heal()

    subject.snapshot()

    assert subject.store.durable_step == 1
    assert StorePaths(subject.path).snapshot(1).stat().st_ino != left
    subject.check()
    subject.leave()


def test_a_refused_snapshot_does_not_count_as_the_newest_that_is_kept(
    make_choosy: Callable[[str], Choosy],
) -> None:
    subject = make_choosy("snapshot")
    subject.train(1)
    subject.snapshot()
    subject.train(1)
    subject.refuse_snapshots()
    with pytest.raises(DiskFaultError):
        subject.store.snapshot()
    assert StorePaths(subject.path).snapshot_steps() == [0, 1, 2]
    subject.heal()

    subject.store.keep_snapshots(1)

    assert StorePaths(subject.path).snapshot_steps() == [1]
    subject.check()
    subject.leave()


# ---------------------------------------------------------------------- journals


def test_in_group_mode_nothing_is_recorded_after_a_gap(
    make_choosy: Callable[[str], Choosy],
) -> None:
    """The journal broke and the seal in its place failed: later steps are not durable either."""
    subject = make_choosy("group(5)")
    subject.train(1)
    subject.wait_durable()
    subject.refuse("sync", "create", below="")
    subject.train(1)
    broken = threading.Event()
    for _ in range(1000):
        if engine_of(subject)._journal._broken:  # type: ignore[union-attr]
            break
        broken.wait(0.01)
    # Now journals could be written again, and nothing else.
    subject.refuse("sync", "create", below="layers")
    subject.train(2)
    broken.wait(0.2)
    assert subject.store.durable_step == 1
    subject.heal()

    subject.check()
    subject.train(1)
    subject.lose_host()
    subject.leave()


def test_in_step_mode_a_refused_commit_does_not_come_back(
    make_choosy: Callable[[str], Choosy],
) -> None:
    """Its record may be on the disk; the step that was committed instead is what is replayed."""
    subject = make_choosy("step")
    subject.train(1)
    subject.refuse("sync", "create", below="")
    with pytest.raises(DiskFaultError):
        subject.train(1)
    # The seal is still refused, so no other journal may be begun.
    subject.refuse("create", below="layers")
    for _ in range(2):
        with pytest.raises(DiskFaultError):
            subject.train(1)
    for window in subject.waiting:
        window.store.close()
        window.oracle.close()
    subject.waiting = []
    subject.heal()

    subject.train(1)  # with other tokens

    subject.lose_host()
    subject.check()
    subject.leave()


def test_a_journal_that_cannot_be_closed_does_not_keep_the_store_open(
    make_choosy: Callable[[str], Choosy],
) -> None:
    subject = make_choosy("step")
    subject.train(1)
    subject.refuse("close", below="journal")
    subject.leave()

    with engram_store.open(subject.path, "train") as store:
        assert store.step == 1


# ---------------------------------------------------------------------- restores


def test_a_refused_restore_is_undone_before_the_next_step(
    make_choosy: Callable[[str], Choosy],
) -> None:
    """The manifest of the restore may be in force on the disk: a kill must not go back to it."""
    subject = make_choosy("snapshot")
    subject.train(2)
    subject.snapshot()
    subject.train(1)
    subject.refuse("sync_directory", below="")
    with pytest.raises(DiskFaultError):
        subject.store.restore(2)
    with pytest.raises(DiskFaultError):
        subject.train(1)
    subject.heal()
    subject.train(1)

    subject.continue_after_kill()
    subject.check()
    subject.leave()


@pytest.mark.parametrize("durability", ["snapshot", "step", "group(5)"])
def test_a_restore_that_is_not_finished_holds_steps_back(
    make_choosy: Callable[[str], Choosy], durability: str
) -> None:
    """A snapshot of the forgotten way must not be taken for one of the new way."""
    subject = make_choosy(durability)
    subject.train(1)
    subject.snapshot()
    subject.train(1)
    subject.snapshot()
    forgotten = oracle_digest(subject.pair.oracle)
    subject.refuse("unlink", below="snapshots")
    subject.restore(1)
    subject.check_reads()
    with pytest.raises(DiskFaultError):
        subject.train(1)
    subject.heal()
    subject.train(1)
    assert subject.history[2] != forgotten

    subject.continue_after_kill()
    subject.snapshot()
    subject.train(1)
    subject.restore(2)
    subject.pair.check()
    subject.leave()


# ---------------------------------------------------------------------- openings


def test_an_opening_that_fails_late_leaves_no_thread(
    make_choosy: Callable[[str], Choosy],
) -> None:
    """The lock is free, too, and no step is lost."""
    subject = make_choosy("group(5)")
    subject.train(2)
    abandon(subject.store)
    threads = set(threading.enumerate())
    marks = 0

    def refuse(operation: Operation) -> bool:
        nonlocal marks
        marks += operation.kind == "rename" and operation.target == subject.path / "CURRENT.json"
        return marks >= 3  # sealed, closed, and open again

    subject.disk.refuse = refuse
    with pytest.raises(DiskFaultError, match="CURRENT"):
        subject.reopen()
    assert set(threading.enumerate()) <= threads
    subject.heal()

    subject.pair = Pair(subject.reopen(), subject.pair.oracle, subject.pair.rng)
    subject.waiting = []
    subject.check()
    subject.leave()
