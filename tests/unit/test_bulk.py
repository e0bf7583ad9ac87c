"""Files are written in blocks that the page cache can hold as huge pages."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engram_store.engine.bulk import ChunkWriter
from engram_store.engine.memory import PAGE_BYTES
from engram_store.layout.disk import Disk
from engram_store.layout.files import HUGE_PAGE_BYTES, write_file


class _Writes(Disk):
    """Remembers where each write began and how long it was."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, int]] = []

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        self.calls.append((offset, len(data)))
        return super().write(fd, data, offset)


def _random(size: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


@given(st.lists(st.integers(0, 300), max_size=8))
def test_parts_of_any_size_are_joined(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    """Also when all of them lie in one buffer that is filled again and again."""
    path, disk = tmp_path_factory.mktemp("files") / "file", _Writes()
    contents = [_random(size, seed) for seed, size in enumerate(sizes)]
    buffer = np.empty(max(sizes, default=0), np.uint8)

    def parts() -> Iterator[NDArray[np.uint8]]:
        for content in contents:
            buffer[: content.size] = content
            yield buffer[: content.size]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engram_store.layout.files.HUGE_PAGE_BYTES", 64)
        write_file(path, parts(), disk)
    assert path.read_bytes() == b"".join(content.tobytes() for content in contents)
    assert all(offset % 64 == 0 for offset, _ in disk.calls)


_Written = tuple[_Writes, ChunkWriter, Path]


@pytest.fixture
def written(tmp_path: Path) -> Iterator[_Written]:
    disk = _Writes()
    fd = disk.create(tmp_path / "chunk")
    yield disk, ChunkWriter(disk, fd), tmp_path / "chunk"
    disk.close(fd)


def test_a_block_that_stays_in_memory_is_one_write(written: _Written) -> None:
    disk, writer, path = written
    size = 5 * HUGE_PAGE_BYTES // 4
    content = _random(2 * size, 0)
    for data in np.split(content, 2):
        writer.add(data, np.ones(size // PAGE_BYTES, np.bool_))
    writer.finish()
    assert path.read_bytes() == content.tobytes()
    assert disk.calls == [
        (0, HUGE_PAGE_BYTES),
        (HUGE_PAGE_BYTES, HUGE_PAGE_BYTES),
        (2 * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES // 2),
    ]


def test_pages_that_go_are_written_apart_from_those_that_stay(written: _Written) -> None:
    """A folio can only go as a whole."""
    disk, writer, path = written
    content = _random(8 * PAGE_BYTES - 100, 1)
    writer.add(content, np.array([1, 1, 0, 0, 0, 1, 0, 0], np.bool_))
    writer.finish()
    assert path.read_bytes() == content.tobytes()
    pages = [(offset // PAGE_BYTES, -(-size // PAGE_BYTES)) for offset, size in disk.calls]
    assert pages == [(0, 2), (2, 3), (5, 1), (6, 2)]
    assert writer.unsynced_bytes == 0
