"""Cold pages of real files, and every reader that brings them into memory."""

import contextlib
import errno
import logging
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engram_store.kernels import pages as kernels
from engram_store.kernels.pages import PAGE_BYTES
from engram_store.paging import (
    Advice,
    BatchedAdvice,
    FileAdvice,
    MappedFiles,
    choose_reader,
    reader,
    system,
)

PAGES = 6000
UNMAPPED = PAGE_BYTES
"""Below what any process may map."""


class ColdFile:
    """A mapped file of distinct bytes per page, of which nothing is in memory."""

    def __init__(self, path: Path, pages: int = PAGES, *, without: int = 0) -> None:
        """`without`: so many bytes of the last page."""
        self.path = path
        content = np.zeros((pages, PAGE_BYTES), np.uint8)
        content[:, :8] = np.arange(pages, dtype="<i8")[:, None].view(np.uint8)
        path.write_bytes(content.tobytes()[: pages * PAGE_BYTES - without])
        self.fd = os.open(path, os.O_RDONLY)
        os.fsync(self.fd)
        self.memory = mmap.mmap(self.fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        self.memory.madvise(mmap.MADV_RANDOM)
        self.bytes = np.frombuffer(self.memory, np.uint8)
        self.address = int(self.bytes.ctypes.data)
        self.pages = pages
        self.evict()

    def evict(self) -> None:
        self.memory.madvise(mmap.MADV_DONTNEED)  # mapped pages are not given up
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def resident(self) -> NDArray[np.intp]:
        """Numbers of the pages in memory."""
        told = np.empty(self.pages, np.uint8)
        assert system.mincore(self.address, told) == 0
        return np.flatnonzero(told & 1)

    def read(self, pages: NDArray[np.intp]) -> None:
        for page in pages:
            os.pread(self.fd, 1, int(page) * PAGE_BYTES)

    def ranges(self, pages: NDArray[np.intp]) -> NDArray[np.int64]:
        """One range per page."""
        starts = self.address + pages.astype(np.int64) * PAGE_BYTES
        return np.stack([starts, np.full(pages.size, PAGE_BYTES)], axis=1)

    def wait_for(
        self, pages: NDArray[np.intp], again: Callable[[NDArray[np.intp]], None] | None = None
    ) -> None:
        """Advice only begins to read; fails if these are not in memory in the end.

        `again` asks once more, for those alone that did not come: advice is no promise, and in one
        run of many beside other tests some pages stayed away, which was not explained.
        """
        if again is not None:
            with contextlib.suppress(AssertionError):
                wait_until(lambda: bool(np.isin(pages, self.resident()).all()), seconds=20)
            missing = np.setdiff1d(pages, self.resident())
            assert missing.size <= pages.size // 20, f"{missing.size} of {pages.size} never came"
            if missing.size:
                again(missing)
        wait_until(lambda: bool(np.isin(pages, self.resident()).all()))

    def close(self) -> None:
        os.close(self.fd)
        self.bytes = np.empty(0, np.uint8)
        self.memory.close()


def wait_until(reached: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.001)


def cold_file(directory: Path) -> Iterator[ColdFile]:
    """One to read from, closed at the end."""
    file = ColdFile(directory / "cold")
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_RANDOM)
    if file.resident().size:
        pytest.skip("this file system keeps its pages in memory whatever it is asked")
    yield file
    file.close()


@pytest.fixture
def cold(tmp_path: Path) -> Iterator[ColdFile]:
    yield from cold_file(tmp_path)


Reader = BatchedAdvice | Advice | FileAdvice


@pytest.fixture(params=["process_madvise", "madvise", "posix_fadvise"])
def any_reader(request: pytest.FixtureRequest, cold: ColdFile) -> Iterator[Reader]:
    """Every reader; the last knows where `cold` is mapped."""
    files = MappedFiles()
    files.add(cold.address, cold.pages * PAGE_BYTES, cold.path)
    readers: list[Reader] = [BatchedAdvice(), Advice(), FileAdvice(files)]
    one = next(one for one in readers if one.name == request.param)
    if one.name == "process_madvise" and choose_reader().name != one.name:
        pytest.skip("process_madvise is not allowed here")
    yield one
    files.remove(cold.address)


