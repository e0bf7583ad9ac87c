"""A table's sealed files, each with the checksums that its blocks should have."""

import logging
from pathlib import Path

import numpy as np

from engram_store.engine.damage import BlockDamage
from engram_store.engine.extents import Segment
from engram_store.engine.pieces import SealedFile, Throttle, read_pieces
from engram_store.engine.table import Table
from engram_store.errors import ChecksumError, StoreFileError
from engram_store.layout import checksums
from engram_store.layout.arrays import chunk_identity
from engram_store.layout.checksums import BLOCK_BYTES
from engram_store.layout.documents import read_document, whole
from engram_store.layout.files import check_length
from engram_store.layout.segments import IDS, read_segment_checksums
from engram_store.types import RowIds

_logger = logging.getLogger(__name__)


def chunk_file(table: Table, array: int, chunk: int) -> SealedFile | None:
    """One chunk file of the base in use; None where there is none, which stands for zeros.

    Args:
        table: whose.
        array: index in `table.arrays`.
        chunk: which.
    """
    layout, layer = table.arrays[array].layout, table.spec.layer
    sums = table.base.checksums[layout.name].get(chunk)
    if sums is None:
        return None
    first_row = chunk * layout.chunk_rows
    return SealedFile(
        path=layout.chunk_file(table.paths.base(layer, table.generation), chunk),
        layer=layer,
        sums=sums,
        identity=chunk_identity(table.store_id, layer, layout.name, chunk),
        length=layout.chunk_bytes,
        row_bytes=layout.row_bytes,
        first_row=first_row,
        rows=min(layout.chunk_rows, layout.rows - first_row),
        segment=None,
        source=table.base,
        array=layout.name,
        chunk=chunk,
    )


def segment_files(table: Table, segment: Segment) -> dict[str, SealedFile]:
    """The files of a segment in use, by name.

    Raises:
        StoreFileError: its description or its list of checksums is damaged or missing.
    """
    files, layer = segment.files, table.spec.layer
    path = files.directory / "segment.json"
    body, digest = read_document(path, "segment")
    if digest != segment.ref.digest:
        raise ChecksumError(path, "is not the one its manifest names")
    expected = whole(body["checksums"], "checksums", below=1 << 64)
    sums = read_segment_checksums(files, expected)
    return {
        name: SealedFile(
            path=files.directory / name,
            layer=layer,
            sums=sums[name],
            identity=checksums.identity(table.store_id, "segment", layer, segment.ref.number, name),
            length=length,
            row_bytes=length // files.slots,
            first_row=0,
            rows=files.slots,
            segment=segment.ref.number,
            source=segment.ref,
            array=name,
        )
        for name, length in files.lengths().items()
    }


def chunk_files(table: Table) -> list[SealedFile]:
    """Every chunk file of the base in use. Hold the lock, or be who replaces the base."""
    return [
        found
        for array, memory in enumerate(table.arrays)
        for chunk in range(memory.layout.chunks)
        if (found := chunk_file(table, array, chunk)) is not None
    ]


def check_base(table: Table) -> None:
    """Compare what describes the base in use with what was read when it was taken into use.

    Raises:
        StoreFileError: it is damaged, or gone.
    """
    with table.lock:
        generation, base = table.generation, table.base
    directory = table.paths.base(table.spec.layer, generation)
    read_document(directory / "base.json", "base generation")
    lists = [sums for array in base.checksums.values() for sums in array.values()]
    known = np.concatenate([*lists, np.empty(0, "<u8")])
    path = directory / "checksums"
    check_length(path, known.nbytes)
    if not np.array_equal(np.fromfile(path, "<u8"), known):
        raise ChecksumError(
            path, "is damaged; the blocks that it covers may be intact. Restore it from a backup"
        )


def read_segment(table: Table, segment: Segment, throttle: Throttle, *, keep: bool) -> RowIds:
    """Check every block of a segment; returns int32 [slots]: its rows.

    Args:
        table, segment: which.
        throttle: limits the speed.
        keep: leave it in the page cache, because its rows are copied next.

    Raises:
        ChecksumError: a block is damaged; the table refuses its rows from now on.
        StoreFileError: its description is damaged.
    """
    files = segment_files(table, segment)
    ids = _read_ids(table, files.pop(IDS), throttle)
    for file in files.values():
        for piece in read_pieces(file, throttle, keep=keep):
            stop_at_damage(table, piece.damages)
    return ids


def read_ids(table: Table, segment: Segment, throttle: Throttle) -> RowIds:
    """The rows of a segment's slots, checked: int32 [slots]. Raises: as `read_segment`."""
    return _read_ids(table, segment_files(table, segment)[IDS], throttle)


def _read_ids(table: Table, file: SealedFile, throttle: Throttle) -> RowIds:
    ids = np.empty(file.rows, "<i4")
    raw = ids.view(np.uint8)
    for piece in read_pieces(file, throttle):
        stop_at_damage(table, piece.damages)
        raw[piece.offset : piece.offset + piece.data.size] = piece.data
    return ids


def stop_at_damage(table: Table, damages: list[BlockDamage]) -> None:
    """Let the table refuse the rows of damaged blocks. Raises: ChecksumError if there are any."""
    for damage in damages:
        report(table, damage)
    if damages:
        raise damages[0].error()


def report(table: Table, damage: BlockDamage) -> bool:
    """A block is damaged: refuse its rows from now on.

    Returns:
        Whether that is news; it is none for a block that was found before, or whose file is not
        in use any more.
    """
    with table.lock:
        if not _in_use(table, damage) or any(d.key == damage.key for d in table.damages):
            return False
        # A new list: whoever looks at the old one without the lock sees one or the other.
        table.damages = [*table.damages, damage]
    _logger.error("damaged: %s; its rows are refused until a sound snapshot is restored", damage)
    return True


def _in_use(table: Table, damage: BlockDamage) -> bool:
    # By what it was read for, not by its name: after a restore another file may have that.
    if damage.segment is not None:
        return any(segment.ref == damage.source for segment in table.segments)
    return table.base is damage.source


def find_again(table: Table, known: list[BlockDamage]) -> None:
    """The table reads other files now: look whether they share damaged blocks with the old ones.

    Snapshots share segments and unchanged chunks, so going back may not help. Hold no lock.
    """
    indices = {memory.layout.name: i for i, memory in enumerate(table.arrays)}
    segments = {segment.ref.number: segment for segment in table.segments}
    for damage in known:
        file: SealedFile | None
        if damage.segment is None:
            file = chunk_file(table, indices[damage.array], damage.chunk)
        elif damage.segment in segments:
            try:
                file = segment_files(table, segments[damage.segment])[damage.array]
            except StoreFileError:
                continue
        else:
            continue
        if file is not None and (found := _check_block(file, damage.block)) is not None:
            report(table, found)


def _check_block(file: SealedFile, block: int) -> BlockDamage | None:
    start = block * BLOCK_BYTES
    try:
        data = _read_at(file.path, start, min(BLOCK_BYTES, file.length - start))
    except OSError as error:
        return file.damage(block, f"cannot be read: {error.strerror or error}")
    return next(iter(file.check(block, data)), None)


def _read_at(path: Path, start: int, count: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    return np.fromfile(path, np.uint8, count, offset=start)
