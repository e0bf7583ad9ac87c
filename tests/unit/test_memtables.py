"""Memtables' files: used again after a kill, never trusted for it, and given back."""

import contextlib
import errno
import os
import shutil
import stat
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import engram_store
from engram_store.engine import placement
from engram_store.engine.engine import Engine
from engram_store.engine.extents import BLOCK_SLOTS
from engram_store.engine.memtable import _DATA_OFFSET, memtable_bytes
from engram_store.engine.recovery import RecoveryKind
from engram_store.errors import SharedMemoryFullError, StoreFileError
from engram_store.layout.disk import Disk
from engram_store.recipes import Recipe
from engram_store.store import Store
from engram_store.testing import RecordingDisk
from engram_store.testing.crash import FileSystem, Workspace, dead_process
from tests.crash.faults import abandon
from tests.pairs import MakePair, Pair, specs_of, tiny_overlay_bytes

Usage = namedtuple("Usage", "total used free")
STEPS = 7
"""With the least overlay, both memtables were sealed before and one holds the last steps."""


class Killed:
    """A store whose process died after some steps, with memtables in a directory of the test."""

    def __init__(self, pair: Pair, memory: Path, overlay_bytes: int) -> None:
        self.pair, self.memory, self.overlay_bytes = pair, memory, overlay_bytes
        self.path = pair.path
        pair.oracle.snapshot()
        pair.train(STEPS)
        self.die(pair.store)

    def die(self, store: Store) -> None:
        abandon(store)

    @property
    def directory(self) -> Path:
        """Of the memtables."""
        (found,) = self.memory.iterdir()
        return found

    @property
    def files(self) -> list[Path]:
        return placement.memtable_files(self.directory)

    def open(self, disk: Disk | None = None, **options: Any) -> Store:
        chosen = {"overlay_bytes": self.overlay_bytes, "memtable_dir": self.memory, **options}
        return engram_store.open(self.path, "train", disk=disk, **chosen)

    def check(self, store: Store) -> None:
        """Nothing is lost, nor is there more than was committed; and it can be trained."""
        assert store.step == self.pair.oracle.step
        again = Pair(store, self.pair.oracle, self.pair.rng)
        again.check()

    def train_on(self, store: Store, steps: int) -> None:
        again = Pair(store, self.pair.oracle, self.pair.rng)
        again.train(steps)
        again.check()


@pytest.fixture
def killed(make_pair: MakePair, recipe: Recipe, tmp_path: Path) -> Killed:
    size, memory = tiny_overlay_bytes(specs_of(recipe)), tmp_path / "memory"
    memory.mkdir()
    pair = make_pair(options={"overlay_bytes": size, "memtable_dir": memory})
    return Killed(pair, memory, size)


def memtables_of(store: Store) -> list[Any]:
    assert isinstance(store._engine, Engine)
    return store._engine._memtables


def no_room(monkeypatch: pytest.MonkeyPatch, *places: Path) -> None:
    """Not a byte is free below these places."""
    disk_usage = shutil.disk_usage

    def usage(path: Path) -> Any:
        full = any(Path(path).is_relative_to(place) for place in places)
        return Usage(1, 1, 0) if full else disk_usage(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)


# ---------------------------------------------------------------------- used again


def test_files_of_a_killed_store_are_used_again(killed: Killed) -> None:
    """Both, as long as they have the length; a clean close gives them back all the same."""
    before = [path.stat() for path in killed.files]

    store = killed.open()

    after = [path.stat() for path in killed.files]
    assert all(os.path.samestat(old, new) for old, new in zip(before, after, strict=True))
    killed.check(store)
    killed.train_on(store, STEPS)
    directory = killed.directory
    store.close()
    assert not directory.exists()


def test_memtables_hold_nothing_when_a_store_is_open(killed: Killed) -> None:
    """The first is open with nothing in it, the second is none, whatever their slots contain."""
    slots = killed.files[0].read_bytes()[_DATA_OFFSET:]
    assert any(slots)

    store = killed.open()

    first, second = memtables_of(store)
    assert (first.committed().step, set(first.committed().counts)) == (STEPS, {0})
    assert second.number == 0
    assert first.path.read_bytes()[_DATA_OFFSET:] == slots
    store.close()


