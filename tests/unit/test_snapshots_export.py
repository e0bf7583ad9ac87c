"""A snapshot becomes a store of its own, while the store it is of may be at work."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import engram_store
from engram_store import snapshots
from engram_store.errors import (
    ChecksumError,
    ConfigError,
    DiskFullError,
    SnapshotMismatchError,
    StoreExistsError,
    StoreFileError,
)
from engram_store.layout.disk import Disk
from engram_store.layout.paths import StorePaths
from engram_store.layout.verify import verify_store
from engram_store.session import SnapshotRef
from engram_store.testing import FaultyDisk
from tests.crash.actions import Action, do
from tests.pairs import (
    INITIAL,
    MakePair,
    Pair,
    assert_same_tables,
    files_of,
    memtable_directory,
)

WANTED = 3
"""Its snapshot is made of a folded base and a segment."""


@pytest.fixture
def busy(make_pair: MakePair) -> Pair:
    """Snapshots at 0 to 4, a fold after the second; two more steps wait in shared memory."""
    pair = make_pair(options={"fold_ratio": 1e9})
    pair.snapshot()
    for step in range(1, 5):
        pair.train(1)
        pair.snapshot()
        if step == 2:
            pair.store.fold()
    pair.train(2)
    return pair


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """Where to export to; its shared memory is forgotten afterwards."""
    path = tmp_path / "copy.engram"
    yield path
    if (path / "zarr.json").exists():
        store_id = engram_store.inspect(path).metadata.store_id
        shutil.rmtree(memtable_directory(path, store_id), ignore_errors=True)


def inodes(path: Path) -> set[int]:
    return {file.stat().st_ino for file in path.rglob("*") if file.is_file()}


def hidden_beside(target: Path) -> list[str]:
    return [entry.name for entry in target.parent.iterdir() if entry.name.startswith(".")]


# ---------------------------------------------------------------------- what it makes


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("step", [0, 1, WANTED, 4])
def test_an_export_is_a_complete_store_of_its_own(
    busy: Pair, target: Path, step: int, copy: bool
) -> None:
    """Its rows and state are the oracle's, it verifies clean, trains on, and shares no fate."""
    before = files_of(busy.path)
    told: list[tuple[int, int]] = []

    made = snapshots.export(
        busy.path, step, target, copy=copy, progress=lambda *of: told.append(of)
    )

    assert files_of(busy.path) == before, "the source is only read"
    assert not hidden_beside(target)
    report = verify_store(StorePaths(target))
    assert report.ok
    assert not report.notes
    assert made.snapshot.store_id == report.store_id != busy.store.store_id
    assert bool(inodes(target) & inodes(busy.path)) is not copy
    assert bool(made.linked) is not copy
    assert bool(made.copied) is copy
    assert told[-1] == (made.read_bytes, made.read_bytes)
    assert engram_store.inspect(target).snapshots == (step,)
    busy.oracle.restore(step)
    with engram_store.open(target) as reader:
        assert_same_tables(reader, busy.oracle)
    with engram_store.open(target, "train", fold_ratio=1e9) as store:
        assert (store.step, store.marks, store.store_id) == (step, (), made.snapshot.store_id)
        for number in range(step, step + 3):
            do(store, Action("step", number))
            do(busy.oracle, Action("step", number))
        store.fold()
        assert_same_tables(store, busy.oracle)
    assert verify_store(StorePaths(target)).ok
    assert verify_store(StorePaths(busy.path)).ok
    shutil.rmtree(busy.path / "layers")  # nothing of it is needed any more
    with engram_store.open(target) as reader:
        assert_same_tables(reader, busy.oracle)


def test_the_source_may_be_folded_collected_and_removed_afterwards(
    busy: Pair, target: Path
) -> None:
    """Hard links keep the data; going on with the source changes none of it."""
    snapshots.export(busy.path, WANTED, target)
    files = files_of(target)
    busy.train(2)
    busy.store.fold()
    busy.store.collect_garbage(keep=1)
    busy.train(1)
    busy.check()
    assert files_of(target) == files
    busy.store.close()
    shutil.rmtree(busy.path)
    assert verify_store(StorePaths(target)).ok


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_links_cannot_be_made_files_are_copied(busy: Pair, target: Path, error: int) -> None:
    """Another file system, one without links, or somebody else's files."""

    class NoLinks(Disk):
        def link(self, existing: Path, new: Path) -> None:
            raise OSError(error, os.strerror(error), str(new))

    made = snapshots.export(busy.path, WANTED, target, disk=NoLinks())

    assert made.linked == 0
    assert not inodes(target) & inodes(busy.path)
    busy.oracle.restore(WANTED)
    with engram_store.open(target) as reader:
        assert_same_tables(reader, busy.oracle)


def test_an_export_may_take_the_place_of_an_empty_directory(busy: Pair, target: Path) -> None:
    """And a pin can name what is exported; it is not taken along."""
    snapshots.pin(busy.path, WANTED, "best")
    target.mkdir()
    assert snapshots.export(busy.path, "best", target).origin.step == WANTED
    assert [info.pins for info in snapshots.describe(target)] == [()]
    assert [info.made for info in snapshots.describe(target)] == [
        info.made for info in snapshots.describe(busy.path) if info.step == WANTED
    ]


