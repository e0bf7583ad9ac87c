"""What snapshots there are, and how much disk each of them holds."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engram_store.errors import StoreFileError
from engram_store.layout.documents import text, whole
from engram_store.layout.manifest import Manifest, check_layers, check_owner, read_manifest
from engram_store.layout.metadata import StoreMetadata
from engram_store.layout.paths import StorePaths
from engram_store.layout.pins import pins_by_step, read_pins
from engram_store.layout.snapshots import counted_steps

Inode = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotInfo:
    """One snapshot."""

    step: int
    """Steps applied before it."""
    made: str
    """UTC, ISO 8601; empty if unknown."""
    digest: str
    """SHA-256 of its manifest."""
    pins: tuple[str, ...]
    """Names that keep it."""
    generations: Mapping[int, int]
    """Number of the base generation, by layer."""
    segments: Mapping[int, int]
    """How many segments lie over it, by layer."""
    own_bytes: int
    """On disk, held by nothing else: what its removal alone would free."""
    shared_bytes: int
    """On disk, held by other snapshots, the tables as they are now, or an export too."""
    problem: str = ""
    """Why the manifest cannot be used; what it would say is empty or 0 then."""

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return {
            "step": self.step,
            "made": self.made,
            "digest": self.digest,
            "pins": list(self.pins),
            "generations": {str(layer): number for layer, number in self.generations.items()},
            "segments": {str(layer): count for layer, count in self.segments.items()},
            "own_bytes": self.own_bytes,
            "shared_bytes": self.shared_bytes,
            "problem": self.problem,
        }


def decode_snapshots(described: Any) -> list[SnapshotInfo]:
    """Inverse of `SnapshotInfo.to_json`, for a list of them.

    Raises: KeyError, TypeError, ValueError, AttributeError: JSON values of another kind.
    """
    return [
        SnapshotInfo(
            step=whole(entry["step"], "step"),
            made=text(entry["made"], "made"),
            digest=text(entry["digest"], "digest"),
            pins=texts(entry["pins"], "pins"),
            generations=_by_layer(entry["generations"], "generations"),
            segments=_by_layer(entry["segments"], "segments"),
            own_bytes=whole(entry["own_bytes"], "own_bytes"),
            shared_bytes=whole(entry["shared_bytes"], "shared_bytes"),
            problem=text(entry["problem"], "problem"),
        )
        for entry in a_list(described, "snapshots")
    ]


def a_list(value: Any, what: str) -> list[Any]:
    """A list of a JSON text. Raises: TypeError for others: a text has items too."""
    if not isinstance(value, list):
        raise TypeError(f"{what} is {value!r:.100}, not a list")
    return value


def texts(value: Any, what: str) -> tuple[str, ...]:
    """A list of texts. Raises: TypeError, ValueError."""
    return tuple(text(entry, what) for entry in a_list(value, what))


def named_number(name: str, what: str) -> int:
    """A number that is a name in a JSON object. Raises: ValueError: it is written otherwise."""
    number = whole(int(name), what)
    if str(number) != name:
        raise ValueError(f"{what} is {name!r:.100}, not a whole number")
    return number


def _by_layer(described: Any, what: str) -> dict[int, int]:
    return {named_number(layer, "layer"): whole(n, what) for layer, n in described.items()}


@dataclass(slots=True)
class _File:
    """One file, which may have several names."""

    disk_bytes: int
    links: int
    names: int = 0
    holders: set[int | None] = field(default_factory=set)
    """Steps of snapshots; None: the working manifest."""


def list_snapshots(paths: StorePaths, metadata: StoreMetadata) -> list[SnapshotInfo]:
    """The snapshots of a store, oldest first. Takes no lock; the store may be at work.

    Args:
        paths, metadata: of the store.

    Returns:
        Damaged ones too, with their `problem`; a damaged pin is left out and logged.
    """
    manifests: dict[int | None, Manifest] = {}
    digests: dict[int | None, str] = {}
    problems: dict[int, str] = {}
    for step in (*counted_steps(paths), None):
        path = paths.current if step is None else paths.snapshot(step)
        try:
            manifests[step], digests[step] = read_manifest(paths, step)
            check_owner(path, manifests[step], metadata.store_id)
            check_layers(path, manifests[step], metadata.tables)
        except StoreFileError as error:
            manifests.pop(step, None)
            if step is not None and path.exists():
                problems[step] = str(error)
    pins = pins_by_step(read_pins(paths, metadata.store_id, skip_damaged=True))
    files = _files_of(paths, manifests)
    found = [
        _describe(manifest, digests[step], pins.get(step, ()), files)
        for step, manifest in manifests.items()
        if step is not None
    ]
    found += [_unusable(step, problem, pins.get(step, ())) for step, problem in problems.items()]
    return sorted(found, key=lambda info: info.step)


def _describe(
    manifest: Manifest, digest: str, pins: tuple[str, ...], files: Mapping[Inode, _File]
) -> SnapshotInfo:
    step = manifest.step
    held = [file for file in files.values() if step in file.holders]
    own = sum(f.disk_bytes for f in held if f.holders == {step} and f.links <= f.names)
    return SnapshotInfo(
        step=step,
        made=manifest.made,
        digest=digest,
        pins=pins,
        generations={table.layer: table.generation for table in manifest.tables},
        segments={table.layer: len(table.segments) for table in manifest.tables},
        own_bytes=own,
        shared_bytes=sum(file.disk_bytes for file in held) - own,
    )


def _unusable(step: int, problem: str, pins: tuple[str, ...]) -> SnapshotInfo:
    return SnapshotInfo(
        step=step,
        made="",
        digest="",
        pins=pins,
        generations={},
        segments={},
        own_bytes=0,
        shared_bytes=0,
        problem=problem,
    )


def _files_of(paths: StorePaths, manifests: Mapping[int | None, Manifest]) -> dict[Inode, _File]:
    """Every file that a manifest names, and who names it."""
    holders: dict[Path, set[int | None]] = {}
    for step, manifest in manifests.items():
        for directory in named_directories(paths, manifest):
            holders.setdefault(directory, set()).add(step)
    files: dict[Inode, _File] = {}
    for directory, steps in holders.items():
        _count_names(directory, steps, files)
    for step in manifests.keys() - {None}:
        assert step is not None
        _count_name(paths.snapshot(step), {step}, files)
    return files


def named_directories(paths: StorePaths, manifest: Manifest) -> Iterator[Path]:
    """Directories of the base generations and segments that a manifest names."""
    for table in manifest.tables:
        yield paths.base(table.layer, table.generation)
        for segment in table.segments:
            yield paths.segment(table.layer, segment.number)


def _count_names(directory: Path, holders: set[int | None], files: dict[Inode, _File]) -> None:
    for where, _, names in os.walk(directory):
        for name in names:
            _count_name(Path(where) / name, holders, files)


def _count_name(path: Path, holders: set[int | None], files: dict[Inode, _File]) -> None:
    try:
        status = path.lstat()
    except OSError:
        return  # removed meanwhile
    file = files.setdefault(
        (status.st_dev, status.st_ino), _File(status.st_blocks * 512, status.st_nlink)
    )
    file.names += 1
    file.holders |= holders


def freed_bytes(directories: list[Path]) -> int:
    """Bytes on disk that removing directories would free: not of files with names elsewhere."""
    files: dict[Inode, _File] = {}
    for directory in directories:
        _count_names(directory, set(), files)
    return sum(file.disk_bytes for file in files.values() if file.links <= file.names)
