"""Exporting: a snapshot becomes a store of its own, while the store it is of may be at work.

The source is only read, and not locked: its snapshot is held, so that nothing removes its files.
The new store is built under a hidden name beside the target and gets its own by one rename.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engram_store.errors import (
    ConfigError,
    DiskFullError,
    ForeignFileError,
    SnapshotMismatchError,
    StoreExistsError,
    StoreFileError,
)
from engram_store.layout import checksums
from engram_store.layout.arrays import (
    BaseDescription,
    chunk_identity,
    read_base_description,
    table_arrays,
    write_base_description,
)
from engram_store.layout.carry import Carrier
from engram_store.layout.create import Progress
from engram_store.layout.disk import Disk
from engram_store.layout.documents import encode_document, read_document
from engram_store.layout.files import (
    check_length,
    disk_errors,
    make_directory,
    remove_tree,
    sync_directory,
    write_file,
)
from engram_store.layout.manifest import (
    Manifest,
    Origin,
    SegmentRef,
    TableFiles,
    read_manifest,
    write_current,
    write_snapshot,
)
from engram_store.layout.metadata import StoreMetadata
from engram_store.layout.paths import StorePaths
from engram_store.layout.segments import SegmentFiles, open_segment, read_segment_checksums
from engram_store.layout.snapshots import Wanted, counted_steps, held_snapshot
from engram_store.layout.verify.blocks import BlockReader
from engram_store.layout.verify.description import check_array_document, read_description
from engram_store.layout.verify.report import Damage, FileKind
from engram_store.session import SnapshotRef
from engram_store.types import TableSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What an export made."""

    path: Path
    origin: SnapshotRef
    """The snapshot in the store that it was exported from."""
    snapshot: SnapshotRef
    """The same rows and state in the new store: its only snapshot."""
    linked: int
    """Data files that both stores share on disk."""
    copied: int
    """Data files of its own."""
    read_bytes: int
    """Compared with their checksums on the way."""


def export_snapshot(
    paths: StorePaths,
    metadata: StoreMetadata,
    wanted: Wanted,
    target: Path,
    *,
    copy: bool = False,
    progress: Progress | None = None,
    disk: Disk,
) -> ExportReport:
    """Make a new, complete, independent store of one snapshot.

    Args:
        paths, metadata: of the store; a process may train it meanwhile.
        wanted: the snapshot.
        target: directory to make; it must not exist, or be empty.
        copy: share no file with the source, as it does by hard links where the file system can.
        progress: told (bytes read, bytes to read).
        disk: what changes files.

    Raises:
        SnapshotMismatchError: no such snapshot, or a restore removed it meanwhile.
        StoreExistsError: something is at the target, or another export to it is at work.
        ConfigError: the target is inside the store.
        StoreFileError: a file of the snapshot is damaged.
        DiskFullError, DiskFaultError, OSError. Nothing is at the target then, here as above.
    """
    _check_target(paths, target)
    with held_snapshot(paths, metadata, wanted) as (manifest, ref):
        try:
            with _building(target, disk) as building:
                export = _Export(paths, metadata, manifest, StorePaths(building), disk)
                return export.run(ref, target, copy=copy, progress=progress)
        except (StoreFileError, FileNotFoundError) as error:
            if _is_there(paths, ref):
                raise
            raise SnapshotMismatchError(
                f"the snapshot at step {ref.step} was removed while it was exported (a restore "
                f"went back past it); nothing was made at {target}. Export another one"
            ) from error


def _check_target(paths: StorePaths, target: Path) -> None:
    """Raises: StoreExistsError, ConfigError."""
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise StoreExistsError(target, "already exists; choose another path or remove it first")
    root = paths.root.resolve()
    if root in (target.resolve(), *target.resolve().parents):
        raise ConfigError(f"{target} is inside the store {paths.root}; choose a path outside of it")


def _is_there(paths: StorePaths, ref: SnapshotRef) -> bool:
    """Whether the snapshot is still that one. What cannot be read counts as there."""
    try:
        return ref.step in counted_steps(paths) and read_manifest(paths, ref.step)[1] == ref.digest
    except StoreFileError:
        return paths.snapshot(ref.step).exists()