def test_every_kind_of_table_can_be_exported(make_pair: MakePair, target: Path) -> None:
    """No state, wide state, half floats, zeros that have no files."""
    kinds: list[tuple[str, str, Any]] = [
        ("sgd", "float16", INITIAL),
        ("adam", "float32", None),
        ("adagrad", "bfloat16", None),
    ]
    for optimizer, dtype, initial in kinds:
        pair = make_pair(optimizer, initial, optimizer=optimizer, dtype=dtype)
        pair.snapshot()
        snapshots.export(pair.path, 0, target.with_name(f"{optimizer}-0"))
        pair.train(1)
        pair.snapshot()
        where = target.with_name(f"{optimizer}-1")
        snapshots.export(pair.path, "newest", where)
        assert verify_store(StorePaths(where)).ok
        with engram_store.open(where) as reader:
            assert_same_tables(reader, pair.oracle)
        pair.oracle.restore(0)
        with engram_store.open(target.with_name(f"{optimizer}-0")) as reader:
            assert_same_tables(reader, pair.oracle)


# ---------------------------------------------------------------------- what it refuses


def test_a_target_that_is_there_or_inside_the_store_is_refused(busy: Pair, target: Path) -> None:
    """Nothing is touched; nor by a snapshot that does not exist."""
    target.mkdir()
    (target / "mine").write_text("keep")
    before = files_of(busy.path)
    with pytest.raises(StoreExistsError, match="already exists"):
        snapshots.export(busy.path, WANTED, target)
    for inside in (busy.path, busy.path / "layers" / "copy", busy.path / "x" / ".." / "copy"):
        with pytest.raises((ConfigError, StoreExistsError)):
            snapshots.export(busy.path, WANTED, inside)
    with pytest.raises(SnapshotMismatchError, match="snapshots at steps 0, 1, 2, 3, 4"):
        snapshots.export(busy.path, 5, target.with_name("other"))
    link = target.with_name("link")
    link.symlink_to(target.with_name("nowhere"))
    with pytest.raises(StoreExistsError):
        snapshots.export(busy.path, WANTED, link)
    assert files_of(target) == {"mine": b"keep"}
    assert files_of(busy.path) == before
    assert not hidden_beside(target)


@pytest.mark.parametrize("copy", [False, True])
def test_damage_is_found_and_never_carried_on(busy: Pair, target: Path, copy: bool) -> None:
    """In base and segments, in every file; only snapshots that need the file are refused."""
    layer = busy.path / "layers" / "1"
    for name in ("base/g0002/rows/c/0/0", "base/g0002/state/sum/c/0/0", "segments/000003/rows",
                 "segments/000003/state", "segments/000003/row_ids"):  # fmt: skip
        file = layer / name
        sound = file.read_bytes()
        file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        with pytest.raises(ChecksumError, match=file.name):
            snapshots.export(busy.path, WANTED, target, copy=copy)
        file.write_bytes(sound[:-4096])
        with pytest.raises(StoreFileError):
            snapshots.export(busy.path, WANTED, target, copy=copy)
        file.unlink()
        with pytest.raises(StoreFileError, match="missing"):
            snapshots.export(busy.path, WANTED, target, copy=copy)
        assert not target.exists()
        assert not hidden_beside(target)
        file.write_bytes(sound)
    snapshots.export(busy.path, WANTED, target)


