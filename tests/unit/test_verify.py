"""verify: every flipped bit of every file is found and named, and nothing else is."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_store.layout.checksums import BLOCK_BYTES
from engram_store.layout.verify import FileKind, VerifyReport
from tests.damage import (
    ROW_BYTES,
    STEPS,
    changed,
    files_of,
    flip,
    is_data,
    make_store_with_history,
    names_of,
    rows_of_block,
    swapped,
    verify,
)
from tests.pairs import MakeStore


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store with everything that can be damaged; tests put back what they change."""
    path = tmp_path_factory.mktemp("verify") / "a.engram"
    make_store_with_history(path)
    yield path
    assert verify(path).ok, "a test left the store damaged"


def check_named(path: Path, report: VerifyReport, file: str, position: int) -> None:
    """The report names the file, under all its names, and no other; of data also the rows."""
    assert {damage.file for damage in report.damages} == names_of(path, file)
    assert len(report.damages) == len(names_of(path, file))
    for damage in report.damages:
        assert report.advice(damage)
        assert damage.working or damage.snapshots
        if not is_data(file):
            continue
        block = position // BLOCK_BYTES
        layer, rows = rows_of_block(path, file, block)
        assert (damage.kind, damage.block, damage.blocks) == (FileKind.DATA, block, 1)
        assert damage.layer == layer
        assert damage.rows is not None
        assert damage.rows.count == len(rows)
        if file.endswith("/row_ids"):
            assert damage.rows.first is None
        elif rows:
            assert (damage.rows.first, damage.rows.last) == (min(rows), max(rows))


# ---------------------------------------------------------------------- sound stores


def test_a_sound_store_has_no_damage_and_every_file_is_read_once(path: Path) -> None:
    """Also no notes; a chunk that two generations share is read under one name."""
    report = verify(path)

    assert report.ok
    assert not report.notes
    assert report.files == len(files_of(path))
    sizes = {(path / file).stat().st_ino: (path / file).stat().st_size for file in files_of(path)}
    assert report.read_bytes == sum(sizes.values())
    assert report.snapshots == report.sound_snapshots == tuple(range(STEPS + 1))
    # What the other tests rely on: shared chunks, files of several blocks, padding.
    assert any(len(names_of(path, file)) > 1 for file in files_of(path))
    assert any((path / f).stat().st_size > 2 * BLOCK_BYTES for f in files_of(path) if is_data(f))


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adagrad", "adam"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_kind_of_table_is_sound(make_store: MakeStore, dtype: str, optimizer: str) -> None:
    """With initial rows, and as zeros without files."""
    assert verify(make_store(dtype=dtype, optimizer=optimizer)).ok
    assert verify(make_store("b", initial=None, dtype=dtype, optimizer=optimizer)).ok


def test_files_that_nothing_needs_are_notes(path: Path) -> None:
    """A left-over segment, one file in a segment in use, and something foreign."""
    segments = path / "layers" / "1" / "segments"
    extra = [path / "notes.txt", segments / "000003" / "rows.bak", segments / "000099" / "rows"]
    extra[2].parent.mkdir()
    for file in extra:
        file.write_bytes(b"12345")
    (extra[2].parent / "row_ids").touch()
    try:
        report = verify(path)
    finally:
        shutil.rmtree(extra[2].parent)
        for file in extra[:2]:
            file.unlink()

    assert report.ok
    assert report.notes == (
        "layers/1/segments/000003/rows.bak, 5 bytes that nothing needs",
        "layers/1/segments/000099: 2 files, 5 bytes that nothing needs",
        "notes.txt, 5 bytes that nothing needs",
    )


# ---------------------------------------------------------------------- flipped bits


@pytest.mark.parametrize("position", [0, -1])
def test_the_first_and_the_last_byte_of_every_file_count(path: Path, position: int) -> None:
    """File, block, table and rows are named."""
    for file in files_of(path):
        with changed(path / file, flip(position, bit=2)):
            at = position % (path / file).stat().st_size
            check_named(path, verify(path), file, at)


@settings(max_examples=100)
@given(st.data())
def test_every_flipped_bit_is_found_and_named(path: Path, data: st.DataObject) -> None:
    """Anywhere in any file: text, rows, padding, state, row ids, checksums, digests."""
    file = data.draw(st.sampled_from(files_of(path)))
    position = data.draw(st.integers(0, (path / file).stat().st_size - 1))
    with changed(path / file, flip(position, data.draw(st.integers(0, 7)))):
        check_named(path, verify(path), file, position)


