"""The file system of crash tests: what it lets a crash keep, and what it must not lose."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engram_store.testing import Operation, RecordingDisk
from engram_store.testing.crash import (
    FileSystem,
    Image,
    Workspace,
    dead_process,
    lost_host,
    torn_operation,
)

Found = dict[str, bytes]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    return tmp_path


@pytest.fixture
def disk() -> RecordingDisk:
    return RecordingDisk()


def write(disk: RecordingDisk, path: Path, data: bytes, *, sync: bool = True) -> None:
    fd = disk.create(path)
    disk.write(fd, memoryview(data), 0)
    if sync:
        disk.sync(fd)
    disk.close(fd)


def replay(root: Path, disk: RecordingDisk) -> FileSystem:
    files = FileSystem.of_image(root, "a", Image({}, ["a"], {}, ""))
    for operation in disk.operations:
        files.apply(operation)
    return files


def losses(files: FileSystem) -> Iterator[Found]:
    for image in lost_host(files, np.random.default_rng(0), subsets=50):
        yield {path: blob.data for path, blob in image.files.items()}


def test_a_synced_file_is_whole_or_has_no_name(root: Path, disk: RecordingDisk) -> None:
    """Its name is durable with its directory only."""
    write(disk, root / "a/x", b"content")

    assert list(losses(replay(root, disk))) == [{}, {"a/x": b"content"}]
    disk.sync_directory(root / "a")
    assert list(losses(replay(root, disk))) == [{"a/x": b"content"}]


def test_an_unsynced_file_may_be_empty_short_zeros_or_torn(root: Path, disk: RecordingDisk) -> None:
    """A synced name does not help: length and each sector are kept or lost one by one."""
    write(disk, root / "a/x", b"1" * 512 + b"2" * 100, sync=False)
    disk.sync_directory(root / "a")

    found = {image["a/x"] for image in losses(replay(root, disk))}

    assert found == {
        b"",
        b"1" * 512,
        bytes(512) + b"2" * 100,
        bytes(612),
        b"1" * 512 + bytes(100),
        b"1" * 512 + b"2" * 100,
    }


def test_blocks_that_were_never_written_may_hold_a_removed_file(
    root: Path, disk: RecordingDisk
) -> None:
    write(disk, root / "a/old", b"s" * 3000)
    disk.sync_directory(root / "a")
    disk.unlink(root / "a/old")
    write(disk, root / "a/x", b"n" * 3000, sync=False)
    disk.sync_directory(root / "a")

    found = {image["a/x"] for image in losses(replay(root, disk))}

    assert b"s" * 3000 in found
    assert any(set(content) == set(b"ns") for content in found)


def test_a_rename_may_be_half_durable_but_a_name_is_never_neither(
    root: Path, disk: RecordingDisk
) -> None:
    """The new name stands for the old file or the new one; the temporary name may stay."""
    write(disk, root / "a/x", b"old")
    disk.sync_directory(root / "a")
    write(disk, root / "a/x.tmp", b"new")
    disk.sync_directory(root / "a")
    disk.rename(root / "a/x.tmp", root / "a/x")

    found = list(losses(replay(root, disk)))

    assert {image["a/x"] for image in found} == {b"old", b"new"}
    assert {"a/x.tmp" in image for image in found} == {True, False}


def test_what_lies_in_a_lost_directory_is_lost(root: Path, disk: RecordingDisk) -> None:
    disk.make_directory(root / "a/d")
    write(disk, root / "a/d/x", b"content")
    disk.sync_directory(root / "a/d")

    assert list(losses(replay(root, disk))) == [{}, {"a/d/x": b"content"}]


def test_the_death_of_a_process_loses_nothing_that_was_done(
    root: Path, disk: RecordingDisk
) -> None:
    """Files and shared memory; the store under way may be cut, and a lost host loses memory."""
    write(disk, root / "a/x", b"content", sync=False)
    fd = disk.open_shared(root / "memory", 64)
    memory = np.zeros(24, np.uint8)
    disk.close(fd)
    disk.operations.pop()
    files = replay(root, disk)
    disk.store(root / "memory", 8, memory, 7)
    (stored,) = [o for o in disk.operations if o.kind == "store"]

    torn = [i.memory["memory"] for i in torn_operation(files, stored, np.random.default_rng(0), 2)]
    assert bytes(8) + b"\7" * 8 + bytes(48) in torn
    assert all(content[:8] == bytes(8) and content[32:] == bytes(32) for content in torn)
    files.apply(stored)
    dead = dead_process(files)
    assert dead.memory["memory"] == bytes(8) + b"\7" * 24 + bytes(32)
    assert dead.files["a/x"].data == b"content"
    assert not any(image.memory for image in lost_host(files, np.random.default_rng(0), 1))


def test_a_record_with_a_gap_is_refused(root: Path, disk: RecordingDisk) -> None:
    files = FileSystem.of_image(root, "a", Image({}, ["a"], {}, ""))
    with pytest.raises(ValueError, match="a/x is not there; the record is not complete"):
        files.apply(Operation("unlink", root / "a/x"))
    with pytest.raises(ValueError, match="is not below"):
        files.apply(Operation("unlink", Path("/elsewhere/x")))


def test_a_workspace_becomes_each_image_whatever_was_done_to_it(
    root: Path, disk: RecordingDisk
) -> None:
    """Only what differs is written, and what recovery changed is put back."""
    disk.make_directory(root / "a/d")
    write(disk, root / "a/d/x", b"1" * 600, sync=False)
    write(disk, root / "a/y", b"2")
    files = replay(root, disk)
    workspace = Workspace(root, "a")

    for image in lost_host(files, np.random.default_rng(0), subsets=30):
        workspace.put(image)
        assert workspace.difference(image) is None
        if "a/y" in image.files:
            workspace.disk.rename(root / "a/y", root / "a/z")
        workspace.disk.make_directory(root / "a/made")
        fd = workspace.disk.create(root / "a/made/file")
        workspace.disk.close(fd)
        assert workspace.difference(image) is not None


def test_equal_images_have_equal_keys_and_others_have_others(
    root: Path, disk: RecordingDisk
) -> None:
    write(disk, root / "a/x", b"1" * 3000, sync=False)
    images = list(lost_host(replay(root, disk), np.random.default_rng(0), subsets=30))
    keys: dict[int, object] = {}
    for image in images:
        content = {path: blob.data for path, blob in image.files.items()}
        assert keys.setdefault(image.key, content) == content
    assert len(keys) == len({tuple(sorted(c.items())) for c in keys.values()})  # type: ignore[attr-defined]
