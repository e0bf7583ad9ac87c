"""Segments: sealed memtables. Dense rows with their ids and state, never changed again."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.errors import ChecksumError, ForeignFileError
from engram_store.layout import checksums
from engram_store.layout.disk import Disk
from engram_store.layout.documents import encode_document, read_document, whole
from engram_store.layout.files import (
    check_length,
    make_directory,
    remove_tree,
    replace_file,
    sync_directory,
    write_file,
)
from engram_store.layout.manifest import SegmentRef
from engram_store.layout.paths import StorePaths
from engram_store.types import RowIds, TableSpec

IDS, ROWS, STATE = "row_ids", "rows", "state"


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentFiles:
    """Where a segment's files are and what length they have."""

    directory: Path
    slots: int
    spec: TableSpec

    def lengths(self) -> dict[str, int]:
        """Bytes of each file, by name; no state file where the optimiser keeps none."""
        lengths = {IDS: 4 * self.slots, ROWS: self.spec.row_bytes * self.slots}
        if self.spec.state_bytes:
            lengths[STATE] = self.spec.state_bytes * self.slots
        return lengths

    def read_ids(self) -> RowIds:
        """int32 [slots]: the row of each slot."""
        return np.fromfile(self.directory / IDS, "<i4")


def write_segment(
    paths: StorePaths,
    store_id: str,
    spec: TableSpec,
    number: int,
    slots: int,
    parts: dict[str, Iterable[NDArray[Any]]],
    disk: Disk,
) -> SegmentRef:
    """Write one segment durably. It becomes real when a manifest names it.

    Args:
        paths, store_id, spec: of the store and the table.
        number: the memtable's number.
        slots: rows in the segment, at least 1.
        parts: content by file name (`SegmentFiles.lengths`) in pieces of whole checksum blocks.
        disk: where it is written.

    Raises:
        DiskFullError: nothing names the partial segment; the next attempt overwrites it.
    """
    directory = paths.segment(spec.layer, number)
    remove_tree(directory, disk)  # of an attempt that failed: what it synced is unknown
    make_directory(directory, disk)
    sums: list[checksums.Checksums] = []
    for name, pieces in parts.items():
        identity = checksums.identity(store_id, "segment", spec.layer, number, name)
        write_file(directory / name, _summed(pieces, identity, sums), disk)
    all_sums = np.concatenate(sums)
    write_file(directory / "checksums", [all_sums], disk)
    content = {
        "store_id": store_id,
        "layer": spec.layer,
        "number": number,
        "slots": slots,
        "block_bytes": checksums.BLOCK_BYTES,
        "checksums": checksums.content_checksum(all_sums.tobytes()),
    }
    data, digest = encode_document("segment", content)
    replace_file(directory / "segment.json", data, disk)
    sync_directory(directory.parent, disk)
    return SegmentRef(number=number, slots=slots, digest=digest)


def _summed(
    pieces: Iterable[NDArray[Any]], identity: int, sums: list[checksums.Checksums]
) -> Iterator[NDArray[Any]]:
    """Pass the pieces of one file on and append their block checksums to `sums`."""
    blocks = 0
    for piece in pieces:
        sums.append(checksums.block_checksums(piece, identity, blocks))
        blocks += sums[-1].size
        yield piece


def open_segment(
    paths: StorePaths, store_id: str, spec: TableSpec, ref: SegmentRef
) -> SegmentFiles:
    """Check a segment's description and lengths against its manifest.

    Raises:
        StoreFileError: a file is missing, foreign, truncated or damaged.
    """
    directory = paths.segment(spec.layer, ref.number)
    path = directory / "segment.json"
    body, digest = read_document(path, "segment")
    named = {"store_id": store_id, "layer": spec.layer, "number": ref.number, "slots": ref.slots}
    if digest != ref.digest or named != {key: body.get(key) for key in named}:
        raise ForeignFileError(path, "is not the one its manifest names")
    try:
        expected = whole(body.get("checksums"), "checksums", below=1 << 64)
    except ValueError as error:
        raise ForeignFileError(path, f"does not describe a segment: {error}") from error
    files = SegmentFiles(directory=directory, slots=ref.slots, spec=spec)
    for name, length in files.lengths().items():
        check_length(directory / name, length)
    sums = read_segment_checksums(files, expected)
    ids = files.read_ids()
    # Read whole anyway, and a wrong id would send a row's bytes to another row.
    identity = checksums.identity(store_id, "segment", spec.layer, ref.number, IDS)
    damaged = checksums.first_damaged_block(ids, identity, sums[IDS])
    if damaged is not None:
        raise ChecksumError(
            directory / IDS,
            f"block {damaged} does not match its checksum; go back to a snapshot without this "
            "segment, or restore the file from a backup",
        )
    if ids.size and not (ids.min() >= 0 and ids.max() < spec.rows):
        raise ChecksumError(directory / IDS, f"holds row ids outside 0..{spec.rows - 1}")
    return files


def read_segment_checksums(files: SegmentFiles, expected: int) -> dict[str, checksums.Checksums]:
    """Block checksums of each file of a segment.

    Raises:
        StoreFileError: the list itself is missing or damaged.
    """
    blocks = {name: -(-size // checksums.BLOCK_BYTES) for name, size in files.lengths().items()}
    path = files.directory / "checksums"
    all_sums = checksums.read_checksums(path, sum(blocks.values()), expected)
    sums = {}
    start = 0
    for name, count in blocks.items():
        sums[name] = all_sums[start : start + count]
        start += count
    return sums
