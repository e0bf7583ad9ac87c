"""Snapshots for people: pins, sizes, what is kept and what is removed."""

import errno
import itertools
import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

import engram_store
from engram_store import snapshots
from engram_store.engine.engine import Engine
from engram_store.engine.rewind import rewind
from engram_store.errors import (
    ConfigError,
    DiskFullError,
    ProtocolError,
    SnapshotMismatchError,
    StoreFileError,
    StoreLockedError,
)
from engram_store.layout.disk import Disk
from engram_store.layout.manifest import read_manifest
from engram_store.layout.metadata import read_metadata
from engram_store.layout.paths import StorePaths
from engram_store.layout.pins import pin_file, read_pin
from engram_store.layout.snapshots import hold_snapshot
from engram_store.layout.verify import verify_store
from engram_store.store import Store
from engram_store.testing import FaultyDisk, RecordingDisk
from tests.pairs import MakePair, Pair, assert_same_tables, files_of, random_tokens

INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def disk_bytes(path: Path) -> int:
    """Bytes below a directory on disk, each file once."""
    found = {}
    for file in path.rglob("*"):
        if file.is_file():
            status = file.stat()
            found[status.st_ino] = status.st_blocks * 512
    return sum(found.values())


def catalog_of(store: Store) -> engram_store.engine.catalog.Catalog:
    engine = store._engine
    assert isinstance(engine, Engine)
    return engine.catalog


@pytest.fixture
def busy(make_pair: MakePair) -> Pair:
    """Snapshots at 0 to 4, a fold after the second; segments beside and below it."""
    pair = make_pair(options={"fold_ratio": 1e9})
    for step in range(1, 5):
        pair.train(1)
        pair.snapshot()
        if step == 2:
            pair.store.fold()
    return pair


# ---------------------------------------------------------------------- pins


def test_a_pinned_snapshot_stays_and_its_name_stands_for_it(busy: Pair) -> None:
    """However few are kept; unpinned, it goes."""
    ref = snapshots.pin(busy.path, 1, "best")
    assert snapshots.pin(busy.path, "best", "again") == ref

    report = busy.store.collect_garbage(keep=1)

    assert report.removed == (0, 2, 3)
    assert report.pinned == {1: ("again", "best")}
    assert busy.store.snapshots() == [1, 4]
    with engram_store.open(busy.path, snapshot="best") as store:
        assert store.step == 1
    with engram_store.open(busy.path, snapshot="newest") as store:
        assert store.step == 4
    with pytest.raises(SnapshotMismatchError, match="its pins are: again, best"):
        engram_store.open(busy.path, snapshot="worst")
    snapshots.unpin(busy.path, "best")
    assert busy.store.collect_garbage(keep=1).pinned == {1: ("again",)}
    snapshots.unpin(busy.path, "again")
    assert busy.store.collect_garbage(keep=1).removed == (1,)
    busy.check()
    assert verify_store(StorePaths(busy.path)).ok


@pytest.mark.parametrize(
    "name", ["", "9", "12best", "newest", "a/b", "../a", ".a", "a b", "ä", "a\n", "a" * 65]
)
def test_only_plain_names_can_be_pins(busy: Pair, name: str) -> None:
    """They become file names, and must not be taken for steps."""
    before = files_of(busy.path)
    with pytest.raises(ConfigError, match="cannot be the name of a pin"):
        snapshots.pin(busy.path, 1, name)
    with pytest.raises(ConfigError, match="cannot be the name of a pin"):
        snapshots.unpin(busy.path, name)
    assert files_of(busy.path) == before