@contextlib.contextmanager
def _building(target: Path, disk: Disk) -> Iterator[Path]:
    """An empty hidden directory beside the target, for this process alone; removed on failure."""
    target = target.absolute()
    building = target.with_name(f".{target.name}.exporting")
    make_directory(target.parent, disk)
    with disk_errors(building), contextlib.suppress(FileExistsError):
        disk.make_directory(building)
    fd = os.open(building, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreExistsError(
                target, "is being exported to by another process; wait for it, or choose another"
            ) from None
        except OSError:  # network file systems lock no directories; then nobody is kept out
            pass
        try:
            for entry in building.iterdir():  # of an export that was killed
                remove_tree(entry, disk)
            yield building
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    finally:
        os.close(fd)


class _Export:
    """One export under way."""

    def __init__(
        self,
        source: StorePaths,
        metadata: StoreMetadata,
        manifest: Manifest,
        building: StorePaths,
        disk: Disk,
    ) -> None:
        self._source, self._new, self._disk = source, building, disk
        self._old_id, self._manifest = metadata.store_id, manifest
        self._metadata = replace(metadata, store_id=uuid.uuid4().hex)
        self._read_bytes = 0
        self._reader = BlockReader(lambda _: None)

    def run(
        self, ref: SnapshotRef, target: Path, *, copy: bool, progress: Progress | None
    ) -> ExportReport:
        self._check_manifest(ref)
        specs = self._metadata.tables
        bases = {
            t.layer: read_base_description(
                self._source, specs[t.layer], t.generation, t.base_digest
            )
            for t in self._manifest.tables
        }
        total = sum(self._data_bytes(files, bases[files.layer]) for files in self._manifest.tables)
        if copy:
            self._check_room(total)

        def on_read(count: int) -> None:
            self._read_bytes += count
            if progress is not None:
                progress(self._read_bytes, total)

        carrier = Carrier(self._disk, copy=copy, on_read=on_read)
        self._write_group()
        tables = tuple(
            self._carry_table(carrier, files, bases[files.layer]) for files in self._manifest.tables
        )
        digest = self._write_manifests(ref, tables)
        self._sync_directories()
        with disk_errors(target):
            try:
                self._disk.rename(self._new.root, target)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise StoreExistsError(target, "was made by somebody else meanwhile") from error
                raise
        sync_directory(target.absolute().parent, self._disk)
        made = SnapshotRef(store_id=self._metadata.store_id, step=ref.step, digest=digest)
        return ExportReport(
            path=target,
            origin=ref,
            snapshot=made,
            linked=carrier.linked,
            copied=carrier.copied,
            read_bytes=self._read_bytes,
        )

    # ------------------------------------------------------------------ what it needs

    def _check_manifest(self, snapshot: SnapshotRef) -> None:
        """Before room is looked for: what it says need not be so.

        Raises: ForeignFileError: no store writes such a manifest. StoreFileError: a file of a
            segment is missing or has another length.
        """
        for files in self._manifest.tables:
            numbers = [segment.number for segment in files.segments]
            if len(set(numbers)) < len(numbers):
                raise ForeignFileError(
                    self._source.snapshot(snapshot.step),
                    f"names a segment of layer {files.layer} twice; export another snapshot",
                )
            for ref in files.segments:
                segment = SegmentFiles(
                    directory=self._source.segment(files.layer, ref.number),
                    slots=ref.slots,
                    spec=self._metadata.tables[files.layer],
                )
                for name, length in segment.lengths().items():
                    check_length(segment.directory / name, length)

    def _data_bytes(self, files: TableFiles, base: BaseDescription) -> int:
        """Bytes of the data files of one table."""
        spec = self._metadata.tables[files.layer]
        slots = sum(segment.slots for segment in files.segments)
        arrays = table_arrays(spec)
        return slots * (4 + spec.row_bytes + spec.state_bytes) + sum(
            array.chunk_bytes * len(base.checksums[array.name]) for array in arrays
        )

    def _check_room(self, needed: int) -> None:
        """Before hours of copying. Raises: DiskFullError."""
        free = shutil.disk_usage(self._new.root).free
        if needed > free:
            raise DiskFullError(
                errno.ENOSPC,
                f"the copy needs {needed:,} bytes, and the disk of {self._new.root.parent} has "
                f"{free:,} free; free space, choose another disk, or leave --copy out to share "
                "files with the store",
            )

    # ------------------------------------------------------------------ documents

    def _make(self, directory: Path) -> None:
        """A directory and its parents; their names are made durable at the end, all together."""
        if not directory.is_dir():
            self._make(directory.parent)
            with disk_errors(directory):
                self._disk.make_directory(directory)

    def _write(self, path: Path, data: bytes) -> None:
        self._make(path.parent)
        write_file(path, [data], self._disk)

    def _write_group(self) -> None:
        """Description of the store, and the token map."""
        group = json.loads(self._source.group.read_bytes())
        attributes: dict[str, Any] = {**group["attributes"], **self._metadata.attributes()}
        self._write(self._new.group, _group_document(attributes))
        token_map = self._metadata.recipe.token_map
        if token_map is not None:
            document = (self._source.token_map / "zarr.json").read_bytes()
            _, damages = read_description(self._source, self._reader)
            # Groups are written anew, so that it matters to nobody how they are.
            self._refuse(damage for damage in damages if damage.kind is not FileKind.ZARR)
            self._write(self._new.token_map / "zarr.json", document)
            data = np.ascontiguousarray(token_map, "<i4").tobytes()
            self._write(self._new.token_map / "c" / "0", data)

    def _write_manifests(self, ref: SnapshotRef, tables: tuple[TableFiles, ...]) -> str:
        """The snapshot and the working manifest; returns the snapshot's digest."""
        origin = Origin(store_id=ref.store_id, step=ref.step, digest=ref.digest)
        manifest = Manifest(
            store_id=self._metadata.store_id,
            step=ref.step,
            made=self._manifest.made,
            origins=(origin, *self._manifest.origins),
            lineage=1,
            sealed=self._manifest.sealed,
            tables=tables,
        )
        self._make(self._new.snapshots)
        digest = write_snapshot(self._new, manifest, self._disk)
        write_current(self._new, manifest, self._disk)
        return digest

    def _sync_directories(self) -> None:
        for directory, _, _ in os.walk(self._new.root, topdown=False):
            sync_directory(Path(directory), self._disk)

    # ------------------------------------------------------------------ tables

    def _carry_table(
        self, carrier: Carrier, files: TableFiles, base: BaseDescription
    ) -> TableFiles:
        spec = self._metadata.tables[files.layer]
        for directory in (self._new.layer(spec.layer), self._new.layer(spec.layer) / "base"):
            self._make_group(directory)
        self._make_group(self._new.root / "layers")
        digest = self._carry_base(carrier, spec, files.generation, base)
        segments = tuple(self._carry_segment(carrier, spec, ref) for ref in files.segments)
        return replace(files, base_digest=digest, segments=segments)

    def _make_group(self, directory: Path) -> None:
        """An empty group."""
        self._write(directory / "zarr.json", _group_document({}))

    def _refuse(self, damages: Iterable[Damage]) -> None:
        """Metadata that the store does not need, and that other programs read, is carried too.

        Raises: StoreFileError: some of it is damaged.
        """
        for damage in damages:
            raise StoreFileError(
                self._source.root / damage.file,
                f"{damage.problem}; put back the file of a backup, or of another export",
            )

    def _carry_base(
        self, carrier: Carrier, spec: TableSpec, generation: int, base: BaseDescription
    ) -> str:
        """One base generation; returns the digest of its new description."""
        old, new = (p.base(spec.layer, generation) for p in (self._source, self._new))
        self._make_group(new)
        sums: dict[str, dict[int, checksums.Checksums]] = {}
        for array in table_arrays(spec):
            name = array.name
            if "/" in name:
                self._make_group(new / Path(name).parent)
            document = old / name / "zarr.json"
            known_as = str(document.relative_to(self._source.root))
            self._refuse(check_array_document(self._source, known_as, spec, array, self._reader))
            self._write(new / name / "zarr.json", document.read_bytes())
            sums[name] = {}
            for chunk, expected in base.checksums[name].items():
                seeds = tuple(
                    chunk_identity(store_id, spec.layer, name, chunk)
                    for store_id in (self._old_id, self._metadata.store_id)
                )
                target = array.chunk_file(new, chunk)
                self._make(target.parent)
                sums[name][chunk] = carrier.carry(
                    array.chunk_file(old, chunk),
                    target,
                    array.chunk_bytes,
                    (seeds[0], seeds[1]),
                    expected,
                )
        carried = BaseDescription(checksums=sums)
        return write_base_description(self._new, spec, generation, carried, self._disk)

    def _carry_segment(self, carrier: Carrier, spec: TableSpec, ref: SegmentRef) -> SegmentRef:
        files = open_segment(self._source, self._old_id, spec, ref)
        body, _ = read_document(files.directory / "segment.json", "segment")
        known = read_segment_checksums(files, body["checksums"])
        directory = self._new.segment(spec.layer, ref.number)
        self._make(directory)
        sums = []
        for name, length in files.lengths().items():
            seeds = [
                checksums.identity(store_id, "segment", spec.layer, ref.number, name)
                for store_id in (self._old_id, self._metadata.store_id)
            ]
            source, target = files.directory / name, directory / name
            sums.append(carrier.carry(source, target, length, (seeds[0], seeds[1]), known[name]))
        all_sums = np.concatenate(sums)
        write_file(directory / "checksums", [all_sums], self._disk)
        content = {
            **{key: value for key, value in body.items() if key not in _HEAD},
            "store_id": self._metadata.store_id,
            "checksums": checksums.content_checksum(all_sums.tobytes()),
        }
        data, digest = encode_document("segment", content)
        write_file(directory / "segment.json", [data], self._disk)
        return replace(ref, digest=digest)


_HEAD = ("engram_store", "format_version")


def _group_document(attributes: dict[str, Any]) -> bytes:
    """A Zarr v3 group."""
    document = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    return json.dumps(document, indent=2).encode()
