"""Journals: what a host that was lost left on the disk of its last steps."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engram_store.layout import journal
from engram_store.layout.journal import StepRecord, file_header, journal_number, read_records
from engram_store.layout.manifest import Mark
from tests.fuzz.mutators import mutate_bytes
from tests.fuzz.samples import metadata
from tests.fuzz.target import Target

_STORE_ID, _LINEAGE, _NUMBER = "5a" * 16, 3, 7
_SPECS = tuple(metadata().tables.values())
_HEADER = file_header(_STORE_ID, _LINEAGE, _NUMBER, _SPECS)
_HEAD_BYTES = journal._RECORD.itemsize


def _check_journal(data: bytes) -> None:
    """Records behind a right header. The switch in the first byte seals each of them again."""
    path = Path("journal")
    path.unlink(missing_ok=True)
    records = _sealed(data[1:]) if data[:1] > b"\x7f" else data[1:]
    path.write_bytes(_HEADER + records)
    assert journal_number(path, _STORE_ID, _LINEAGE, _SPECS) == _NUMBER
    for record in read_records(path, _STORE_ID, _NUMBER, _SPECS):
        assert 0 <= record.step < 2**64
        for mark in record.marks:
            assert not mark.session.strip("0123456789abcdef"), "a mark of no session"
        for spec, (ids, state, rows) in zip(_SPECS, record.tables, strict=True):
            assert state.shape == (ids.size, spec.state_width)
            assert rows.shape == (ids.size, spec.dim)
            assert rows.dtype == spec.dtype.storage
            # They become segments, and segments are laid over a table.
            assert not ids.size or 0 <= ids.min() <= ids.max() < spec.rows, "rows of no table"


def _check_header(data: bytes) -> None:
    """A file of any bytes: it is ours or it is none."""
    path = Path("journal")
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    number = journal_number(path, _STORE_ID, _LINEAGE, _SPECS)
    assert number is None or data.startswith(file_header(_STORE_ID, _LINEAGE, number, _SPECS))
    list(read_records(path, _STORE_ID, _NUMBER, _SPECS))


def _sealed(data: bytes) -> bytes:
    """With checksums that fit, as far as the lengths of the records lead."""
    content, at = bytearray(data), 0
    while at + _HEAD_BYTES <= len(content):
        length = int.from_bytes(content[at + 8 : at + 16], "little")
        if not _HEAD_BYTES <= length <= len(content) - at:
            break
        body = np.frombuffer(bytes(content[at + 8 : at + length]), np.uint8)
        checksum = journal._checksum(_STORE_ID, _NUMBER, [body])
        content[at : at + 8] = checksum.to_bytes(8, "little")
        at += length
    return bytes(content)


def _record(step: int, rows: int) -> bytes:
    tables = tuple(
        (
            np.arange(rows, dtype=np.int32),
            np.ones((rows, spec.state_width), np.float32),
            np.zeros((rows, spec.dim), spec.dtype.storage),
        )
        for spec in _SPECS
    )
    record = StepRecord(step, (Mark(session="89" * 16, epoch=3, step=step - 1),), tables)
    return b"".join(part.tobytes() for part in journal.record_parts(_STORE_ID, _NUMBER, record))


def _journals() -> Iterator[bytes]:
    for switch in (b"\xff", b"\0"):
        yield switch + _record(4, 3) + _record(5, 0) + _record(6, 9)
        yield switch + _record(4, 3)[:-1]
    # Numbers of tables and marks, a session that is no text, and a row that no table has.
    first = _record(4, 3)
    for at, value in ((24, b"\3"), (28, b"\2"), (28, b"\xff" * 4), (32, b"\x80"), (104, b"\xff")):
        yield b"\xff" + first[:at] + value + first[at + len(value) :]
    yield b"\xff" + first.replace(np.arange(3, dtype="<i4").tobytes(), b"\xff" * 12, 1)


def _headers() -> Iterator[bytes]:
    yield _HEADER + _record(4, 3)
    yield _HEADER
    yield b""


TARGETS = (
    Target(name="journal", check=_check_journal, seeds=_journals, allowed=(), mutate=mutate_bytes),
    Target(name="journal-file", check=_check_header, seeds=_headers, allowed=()),
)
