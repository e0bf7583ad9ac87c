"""Folding: segments and a base generation become the next base generation.

Sequential: chunk after chunk is read, rows that a segment holds are put over it, and the result is
written as a new file. Memtables are not touched, so that the new base is exactly the tables at the
step of the newest segment that went in.
"""

import os
import shutil
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.memory import forget_cached_pages
from engram_store.engine.table import Segment, Table
from engram_store.failpoints import failpoint
from engram_store.kernels import rows as kernels
from engram_store.layout import checksums
from engram_store.layout.arrays import BaseDescription, chunk_identity, write_base_description
from engram_store.layout.files import (
    WriteCounter,
    disk_errors,
    make_directory,
    replace_file,
    sync_directory,
    write_file,
)
from engram_store.types import RowIds


@dataclass(frozen=True, slots=True)
class FoldedBase:
    """A new base generation that no manifest names yet."""

    generation: int
    digest: str
    description: BaseDescription


def fold_table(
    table: Table,
    generation: int,
    base: BaseDescription,
    segments: list[Segment],
    counter: WriteCounter,
) -> FoldedBase:
    """Write base generation `generation + 1` from the given one and segments, oldest first.

    Neither the table nor any manifest changes.

    Raises:
        DiskFullError: the partial generation is overwritten by the next fold.
    """
    paths, layer = table.paths, table.spec.layer
    old, new = paths.base(layer, generation), paths.base(layer, generation + 1)
    shutil.rmtree(new, ignore_errors=True)  # of a fold that did not finish
    ids = [(segment.files.read_ids(), segment.first_slot) for segment in segments]
    sums: dict[str, dict[int, checksums.Checksums]] = {a.layout.name: {} for a in table.arrays}
    for array in table.arrays:
        name = array.layout.name
        make_directory(new / name / "c")
        for document in _group_documents(name):
            source = old / document
            if source.exists():
                replace_file(new / document, source.read_bytes(), counter)
    places = np.empty(table.arrays[0].layout.chunk_rows, np.int32)
    for chunk in range(table.arrays[0].layout.chunks):
        _find_changes(ids, chunk * places.size, places)
        for index, array in enumerate(table.arrays):
            known = base.checksums[array.layout.name].get(chunk)
            name, source = array.layout.name, array.layout.chunk_file(old, chunk)
            target = array.layout.chunk_file(new, chunk)
            if places.any():
                make_directory(target.parent)
                data = _folded_chunk(table, index, chunk, places)
                write_file(target, [data], counter)
                sync_directory(target.parent)
                identity = chunk_identity(table.store_id, layer, name, chunk)
                sums[name][chunk] = checksums.block_checksums(data, identity)
                # Written once, read by nobody soon: leave the page cache to rows in use.
                forget_cached_pages(source)
            elif known is not None:
                make_directory(target.parent)
                with disk_errors(target):
                    os.link(source, target)
                    sync_directory(target.parent)
                sums[name][chunk] = known
            failpoint("fold.chunk_written")
    description = BaseDescription(checksums=sums)
    digest = write_base_description(paths, table.spec, generation + 1, description, counter)
    sync_directory(new.parent)
    return FoldedBase(generation + 1, digest, description)


def _group_documents(array: str) -> list[str]:
    """Zarr documents from a generation's directory down to an array."""
    parts = array.split("/")
    return ["zarr.json", *("/".join([*parts[: i + 1], "zarr.json"]) for i in range(len(parts)))]


def _find_changes(ids: list[tuple[RowIds, int]], first_row: int, places: NDArray[np.int32]) -> None:
    """For each row of a chunk, the place of its newest version in the segments, or 0."""
    places[:] = 0
    for rows, first_slot in ids:
        kernels.newest_in_chunk(rows, first_slot, first_row, places)


def _folded_chunk(
    table: Table, index: int, chunk: int, places: NDArray[np.int32]
) -> NDArray[np.uint8]:
    """Bytes of one chunk of the new base; rows beyond the table's end are carried along.

    No lock: base chunks and the segments of a fold stay mapped until the fold itself drops them.
    """
    array = table.arrays[index]
    rows = np.arange(places.size, dtype=np.int32)
    out = np.empty(array.layout.chunk_bytes, np.uint8)
    array.copy(rows, places, np.empty(places.size, np.int64), out, first_chunk=chunk)
    return out
