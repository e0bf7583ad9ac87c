"""One base generation or segment: every file of it against its checksums."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engram_store.errors import EngramStoreError
from engram_store.layout import checksums
from engram_store.layout.arrays import ArrayLayout, chunk_identity, table_arrays
from engram_store.layout.checksums import BLOCK_BYTES, Checksums
from engram_store.layout.documents import read_document
from engram_store.layout.paths import StorePaths
from engram_store.layout.segments import IDS, SegmentFiles
from engram_store.layout.verify.blocks import BlockReader, FileSums
from engram_store.layout.verify.description import (
    BROKEN,
    Description,
    check_array_document,
    check_group_document,
    problem_of,
)
from engram_store.layout.verify.needed import Part
from engram_store.layout.verify.report import Damage, FileKind, Rows
from engram_store.types import TableSpec

_NO_SUMS: Checksums = np.empty(0, "<u8")


@dataclass(frozen=True, slots=True)
class PartCheck:
    """What checking one part found."""

    damages: list[Damage]
    files: set[str]
    """Files that belong to it, below the store's directory."""
    whole: str = ""
    """Directory, ending in '/', of which it cannot be told what belongs to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _SealedFile:
    """A file whose blocks have checksums."""

    name: str
    """Below the store's directory."""
    length: int
    identity: int
    rows: Callable[[int, int], Rows]
    """Rows of the bytes from the first up to, not including, the second."""

    @property
    def blocks(self) -> int:
        return -(-self.length // BLOCK_BYTES)


def part_directory(paths: StorePaths, part: Part) -> Path:
    """Where a part's files are."""
    if part.slots is None:
        return paths.base(part.layer, part.number)
    return paths.segment(part.layer, part.number)


def check_part(
    paths: StorePaths, description: Description, part: Part, reader: BlockReader
) -> PartCheck:
    """Check every file of a part. Raises nothing for damage."""
    check = _check_base if part.slots is None else _check_segment
    return check(paths, description, part, reader)


def _check_base(
    paths: StorePaths, description: Description, part: Part, reader: BlockReader
) -> PartCheck:
    spec = description.specs[part.layer]
    directory = paths.base(part.layer, part.number)
    prefix = f"{directory.relative_to(paths.root)}/"
    damages: list[Damage] = []
    arrays = table_arrays(spec)
    groups = {f"{prefix}zarr.json"}
    documents = set()
    for array in arrays:
        groups |= {f"{prefix}{parent}/zarr.json" for parent in _parents(array.name)}
        documents.add(name := f"{prefix}{array.name}/zarr.json")
        damages += check_array_document(paths, name, spec, array, reader)
    for name in sorted(groups):
        damages += check_group_document(paths, name, reader, spec.layer)
    try:
        body = _read_body(directory / "base.json", "base generation", part, reader)
        if body["generation"] != part.number or body["layer"] != part.layer:
            raise ValueError("another generation's, or another table's")
        files = [
            _chunk(description.store_id, spec, prefix, array, chunk)
            for array in arrays
            for chunk in body["chunks"].get(array.name, ())
            if 0 <= chunk < array.chunks
        ]
        stored_hash = int(body["checksums"])
    except (EngramStoreError, OSError, *BROKEN) as error:
        everything = Rows(count=spec.rows, first=0, last=spec.rows - 1)
        problem = problem_of(error, directory / "base.json")
        damages.append(_description_damage(f"{prefix}base.json", part, problem, everything))
        return PartCheck(damages, set(), prefix)
    damages += _check_sealed(paths, part, files, f"{prefix}checksums", stored_hash, reader)
    names = {f"{prefix}base.json", f"{prefix}checksums", *(file.name for file in files)}
    return PartCheck(damages, groups | documents | names)


def _parents(array: str) -> list[str]:
    """'state' for 'state/sum', nothing for 'rows'."""
    pieces = array.split("/")
    return ["/".join(pieces[: i + 1]) for i in range(len(pieces) - 1)]


def _chunk(
    store_id: str, spec: TableSpec, prefix: str, array: ArrayLayout, chunk: int
) -> _SealedFile:
    return _SealedFile(
        name=f"{prefix}{array.chunk_file(Path(), chunk)}",
        length=array.chunk_bytes,
        identity=chunk_identity(store_id, spec.layer, array.name, chunk),
        rows=partial(_base_rows, spec, array, chunk),
    )


def _base_rows(spec: TableSpec, array: ArrayLayout, chunk: int, start: int, end: int) -> Rows:
    """Rows in a piece of a chunk file, without the padding after the table's end."""
    before = chunk * array.chunk_rows
    first = before + start // array.row_bytes
    stop = min(spec.rows, before + -(-end // array.row_bytes))
    if first >= stop:
        return Rows(count=0)
    return Rows(count=stop - first, first=first, last=stop - 1)


def _check_segment(
    paths: StorePaths, description: Description, part: Part, reader: BlockReader
) -> PartCheck:
    spec, slots = description.specs[part.layer], part.slots or 0
    directory = paths.segment(part.layer, part.number)
    prefix = f"{directory.relative_to(paths.root)}/"
    lengths = SegmentFiles(directory=directory, slots=slots, spec=spec).lengths()
    names = {f"{prefix}{name}" for name in ("segment.json", "checksums", *lengths)}
    try:
        body = _read_body(directory / "segment.json", "segment", part, reader)
        if (body["store_id"], body["slots"]) != (description.store_id, slots):
            raise ValueError("another store's, or of another length")
        stored_hash = int(body["checksums"])
    except (EngramStoreError, OSError, *BROKEN) as error:
        problem = problem_of(error, directory / "segment.json")
        everything = Rows(count=slots, first_slot=0)
        damage = _description_damage(f"{prefix}segment.json", part, problem, everything)
        return PartCheck([damage], names)
    ids = _SlotIds(directory / IDS, slots)
    files = [
        _SealedFile(
            name=f"{prefix}{name}",
            length=length,
            identity=checksums.identity(
                description.store_id, "segment", part.layer, part.number, name
            ),
            rows=partial(ids.rows, length // slots),
        )
        for name, length in lengths.items()
    ]
    damages = _check_sealed(paths, part, files, f"{prefix}checksums", stored_hash, reader, ids)
    known = None if damages else ids.extremes(0, slots)
    if known is not None and not (known[0] >= 0 and known[1] < spec.rows):
        first, last = known
        problem = f"holds row ids from {first} to {last}, the table has rows 0 to {spec.rows - 1}"
        rows = Rows(count=slots, first_slot=0)
        damages.append(_damage(f"{prefix}{IDS}", part, problem, rows=rows))
    return PartCheck(damages, names)


class _SlotIds:
    """Row ids of a segment's slots: read when a damage is to be named."""

    def __init__(self, path: Path, slots: int) -> None:
        self._path, self._slots = path, slots
        self.damaged = False

    def rows(self, slot_bytes: int, start: int, end: int) -> Rows:
        """Rows in a piece of a file with so many bytes per slot."""
        first, stop = start // slot_bytes, min(self._slots, -(-end // slot_bytes))
        known = None if self.damaged else self.extremes(first, stop)
        lowest, highest = known or (None, None)
        return Rows(count=stop - first, first=lowest, last=highest, first_slot=first)

    def extremes(self, first: int, stop: int) -> tuple[int, int] | None:
        """Lowest and highest row id of some slots; None where they cannot be read."""
        try:
            ids = np.fromfile(self._path, "<i4", stop - first, offset=4 * first)
        except OSError:
            return None
        return (int(ids.min()), int(ids.max())) if ids.size else None


def _read_body(path: Path, kind: str, part: Part, reader: BlockReader) -> dict[str, Any]:
    reader.count(path.stat().st_size)
    body, digest = read_document(path, kind)
    if digest != part.digest:
        raise EngramStoreError("is not the one that its manifests name")
    return body


def _check_sealed(
    paths: StorePaths,
    part: Part,
    files: Sequence[_SealedFile],
    sums_name: str,
    stored_hash: int,
    reader: BlockReader,
    ids: _SlotIds | None = None,
) -> list[Damage]:
    """Compare files with their list of checksums, and the list with its own checksum."""
    stored, problem = _read_sums(paths.root / sums_name, files, stored_hash, reader)
    found = [reader.sums_of(paths.root / f.name, f.length, f.identity) for f in files]
    damages = []
    if problem:
        actual = np.concatenate([*(sums.sums for sums in found), _NO_SUMS])
        readable = not any(sums.unreadable for sums in found)
        if readable and checksums.content_checksum(actual.tobytes()) == stored_hash:
            # The list can be computed again: only it is damaged.
            damages.append(_damage(
                sums_name, part, f"{problem}; the blocks that it covers are intact",
                kind=FileKind.CHECKSUMS,
            ))  # fmt: skip
            return damages + _wrong_lengths(files, found, part)
        damages.append(_damage(sums_name, part, problem, kind=FileKind.CHECKSUMS))
    start = 0
    for file, sums in zip(files, found, strict=True):
        expected = stored[start : start + file.blocks]
        start += file.blocks
        bad = list(_compare(file, sums, expected, part))
        if bad and ids is not None and file.name.endswith(f"/{IDS}"):
            # Named again without ids: those in the file cannot be believed.
            ids.damaged = True
            bad = list(_compare(file, sums, expected, part))
        damages += bad
    return damages


def _read_sums(
    path: Path, files: Sequence[_SealedFile], stored_hash: int, reader: BlockReader
) -> tuple[Checksums, str]:
    """A list of checksums as it is, and what is wrong with it ('' if nothing is)."""
    length = 8 * sum(file.blocks for file in files)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(length)
    except OSError as error:
        return _NO_SUMS, problem_of(error, path)
    reader.count(len(data))
    sums = np.frombuffer(data[: len(data) // 8 * 8], "<u8")
    if size != length:
        return sums, f"has {size:,} bytes, it should have {length:,}"
    if checksums.content_checksum(data) != stored_hash:
        return sums, "does not match its own checksum"
    return sums, ""


def _compare(
    file: _SealedFile, found: FileSums, expected: Checksums, part: Part
) -> Iterator[Damage]:
    """Damages of one file; consecutive blocks with the same problem are one."""
    if found.size is None:
        rows = file.rows(0, file.length)
        yield _damage(file.name, part, found.problem, rows=rows)
        return
    problems = dict(found.unreadable)
    common = min(found.sums.size, expected.size)
    for block in np.flatnonzero(found.sums[:common] != expected[:common]).tolist():
        problems.setdefault(block, "does not match its checksum")
    if found.size != file.length:
        yield _wrong_length(file, found.size, part)
    if found.size < file.length:
        # Named above: the bytes that are missing.
        problems = {b: text for b, text in problems.items() if b < found.size // BLOCK_BYTES}
    for first, count in _runs(problems):
        start, end = first * BLOCK_BYTES, min(file.length, (first + count) * BLOCK_BYTES)
        rows = file.rows(start, end)
        yield _damage(file.name, part, problems[first], first, count, rows=rows)


def _wrong_lengths(
    files: Sequence[_SealedFile], found: Sequence[FileSums], part: Part
) -> list[Damage]:
    """Files that are longer than they should be although their blocks are right."""
    pairs = zip(files, found, strict=True)
    return [_wrong_length(f, s.size, part) for f, s in pairs if s.size not in (None, f.length)]


def _wrong_length(file: _SealedFile, size: int | None, part: Part) -> Damage:
    size = size or 0
    problem = f"has {size:,} bytes, its manifest says {file.length:,}"
    if size > file.length:
        return _damage(file.name, part, problem)
    first = size // BLOCK_BYTES
    rows = file.rows(first * BLOCK_BYTES, file.length)
    return _damage(file.name, part, problem, first, file.blocks - first, rows=rows)


def _runs(problems: dict[int, str]) -> Iterator[tuple[int, int]]:
    """(first block, number of blocks) of consecutive blocks with the same problem."""
    first = None
    for block in sorted(problems):
        if first is None:
            first = block
        if problems.get(block + 1) != problems[block]:
            yield first, block + 1 - first
            first = None


def _damage(
    name: str,
    part: Part,
    problem: str,
    block: int | None = None,
    blocks: int = 0,
    *,
    rows: Rows | None = None,
    kind: FileKind = FileKind.DATA,
) -> Damage:
    return Damage(
        file=name,
        kind=kind,
        problem=problem,
        block=block,
        blocks=blocks,
        layer=part.layer,
        rows=rows,
    )


def _description_damage(name: str, part: Part, problem: str, rows: Rows) -> Damage:
    problem += "; the files that it describes were not checked"
    return _damage(name, part, problem, rows=rows, kind=FileKind.DESCRIPTION)
