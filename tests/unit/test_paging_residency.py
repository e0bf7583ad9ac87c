"""What is believed about the pages of real files, beside what is so."""

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engram_store.kernels import pages as kernels
from engram_store.kernels.pages import PAGE_BYTES
from engram_store.paging import Residency, cached_bytes, major_faults, residency, system
from tests.unit.test_paging import PAGES, UNMAPPED, ColdFile, cold_file, some_pages


@pytest.fixture
def cold(tmp_path: Path) -> Iterator[ColdFile]:
    yield from cold_file(tmp_path)


def test_a_refresh_believes_what_is_in_memory(cold: ColdFile) -> None:
    """Pages that were read are, others are not, and an eviction is noticed."""
    kept = Residency(cold.address, PAGES * PAGE_BYTES - 5, cold.path)
    assert (kept.known, kept.whole, kept.resident_share) == (False, False, None)
    assert kept.pages.size == PAGES
    assert kept.address == kept.pages.ctypes.data
    kept.refresh()
    assert (kept.known, kept.whole, kept.resident_share) == (True, False, 0.0)
    cold.read(some_pages())
    kept.refresh()
    np.testing.assert_array_equal(np.flatnonzero(kept.pages), cold.resident())
    assert np.isin(some_pages(), cold.resident()).all()
    assert kept.resident_share == cold.resident().size / PAGES
    cold.read(np.arange(PAGES))
    kept.refresh()
    assert (kept.whole, kept.resident_share) == (True, 1.0)
    cold.evict()
    kept.refresh()
    assert not kept.whole
    assert not kept.pages.any()


def test_a_page_being_read_stays_so_until_it_is_in_memory(cold: ColdFile) -> None:
    """A refresh does not take it for absent, and does take it for read."""
    kept = Residency(cold.address, PAGES * PAGE_BYTES, cold.path)
    kept.pages[[3, 500]] = 2
    cold.read(np.array([500]))
    kept.refresh()
    assert kept.pages[[3, 500]].tolist() == [2, 1]
    assert kept.resident_share == cold.resident().size / PAGES


def test_a_part_is_refreshed_alone(tmp_path: Path) -> None:
    """Pieces of the file; it is known when all were seen. A sparse file is enough."""
    pages = 2 * residency.PIECE_PAGES + 10
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, pages * PAGE_BYTES)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        memory.madvise(mmap.MADV_RANDOM)
        for page in (0, residency.PIECE_PAGES, pages - 1):
            memory[page * PAGE_BYTES]
        view = np.frombuffer(memory, np.uint8)
        kept = Residency(int(view.ctypes.data), pages * PAGE_BYTES, path)
        del view
        kept.refresh(residency.PIECE_PAGES, 1)
        assert kept.pages[[0, residency.PIECE_PAGES, pages - 1]].tolist() == [0, 1, 0]
        kept.refresh(0, residency.PIECE_PAGES)
        assert not kept.known
        kept.refresh(2 * residency.PIECE_PAGES, residency.PIECE_PAGES)
        assert kept.known
        assert kept.pages[[0, residency.PIECE_PAGES, pages - 1]].tolist() == [1, 1, 1]


def test_larger_pages_are_several_of_the_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel answers for 16 KiB at a time there; the last page may be cut off by the file."""

    def mincore(address: int, out: NDArray[np.uint8]) -> int:
        assert address == 1 << 20
        out[:] = [1, 0, 1]
        return 0

    monkeypatch.setattr(system, "mincore", mincore)
    monkeypatch.setattr(residency, "PAGE_BYTES", 4 * kernels.UNIT_BYTES)
    kept = Residency(1 << 20, 10 * kernels.UNIT_BYTES - 1)
    kept.refresh()
    assert kept.pages.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 1, 1]
    assert kept.resident_share == 0.6


def test_a_file_that_is_gone_is_an_error_and_changes_no_belief() -> None:
    """The message says what was forgotten to be forgotten."""
    kept = Residency(UNMAPPED, 10 * PAGE_BYTES)
    kept.pages[:] = 1
    with pytest.raises(OSError, match="forget it before it is unmapped"):
        kept.refresh()
    assert kept.pages.all()


def test_the_kernel_is_not_believed_about_files_of_others(
    cold: ColdFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would say that everything is in memory. Own reads are known until the next refresh."""
    monkeypatch.setattr(os, "geteuid", lambda: cold.path.stat().st_uid + 1)
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    kept = Residency(cold.address, PAGES * PAGE_BYTES, cold.path)
    cold.read(np.arange(PAGES))
    kept.pages[:3] = [0, 1, 2]
    kept.refresh()
    assert kept.pages[:4].tolist() == [0, 0, 2, 0]
    assert (kept.observable, kept.known, kept.resident_share) == (False, False, None)


@pytest.mark.parametrize(("error", "observable"), [("EPERM", False), ("EAGAIN", True)])
def test_a_kernel_that_does_not_answer_changes_what_can_be_known(
    error: str, observable: bool, cold: ColdFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused for good: beliefs are forgotten at a refresh. Just now: they stay."""
    kept = Residency(cold.address, PAGES * PAGE_BYTES, cold.path)
    kept.pages[7] = 1
    monkeypatch.setattr(system, "mincore", lambda *_: -getattr(errno, error))
    kept.refresh()
    assert kept.observable is observable
    assert bool(kept.pages[7]) is observable


def test_cached_bytes_count_whole_pages(
    cold: ColdFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a path or a descriptor. None: this kernel cannot; a file that is not there: an error."""
    if cached_bytes(cold.fd) is None:
        pytest.skip("the kernel has no cachestat")
    assert cached_bytes(cold.path) == cached_bytes(cold.fd) == 0
    cold.read(some_pages(100))
    assert cached_bytes(cold.path) == cached_bytes(cold.fd) == cold.resident().size * PAGE_BYTES
    with pytest.raises(FileNotFoundError):
        cached_bytes(tmp_path / "none")
    with pytest.raises(OSError, match="is not open"):
        cached_bytes(2**30)
    monkeypatch.setattr(system, "_CACHESTAT", 100_000)
    assert cached_bytes(cold.path) is None


def test_major_faults_are_those_that_waited_for_the_disk(cold: ColdFile) -> None:
    """One for each cold page of a random mapping, none for the same pages again."""
    pages = np.arange(0, PAGES, PAGES // 50)
    before = major_faults()
    for page in pages:
        ctypes.string_at(cold.address + int(page) * PAGE_BYTES, 1)
    after = major_faults()
    assert after - before >= pages.size
    for page in pages:
        ctypes.string_at(cold.address + int(page) * PAGE_BYTES, 1)
    assert major_faults() == after