def some_pages(count: int = 3000, seed: int = 0) -> NDArray[np.intp]:
    return np.sort(np.random.default_rng(seed).permutation(PAGES)[:count])


def test_every_reader_brings_the_pages_and_few_others(cold: ColdFile, any_reader: Reader) -> None:
    """A few thousand pages all over the file, several times as many ranges as one call takes."""
    pages = some_pages()

    any_reader.start(cold.ranges(pages))

    cold.wait_for(pages, again=lambda missing: any_reader.start(cold.ranges(missing)))
    assert any_reader.failed_ranges == 0
    assert cold.resident().size <= pages.size + 64
    np.testing.assert_array_equal(cold.bytes[pages * PAGE_BYTES], pages & 255)


def test_every_reader_reads_ranges_of_any_length_to_the_end(
    cold: ColdFile, any_reader: Reader
) -> None:
    """The kernel reads only the beginning of a range that is longer than the read-ahead."""
    any_reader.start(np.array([[cold.address, PAGES * PAGE_BYTES]]))
    cold.wait_for(np.arange(PAGES))
    assert any_reader.failed_ranges == 0


@pytest.mark.parametrize("bad", [[0], [1023], [1024], [2999], [5, 6, 7], [0, 1023, 1024, 2999]])
def test_every_reader_passes_over_memory_that_was_unmapped(
    cold: ColdFile, any_reader: Reader, bad: list[int]
) -> None:
    """Wherever the range is in a batch, those around it are read, and it is counted."""
    pages = some_pages()
    ranges = cold.ranges(pages)
    ranges[bad, 0] = UNMAPPED

    any_reader.start(ranges)

    cold.wait_for(np.delete(pages, bad))
    assert any_reader.failed_ranges == len(bad)


def test_every_reader_has_nothing_to_do_for_no_ranges(cold: ColdFile, any_reader: Reader) -> None:
    """Neither for an empty array nor for an empty range, wherever that is."""
    any_reader.start(np.empty((0, 2), np.int64))
    any_reader.start(np.array([[cold.address, 0], [UNMAPPED, 0]]))
    assert any_reader.failed_ranges == 0
    assert not cold.resident().size


