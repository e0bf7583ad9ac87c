"""Cold reads: which pages are in memory, and how the others are read before they are needed."""

from engram_store.paging.reader import (
    Advice,
    BatchedAdvice,
    FileAdvice,
    MappedFiles,
    PageReader,
    choose_reader,
)
from engram_store.paging.residency import Keeper, Residency, cached_bytes, major_faults

__all__ = [
    "Advice",
    "BatchedAdvice",
    "FileAdvice",
    "Keeper",
    "MappedFiles",
    "PageReader",
    "Residency",
    "cached_bytes",
    "choose_reader",
    "major_faults",
]
