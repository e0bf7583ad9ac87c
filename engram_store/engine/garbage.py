"""Garbage: snapshots beyond those to keep, and files that nothing names any more."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engram_store.engine.merge import MERGED
from engram_store.errors import ConfigError, EngramStoreError
from engram_store.layout.disk import Disk
from engram_store.layout.documents import whole
from engram_store.layout.files import remove_tree, sync_directory
from engram_store.layout.manifest import Manifest
from engram_store.layout.metadata import StoreMetadata
from engram_store.layout.paths import StorePaths
from engram_store.layout.pins import pins_by_step, read_pins
from engram_store.layout.snapshots import find_snapshot, remove_snapshot
from engram_store.layout.usage import a_list, freed_bytes, named_number, texts

_logger = logging.getLogger(__name__)
_GENERATION = re.compile(r"g(\d{4,})")
_NUMBER = re.compile(r"(\d{6,})")


@dataclass(frozen=True, kw_only=True, slots=True)
class GarbageReport:
    """What was removed; with `dry_run` what would be."""

    removed: tuple[int, ...]
    """Steps of snapshots, ascending."""
    kept: tuple[int, ...]
    """Steps of the snapshots that remain."""
    pinned: Mapping[int, tuple[str, ...]]
    """Steps that remain because they are pinned, and the names."""
    in_use: tuple[int, ...]
    """Steps that remain because they are being read, by an export for instance."""
    directories: tuple[str, ...]
    """Base generations and segments, below the store's directory."""
    freed_bytes: int
    """On disk. What has names elsewhere, in an export for instance, is not freed."""
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return asdict(self) | {"pinned": {str(s): list(names) for s, names in self.pinned.items()}}


def decode_report(described: Any) -> GarbageReport:
    """Inverse of `GarbageReport.to_json`.

    Raises: KeyError, TypeError, ValueError, AttributeError: JSON values of another kind.
    """
    removed, kept, in_use = (
        tuple(whole(step, name) for step in a_list(described[name], name))
        for name in ("removed", "kept", "in_use")
    )
    if not isinstance(described["dry_run"], bool):
        raise TypeError(f"dry_run is {described['dry_run']!r:.100}, not true or false")
    return GarbageReport(
        removed=removed,
        kept=kept,
        pinned={
            named_number(step, "step"): texts(names, "pinned")
            for step, names in described["pinned"].items()
        },
        in_use=in_use,
        directories=texts(described["directories"], "directories"),
        freed_bytes=whole(described["freed_bytes"], "freed_bytes"),
        dry_run=described["dry_run"],
    )


def check_keep(keep: int | None) -> None:
    """Raises: ConfigError: fewer than one snapshot is to be kept."""
    if keep is not None and keep < 1:
        raise ConfigError(
            f"keep is {keep!r}; the newest snapshots that are kept are at least 1, or None: all"
        )


class Janitor:
    """Removes older snapshots on a thread of its own whenever one was made.

    Args:
        collect: removes all but so many; see `Catalog.collect`.
        keep: how many stay; None: nothing is ever removed.
    """

    def __init__(self, collect: Callable[[int], object], keep: int | None) -> None:
        """Raises: ConfigError: `keep` is less than 1."""
        check_keep(keep)
        self._collect, self._keep = collect, keep
        # Removing large files takes long, and whoever made the snapshot wants to go on training.
        self._thread = ThreadPoolExecutor(1, "engram-gc")

    def snapshot_made(self) -> None:
        """Begin; returns at once. What fails is logged, and tried again after the next one."""
        if self._keep is not None:
            self._thread.submit(self._run, self._keep)

    def _run(self, keep: int) -> None:
        try:
            self._collect(keep)
        except (EngramStoreError, OSError) as error:
            _logger.warning("older snapshots stay until the next one is made: %s", error)

    def stop(self) -> None:
        """Finish what runs and end the thread."""
        self._thread.shutdown()


def collect(
    paths: StorePaths,
    metadata: StoreMetadata,
    current: Manifest,
    disk: Disk,
    *,
    keep: int | None = None,
    dry_run: bool = False,
    unpublished: frozenset[tuple[int, int]] = frozenset(),
) -> GarbageReport:
    """Remove snapshots but the newest and the pinned ones, and then what nothing names.

    Nobody else may publish a manifest meanwhile.

    Args:
        paths, metadata: of the store.
        current: its working manifest.
        disk: what changes files.
        keep: how many of the newest snapshots stay; None: all.
        dry_run: only tell.
        unpublished: layer and number of merged segments that no manifest names yet.

    Raises:
        ConfigError: `keep` is less than 1.
        StoreFileError: a snapshot or a pin is damaged, so that it is unknown what must stay;
            files stay then.
    """
    check_keep(keep)
    steps = [step for step in paths.snapshot_steps() if step <= current.step]
    names = pins_by_step(read_pins(paths, metadata.store_id))
    old = steps[:-keep] if keep is not None else []
    wanted = [step for step in old if step not in names]
    gone = wanted if dry_run else _remove(paths, metadata.store_id, wanted, disk)
    kept = [step for step in steps if step not in gone]
    manifests = [current, *(find_snapshot(paths, metadata, kept, step) for step in kept)]
    directories = list(_unnamed(paths, metadata, manifests, unpublished))
    size = freed_bytes(directories)
    if not dry_run:
        for directory in directories:
            remove_tree(directory, disk)
    return GarbageReport(
        removed=tuple(gone),
        kept=tuple(kept),
        pinned={step: names[step] for step in old if step in names},
        in_use=tuple(step for step in wanted if step not in gone),
        directories=tuple(str(path.relative_to(paths.root)) for path in directories),
        freed_bytes=size,
        dry_run=dry_run,
    )


def _remove(paths: StorePaths, store_id: str, steps: list[int], disk: Disk) -> list[int]:
    """Remove snapshots, durably; returns those that are gone."""
    gone = [step for step in steps if remove_snapshot(paths, store_id, step, disk)]
    if gone:
        sync_directory(paths.snapshots, disk)
    return gone


def _unnamed(
    paths: StorePaths,
    metadata: StoreMetadata,
    manifests: list[Manifest],
    unpublished: frozenset[tuple[int, int]],
) -> Iterator[Path]:
    """Generations and segments that no manifest names; the first manifest is the working one.

    Newer numbers than its own are being written right now: no manifest names them yet. Merged
    segments have numbers far above; those that are being written are `unpublished`.
    """
    current = manifests[0]
    for layer in metadata.tables:
        files = [manifest.table(layer) for manifest in manifests]
        generations = {f.generation for f in files}
        segments = {ref.number for f in files for ref in f.segments}
        segments |= {number for table, number in unpublished if table == layer}
        base, overlay = paths.base(layer, 0).parent, paths.segment(layer, 0).parent
        yield from _others(base, _GENERATION, generations, current.table(layer).generation)
        yield from _others(overlay, _NUMBER, segments, current.sealed)


def _others(
    directory: Path, pattern: re.Pattern[str], kept: set[int], newest: int
) -> Iterator[Path]:
    """Numbered entries up to `newest` that are not to be kept, by name."""
    if not directory.is_dir():
        return
    for entry in sorted(directory.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match is None or int(match[1]) in kept:
            continue
        if int(match[1]) <= newest or int(match[1]) >= MERGED:
            yield entry