def test_old_slots_are_not_seen_after_a_kill_before_the_first_commit(killed: Killed) -> None:
    """Again and again; and one commit later its rows are all that is taken over."""
    for _ in range(2):
        store = killed.open()
        killed.check(store)
        killed.die(store)
    store = killed.open()
    assert store.recovery is not None
    assert (store.recovery.kind, store.recovery.sealed_rows) == (RecoveryKind.RECOVERED, 0)
    killed.train_on(store, 1)
    rows = sum(memtables_of(store)[0].committed().counts)
    killed.die(store)

    with killed.open() as store:
        assert store.recovery is not None
        assert 0 < store.recovery.sealed_rows == rows
        killed.check(store)


def test_old_slots_are_not_seen_after_a_restore(killed: Killed) -> None:
    """It starts a lineage of which the files' content never was."""
    store = killed.open()
    killed.train_on(store, 2)
    again = Pair(store, killed.pair.oracle, killed.pair.rng)
    store.restore(0)
    killed.pair.oracle.restore(0)
    again.check()
    killed.die(store)

    with killed.open() as store:
        killed.check(store)
        killed.train_on(store, 1)


def test_a_kill_at_any_moment_of_reopening_loses_nothing(killed: Killed, tmp_path: Path) -> None:
    """Between the seal of what was left behind and the first commit in the same files."""
    files = FileSystem.found(tmp_path, killed.path.name, ignored=("LOCK",))
    files.memory = {str(f.relative_to(tmp_path)): f.read_bytes() for f in killed.files}
    disk = RecordingDisk()
    killed.die(killed.open(disk))
    kinds = [operation.kind for operation in disk.operations]
    assert "store" in kinds
    assert not {op.path for op in disk.operations if op.kind == "unlink"} & set(killed.files)
    workspace = Workspace(tmp_path, killed.path.name, ("LOCK",))
    seen = set()
    for operation in [*disk.operations, None]:
        image = dead_process(files)
        if image.key not in seen:
            seen.add(image.key)
            workspace.put(image)
            with killed.open(workspace.disk) as store:
                killed.check(store)
        if operation is not None:
            files.apply(operation)
    assert len(seen) > kinds.count("store")


# ---------------------------------------------------------------------- not used again


def _open_to_others(path: Path) -> None:
    path.chmod(0o640)


def _linked(path: Path) -> None:
    os.link(path, path.parent.parent / "another name")


def _link(path: Path) -> None:
    aside = path.parent.parent / "aside"
    path.rename(aside)
    path.symlink_to(aside)


def _longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").touch()


@pytest.mark.parametrize("change", [_open_to_others, _linked, _link, _longer, _directory])
def test_only_private_files_of_the_length_are_used_again(
    killed: Killed, change: Callable[[Path], None]
) -> None:
    """Everything else at the place of a memtable is replaced; other names are untouched."""
    # So that nothing that must be taken over is in the file that is changed.
    killed.die(killed.open())
    directory, (first, path) = killed.directory, killed.files
    length = path.stat().st_size
    change(path)
    others = {p: p.read_bytes() for p in killed.memory.iterdir() if p.is_file()}

    store = killed.open()

    found = path.lstat()
    assert stat.S_ISREG(found.st_mode)
    assert (found.st_mode & 0o777, found.st_size, found.st_nlink) == (0o600, length, 1)
    assert sorted(directory.iterdir()) == [first, path]
    killed.check(store)
    store.close()
    assert not directory.exists()
    assert {p: p.read_bytes() for p in killed.memory.iterdir()} == others


def test_memtables_of_another_size_are_replaced(killed: Killed) -> None:
    """Larger and smaller ones, and names that are nobody's; nothing is lost meanwhile."""
    for blocks in (3, 2):
        with contextlib.ExitStack() as stack:
            old = [stack.enter_context(path.open("rb")) for path in killed.files]
            (killed.directory / "memtable-2").touch()
            (killed.directory / "more").mkdir()
            specs = specs_of(killed.pair.oracle.recipe)
            killed.overlay_bytes = tiny_overlay_bytes(specs, blocks)

            store = killed.open()

            assert [os.fstat(file.fileno()).st_nlink for file in old] == [0, 0]
        length = memtable_bytes(list(specs.values()), blocks * BLOCK_SLOTS)
        assert sorted(killed.directory.iterdir()) == killed.files
        assert [path.stat().st_size for path in killed.files] == [length, length]
        killed.train_on(store, 2)
        killed.die(store)
    with killed.open() as store:
        killed.check(store)


