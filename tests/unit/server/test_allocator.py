"""The store process keeps memory of messages, where its C library can be told to."""

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from engram_store_server.allocator import keep_freed_memory


def test_glibc_is_told_to_keep_what_messages_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """M_TRIM_THRESHOLD (-1) and M_MMAP_THRESHOLD (-3) of malloc.h, both above any chunk."""
    told: dict[int, int] = {}
    library = SimpleNamespace(mallopt=told.__setitem__)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: library)

    keep_freed_memory()

    assert set(told) == {-1, -3}
    assert min(told.values()) > 4 << 20


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without mallopt, and a system that does not say what its library is."""

    def missing(_name: Any) -> Any:
        raise OSError("no library")

    for library in (lambda _name: SimpleNamespace(), missing):
        monkeypatch.setattr(ctypes, "CDLL", library)
        keep_freed_memory()
