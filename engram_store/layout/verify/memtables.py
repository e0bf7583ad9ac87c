"""The commit records of memtables, read while a process may be writing them.

A commit fills the record that is not in force and then selects it, so that the selected one is
whole at every moment; a reader that finds it broken looks again whether it still is the selected
one. Rows of memtables have no checksums: they are in memory, and sealed with checksums.
"""

import os
import struct
from pathlib import Path

import xxhash

from engram_store.layout.manifest import Manifest
from engram_store.layout.paths import StorePaths
from engram_store.layout.verify.report import Damage, FileKind

_IDENTITY = struct.Struct("<8s32s40s4Q")
"""Magic, store id, boot id, lineage, layout, capacity, number."""
_MAGIC = b"ENGRMEM2"
_PUBLISHED_OFFSET = 512
_RECORD_OFFSETS = (4096, 8192)
_RECORD_BYTES = 8 + 8 + 128 * 8 + 8 + 32 * (32 + 3 * 8) + 8
_LOOKS = 1000
"""A commit takes longer than a look, so that so many of them never meet one each."""

_GONE = (
    "the store was not closed and its memtables are gone (killed, and the host restarted): the "
    "next opening for training goes back to the newest snapshot"
)
_RECORDS_ONLY = (
    "the store is open, or its process was killed: rows in its memtables have no checksums and "
    "were not checked, only their commit records"
)


def check_memtables(
    paths: StorePaths, store_id: str, working: Manifest
) -> tuple[list[Damage], list[str]]:
    """Damages of the memtables of a store that is open or was killed, and what is worth knowing."""
    damages: list[Damage] = []
    found = {}
    for file in _files(paths, store_id, working):
        number, sound = _look(file, store_id, working.lineage)
        if number and sound:
            found[number] = file
        elif number:
            damages.append(
                Damage(
                    file=str(file),
                    kind=FileKind.MEMTABLE,
                    problem="its commit record does not match its checksum: steps after "
                    f"{working.step:,} cannot be recovered from it",
                    working=True,
                )
            )
    if damages:
        return damages, []
    if working.sealed + 1 not in found and working.sealed not in found:
        return [], [_GONE]
    return [], [_RECORDS_ONLY]


def _files(paths: StorePaths, store_id: str, working: Manifest) -> list[Path]:
    """Where recovery would look for memtables."""
    shared = f"{store_id}-{paths.root.stat().st_ino}"
    parents = [Path("/dev/shm") / f"engram-store-{os.getuid()}"]  # noqa: S108 - where they are
    if working.memtables:
        parents.append(Path(working.memtables))
    directories = [parent / shared for parent in parents] + [paths.root / "memtables"]
    files = [directory / f"memtable-{i}" for directory in directories for i in range(2)]
    return list(dict.fromkeys(files))


def _look(file: Path, store_id: str, lineage: int) -> tuple[int, bool]:
    """Number of the memtable in a file, 0 if it holds nothing of this store; is it whole?"""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return 0, True
    try:
        number = 0
        for _ in range(_LOOKS):
            before = _published(fd)
            number = _number(fd, store_id, lineage)
            if not number or before is None:
                return number, before is not None
            record = os.pread(fd, _RECORD_BYTES, _RECORD_OFFSETS[before % 2])
            if _whole(record, before):
                return number, True
            if _published(fd) == before and _number(fd, store_id, lineage) == number:
                return number, False
        return number, True  # it changes all the time: somebody is at work, nothing is broken
    except OSError:
        return number, False
    finally:
        os.close(fd)


def _number(fd: int, store_id: str, lineage: int) -> int:
    data = os.pread(fd, _IDENTITY.size, 0)
    if len(data) < _IDENTITY.size:
        return 0
    magic, owner, boot, line, _layout, _capacity, number = _IDENTITY.unpack(data)
    this_boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    mine = (_MAGIC, store_id.encode(), this_boot.encode(), lineage)
    return int(number) if (magic, owner, boot.rstrip(b"\0"), line) == mine else 0


def _published(fd: int) -> int | None:
    data = os.pread(fd, 8, _PUBLISHED_OFFSET)
    return int.from_bytes(data, "little") if len(data) == 8 else None


def _whole(record: bytes, sequence: int) -> bool:
    if len(record) < _RECORD_BYTES:
        return False
    checksum = xxhash.xxh3_64_intdigest(record[:-8])
    return (record[:8], record[-8:]) == (
        sequence.to_bytes(8, "little"),
        checksum.to_bytes(8, "little"),
    )
