"""Manifests: which immutable files make up the tables at one step.

A snapshot is a manifest under its step's name. `CURRENT.json` is the same thing for a store at
work: it names what was sealed so far, and the memtables in shared memory hold the rest.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from engram_store.errors import ForeignFileError
from engram_store.layout.documents import encode_document, read_document
from engram_store.layout.files import WriteCounter, replace_file
from engram_store.layout.paths import StorePaths


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentRef:
    """One sealed segment of a table."""

    number: int
    slots: int
    digest: str
    """Digest of the segment's description."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableFiles:
    """The files of one table: a base generation and the segments over it, oldest first."""

    layer: int
    generation: int
    base_digest: str
    """Digest of the base's description."""
    segments: tuple[SegmentRef, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """The newest part of a step that was applied for one session."""

    session: str
    """32 hexadecimal digits."""
    epoch: int
    step: int
    part: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """All tables of a store at one step."""

    store_id: str
    lineage: int
    """Grows with every restore; memtables of another lineage are forgotten ones."""
    step: int
    """Steps applied."""
    sealed: int
    """Number of the newest memtable that was sealed into the segments."""
    tables: tuple[TableFiles, ...]
    marks: tuple[Mark, ...] = field(default=())
    closed: bool = True
    """Whether this is all there is: False in the working manifest of a store that is open for
    training, or was when its process died."""
    memtables: str = ""
    """Where the memtables' directory is while `closed` is False."""

    def table(self, layer: int) -> TableFiles:
        """The files of one table."""
        return next(table for table in self.tables if table.layer == layer)

    def with_table(self, files: TableFiles) -> Self:
        """A copy in which one table's files are replaced."""
        tables = tuple(files if table.layer == files.layer else table for table in self.tables)
        return replace(self, tables=tables)

    def with_segments(self, layer: int, segments: tuple[SegmentRef, ...]) -> Self:
        """A copy in which one table's segments are replaced."""
        return self.with_table(replace(self.table(layer), segments=segments))


def encode_manifest(manifest: Manifest) -> tuple[bytes, str]:
    """File content and digest."""
    return encode_document("manifest", asdict(manifest))


def write_current(paths: StorePaths, manifest: Manifest, counter: WriteCounter) -> None:
    """Make a manifest the working one."""
    replace_file(paths.current, encode_manifest(manifest)[0], counter)


def write_snapshot(paths: StorePaths, manifest: Manifest, counter: WriteCounter) -> str:
    """Make a manifest the snapshot at its step; returns its digest."""
    data, digest = encode_manifest(manifest)
    replace_file(paths.snapshot(manifest.step), data, counter)
    return digest


def read_manifest(paths: StorePaths, step: int | None = None) -> tuple[Manifest, str]:
    """The working manifest, or the snapshot at a step, and its digest.

    Raises:
        StoreFileError: missing, foreign, newer or damaged (see `read_document`).
    """
    path = paths.current if step is None else paths.snapshot(step)
    body, digest = read_document(path, "manifest")
    try:
        manifest = _manifest(body)
    except (KeyError, TypeError) as error:
        raise ForeignFileError(path, f"is not a manifest of this format: {error!r}") from error
    if step is not None and manifest.step != step:
        raise ForeignFileError(path, f"is the snapshot at step {manifest.step}, by another name")
    return manifest, digest


def check_owner(path: Path, manifest: Manifest, store_id: str) -> None:
    """Refuse a manifest that was copied here. Raises: ForeignFileError."""
    if manifest.store_id != store_id:
        raise ForeignFileError(
            path, f"belongs to another store, {manifest.store_id}; this is {store_id}"
        )


def _manifest(body: dict[str, Any]) -> Manifest:
    tables = tuple(
        TableFiles(
            layer=table["layer"],
            generation=table["generation"],
            base_digest=table["base_digest"],
            segments=tuple(SegmentRef(**segment) for segment in table["segments"]),
        )
        for table in body["tables"]
    )
    return Manifest(
        store_id=body["store_id"],
        lineage=body["lineage"],
        step=body["step"],
        sealed=body["sealed"],
        tables=tables,
        marks=tuple(Mark(**mark) for mark in body["marks"]),
        closed=body["closed"],
        memtables=body["memtables"],
    )
