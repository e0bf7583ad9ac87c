"""Journal files: the slots that each commit added to a memtable, on disk before it is sealed.

One file for each memtable, and in it one record for each step. A record is real if its checksum
holds, which is seeded with the store and the memtable it belongs to; the first one that is not
ends the file. docs/format.md has the bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from engram_store.layout import checksums
from engram_store.layout.manifest import Mark
from engram_store.types import TableSpec

MAX_MARKS = 32
_MAGIC = b"ENGRJRN1"
_FILE = np.dtype(
    [
        ("magic", "S8"),
        ("store_id", "S32"),
        ("lineage", "<u8"),
        ("number", "<u8"),
        ("layout", "<u8"),
        ("checksum", "<u8"),
    ]
)
_RECORD = np.dtype(
    [
        ("checksum", "<u8"),
        ("length", "<u8"),
        ("step", "<u8"),
        ("tables", "<u4"),
        ("marks", "<u4"),
    ]
)
_MARK = np.dtype([("session", "S32"), ("epoch", "<u8"), ("step", "<u8"), ("part", "<u8")])
Columns = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""Ids, state and rows of new slots of one table."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one commit added."""

    step: int
    """Steps applied, this one included."""
    marks: tuple[Mark, ...]
    tables: tuple[Columns, ...]
    """In the order of the store's tables: int32 [n], float32 [n, state width], rows [n, dim]."""


def layout_hash(specs: Sequence[TableSpec]) -> int:
    """Tells journals of other tables apart."""
    return checksums.identity(*((s.layer, s.rows, s.row_bytes, s.state_bytes) for s in specs))


def file_header(store_id: str, lineage: int, number: int, specs: Sequence[TableSpec]) -> bytes:
    """The first bytes of the journal of one memtable."""
    header = np.zeros((), _FILE)
    header["magic"], header["store_id"] = _MAGIC, store_id.encode()
    header["lineage"], header["number"] = lineage, number
    header["layout"] = layout_hash(specs)
    header["checksum"] = xxhash.xxh3_64_intdigest(header.tobytes()[:-8])
    return header.tobytes()


def record_parts(store_id: str, number: int, record: StepRecord) -> list[NDArray[np.uint8]]:
    """The bytes of a record, large arrays as they are; to be written one after the other."""
    marks = np.array([(m.session.encode(), m.epoch, m.step, m.part) for m in record.marks], _MARK)
    counts = np.array([len(ids) for ids, _, _ in record.tables], "<u8")
    body = [_raw(marks), _raw(counts)]
    body += [_raw(array) for columns in record.tables for array in columns]
    head = np.zeros(1, _RECORD)
    head["length"] = _RECORD.itemsize + sum(part.size for part in body)
    head["step"] = record.step
    head["tables"], head["marks"] = len(record.tables), len(record.marks)
    head["checksum"] = _checksum(store_id, number, [_raw(head)[8:], *body])
    return [_raw(head), *(part for part in body if part.size)]


def _raw(array: NDArray[Any]) -> NDArray[np.uint8]:
    return array.reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8)


def _checksum(store_id: str, number: int, parts: Sequence[NDArray[np.uint8]]) -> int:
    total = xxhash.xxh3_64(seed=checksums.identity(store_id, "journal", number))
    for part in parts:
        total.update(part.data)
    return total.intdigest()


def journal_number(
    path: Path, store_id: str, lineage: int, specs: Sequence[TableSpec]
) -> int | None:
    """The memtable that a journal belongs to; None if it is not whole or of another store."""
    with path.open("rb") as file:
        data = file.read(_FILE.itemsize)
    if len(data) < _FILE.itemsize:
        return None
    header = np.frombuffer(data, _FILE)[0]
    number = int(header["number"])
    return number if data == file_header(store_id, lineage, number, specs) else None


def read_records(
    path: Path, store_id: str, number: int, specs: Sequence[TableSpec]
) -> Iterator[StepRecord]:
    """The whole records of a journal, up to the first that is not.

    Arrays share the memory of the mapped file, which must stay as it is. Nothing that a damaged
    file says is believed before the checksum of what it says holds.
    """
    if path.stat().st_size <= _FILE.itemsize:
        return
    data = np.memmap(path, np.uint8, "r")
    offset = _FILE.itemsize
    while (record := _read_record(data[offset:], store_id, number, specs)) is not None:
        yield record[0]
        offset += record[1]


def _read_record(
    data: NDArray[np.uint8], store_id: str, number: int, specs: Sequence[TableSpec]
) -> tuple[StepRecord, int] | None:
    """The record at the start of some bytes, and its length.

    None: it is not whole, or says what no record of these tables says.
    """
    if data.size < _RECORD.itemsize:
        return None
    head = data[: _RECORD.itemsize].view(_RECORD)[0]
    length = int(head["length"])
    if not _RECORD.itemsize <= length <= data.size:
        return None
    if head["checksum"] != _checksum(store_id, number, [data[8:length]]):
        return None
    if head["tables"] != len(specs) or head["marks"] > MAX_MARKS:
        return None
    position = _RECORD.itemsize
    marks_end = position + int(head["marks"]) * _MARK.itemsize
    counts_end = marks_end + 8 * len(specs)
    if counts_end > length:
        return None
    marks = data[position:marks_end].view(_MARK)
    if any(bytes(mark["session"]).strip(b"0123456789abcdef") for mark in marks):
        return None
    counts = [int(count) for count in data[marks_end:counts_end].view("<u8")]
    needed = sum(n * (4 + s.state_bytes + s.row_bytes) for n, s in zip(counts, specs, strict=True))
    if counts_end + needed != length:
        return None
    tables, position = [], counts_end
    for n, spec in zip(counts, specs, strict=True):
        shapes = (
            ("<i4", (n,)),
            ("<f4", (n, spec.state_width)),
            (spec.dtype.storage, (n, spec.dim)),
        )
        arrays = []
        for dtype, shape in shapes:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            # Copied: a journal's arrays lie at any offset, kernels want aligned ones.
            arrays.append(
                np.frombuffer(data[position : position + size].tobytes(), dtype).reshape(shape)
            )
            position += size
        # They become a segment, which is laid over the table; one pass, as negative ids are huge.
        if n and int(arrays[0].view(np.uint32).max()) >= spec.rows:
            return None
        tables.append((arrays[0], arrays[1], arrays[2]))
    return StepRecord(
        int(head["step"]), tuple(_mark(mark) for mark in marks), tuple(tables)
    ), length


def _mark(mark: Any) -> Mark:
    return Mark(
        session=bytes(mark["session"]).decode("ascii"),
        epoch=int(mark["epoch"]),
        step=int(mark["step"]),
        part=int(mark["part"]),
    )
