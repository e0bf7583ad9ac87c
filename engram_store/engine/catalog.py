"""The catalog: which files make up the store now, in memory and as the working manifest on disk."""

import contextlib
import logging
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from engram_store.engine.fold import FoldedBase
from engram_store.engine.memtable import Commit
from engram_store.engine.table import Table
from engram_store.errors import SnapshotMismatchError, StoreFileError
from engram_store.failpoints import failpoint
from engram_store.layout.arrays import BaseDescription, read_base_description
from engram_store.layout.files import WriteCounter, sync_directory
from engram_store.layout.manifest import (
    Manifest,
    SegmentRef,
    check_owner,
    read_manifest,
    write_current,
    write_snapshot,
)
from engram_store.layout.metadata import StoreMetadata
from engram_store.layout.paths import StorePaths
from engram_store.layout.segments import SegmentFiles, open_segment
from engram_store.session import SnapshotRef

_logger = logging.getLogger(__name__)
_GENERATION = re.compile(r"g(\d{4,})")
_NUMBER = re.compile(r"(\d{6,})")


@dataclass(frozen=True, slots=True)
class TableParts:
    """The checked files of one table."""

    generation: int
    base: BaseDescription
    segments: tuple[tuple[SegmentRef, SegmentFiles], ...]


def check_files(
    paths: StorePaths, metadata: StoreMetadata, manifest: Manifest
) -> dict[int, TableParts]:
    """Open and check every file that a manifest names, changing nothing.

    Raises:
        StoreFileError: a file is missing, foreign, truncated or damaged.
    """
    parts = {}
    for files in manifest.tables:
        spec = metadata.tables[files.layer]
        base = read_base_description(paths, spec, files.generation, files.base_digest)
        segments = tuple(
            (ref, open_segment(paths, metadata.store_id, spec, ref)) for ref in files.segments
        )
        parts[files.layer] = TableParts(files.generation, base, segments)
    return parts


def fill_table(table: Table, parts: TableParts) -> None:
    """Make an empty table read from these files. Be alone."""
    table.map_base(parts.generation, parts.base)
    for ref, files in parts.segments:
        table.point_at_segment(table.map_segment(ref, files))