def test_a_name_moves_only_if_that_is_asked_for(busy: Pair) -> None:
    """And nothing is pinned that is not there."""
    snapshots.pin(busy.path, 1, "best")
    with pytest.raises(ConfigError, match="is the snapshot at step 1"):
        snapshots.pin(busy.path, 2, "best")
    with pytest.raises(SnapshotMismatchError, match="snapshots at steps 0, 1, 2, 3, 4"):
        snapshots.pin(busy.path, 7, "worst")
    with pytest.raises(SnapshotMismatchError, match="no snapshot of store"):
        snapshots.unpin(busy.path, "worst")

    assert snapshots.pin(busy.path, 2, "best", move=True).step == 2

    assert [info.pins for info in snapshots.describe(busy.path)] == [(), (), ("best",), (), ()]


def test_a_damaged_pin_lets_nothing_be_removed(busy: Pair) -> None:
    """Whose snapshot it keeps is unknown. Pinning again, or unpinning, mends it."""
    snapshots.pin(busy.path, 1, "best")
    file = busy.path / "snapshots" / "pins" / "best.json"
    sound = file.read_bytes()
    for damaged in (sound.replace(b'"step": 1', b'"step": 2'), b"{", b""):
        file.write_bytes(damaged)
        with pytest.raises(StoreFileError, match=r"best\.json.*pinned"):
            busy.store.collect_garbage(keep=1)
        with pytest.raises(StoreFileError, match=r"best\.json.*pinned"):
            busy.store.restore(2)
        assert len(snapshots.describe(busy.path)) == 5
    snapshots.pin(busy.path, 1, "best", move=True)
    assert busy.store.collect_garbage(keep=1).pinned == {1: ("best",)}
    file.write_bytes(b"{")
    snapshots.unpin(busy.path, "best")
    assert busy.store.collect_garbage(keep=1).removed == (1,)


def test_every_flipped_bit_of_a_pin_is_found(busy: Pair) -> None:
    """Or it means the same: nothing but its meaning is vouched for."""
    paths = StorePaths(busy.path)
    snapshots.pin(busy.path, 1, "best")
    file = pin_file(paths, "best")
    sound = file.read_bytes()
    expected, found = read_pin(paths, busy.store.store_id, "best"), 0
    for position in range(len(sound)):
        for bit in range(8):
            changed = bytearray(sound)
            changed[position] ^= 1 << bit
            file.write_bytes(changed)
            try:
                assert read_pin(paths, busy.store.store_id, "best") == expected
            except StoreFileError:
                found += 1
    assert found > 7.9 * len(sound)


def test_a_pin_of_another_store_or_name_is_refused(busy: Pair, make_pair: MakePair) -> None:
    """Copied into the directory by hand."""
    snapshots.pin(busy.path, 1, "best")
    pins = busy.path / "snapshots" / "pins"
    (pins / "renamed.json").write_bytes((pins / "best.json").read_bytes())
    other = make_pair("b")
    (other.path / "snapshots" / "pins").mkdir()
    (other.path / "snapshots" / "pins" / "best.json").write_bytes((pins / "best.json").read_bytes())

    for path, name in ((busy.path, "renamed"), (other.path, "best")):
        with pytest.raises(StoreFileError, match="is the pin 'best' of store"):
            engram_store.open(path, snapshot=name)


def test_going_back_past_a_pinned_snapshot_is_refused(busy: Pair) -> None:
    """It would be forgotten; nothing has changed, not even the open windows."""
    snapshots.pin(busy.path, 3, "best")
    window = busy.store.announce(random_tokens(busy.rng), busy.step)
    before = files_of(busy.path)

    for goal in (2, 0):
        with pytest.raises(ProtocolError, match=r"'best' \(step 3\).*Unpin"):
            busy.store.restore(goal)

    assert files_of(busy.path) == before
    assert window.rows(1)[0].size
    window.close()
    busy.check()
    busy.store.restore("best")
    busy.oracle.restore(3)
    busy.check()
    snapshots.unpin(busy.path, "best")
    busy.store.restore(2)
    busy.oracle.restore(2)
    busy.check()
    busy.store.close()
    snapshots.pin(busy.path, 2, "best")
    paths = StorePaths(busy.path)
    before = files_of(busy.path)
    with pytest.raises(ProtocolError, match="'best'"):
        rewind(paths, read_metadata(paths), 1, Disk())
    assert files_of(busy.path) == before
    assert rewind(paths, read_metadata(paths), "best", Disk()) is None


