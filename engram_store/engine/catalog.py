"""The catalog: which files make up the store now, in memory and as the working manifest on disk."""

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from engram_store.engine.fold import FoldedBase
from engram_store.engine.garbage import GarbageReport, collect
from engram_store.engine.memory import Mapping as MappedFile
from engram_store.engine.memtable import Commit
from engram_store.engine.table import Table
from engram_store.errors import DiskFaultError, DiskFullError, ProtocolError, StoreFileError
from engram_store.failpoints import failpoint
from engram_store.layout.arrays import BaseDescription, read_base_description
from engram_store.layout.disk import Disk
from engram_store.layout.files import remove_file, sync_directory
from engram_store.layout.manifest import (
    Manifest,
    SegmentRef,
    as_working,
    check_layers,
    check_owner,
    read_manifest,
    write_current,
    write_snapshot,
)
from engram_store.layout.metadata import StoreMetadata
from engram_store.layout.paths import StorePaths
from engram_store.layout.pins import read_pins
from engram_store.layout.segments import SegmentFiles, open_segment
from engram_store.layout.snapshots import Wanted, find_snapshot, held_snapshot
from engram_store.session import SnapshotRef

_logger = logging.getLogger(__name__)


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


def fill_table(table: Table, parts: TableParts) -> list[MappedFile]:
    """Make an empty table read from these files; returns what to unmap. Hold its lock."""
    replaced = table.map_base(parts.generation, parts.base)
    for ref, files in parts.segments:
        table.point_at_segment(table.map_segment(ref, files))
    return replaced