class Catalog:
    """Publishes manifests one at a time; `lock` orders seals and folds."""

    def __init__(self, paths: StorePaths, metadata: StoreMetadata) -> None:
        """Raises: StoreFileError when the working manifest cannot be used."""
        self.paths, self.metadata = paths, metadata
        self.counter = WriteCounter()
        self._lock = threading.Lock()
        self.manifest, _ = read_manifest(paths)
        check_owner(paths.current, self.manifest, metadata.store_id)
        self.bases: dict[int, BaseDescription] = {}

    def adopt(self, parts: Mapping[int, TableParts]) -> None:
        """Remember the base descriptions of the files now in use."""
        self.bases = {layer: part.base for layer, part in parts.items()}

    def _publish(self, manifest: Manifest) -> Manifest:
        write_current(self.paths, manifest, self.counter)
        self.manifest = manifest
        return manifest

    def mark(self, *, closed: bool, memtables: str = "") -> None:
        """Say whether memtables may hold more than the files: at opening and at closing."""
        with self._lock:
            self._publish(replace(self.manifest, closed=closed, memtables=memtables))

    def append_segments(
        self,
        number: int,
        commit: Commit,
        segments: Mapping[int, SegmentRef],
        *,
        snapshot: bool = False,
    ) -> SnapshotRef | None:
        """The memtable with this number was sealed: its segments are part of the store.

        Returns:
            The snapshot of exactly this state, if one was asked for.
        """
        with self._lock:
            manifest = replace(
                self.manifest, step=commit.step, sealed=number, marks=tuple(commit.marks)
            )
            for layer, ref in segments.items():
                # A seal that failed late and is tried again is here already.
                have = tuple(s for s in manifest.table(layer).segments if s.number != number)
                manifest = manifest.with_segments(layer, (*have, ref))
            self._publish(manifest)
            return self._snapshot() if snapshot else None

    def replace_base(self, layer: int, folded: set[int], base: FoldedBase) -> Manifest:
        """Segments with these numbers went into a new base generation."""
        with self._lock:
            files = self.manifest.table(layer)
            manifest = self.manifest.with_table(
                replace(
                    files,
                    generation=base.generation,
                    base_digest=base.digest,
                    segments=tuple(s for s in files.segments if s.number not in folded),
                )
            )
            self.bases[layer] = base.description
            return self._publish(manifest)

    def snapshot(self) -> SnapshotRef:
        """Keep the working manifest as the snapshot at its step."""
        with self._lock:
            return self._snapshot()

    def _snapshot(self) -> SnapshotRef:
        # Under the lock: a fold must not collect files between here and the manifest's rename.
        manifest = self.manifest
        if manifest.step in self.snapshots():
            # The same rows, perhaps in other files: checkpoints go on naming the first manifest.
            digest = read_manifest(self.paths, manifest.step)[1]
        else:
            whole = replace(manifest, closed=True, memtables="")
            digest = write_snapshot(self.paths, whole, self.counter)
        failpoint("snapshot.published")
        return SnapshotRef(store_id=manifest.store_id, step=manifest.step, digest=digest)

    def snapshots(self) -> list[int]:
        """Steps with a snapshot, ascending. Later ones than the store itself never happened."""
        return [s for s in self.paths.snapshot_steps() if s <= self.manifest.step]

    def find_snapshot(self, wanted: SnapshotRef | int) -> Manifest:
        """The manifest of a snapshot.

        Raises:
            SnapshotMismatchError: it is of another store, does not exist, or is another one.
        """
        return find_snapshot(self.paths, self.metadata.store_id, self.snapshots(), wanted)

    def roll_back(self, manifest: Manifest, sealed: int) -> Manifest:
        """Continue from a snapshot's manifest in a new lineage; everything newer is forgotten.

        Args:
            manifest: a snapshot's.
            sealed: number of the newest memtable there ever was, so that numbers never repeat.
        """
        with self._lock:
            lineage = self.manifest.lineage + 1
            return self._publish(replace(manifest, lineage=lineage, sealed=sealed))

    def drop_newer_snapshots(self) -> None:
        """Remove snapshots that a roll back made untrue."""
        newer = [s for s in self.paths.snapshot_steps() if s > self.manifest.step]
        for step in newer:
            self.paths.snapshot(step).unlink(missing_ok=True)
        if newer:
            sync_directory(self.paths.snapshots)

    def keep_snapshots(self, newest: int) -> None:
        """Drop all but the newest snapshots, and what only they named."""
        with self._lock:
            for step in self.snapshots()[:-newest]:
                self.paths.snapshot(step).unlink(missing_ok=True)
            sync_directory(self.paths.snapshots)
        self.collect_garbage()

    def collect_garbage(self) -> None:
        """Remove segments and generations that neither the store nor any snapshot names."""
        with self._lock:
            kept = [self.manifest]
            try:
                kept += [read_manifest(self.paths, step)[0] for step in self.snapshots()]
            except StoreFileError as error:
                _logger.warning("old files stay, a damaged snapshot may need them: %s", error)
                return
            for layer in self.metadata.tables:
                files = [manifest.table(layer) for manifest in kept]
                generations = {f.generation for f in files}
                segments = {ref.number for f in files for ref in f.segments}
                # Newer numbers are being written right now: no manifest names them yet.
                base, overlay = self.paths.base(layer, 0), self.paths.segment(layer, 0)
                newest = self.manifest.table(layer).generation
                _remove_others(base.parent, _GENERATION, generations, newest)
                _remove_others(overlay.parent, _NUMBER, segments, self.manifest.sealed)


def find_snapshot(
    paths: StorePaths, store_id: str, steps: list[int], wanted: SnapshotRef | int
) -> Manifest:
    """See `Catalog.find_snapshot`; `steps` are those that count."""
    step = wanted if isinstance(wanted, int) else wanted.step
    have = ", ".join(map(str, steps)) or "none"
    if isinstance(wanted, SnapshotRef) and wanted.store_id != store_id:
        raise SnapshotMismatchError(
            f"the checkpoint belongs to store {wanted.store_id} (step {step}), this is store "
            f"{store_id}; open the store that was trained with it"
        )
    if step not in steps:
        raise SnapshotMismatchError(
            f"asked for the snapshot at step {step}; store {store_id} has snapshots at steps {have}"
        )
    manifest, digest = read_manifest(paths, step)
    check_owner(paths.snapshot(step), manifest, store_id)
    if isinstance(wanted, SnapshotRef) and wanted.digest != digest:
        raise SnapshotMismatchError(
            f"the checkpoint names snapshot {wanted.digest[:16]} at step {step}, this store's "
            f"snapshot there is {digest[:16]}: the tables were trained on another way since; use "
            f"the checkpoint saved with it (snapshots at steps {have})"
        )
    return manifest


def _remove_others(directory: Path, pattern: re.Pattern[str], kept: set[int], newest: int) -> None:
    """Remove numbered entries up to `newest` that are not to be kept."""
    if not directory.is_dir():
        return
    for entry in directory.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and int(match[1]) <= newest and int(match[1]) not in kept:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(entry)