@settings(max_examples=100)
@given(st.data())
def test_every_flipped_bit_of_a_document_is_found(path: Path, data: st.DataObject) -> None:
    """The same where most bytes are no data, which the sizes of files would hide."""
    documents = [file for file in files_of(path) if file.endswith((".json", "checksums"))]
    file = data.draw(st.sampled_from(documents))
    position = data.draw(st.integers(0, (path / file).stat().st_size - 1))
    with changed(path / file, flip(position, data.draw(st.integers(0, 7)))):
        check_named(path, verify(path), file, position)


def test_padding_after_the_last_row_is_checked(path: Path) -> None:
    """It is carried along by folds, but it is no row."""
    chunks = path / "layers" / "1" / "base" / "g0001" / "rows" / "c"
    newest = max(chunks.iterdir(), key=lambda chunk: int(chunk.name))
    file = str((newest / "0").relative_to(path))
    with changed(path / file, flip(-1)):
        damages = verify(path).damages

    assert damages
    assert all(damage.rows is not None and damage.rows.count == 0 for damage in damages)
    assert "padding" in damages[0].where


def test_consecutive_blocks_are_one_damage(path: Path) -> None:
    """Not one line per 64 KiB of a file that is lost altogether; a gap makes two."""
    file = next(f for f in files_of(path) if "/1/base/g0001/rows/c/0/" in f)
    count = (path / file).stat().st_size // BLOCK_BYTES
    assert count == 3

    def wreck(data: bytearray) -> None:
        data[:] = bytes(len(data))

    with changed(path / file, wreck):
        damages = [d for d in verify(path).damages if d.file == file]

    assert [(d.block, d.blocks) for d in damages] == [(0, 3)]
    assert damages[0].rows is not None
    assert (damages[0].rows.first, damages[0].rows.last) == (0, 1023)


def test_a_damaged_list_of_checksums_is_told_from_damaged_data(path: Path) -> None:
    """Computing it again gives what its description names: every block is intact."""
    for list_ in (f for f in files_of(path) if f.endswith("/checksums")):
        with changed(path / list_, flip(3)):
            (damage,) = verify(path).damages
        assert (damage.file, damage.kind) == (list_, FileKind.CHECKSUMS)
        assert "are intact" in damage.problem
        assert damage.rows is None


def test_data_and_its_list_can_be_damaged_together(path: Path) -> None:
    """Both are named."""
    directory = path / "layers" / "2" / "segments" / "000003"
    with changed(directory / "checksums", flip(3)), changed(directory / "state", flip(70_000)):
        damages = verify(path).damages

    kinds = {damage.kind for damage in damages}
    assert kinds == {FileKind.CHECKSUMS, FileKind.DATA}
    assert "layers/2/segments/000003/state" in {damage.file for damage in damages}


# ---------------------------------------------------------------------- whole files


def lose(data: bytearray) -> None:
    del data[-1]


@pytest.mark.parametrize("change", [lose, lambda data: data.append(data[-1])])
def test_a_byte_too_few_or_too_many_is_found_in_every_file(
    path: Path, change: Callable[[bytearray], Any]
) -> None:
    """Except the newline at the end of a document, which says nothing."""
    for file in files_of(path):
        document = (path / file).read_bytes()[-2:] == b"}\n"
        with changed(path / file, change):
            report = verify(path)
            if document:
                assert report.ok, file
            else:
                assert {damage.file for damage in report.damages} == names_of(path, file), file