class Catalog:
    """Publishes manifests one at a time; `lock` orders seals and folds."""

    def __init__(self, paths: StorePaths, metadata: StoreMetadata, disk: Disk) -> None:
        """Raises: StoreFileError when the working manifest cannot be used."""
        self.paths, self.metadata = paths, metadata
        self.disk = disk
        self._lock = threading.Lock()
        self.manifest, _ = read_manifest(paths)
        check_owner(paths.current, self.manifest, metadata.store_id)
        check_layers(paths.current, self.manifest, metadata.tables)
        self.bases: dict[int, BaseDescription] = {}
        self._settled = True
        self._unpublished: set[tuple[int, int]] = set()
        """Layer and number of merged segments that no manifest names yet."""
        self._doubtful: set[int] = set()
        """Snapshots whose names may not be durable: they failed, and may be there all the same."""

    def adopt(self, parts: Mapping[int, TableParts]) -> None:
        """Remember the base descriptions of the files now in use."""
        self.bases = {layer: part.base for layer, part in parts.items()}

    def _publish(self, manifest: Manifest) -> Manifest:
        self._settled = False
        write_current(self.paths, manifest, self.disk)
        self.manifest, self._settled = manifest, True
        return manifest

    def settle(self) -> None:
        """After a publication that failed, the manifest on the disk may be the refused one.

        Nobody may build upon what only that one names, or undo it, before ours is back.
        """
        with self._lock:
            if not self._settled:
                self._publish(self.manifest)

    def mark(self, *, closed: bool, memtables: str = "", journaled: bool = False) -> None:
        """Say whether memtables may hold more than the files: at opening and at closing."""
        with self._lock:
            manifest = replace(
                as_working(self.manifest), closed=closed, memtables=memtables, journaled=journaled
            )
            if closed:
                # So that, as long as nothing is folded, either can stand in for the other.
                with contextlib.suppress(StoreFileError):
                    kept, _ = read_manifest(self.paths, manifest.step)
                    manifest = replace(manifest, made=kept.made, origins=kept.origins)
            self._publish(manifest)

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
                as_working(self.manifest),
                step=commit.step,
                sealed=number,
                marks=tuple(commit.marks),
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
            self._publish(manifest)
            self.bases[layer] = base.description
            return manifest

    def replace_segments(self, layer: int, merged: set[int], new: SegmentRef | None) -> None:
        """Segments with these numbers, which follow each other, became one, or nothing."""
        with self._lock:
            have = self.manifest.table(layer).segments
            at = next(i for i, ref in enumerate(have) if ref.number in merged)
            rest = [ref for ref in have if ref.number not in merged]
            segments = (*rest[:at], *([new] if new else []), *rest[at:])
            self._publish(self.manifest.with_segments(layer, segments))

    @contextlib.contextmanager
    def writing_segment(self, layer: int, number: int) -> Iterator[None]:
        """A merged segment is written, and named by a manifest in the end; until then it stays.

        After a failure it stays too: the manifest on the disk may name it. See
        `forget_unpublished`.
        """
        with self._lock:
            self._unpublished.add((layer, number))
        yield
        with self._lock:
            self._unpublished.discard((layer, number))

    def forget_unpublished(self) -> None:
        """What failed merges left is garbage. Call it settled, and while nothing is merged."""
        with self._lock:
            self._unpublished.clear()

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
            # A process that was killed may have made it and not come to this.
            sync_directory(self.paths.snapshots, self.disk)
        else:
            digest = self._write_snapshot(manifest)
        failpoint("snapshot.published")
        return SnapshotRef(store_id=manifest.store_id, step=manifest.step, digest=digest)

    def _write_snapshot(self, manifest: Manifest) -> str:
        """A new snapshot's digest. One that fails is none, even if its file cannot be removed."""
        whole = replace(as_working(manifest), closed=True, memtables="", journaled=False)
        self._doubtful.add(manifest.step)
        try:
            digest = write_snapshot(self.paths, whole, self.disk)
        except BaseException:
            with contextlib.suppress(OSError):
                remove_file(self.paths.snapshot(manifest.step), self.disk)
            raise
        self._doubtful.discard(manifest.step)
        return digest

    def snapshots(self) -> list[int]:
        """Steps with a snapshot, ascending. Later ones than the store itself never happened."""
        known = set(self.paths.snapshot_steps()) - self._doubtful
        return sorted(step for step in known if step <= self.manifest.step)

    def find_snapshot(self, wanted: Wanted) -> Manifest:
        """The manifest of a snapshot.

        Raises:
            SnapshotMismatchError: it is of another store, does not exist, or is another one.
            StoreFileError: its manifest is damaged.
        """
        return find_snapshot(self.paths, self.metadata, self.snapshots(), wanted)

    @contextlib.contextmanager
    def goal(self, wanted: Wanted) -> Iterator[Manifest]:
        """The manifest of a snapshot to go back to; it is not removed meanwhile.

        Raises:
            As `find_snapshot`. ProtocolError: newer snapshots are pinned, and would be forgotten.
            StoreFileError: a pin is damaged, and may be of a newer snapshot.
        """
        paths = self.paths
        held = held_snapshot(paths, self.metadata, wanted, lambda _: self.snapshots())
        with held as (manifest, _):
            check_pins(paths, self.metadata.store_id, paths.snapshot_steps(), manifest.step)
            yield manifest

    def roll_back(self, manifest: Manifest, sealed: int) -> Manifest:
        """Continue from a snapshot's manifest in a new lineage; everything newer is forgotten.

        Args:
            manifest: a snapshot's.
            sealed: number of the newest memtable there ever was, so that numbers never repeat.
        """
        with self._lock:
            lineage = self.manifest.lineage + 1
            working = replace(as_working(manifest), lineage=lineage, sealed=sealed)
            return self._publish(working)

    def drop_newer_snapshots(self) -> None:
        """Remove snapshots that a roll back made untrue."""
        newer = [s for s in self.paths.snapshot_steps() if s > self.manifest.step]
        for step in newer:
            remove_file(self.paths.snapshot(step), self.disk)
        if newer:
            sync_directory(self.paths.snapshots, self.disk)

    def keep_snapshots(self, newest: int) -> GarbageReport:
        """Drop all but the newest snapshots and the pinned ones, and what nothing names then."""
        return self.collect(keep=newest)

    def collect(self, *, keep: int | None = None, dry_run: bool = False) -> GarbageReport:
        """See `garbage.collect`."""
        with self._lock:
            for step in sorted(self._doubtful):
                # It must not be what remains of the newest ones.
                remove_file(self.paths.snapshot(step), self.disk)
                self._doubtful.discard(step)
            return collect(
                self.paths,
                self.metadata,
                self.manifest,
                self.disk,
                keep=keep,
                dry_run=dry_run,
                unpublished=frozenset(self._unpublished),
            )

    def collect_garbage(self) -> None:
        """Remove segments and generations that neither the store nor any snapshot names.

        What cannot be removed now is removed another time.
        """
        try:
            self.collect()
        except (DiskFaultError, DiskFullError) as error:
            _logger.warning("files that nobody needs stay for now: %s", error)
        except StoreFileError as error:
            _logger.warning("old files stay, a damaged snapshot may need them: %s", error)


def check_pins(paths: StorePaths, store_id: str, steps: list[int], goal: int) -> None:
    """Refuse to go back past a pinned snapshot, which would be forgotten.

    Args:
        paths, store_id: of the store.
        steps: snapshots that there are.
        goal: step to go back to.

    Raises:
        ProtocolError: names the pins.
        StoreFileError: a pin is damaged, and may be of a newer snapshot.
    """
    newer = {step for step in steps if step > goal}
    if not newer:
        return
    lost = [pin for pin in read_pins(paths, store_id) if pin.step in newer]
    if lost:
        names = ", ".join(f"{pin.name!r} (step {pin.step})" for pin in lost)
        raise ProtocolError(
            f"going back to step {goal} forgets everything newer, and that is pinned: {names}. "
            "Nothing was changed. Unpin it first (engram-store unpin), or keep a copy of it "
            "(engram-store export), or export the older snapshot instead of going back to it"
        )
