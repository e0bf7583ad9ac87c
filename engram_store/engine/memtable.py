"""The memtable: the only mutable part of a store, and its own log.

A file in shared memory with, for every table, parallel arrays of row ids, state and rows. A commit
writes post-images into the next free slots and becomes real by one 8-byte store that selects a
commit record; slots beyond the record's counts do not exist. After kill -9 the pages are intact
and in order (the dead process executed its stores in program order), so recovery is reading the
record: nothing is replayed and nothing can be torn.
"""

import os
import stat
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from engram_store.engine.memory import PAGE_BYTES, Mapping
from engram_store.errors import ConfigError, StoreFileError
from engram_store.layout.disk import Disk
from engram_store.layout.files import disk_errors
from engram_store.layout.manifest import Mark
from engram_store.types import TableSpec

MAX_TABLES = 128
MAX_MARKS = 32
_MAGIC = b"ENGRMEM2"

_IDENTITY = np.dtype(
    [
        ("magic", "S8"),
        ("store_id", "S32"),
        ("boot_id", "S40"),
        ("lineage", "<u8"),
        ("layout", "<u8"),
        ("capacity", "<u8"),
        # Written last when a memtable is opened, zeroed first when it is let go.
        ("number", "<u8"),
    ]
)
_MARK = np.dtype([("session", "S32"), ("epoch", "<u8"), ("step", "<u8"), ("part", "<u8")])
_RECORD = np.dtype(
    [
        ("sequence", "<u8"),
        ("step", "<u8"),
        ("counts", "<u8", (MAX_TABLES,)),
        ("mark_count", "<u8"),
        ("marks", _MARK, (MAX_MARKS,)),
        ("checksum", "<u8"),
    ]
)
_NUMBER_OFFSET = _IDENTITY.fields["number"][1]  # type: ignore[index]
_PUBLISHED_OFFSET = 512
_RECORD_OFFSETS = (PAGE_BYTES, 2 * PAGE_BYTES)
_DATA_OFFSET = 3 * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Commit:
    """What a commit record says."""

    step: int
    counts: tuple[int, ...]
    """Slots used, by table."""
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class TableSlots:
    """One table's arrays in a memtable, `capacity` slots each."""

    ids: NDArray[np.int32]
    rows: NDArray[Any]
    """Storage dtype [capacity, dim]."""
    state: NDArray[np.float32]
    """[capacity, state width]."""