def test_a_copy_that_cannot_fit_is_refused_before_it_begins(
    busy: Pair, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links need no room."""
    usage = shutil.disk_usage(target.parent)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    disk = Disk()
    with pytest.raises(DiskFullError, match=r"100,000 free.*leave --copy out"):
        snapshots.export(busy.path, WANTED, target, copy=True, disk=disk)
    assert disk.written_bytes == 0
    assert not hidden_beside(target)
    snapshots.export(busy.path, WANTED, target)


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_leaves_nothing_behind(
    make_pair: MakePair, target: Path, copy: bool, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every single operation; the source is untouched and the next attempt works."""
    for name in ("fdatasync", "fsync"):  # a hundred exports: nobody cuts the power here
        monkeypatch.setattr(os, name, lambda _fd: None)
    pair = make_pair()
    pair.train(1)
    pair.snapshot()
    before = files_of(pair.path)
    failures = 0
    for at in range(1, 10_000):
        disk = FaultyDisk()
        disk.fail(error, at=at)
        try:
            snapshots.export(pair.path, 1, target, copy=copy, disk=disk)
        except DiskFullError:
            assert error == errno.ENOSPC
        except StoreFileError:
            assert error == errno.EIO
        else:
            if disk.fired:  # closing a file that was synced, at most
                pytest.fail(f"operation {at} failed and nobody was told")
            break
        failures += 1
        # The last operation makes the name durable; it is there, and whole.
        if target.exists():
            assert verify_store(StorePaths(target)).ok
            shutil.rmtree(target)
        assert not hidden_beside(target), at
    assert failures > 40
    assert files_of(pair.path) == before
    with engram_store.open(target) as reader:
        assert_same_tables(reader, pair.oracle)
    assert verify_store(StorePaths(target)).ok


def test_a_restore_meanwhile_ends_an_export_cleanly(busy: Pair, target: Path) -> None:
    """It went back past the snapshot, so that its files are gone; the message says so."""

    class Restores(Disk):
        links = 0

        def link(self, existing: Path, new: Path) -> None:
            super().link(existing, new)
            self.links += 1
            if self.links == 2:
                busy.store.restore(0)

    with pytest.raises(SnapshotMismatchError, match="was removed while it was exported"):
        snapshots.export(busy.path, WANTED, target, disk=Restores())

    assert not target.exists()
    assert not hidden_beside(target)
    busy.oracle.restore(0)
    busy.check()


def test_a_collection_meanwhile_leaves_what_is_exported(busy: Pair, target: Path) -> None:
    """However often it runs, and folds with it; the next one removes it."""

    class Collects(Disk):
        def create(self, path: Path) -> int:
            busy.store.fold()
            in_use.append(busy.store.collect_garbage(keep=1).in_use)
            return super().create(path)

    in_use: list[tuple[int, ...]] = []
    busy.train(1)
    busy.snapshot()

    snapshots.export(busy.path, WANTED, target, copy=True, disk=Collects())

    assert set(in_use) == {(WANTED,)}
    assert busy.store.collect_garbage(keep=1).removed == (WANTED,)
    busy.check()
    busy.oracle.restore(WANTED)
    with engram_store.open(target) as reader:
        assert_same_tables(reader, busy.oracle)


def test_what_a_killed_export_left_is_removed_by_the_next(busy: Pair, target: Path) -> None:
    """One that is still at work keeps its directory."""
    building = target.with_name(f".{target.name}.exporting")
    (building / "layers" / "1").mkdir(parents=True)
    (building / "layers" / "1" / "rows").write_text("half")
    fd = os.open(building, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(StoreExistsError, match="by another process"):
        snapshots.export(busy.path, WANTED, target)
    assert (building / "layers" / "1" / "rows").exists()
    os.close(fd)

    snapshots.export(busy.path, WANTED, target)

    assert not hidden_beside(target)
    assert verify_store(StorePaths(target)).ok
    assert not verify_store(StorePaths(target)).notes


# ---------------------------------------------------------------------- checkpoints


def ref_of(path: Path, step: int) -> SnapshotRef:
    info = next(info for info in snapshots.describe(path) if info.step == step)
    store_id = engram_store.inspect(path).metadata.store_id
    return SnapshotRef(store_id=store_id, step=step, digest=info.digest)


def test_a_reference_to_the_exported_snapshot_goes_with_the_export(
    busy: Pair, target: Path
) -> None:
    """Also with the export of an export; that of another step or store does not."""
    second = target.with_name("second.engram")
    third = target.with_name("third.engram")
    origin, other = ref_of(busy.path, WANTED), ref_of(busy.path, WANTED + 1)
    stranger = SnapshotRef(store_id="ab" * 16, step=WANTED, digest=origin.digest)
    made = snapshots.export(busy.path, WANTED, target)
    assert made.origin == origin
    assert made.snapshot == ref_of(target, WANTED)
    snapshots.export(target, made.snapshot, second)
    for path in (target, second):
        with engram_store.open(path, "train") as store:
            do(store, Action("step", WANTED))
            later = store.snapshot()
            for refused, reason in (
                (other, f"an export of it from step {WANTED} "),
                (SnapshotRef(store_id=origin.store_id, step=WANTED, digest="0"), "an export of it"),
                (stranger, "open the store that was trained with it"),
            ):
                with pytest.raises(SnapshotMismatchError, match=reason):
                    store.restore(refused)
            assert store.step == WANTED + 1
            store.restore(origin)
            assert store.step == WANTED
            busy.oracle.restore(WANTED)
            assert_same_tables(store, busy.oracle)
            do(store, Action("step", WANTED, seed=1))
            assert store.snapshot() != later
            store.restore(made.snapshot)
        with engram_store.open(path, snapshot=origin) as reader:
            assert reader.step == WANTED
    with pytest.raises(SnapshotMismatchError):
        busy.store.restore(made.snapshot)
    # A later snapshot of the export has nothing to do with the original.
    with engram_store.open(target, "train") as store:
        do(store, Action("step", WANTED))
        store.snapshot()
    snapshots.export(target, WANTED + 1, third)
    with pytest.raises(SnapshotMismatchError):
        engram_store.open(third, snapshot=origin)
    for path, steps in ((target, [WANTED]), (second, [WANTED, WANTED]), (third, [WANTED + 1])):
        document = json.loads((path / "snapshots" / f"{steps[0]:09d}.json").read_bytes())
        assert [origin["step"] for origin in document["origins"]] == steps
    for path, known in ((target, False), (second, True), (third, True)):
        # Of the step at which it was closed.
        assert ("origins" in json.loads((path / "CURRENT.json").read_bytes())) is known
