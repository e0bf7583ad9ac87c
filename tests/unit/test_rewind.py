"""Going back to a snapshot although the store cannot be opened as it is."""

import errno
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import engram_store
from engram_store.cli import main
from engram_store.engine.rewind import rewind
from engram_store.errors import (
    ChecksumError,
    DiskFullError,
    ForeignFileError,
    SnapshotMismatchError,
    StoreFileError,
    StoreLockedError,
)
from engram_store.layout.disk import Disk
from engram_store.layout.manifest import read_manifest, write_current, write_snapshot
from engram_store.layout.metadata import read_metadata
from engram_store.layout.paths import StorePaths
from engram_store.testing import FaultyDisk
from tests.damage import STEPS, make_store_with_history, train, verify
from tests.pairs import files_of, memtable_directory

Harm = Callable[[Path], None]
WANTED = 3
"""Its snapshot is made of a folded base and a segment."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed store with a snapshot at every step up to `STEPS`."""
    path = tmp_path_factory.mktemp("rewind") / "template.engram"
    make_store_with_history(path)
    return path


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy to damage."""
    copy = tmp_path / "a.engram"
    shutil.copytree(template, copy)
    directory = memtable_directory(copy, engram_store.inspect(copy).metadata.store_id)
    yield copy
    shutil.rmtree(directory, ignore_errors=True)


def contents(path: Path, snapshot: int | None = None) -> list[bytes]:
    """All rows of all tables at a snapshot."""
    with engram_store.open(path, snapshot=snapshot) as store:
        return [
            store.read_rows(layer, np.arange(spec.rows, dtype=np.int32)).tobytes()
            for layer, spec in store.tables.items()
        ]


def go_back(path: Path, step: int = WANTED, disk: Disk | None = None) -> StoreFileError | None:
    paths = StorePaths(path)
    return rewind(paths, read_metadata(paths), step, disk or Disk())


def killed(path: Path, steps: int = 2) -> None:
    """Train, and leave the newest steps in shared memory as a killed process does."""
    disk = FaultyDisk()
    store = engram_store.open(path, "train", disk=disk)
    for _ in range(steps):
        train(store, np.random.default_rng(7), (2, 30))
    disk.fail(errno.ENOSPC, forever=True)
    with pytest.raises(DiskFullError):
        store.close()


def damage_manifest(path: Path) -> None:
    (path / "CURRENT.json").write_bytes(b"{")


def lose_manifest(path: Path) -> None:
    (path / "CURRENT.json").unlink()


def lose_segment(path: Path) -> None:
    """Only the working manifest and the newest snapshot need it."""
    shutil.rmtree(path / "layers" / "1" / "segments" / f"{STEPS:06d}")


def foreign_manifest(path: Path) -> None:
    """Whole, but of another store."""
    paths = StorePaths(path)
    manifest = replace(read_manifest(paths)[0], store_id="ab" * 16)
    write_current(paths, manifest, Disk())


@pytest.mark.parametrize("harm", [damage_manifest, lose_manifest, lose_segment, foreign_manifest])
def test_a_store_that_cannot_be_opened_goes_back_to_a_sound_snapshot(
    path: Path, template: Path, harm: Harm, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command; afterwards it is whole, trains on, and newer snapshots are gone."""
    harm(path)
    with pytest.raises(StoreFileError):
        engram_store.open(path, "train").close()

    with pytest.raises(SystemExit) as end:
        main(["restore", str(path), str(WANTED)])

    assert not end.value.code
    said = capsys.readouterr()
    assert f"At step {WANTED} again" in said.out
    assert ("The working manifest was of no use" in said.err) == (harm is not lose_segment)
    assert verify(path).ok
    assert contents(path) == contents(template, WANTED)
    assert engram_store.inspect(path).snapshots == (0, 1, 2, WANTED)
    with engram_store.open(path, "train") as store:
        assert store.step == WANTED
        train(store, np.random.default_rng(1), (2, 30))
    assert verify(path).ok
    assert engram_store.inspect(path).snapshots == (0, 1, 2, WANTED, WANTED + 1)


