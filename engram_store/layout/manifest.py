"""Manifests: which immutable files make up the tables at one step.

A snapshot is a manifest under its step's name. `CURRENT.json` is the same thing for a store at
work: it names what was sealed so far, and the memtables in shared memory hold the rest.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from engram_store.errors import ForeignFileError
from engram_store.layout.disk import Disk
from engram_store.layout.documents import encode_document, read_document, text, whole
from engram_store.layout.files import replace_file
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
class Origin:
    """A snapshot of another store that this one was exported from: the same rows and state."""

    store_id: str
    step: int
    digest: str
    """Of the snapshot's manifest there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """All tables of a store at one step. In the order in which a person reads them."""

    store_id: str
    step: int
    """Steps applied."""
    made: str = ""
    """When, of a snapshot: UTC, ISO 8601. For people; nothing is decided by it. A closed store's
    working manifest repeats it, and `origins`, so that either can stand in for the other."""
    origins: tuple[Origin, ...] = ()
    """Of the snapshot that an export begins with: checkpoints of these go with it too."""
    lineage: int
    """Grows with every restore; memtables of another lineage are forgotten ones."""
    sealed: int
    """Number of the newest memtable that was sealed into the segments."""
    tables: tuple[TableFiles, ...]
    marks: tuple[Mark, ...] = field(default=())
    closed: bool = True
    """Whether this is all there is: False in the working manifest of a store that is open for
    training, or was when its process died."""
    memtables: str = ""
    """Where the memtables' directory is while `closed` is False."""
    journaled: bool = False
    """Whether, while `closed` is False, every durable step is in the files or in the journal; a
    host that lost its memory then continues from there, and otherwise from the newest snapshot."""

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
    fields = asdict(manifest)
    for name in ("made", "origins"):
        if not fields[name]:
            del fields[name]
    return encode_document("manifest", fields)


def now_text() -> str:
    """The time, as `Manifest.made` has it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def as_working(manifest: Manifest) -> Manifest:
    """For a store at work: without what is said of one snapshot only."""
    return replace(manifest, made="", origins=())


def write_current(paths: StorePaths, manifest: Manifest, disk: Disk) -> None:
    """Make a manifest the working one."""
    replace_file(paths.current, encode_manifest(manifest)[0], disk)


def write_snapshot(paths: StorePaths, manifest: Manifest, disk: Disk) -> str:
    """Make a manifest the snapshot at its step, made now; returns its digest."""
    data, digest = encode_manifest(replace(manifest, made=manifest.made or now_text()))
    replace_file(paths.snapshot(manifest.step), data, disk)
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
    except (KeyError, TypeError, ValueError) as error:
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


def check_layers(path: Path, manifest: Manifest, layers: Iterable[int]) -> None:
    """Refuse a manifest that does not name exactly the store's tables. Raises: ForeignFileError."""
    named, known = sorted(table.layer for table in manifest.tables), sorted(layers)
    if named != known:
        raise ForeignFileError(path, f"has tables for layers {named}, the store for {known}")


def _manifest(body: dict[str, Any]) -> Manifest:
    """Raises: KeyError, TypeError, ValueError: numbers and names that make no sense.

    They become parts of paths, so nothing of another type may pass.
    """
    tables = tuple(_table_files(table) for table in body["tables"])
    if len({table.layer for table in tables}) < len(tables):
        raise ValueError("a layer has two tables")
    for flag in ("closed", "journaled"):
        if not isinstance(body[flag], bool):
            raise TypeError(f"{flag} is {body[flag]!r:.100}")
    return Manifest(
        store_id=text(body["store_id"], "store_id"),
        made=text(body.get("made", ""), "made"),
        origins=tuple(_origin(origin) for origin in body.get("origins", ())),
        lineage=whole(body["lineage"], "lineage"),
        step=whole(body["step"], "step"),
        sealed=whole(body["sealed"], "sealed"),
        tables=tables,
        marks=tuple(_mark(mark) for mark in body["marks"]),
        closed=body["closed"],
        memtables=text(body["memtables"], "memtables"),
        journaled=body["journaled"],
    )


def _table_files(table: dict[str, Any]) -> TableFiles:
    found = TableFiles(**table | {"segments": tuple(SegmentRef(**s) for s in table["segments"])})
    whole(found.layer, "layer")
    whole(found.generation, "generation")
    text(found.base_digest, "base_digest")
    for segment in found.segments:
        whole(segment.number, "number")
        whole(segment.slots, "slots", 1, 1 << 40)
        text(segment.digest, "digest")
    if len({segment.number for segment in found.segments}) < len(found.segments):
        raise ValueError("names a segment twice")
    return found


def _origin(origin: dict[str, Any]) -> Origin:
    found = Origin(**origin)
    text(found.store_id, "store_id")
    whole(found.step, "step")
    text(found.digest, "digest")
    return found


def _mark(mark: dict[str, Any]) -> Mark:
    found = Mark(**mark)
    for name in ("epoch", "step", "part"):
        whole(getattr(found, name), name, below=1 << 64)
    text(found.session, "session")
    return found