def test_a_cut_off_file_names_the_rows_that_are_gone(path: Path) -> None:
    """From the block of the cut to the end, and no damage before it."""
    file = "layers/1/segments/000003/rows"
    ids = np.fromfile((path / file).parent / "row_ids", "<i4")

    def cut(data: bytearray) -> None:
        del data[BLOCK_BYTES + 100 :]

    with changed(path / file, cut):
        (damage,) = verify(path).damages

    gone = ids[BLOCK_BYTES // ROW_BYTES :]
    assert (damage.block, damage.file) == (1, file)
    assert damage.rows is not None
    assert (damage.rows.count, damage.rows.first_slot) == (gone.size, BLOCK_BYTES // ROW_BYTES)
    assert (damage.rows.first, damage.rows.last) == (gone.min(), gone.max())


def test_every_missing_file_is_found(path: Path, tmp_path: Path) -> None:
    """But a pin, and an older snapshot's manifest that is not pinned: they may be removed."""
    for file in files_of(path):
        aside = tmp_path / "aside"
        (path / file).rename(aside)
        try:
            report = verify(path)
        finally:
            aside.rename(path / file)
        if file == "snapshots/000000002.json":
            (damage,) = report.damages
            assert damage.file == "snapshots/pins/kept.json"
            assert "step 2, which is not there" in damage.problem
        elif file.startswith("snapshots/") and not file.endswith(f"{STEPS}.json"):
            assert report.ok, file
        else:
            (damage,) = report.damages
            assert damage.file == file
            assert damage.problem.startswith("is missing")


def test_something_else_under_a_file_s_name_is_damage(path: Path, tmp_path: Path) -> None:
    """A directory or a pipe: neither an exception nor a process that hangs."""
    for file in ("layers/1/segments/000003/rows", "layers/1/base/g0001/checksums", "CURRENT.json"):
        for make in (os.mkdir, os.mkfifo):
            if make is os.mkfifo and not file.endswith("rows"):
                continue
            aside = tmp_path / "aside"
            (path / file).rename(aside)
            make(path / file)
            try:
                report = verify(path)
            finally:
                (path / file).rmdir() if make is os.mkdir else (path / file).unlink()
                aside.rename(path / file)
            assert [damage.file for damage in report.damages] == [file]


SWAPS = [
    ("layers/1/base/g0001/rows/c/0/0", "layers/1/base/g0001/rows/c/1/0"),
    ("layers/2/base/g0002/state/moments/c/0/0", "layers/2/base/g0002/state/moments/c/1/0"),
    ("layers/1/base/g0001/base.json", "layers/2/base/g0001/base.json"),
    ("layers/1/base/g0001/rows/zarr.json", "layers/2/base/g0001/rows/zarr.json"),
    ("layers/1/segments/000001/rows", "layers/1/segments/000002/rows"),
    ("layers/1/segments/000001/row_ids", "layers/1/segments/000001/state"),
    ("layers/1/segments/000001/checksums", "layers/2/segments/000001/checksums"),
    ("layers/1/segments/000001/segment.json", "layers/1/segments/000002/segment.json"),
    ("snapshots/000000002.json", "snapshots/000000003.json"),
]


@pytest.mark.parametrize("pair", SWAPS, ids=lambda pair: pair[0])
def test_swapped_files_are_found(path: Path, pair: tuple[str, str]) -> None:
    """Each whole, and in the wrong place."""
    one, other = (path / file for file in pair)
    if one.stat().st_size != other.stat().st_size:
        # Content and lengths of documents vary: the same exchange without equal lengths.
        content = one.read_bytes(), other.read_bytes()

        def put(data: tuple[bytes, bytes]) -> None:
            one.write_bytes(data[0])
            other.write_bytes(data[1])

        put((content[1], content[0]))
        report = verify(path)
        put(content)
    else:
        with swapped(one, other):
            report = verify(path)

    assert {damage.file for damage in report.damages} >= set(pair)


def test_a_block_written_to_the_wrong_place_is_found(path: Path) -> None:
    """Its bytes are whole, and another block's."""
    file = "layers/2/base/g0001/rows/c/0/0"
    if (path / file).stat().st_size < 2 * BLOCK_BYTES:
        file = "layers/1/base/g0001/rows/c/0/0"

    def misdirect(data: bytearray) -> None:
        data[BLOCK_BYTES : 2 * BLOCK_BYTES] = data[:BLOCK_BYTES]

    with changed(path / file, misdirect):
        damages = verify(path).damages

    assert {(damage.file, damage.block) for damage in damages} == {
        (name, 1) for name in names_of(path, file)
    }


def test_a_block_that_the_disk_cannot_read_is_named(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO in the middle of a file: the other blocks are checked."""
    file = path / "layers" / "1" / "segments" / "000003" / "rows"
    inode, real = file.stat().st_ino, os.preadv

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        end = offset + sum(buffer.nbytes for buffer in buffers)
        if os.fstat(fd).st_ino == inode and offset < BLOCK_BYTES + 500 < end:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    (damage,) = verify(path).damages

    assert (damage.block, damage.blocks) == (1, 1)
    assert damage.problem == "cannot be read: Input/output error"