# ---------------------------------------------------------------------- removing


def test_a_dry_run_tells_exactly_what_a_collection_frees(busy: Pair) -> None:
    """Measured on the disk; the tables and what is kept are untouched."""
    before, files = disk_bytes(busy.path), files_of(busy.path)

    planned = busy.store.collect_garbage(keep=2, dry_run=True)
    assert files_of(busy.path) == files
    done = busy.store.collect_garbage(keep=2)

    assert planned.dry_run
    assert not done.dry_run
    assert {**planned.to_json(), "dry_run": False} == done.to_json()
    assert done.removed == (0, 1, 2)
    assert done.kept == (3, 4)
    manifests = [f for f in files if f in {f"snapshots/{step:09d}.json" for step in done.removed}]
    small = sum(-(-len(files[name]) // 4096) * 4096 for name in manifests)
    assert before - disk_bytes(busy.path) == done.freed_bytes + small
    assert done.freed_bytes > 0
    assert all(not (busy.path / gone).exists() for gone in done.directories)
    busy.check()
    assert verify_store(StorePaths(busy.path)).ok
    with engram_store.open(busy.path, snapshot=3) as store:
        busy.oracle.restore(3)
        assert_same_tables(store, busy.oracle)


def test_sizes_are_what_removing_a_snapshot_frees(busy: Pair) -> None:
    """`own` for each, measured by removing it; with `shared` it is all that it needs."""
    busy.store.close()
    listed = {info.step: info for info in snapshots.describe(busy.path)}
    assert listed[4].own_bytes < 8192, "all but the manifest is in use"
    assert listed[2].shared_bytes > 0
    for step in (1, 0):  # the unfolded base is held by both until one is gone
        info = next(i for i in snapshots.describe(busy.path) if i.step == step)
        before = disk_bytes(busy.path)
        (busy.path / "snapshots" / f"{step:09d}.json").unlink()
        snapshots.collect_garbage(busy.path)
        assert before - disk_bytes(busy.path) == info.own_bytes
        assert info.own_bytes >= listed[step].own_bytes


def test_a_snapshot_that_is_read_is_left_alone(busy: Pair) -> None:
    """Until it is let go; a restore in the same process holds its goal, too."""
    paths = StorePaths(busy.path)
    with hold_snapshot(paths, 1), hold_snapshot(paths, 2), hold_snapshot(paths, 99):
        report = busy.store.collect_garbage(keep=1)
        assert report.removed == (0, 3)
        assert report.in_use == (1, 2)
        with engram_store.open(busy.path, snapshot=1) as store:
            assert store.step == 1
    assert busy.store.collect_garbage(keep=1).removed == (1, 2)


@pytest.mark.parametrize("keep", [1, 2])
def test_keeping_the_newest_happens_with_every_snapshot(make_pair: MakePair, keep: int) -> None:
    """Pinned ones stay; a fold and the close in between do not disturb it."""
    pair = make_pair(options={"keep_snapshots": keep, "fold_ratio": 1e9})
    for step in range(1, 7):
        pair.train(1)
        pair.snapshot()
        if step == 2:
            snapshots.pin(pair.path, 2, "best")
        if step == 4:
            pair.store.fold()
    pair.train(1)
    pair.check()
    pair.store.close()

    newest = list(range(8 - keep, 8))
    assert list(engram_store.inspect(pair.path).snapshots) == [2, *newest]
    with engram_store.open(pair.path) as store:
        assert_same_tables(store, pair.oracle)
    with engram_store.open(pair.path, snapshot="best") as store:
        pair.oracle.restore(2)
        assert_same_tables(store, pair.oracle)
    report = verify_store(StorePaths(pair.path))
    assert report.ok
    assert all("snapshots" in note for note in report.notes), report.notes


def test_fewer_than_one_cannot_be_kept(busy: Pair) -> None:
    """Wherever the number is given; nothing is removed, and the store is free again."""
    for refused in (
        lambda: busy.store.collect_garbage(keep=0),
        lambda: busy.store.keep_snapshots(-1),
        lambda: snapshots.collect_garbage(busy.path, keep=0),
    ):
        with pytest.raises(ConfigError, match="at least 1"):
            refused()
    busy.store.close()
    with pytest.raises(ConfigError, match="at least 1"):
        engram_store.open(busy.path, "train", keep_snapshots=0)
    assert engram_store.inspect(busy.path).snapshots == (0, 1, 2, 3, 4)
    engram_store.open(busy.path, "train").close()


def test_a_directory_is_collected_only_while_nobody_trains_it(busy: Pair) -> None:
    """A dry run is always possible."""
    assert snapshots.collect_garbage(busy.path, 1, dry_run=True).removed == (0, 1, 2, 3)
    with pytest.raises(StoreLockedError):
        snapshots.collect_garbage(busy.path, 1)
    busy.store.close()
    assert snapshots.collect_garbage(busy.path, 1).removed == (0, 1, 2, 3)
    with engram_store.open(busy.path, "train") as store:
        assert_same_tables(store, busy.oracle)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_collection_that_fails_anywhere_costs_nothing_that_is_kept(
    busy: Pair, error: int
) -> None:
    """At every single operation; the next one does the rest."""
    busy.store.close()
    snapshots.pin(busy.path, 1, "one")
    before = files_of(busy.path)
    planned = snapshots.collect_garbage(busy.path, 2, dry_run=True)
    assert planned.removed == (0, 2)
    for at in itertools.count(1):
        for name, content in before.items():
            (busy.path / name).parent.mkdir(parents=True, exist_ok=True)
            (busy.path / name).write_bytes(content)
        disk = FaultyDisk()
        disk.fail(error, at=at, forever=True)
        try:
            snapshots.collect_garbage(busy.path, 2, disk=disk)
        except (DiskFullError, StoreFileError):
            assert disk.fired
        else:
            assert not disk.fired
            break
        left = [info.step for info in snapshots.describe(busy.path)]
        assert {1, 3, 4} <= set(left)
        assert verify_store(StorePaths(busy.path)).ok
        assert snapshots.collect_garbage(busy.path, 2).kept == (1, 3, 4)
    assert at > len(planned.directories)
    after = files_of(busy.path)
    assert after == {name: before[name] for name in after}
    for step in (4, 3, 1):
        busy.oracle.restore(step)
        with engram_store.open(busy.path, snapshot=step) as store:
            assert_same_tables(store, busy.oracle)


def test_files_go_only_after_the_snapshots_that_name_them_are_gone_for_good(busy: Pair) -> None:
    """A host that dies in between must not come back with a snapshot that lacks its files."""
    busy.store.close()
    disk = RecordingDisk()
    snapshots.collect_garbage(busy.path, 1, disk=disk)
    done = [(o.kind, o.path.relative_to(busy.path).parts[0]) for o in disk.operations]
    manifests = [i for i, (kind, where) in enumerate(done)
                 if (kind, where) == ("unlink", "snapshots")]  # fmt: skip
    files = [i for i, (_, where) in enumerate(done) if where == "layers"]
    assert len(manifests) == 4
    assert files
    assert ("sync_directory", "snapshots") in done[max(manifests) : min(files)]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_pin_that_fails_anywhere_is_the_old_one_or_the_new_one(busy: Pair, error: int) -> None:
    """And is said to have failed."""
    ends = set()
    for at in itertools.count(1):
        snapshots.pin(busy.path, 1, "best", move=True)
        disk = FaultyDisk()
        disk.fail(error, at=at)
        try:
            snapshots.pin(busy.path, 3, "best", move=True, disk=disk)
        except (DiskFullError, StoreFileError):
            with engram_store.open(busy.path, snapshot="best") as store:
                ends.add(store.step)
        else:
            assert not disk.fired
            break
    assert ends == {1, 3}
    assert [info.step for info in snapshots.describe(busy.path) if info.pins] == [3]


# ---------------------------------------------------------------------- what they are


def test_a_snapshot_costs_as_many_bytes_as_rows_were_touched(make_pair: MakePair) -> None:
    """Beside a few documents whose size does not depend on the tables."""
    pair = make_pair(options={"fold_ratio": 1e9}, optimizer="adam")
    per_row = sum(4 + spec.row_bytes + spec.state_bytes for spec in pair.store.tables.values()) / 2
    documents = 24 << 10
    for tokens in (2, 20, 200, 20, 2):
        before = pair.store.stats().bytes_written
        window = pair.announce(random_tokens(pair.rng, (1, tokens)), pair.step)
        rows = sum(window.store.row_ids(layer).size for layer in (1, 2))
        window.push_random(pair.rng)
        pair.commit()
        pair.snapshot()

        written = pair.store.stats().bytes_written - before

        assert rows * per_row <= written <= rows * per_row * 1.02 + documents
    everything = sum(s.rows * (s.row_bytes + s.state_bytes) for s in pair.store.tables.values())
    assert documents < everything / 20


def test_a_manifest_can_be_read_by_people(busy: Pair) -> None:
    """What it is comes first, then when, then the files; nothing is decided by the time."""
    paths = StorePaths(busy.path)
    document = json.loads(paths.snapshot(3).read_text("utf-8"))

    assert list(document)[:5] == ["engram_store", "format_version", "store_id", "step", "made"]
    assert INSTANT.fullmatch(document["made"])
    made = datetime.fromisoformat(document["made"])
    assert made.tzinfo == UTC
    assert "origins" not in document
    assert "made" not in json.loads(paths.current.read_text("utf-8"))
    assert [info.made for info in snapshots.describe(busy.path)][3] == document["made"]
    busy.store.restore(3)
    assert "made" not in json.loads(paths.current.read_text("utf-8"))
    digest = read_manifest(paths, 3)[1]
    busy.store.fold()
    assert busy.store.snapshot().digest == digest, "the first manifest of a step stays"


def test_a_damaged_snapshot_is_listed_with_its_problem(busy: Pair) -> None:
    """The others are listed as ever, also where the working manifest is of no use."""
    busy.store.close()
    (busy.path / "snapshots" / "000000002.json").write_text("{")

    listed = snapshots.describe(busy.path)

    assert [info.step for info in listed] == [0, 1, 2, 3, 4]
    assert [bool(info.problem) for info in listed] == [False, False, True, False, False]
    assert "000000002.json" in listed[2].problem
    files = {name for name in files_of(busy.path) if name.startswith("layers/")}
    with pytest.raises(StoreFileError, match=r"000000002\.json"):
        snapshots.collect_garbage(busy.path, 3)
    assert files <= files_of(busy.path).keys(), "what the damaged one needs is unknown"
    assert [info.step for info in snapshots.describe(busy.path)] == [2, 3, 4]
    (busy.path / "CURRENT.json").write_text("{")
    assert [info.step for info in snapshots.describe(busy.path)] == [2, 3, 4]


def test_a_snapshot_taken_while_rows_wait_in_shared_memory_can_be_pinned(pair: Pair) -> None:
    """By its reference, while the store trains on."""
    pair.train(2)
    ref = pair.snapshot()
    assert snapshots.pin(pair.path, ref, "two") == ref
    pair.train(1)
    with pytest.raises(SnapshotMismatchError):
        snapshots.pin(pair.path, 3, "three")
    assert catalog_of(pair.store).find_snapshot("two").step == 2
    assert os.listdir(pair.path / "snapshots" / "pins") == ["two.json"]  # noqa: PTH208
    assert np.array_equal(pair.store.snapshots(), [0, 2])
