"""How many random pages a second the disk delivers, asked as the store asks it."""

import time
from pathlib import Path

import numpy as np

import engram_store
from engram_store.engine.memory import PAGE_BYTES, Mapping, forget_cached_pages
from engram_store.layout.arrays import table_arrays
from engram_store.layout.paths import StorePaths
from engram_store.paging import choose_reader

SLICE_PAGES = 8192
"""Asked for together, one slice before they are used: as a window's cold rows are."""
_PAGES = 65_536


def reads_per_second(root: Path, layer: int) -> float:
    """Random 4 KiB reads a second, from a base chunk of a store at step 0 that is not cached.

    Args:
        root: of a store that nobody has open; its largest chunk is read.
        layer: whose rows.
    """
    found = engram_store.inspect(root)
    directory = StorePaths(root).base(layer, found.tables[layer].generation)
    file = table_arrays(found.metadata.tables[layer])[0].chunk_file(directory, 0)
    forget_cached_pages(file)
    mapping = Mapping.of_file(file)
    try:
        return _measure(mapping)
    finally:
        mapping.close()
        forget_cached_pages(file)


def _measure(mapping: Mapping) -> float:
    reader = choose_reader()
    all_pages = mapping.bytes.size // PAGE_BYTES
    # A quarter at most: pages side by side would be read by one request.
    count = max(min(_PAGES, all_pages // 4), 1)
    pages = np.sort(np.random.default_rng(0).choice(all_pages, count, replace=False))
    ranges = np.empty((count, 2), np.int64)
    ranges[:, 0], ranges[:, 1] = mapping.address + pages * PAGE_BYTES, PAGE_BYTES
    started = time.perf_counter()
    reader.start(ranges[:SLICE_PAGES])
    for first in range(0, count, SLICE_PAGES):
        reader.start(ranges[first + SLICE_PAGES : first + 2 * SLICE_PAGES])
        mapping.bytes[pages[first : first + SLICE_PAGES] * PAGE_BYTES].sum()
    return count / (time.perf_counter() - started)