def test_a_directory_that_others_may_enter_is_replaced(killed: Killed) -> None:
    """Whoever could write there could have put the files there."""
    killed.directory.chmod(0o755)

    with killed.open() as store:
        assert killed.directory.stat().st_mode & 0o777 == 0o700
        killed.check(store)


def test_memtables_somewhere_else_are_taken_over_and_removed(
    killed: Killed, tmp_path: Path
) -> None:
    """The memory of a directory that is not asked for any more is given back."""
    old = killed.directory

    with killed.open(memtable_dir=tmp_path / "elsewhere") as store:
        assert not old.exists()
        killed.check(store)


class _Stubborn(Disk):
    """Cannot remove files of memtables."""

    def unlink(self, path: Path) -> None:
        if path.name.startswith("memtable-"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        super().unlink(path)


def test_a_file_of_another_size_that_stays_is_refused(killed: Killed) -> None:
    """Recovery would not know it as a memtable, and lose every step that it holds."""
    bigger = tiny_overlay_bytes(specs_of(killed.pair.oracle.recipe), 2)
    killed.die(killed.open(overlay_bytes=bigger))

    with pytest.raises(StoreFileError, match=r"memtable-0.* slots has .*remove it and open again"):
        killed.open(_Stubborn())

    with killed.open() as store:
        killed.check(store)


# ---------------------------------------------------------------------- room


def test_files_that_are_there_need_no_room(killed: Killed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store comes back where not one more memtable would fit."""
    no_room(monkeypatch, killed.memory)

    with killed.open() as store:
        killed.check(store)
        killed.train_on(store, STEPS)


def test_what_is_missing_needs_room(killed: Killed, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file of two, or the holes in one; refused, the memory of both is given back."""
    killed.die(killed.open())
    directory, path = killed.directory, killed.files[1]
    length = path.stat().st_size
    no_room(monkeypatch, killed.memory)
    path.write_bytes(b"")
    os.truncate(path, length)

    with pytest.raises(SharedMemoryFullError) as refused:
        killed.open()

    assert refused.value.needed_bytes == 2 * length
    assert refused.value.available_bytes == length
    assert not directory.exists()
    monkeypatch.undo()
    with killed.open() as store:
        killed.check(store)


def test_memtables_move_to_the_disk_and_back(
    killed: Killed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where room is found decides; the other place is given back, and files there used again."""
    monkeypatch.setattr(placement, "SHARED_MEMORY", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    on_disk = killed.path / "memtables"

    with monkeypatch.context() as full:
        no_room(full, tmp_path / "shm")
        killed.die(killed.open(memtable_dir=None))
        inodes = [path.stat().st_ino for path in placement.memtable_files(on_disk)]
        # Not one more byte, neither here nor there.
        no_room(full, tmp_path)
        store = killed.open(memtable_dir=None)
        assert [path.stat().st_ino for path in placement.memtable_files(on_disk)] == inodes
        killed.train_on(store, 1)
        killed.die(store)
    assert "slower" in caplog.text

    with killed.open(memtable_dir=None) as store:
        assert not on_disk.exists()
        assert len(list((tmp_path / "shm").rglob("memtable-*"))) == 2
        killed.check(store)


def test_a_store_that_cannot_be_opened_gives_memory_back(killed: Killed) -> None:
    """What was in it is sealed first: with the missing file every step is there."""
    directory = killed.directory
    description = next(killed.path.rglob("base.json"))
    description.rename(killed.path / "aside")

    with pytest.raises(StoreFileError, match=r"base\.json"):
        killed.open()

    assert not directory.exists()
    (killed.path / "aside").rename(description)
    with killed.open() as store:
        killed.check(store)
