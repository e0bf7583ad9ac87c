"""Binary files of a store: segments, and memtables that a killed process left."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engram_store.engine.memtable import (
    MAX_MARKS,
    Commit,
    Memtable,
    memtable_bytes,
    stored_capacity,
)
from engram_store.engine.memtable import _checksum as checksum_of_record
from engram_store.errors import StoreFileError
from engram_store.layout.checksums import block_checksums, content_checksum
from engram_store.layout.disk import Disk
from engram_store.layout.manifest import Mark, SegmentRef
from engram_store.layout.segments import open_segment
from tests.fuzz.mutators import SEPARATOR, mutate_bytes, mutate_json, mutate_parts, split
from tests.fuzz.samples import SLOTS, metadata, store_files
from tests.fuzz.target import Target
from tests.fuzz.targets.documents import sealed

_CAPACITY = 64
_PATCH = struct.Struct("<HQ")
_STORE_ID, _LINEAGE = "5a" * 16, 3


def _check_segment(data: bytes) -> None:
    """`segment.json`, `checksums` and `row_ids`; all seals are made right."""
    store = store_files()
    document, sums, ids = split(data, 3)
    # The ids' block is the first one of the list.
    right = block_checksums(np.frombuffer(ids, np.uint8), store.ids_identity()).tobytes()
    sums = right[:8] + sums[8:]
    number, slots = store.segment.number, SLOTS
    try:
        body = json.loads(document)
        # A manifest is checked when it is read: its numbers are whole numbers.
        if type(body.get("slots")) is int and 0 < body["slots"] < 2**40:
            slots = body["slots"]
        body["checksums"] = content_checksum(sums)
        document = json.dumps(body).encode()
    except (AttributeError, TypeError, ValueError, RecursionError):
        pass
    document, digest = sealed(document)
    directory = store.segment_directory
    for name, content in (("segment.json", document), ("checksums", sums), ("row_ids", ids)):
        (directory / name).write_bytes(content)
    files = open_segment(
        store.paths,
        store.metadata.store_id,
        store.spec,
        SegmentRef(number=number, slots=slots, digest=digest),
    )
    body = json.loads(document)
    assert (body["layer"], body["number"]) == (store.spec.layer, number)
    found = files.read_ids()
    assert len(found) == slots
    assert 0 <= found.min() <= found.max() < store.spec.rows


def _segments() -> Iterator[bytes]:
    directory = store_files().segment_directory
    whole = [(directory / name).read_bytes() for name in ("segment.json", "checksums", "row_ids")]
    yield SEPARATOR.join(whole)
    yield SEPARATOR.join([whole[0], whole[1], whole[2][:-4]])
    yield SEPARATOR.join([whole[0], whole[1][:-3], whole[2]])


def _check_memtable(data: bytes) -> None:
    """Numbers written over the head of a real file: (offset, value) pairs after a switch.

    The switch seals the record in force, so that the checksum does not refuse everything.
    """
    path = Path("memtable-0")
    specs = list(metadata().tables.values())
    content = bytearray(_memtable_file())
    for offset, value in _PATCH.iter_unpack(data[1:][: (len(data) - 1) // 10 * 10]):
        content[offset : offset + 8] = value.to_bytes(8, "little")
    path.unlink(missing_ok=True)
    path.write_bytes(content[: len(_memtable_file())])
    capacity = stored_capacity(path)
    if capacity is None or path.stat().st_size != memtable_bytes(specs, capacity):
        return
    memtable = Memtable(path, specs, capacity, Disk())
    try:
        if data[:1] > b"\x7f":
            record = memtable._records[int(memtable._published[0]) % 2]
            record["checksum"] = checksum_of_record(record)
        if memtable.trusted(_STORE_ID, _LINEAGE):
            commit = memtable.committed()
            assert all(count <= capacity for count in commit.counts), "more slots than there are"
            assert len(commit.marks) <= MAX_MARKS
    finally:
        memtable.close()


_FILE: list[bytes] = []


def _memtable_file() -> bytes:
    """A memtable with one commit in it."""
    if not _FILE:
        path = Path("memtable-seed")
        memtable = Memtable(path, list(metadata().tables.values()), _CAPACITY, Disk())
        marks = (Mark(session="89" * 16, epoch=3, step=6),)
        memtable.open_as(4, _STORE_ID, _LINEAGE, Commit(6, (0, 0), marks))
        memtable.publish(Commit(7, (5, 6), marks))
        memtable.close()
        _FILE.append(path.read_bytes())
        path.unlink()
    return _FILE[0]


def _memtables() -> Iterator[bytes]:
    yield b"\xff"
    yield b"\0"
    sequence, record = 512, 4096
    yield b"\xff" + _PATCH.pack(sequence, 3)
    # Slots used by the first table, the number of marks, the session of the first mark.
    yield b"\xff" + _PATCH.pack(record + 16, 2)
    yield b"\xff" + _PATCH.pack(record + 16 + 8 * 128, 2**60)
    yield b"\xff" + _PATCH.pack(record + 16 + 8 * 129, 0x6261)
    # A first table with one slot too many, and a session that is no text.
    yield b"\xff" + _PATCH.pack(record + 16, _CAPACITY + 1)
    yield b"\xff" + _PATCH.pack(record + 16 + 8 * 129, 0x80_0000_0000_6261)
    for field in range(80, 112, 8):  # lineage, layout, capacity, number
        yield b"\xff" + _PATCH.pack(field, 1)


TARGETS = (
    Target(
        name="segment",
        check=_check_segment,
        seeds=_segments,
        allowed=(StoreFileError,),
        mutate=mutate_parts(mutate_json, mutate_bytes, mutate_bytes),
    ),
    Target(name="memtable", check=_check_memtable, seeds=_memtables, allowed=()),
)