def boot_id() -> str:
    """Changes with every boot of the machine: shared memory of another boot is gone."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def slot_bytes(specs: list[TableSpec]) -> int:
    """Bytes of one slot, all tables together."""
    return sum(4 + spec.state_bytes + spec.row_bytes for spec in specs)


def _offsets(specs: list[TableSpec], capacity: int) -> tuple[list[tuple[int, int, int]], int]:
    """Offsets of (ids, state, rows) of every table, page-aligned, and the file's length."""
    offsets, position = [], _DATA_OFFSET
    for spec in specs:
        triple = []
        for width in (4, spec.state_bytes, spec.row_bytes):
            triple.append(position)
            position += -(-capacity * width // PAGE_BYTES) * PAGE_BYTES
        offsets.append((triple[0], triple[1], triple[2]))
    return offsets, position


def memtable_bytes(specs: list[TableSpec], capacity: int) -> int:
    """Length of a memtable's file."""
    return _offsets(specs, capacity)[1]


class Memtable:
    """One memtable file. `number` 0 means that it holds nothing."""

    def __init__(self, path: Path, specs: list[TableSpec], capacity: int, disk: Disk) -> None:
        """Map the file, making it if it is not there; its memory is reserved.

        Raises:
            ConfigError: too many tables.
            DiskFullError: its memory cannot be reserved.
            StoreFileError: the file is there and has another length.
        """
        if len(specs) > MAX_TABLES:
            raise ConfigError(f"a store has at most {MAX_TABLES} tables, got {len(specs)}")
        self.path, self.capacity = path, capacity
        self._specs, self._disk = specs, disk
        self.backed = capacity
        """Slots, of every table, that have memory; others must not be written."""
        self._offsets, length = _offsets(specs, capacity)
        with disk_errors(path):
            fd = disk.open_shared(path, length)
        try:
            found = os.fstat(fd).st_size
            if found != length:
                # Recovery would not know it as a memtable of this capacity, and lose its steps.
                raise StoreFileError(
                    path,
                    f"has {found:,} bytes, and a memtable of {capacity:,} slots has {length:,}; it "
                    "is of another run and could not be removed: remove it and open again",
                )
            self._mapping = Mapping.of_shared_file(fd, length, path)
        finally:
            os.close(fd)
        self._identity = self._mapping.view(_IDENTITY, 0, (1,))
        self._number = self._identity["number"]
        self._published = self._mapping.view("<u8", _PUBLISHED_OFFSET, (1,))
        self._records = [self._mapping.view(_RECORD, offset, (1,)) for offset in _RECORD_OFFSETS]
        self.tables = [
            TableSlots(
                ids=self._mapping.view("<i4", ids, (capacity,)),
                state=self._mapping.view("<f4", state, (capacity, spec.state_width)),
                rows=self._mapping.view(spec.dtype.storage, rows, (capacity, spec.dim)),
            )
            for spec, (ids, state, rows) in zip(specs, self._offsets, strict=True)
        ]

    @property
    def number(self) -> int:
        """Grows by one with every memtable opened; 0: empty."""
        return int(self._number[0])

    @property
    def addresses(self) -> list[tuple[int, int]]:
        """Address of (rows, state) of every table."""
        return [(int(t.rows.ctypes.data), int(t.state.ctypes.data)) for t in self.tables]

    def populate(self) -> None:
        """Fault the memory in, so that a commit meets no page fault."""
        self._mapping.populate()

    @property
    def backed_bytes(self) -> int:
        """Memory of the slots that have some."""
        return self.bytes_of(self.backed)

    def bytes_of(self, slots: int) -> int:
        """What so many slots of every table take."""
        return slots * slot_bytes(self._specs)

    def give_back(self, slots: int) -> None:
        """Do without the memory of slots from here on; nothing in force may be in them.

        A crash at any moment is harmless: recovery reads what a commit record counts, no more.

        Args:
            slots: a multiple of 4,096.

        Raises:
            OSError: some of it stays allocated.
        """
        old, self.backed = self.backed, min(slots, self.backed)
        for offset, length in self._ranges(self.backed, old):
            self._disk.discard(self.path, offset, length)

    def reserve(self, slots: int) -> None:
        """Have memory for so many slots.

        Args:
            slots: a multiple of 4,096, at most `capacity`.

        Raises:
            DiskFullError: there is no room where the file is.
        """
        with disk_errors(self.path):
            for offset, length in self._ranges(self.backed, slots):
                self._disk.reserve_shared(self.path, offset, length)
        for offset, length in self._ranges(self.backed, slots):
            self._mapping.populate(offset, length)
        self.backed = max(slots, self.backed)

    def _ranges(self, first: int, end: int) -> list[tuple[int, int]]:
        """(offset, length) of slots first..end-1 in every array; whole pages."""
        if first >= end:
            return []
        widths = [(4, spec.state_bytes, spec.row_bytes) for spec in self._specs]
        return [
            (offset + first * width, (end - first) * width)
            for offsets, of_table in zip(self._offsets, widths, strict=True)
            for offset, width in zip(offsets, of_table, strict=True)
            if width
        ]

    def open_as(self, number: int, store_id: str, lineage: int, commit: Commit) -> None:
        """Start over as memtable `number`, with nothing in it, after `commit`."""
        self._set_number(0)
        identity = np.zeros(1, _IDENTITY)
        identity["magic"] = _MAGIC
        identity["store_id"] = store_id.encode()
        identity["boot_id"] = boot_id().encode()
        identity["lineage"] = lineage
        identity["layout"] = self._layout()
        identity["capacity"] = self.capacity
        self._disk.store(self.path, 0, self._identity, identity)
        self._disk.store(self.path, _PUBLISHED_OFFSET, self._published, 0)
        self.publish(Commit(commit.step, (0,) * len(self.tables), commit.marks))
        self._set_number(number)

    def release(self) -> None:
        """Its content is sealed elsewhere: hold nothing."""
        self._set_number(0)

    def _set_number(self, number: int) -> None:
        self._disk.store(self.path, _NUMBER_OFFSET, self._number, number)

    def wrote(self, table: int, first: int, count: int) -> None:
        """Slots first..first+count-1 of a table have their ids, state and rows."""
        slots = self.tables[table]
        arrays = (slots.ids, slots.state, slots.rows)
        for array, offset in zip(arrays, self._offsets[table], strict=True):
            begin = offset + first * array.strides[0]
            self._disk.stored(self.path, begin, array[first : first + count])

    def publish(self, commit: Commit) -> None:
        """Make a commit real: fill the record that is not in force, then select it."""
        sequence = int(self._published[0]) + 1
        record = np.zeros(1, _RECORD)
        record["sequence"] = sequence
        record["step"] = commit.step
        record["counts"][0, : len(commit.counts)] = commit.counts
        record["mark_count"] = len(commit.marks)
        for i, mark in enumerate(commit.marks):
            record["marks"][0, i] = (mark.session.encode(), mark.epoch, mark.step, mark.part)
        record["checksum"] = _checksum(record)
        place = sequence % 2
        self._disk.store(self.path, _RECORD_OFFSETS[place], self._records[place], record)
        self._disk.store(self.path, _PUBLISHED_OFFSET, self._published, sequence)

    def committed(self) -> Commit:
        """The commit in force."""
        record = self._records[int(self._published[0]) % 2][0]
        marks = tuple(
            Mark(
                session=mark["session"].decode(),
                epoch=int(mark["epoch"]),
                step=int(mark["step"]),
                part=int(mark["part"]),
            )
            for mark in record["marks"][: int(record["mark_count"])]
        )
        counts = tuple(int(count) for count in record["counts"][: len(self.tables)])
        return Commit(int(record["step"]), counts, marks)

    def trusted(self, store_id: str, lineage: int) -> bool:
        """Whether its content belongs to this store, this lineage and this boot, and is whole."""
        record = self._records[int(self._published[0]) % 2][0]
        identity = self._identity[0]
        return bool(
            self.number
            and identity["magic"] == _MAGIC
            and identity["store_id"] == store_id.encode()
            and identity["boot_id"] == boot_id().encode()
            and identity["lineage"] == lineage
            and identity["layout"] == self._layout()
            and record["sequence"] == self._published[0]
            and record["checksum"] == _checksum(record)
            and (record["counts"] <= self.capacity).all()
            and record["mark_count"] <= MAX_MARKS
            and all(_is_hexadecimal(bytes(mark["session"])) for mark in record["marks"])
        )

    def _layout(self) -> int:
        parts = [(s.layer, s.rows, s.row_bytes, s.state_bytes) for s in self._specs]
        return xxhash.xxh3_64_intdigest(repr((self.capacity, parts)).encode())

    def close(self) -> None:
        """Unmap; the file stays."""
        self.tables = []
        self._records = []
        del self._identity, self._number, self._published
        self._mapping.close()


def stored_capacity(path: Path) -> int | None:
    """Slots of the memtable in a file; None when there is none or it is something else."""
    try:
        # Not what a link points to, nor a pipe, which would make the opening wait for a writer.
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        with path.open("rb") as file:
            header = file.read(_IDENTITY.itemsize)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if len(header) < _IDENTITY.itemsize:
        return None
    identity = np.frombuffer(header, _IDENTITY)[0]
    if identity["magic"] != _MAGIC or not 0 < int(identity["capacity"]) < 2**31:
        return None
    return int(identity["capacity"])


def _is_hexadecimal(session: bytes) -> bool:
    return not session.strip(b"0123456789abcdef")


def _checksum(record: Any) -> int:
    return xxhash.xxh3_64_intdigest(record.tobytes()[: -_RECORD["checksum"].itemsize])


def new_session_id() -> str:
    """32 hexadecimal digits."""
    return uuid.uuid4().hex