def test_long_ranges_are_cut_without_a_gap() -> None:
    """Each at most as long as the kernel reads at once; the others stay as they are."""
    limit = reader.MAX_RANGE_BYTES
    ranges = np.array([[0, 4096], [1 << 40, 2 * limit + 4096], [5 << 40, 0], [9 << 40, limit]])
    cut = reader.cut_ranges(ranges)
    assert cut.tolist() == [
        [0, 4096],
        [1 << 40, limit],
        [(1 << 40) + limit, limit],
        [(1 << 40) + 2 * limit, 4096],
        [9 << 40, limit],
    ]
    assert reader.cut_ranges(cut).tolist() == cut.tolist()


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_partial_progress_leaves_no_range_out(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that stops after a few ranges is asked again for the rest, once each."""
    seen: list[int] = []

    def willneed(_: int, ranges: NDArray[np.int64]) -> int:
        part = ranges[:at_once]
        seen.extend(part[:, 0].tolist())
        return int(part[:, 1].sum())

    monkeypatch.setattr(system, "willneed", willneed)
    ranges = np.stack([np.arange(2500), np.arange(2500) % 3 + 1], axis=1) * PAGE_BYTES
    BatchedAdvice().start(ranges)
    assert seen == ranges[:, 0].tolist()


def test_a_call_that_does_nothing_does_not_go_on_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero bytes advised count as a failure of the first range."""
    monkeypatch.setattr(system, "willneed", lambda *_: 0)
    batched = BatchedAdvice()
    batched.start(np.full((30, 2), PAGE_BYTES))
    assert batched.failed_ranges == 30


def test_a_system_call_that_is_forbidden_later_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is raised, what is not read is counted, and no range is tried in vain after it."""
    calls: list[int] = []

    def forbidden(_: int, ranges: NDArray[np.int64]) -> int:
        calls.append(ranges.shape[0])
        return -errno.EPERM if len(calls) > 1 else ranges.shape[0] * PAGE_BYTES

    monkeypatch.setattr(system, "willneed", forbidden)
    batched = BatchedAdvice()
    for _ in range(3):
        batched.start(np.full((1500, 2), PAGE_BYTES))
    assert calls == [1024, 476, 1024, 1024]
    assert batched.failed_ranges == 476 + 1500 + 1500
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_closed_pidfd_is_opened_again(cold: ColdFile) -> None:
    """Also if its number means another file by then, which stays open."""
    if choose_reader().name != "process_madvise":
        pytest.skip("process_madvise is not allowed here")
    lost = reader.own_pidfd()
    os.dup2(cold.fd, lost)
    batched = BatchedAdvice()

    batched.start(cold.ranges(some_pages()))

    cold.wait_for(some_pages())
    assert batched.failed_ranges == 0
    assert reader.own_pidfd() not in (lost, cold.fd)
    assert os.fstat(lost).st_ino == os.fstat(cold.fd).st_ino
    os.close(lost)


def test_a_forked_child_reads_what_it_has_mapped(tmp_path: Path) -> None:
    """Its parent, which the inherited pidfd means, has nothing at those addresses."""
    if choose_reader().name != "process_madvise":
        pytest.skip("process_madvise is not allowed here")
    script = f"""
import os, sys
sys.path.append({str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.unit.test_paging import BatchedAdvice, ColdFile, some_pages
batched = BatchedAdvice()
first = ColdFile(Path({str(tmp_path / "first")!r}))
batched.start(first.ranges(some_pages()))
child = os.fork()
if child == 0:
    second = ColdFile(Path({str(tmp_path / "second")!r}))
    batched.start(second.ranges(some_pages(seed=1)))
    second.wait_for(some_pages(seed=1))
    os._exit(0 if batched.failed_ranges == 0 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_range_may_reach_from_one_file_into_the_next(tmp_path: Path) -> None:
    """Files mapped side by side, the first of which ends within a page."""
    first = ColdFile(tmp_path / "first", 10, without=100)
    second = ColdFile(tmp_path / "second", 10)
    files = MappedFiles()
    files.add(2**40, 10 * PAGE_BYTES - 100, first.path)
    files.add(2**40 + 10 * PAGE_BYTES, 10 * PAGE_BYTES, second.path)
    by_file = FileAdvice(files)

    by_file.start(np.array([[2**40 + 8 * PAGE_BYTES, 5 * PAGE_BYTES]]))

    first.wait_for(np.array([8, 9]))
    second.wait_for(np.array([0, 1, 2]))
    assert by_file.failed_ranges == 0
    by_file.start(np.array([[2**40 + 19 * PAGE_BYTES, 2 * PAGE_BYTES], [0, PAGE_BYTES]]))
    assert by_file.failed_ranges == 2
    second.wait_for(np.array([9]))
    for file in (first, second):
        file.close()


def test_a_removed_file_is_not_read_and_not_kept_open(cold: ColdFile) -> None:
    """Its descriptor is closed; the ranges fail."""
    files = MappedFiles()
    files.add(cold.address, PAGES * PAGE_BYTES, cold.path)
    fd = int(files.table()[2][0])
    files.remove(cold.address)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    by_file = FileAdvice(files)
    by_file.start(cold.ranges(some_pages(10)))
    assert by_file.failed_ranges == 10
    assert not cold.resident().size


def test_the_first_reader_that_works_is_chosen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And said; where none does, the choice is one that does no harm."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(system, "willneed", lambda _, ranges: int(ranges[:, 1].sum()))
    assert choose_reader().name == "process_madvise"
    monkeypatch.setattr(system, "willneed", lambda *_: -errno.ENOSYS)
    files = MappedFiles()
    assert choose_reader(files).name == "posix_fadvise"
    assert files.table()[0].size == 0
    assert choose_reader().name == "madvise"
    assert {record.levelname for record in caplog.records} == {"INFO"}
    monkeypatch.setattr(kernels, "advise", lambda ranges: ranges.shape[0])
    choose_reader().start(np.array([[UNMAPPED, PAGE_BYTES]]))
    assert caplog.records[-1].levelname == "WARNING"