@pytest.mark.parametrize("known", [True, False])
def test_steps_in_shared_memory_are_forgotten_too(path: Path, template: Path, known: bool) -> None:
    """Nor do they come back by the next opening, whether or not the last lineage is known."""
    killed(path)
    paths = StorePaths(path)
    store_id = read_metadata(paths).store_id
    directory = memtable_directory(path, store_id)
    left = {file.name: file.read_bytes() for file in directory.iterdir()}
    if not known:
        damage_manifest(path)

    go_back(path)

    assert not directory.exists()
    directory.mkdir(mode=0o700)  # had it not been found, it would still be there
    for name, content in left.items():
        (directory / name).write_bytes(content)
    with engram_store.open(path, "train") as store:
        assert store.step == WANTED
    assert contents(path) == contents(template, WANTED)


@pytest.mark.parametrize("harm", [None, damage_manifest, lose_segment])
def test_a_machine_that_dies_at_any_change_leaves_the_old_state_or_the_snapshot(
    path: Path, template: Path, harm: Harm | None
) -> None:
    """Never a mixture, for a failure at each of the changes that are made; again, it works."""
    if harm is not None:
        harm(path)
    else:
        killed(path)
    before = files_of(path)
    at_snapshot = contents(template, WANTED)
    ends = set()
    for at in itertools.count(1):
        shutil.rmtree(path)
        for name, content in before.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        disk = FaultyDisk()
        disk.fail(errno.EIO, at=at, forever=True)
        failed = False
        try:
            go_back(path, disk=disk)
        except OSError:
            failed = True
        if not disk.fired:
            break
        current = StorePaths(path).current
        same = files_of(path).get("CURRENT.json") == before.get("CURRENT.json")
        ends.add("old" if same else "snapshot")
        if same:
            assert failed
            left = {name for name in files_of(path) if not name.endswith(".tmp")}
            assert left >= set(before), "the old state lost a file"
        else:
            assert json.loads(current.read_bytes())["step"] == WANTED
            with engram_store.open(path, "train") as store:
                assert store.step == WANTED
            assert contents(path) == at_snapshot
            assert verify(path).ok
        go_back(path)
        assert contents(path) == at_snapshot
    assert ends == {"old", "snapshot"}


def test_what_cannot_be_gone_back_to_changes_nothing(path: Path) -> None:
    """No such snapshot, a damaged one, one that lacks a file, or one of other tables."""
    paths = StorePaths(path)
    with pytest.raises(SnapshotMismatchError, match="snapshots at steps 0, 1, 2, 3, 4"):
        go_back(path, 9)
    manifest, _ = read_manifest(paths, 1)
    write_snapshot(paths, replace(manifest, tables=manifest.tables[:1]), Disk())
    snapshot = paths.snapshot(2)
    snapshot.write_bytes(snapshot.read_bytes().replace(b'"sealed": ', b'"sealed": 1'))
    (paths.segment(1, WANTED) / "rows").unlink()
    damage_manifest(path)
    before = files_of(path)

    with pytest.raises(ForeignFileError, match=r"has tables for layers \[1\]"):
        go_back(path, 1)
    with pytest.raises(ChecksumError):
        go_back(path, 2)
    with pytest.raises(StoreFileError, match="missing"):
        go_back(path, WANTED)

    assert files_of(path) == before


def test_a_store_in_use_is_left_alone(path: Path) -> None:
    """Its process would go on with what was forgotten."""
    with engram_store.open(path, "train") as store:
        before = files_of(path)
        with pytest.raises(StoreLockedError):
            go_back(path)
        assert files_of(path) == before
        train(store, np.random.default_rng(1), (2, 30))
    assert engram_store.inspect(path).step == STEPS + 1


def test_a_snapshot_with_other_tables_cannot_be_read_or_restored(path: Path) -> None:
    """It names them; a table without files would be a table of anything."""
    paths = StorePaths(path)
    manifest, _ = read_manifest(paths, 1)
    write_snapshot(paths, replace(manifest, tables=manifest.tables[:1]), Disk())
    with pytest.raises(ForeignFileError, match=r"has tables for layers \[1\], the store for"):
        engram_store.open(path, snapshot=1)
    with engram_store.open(path, "train") as store:
        with pytest.raises(ForeignFileError):
            store.restore(1)
        assert store.step == STEPS
