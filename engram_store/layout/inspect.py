"""What a store is, told from its files."""

from collections.abc import Mapping
from dataclasses import dataclass

from engram_store.layout.files import allocated_bytes
from engram_store.layout.manifest import read_manifest
from engram_store.layout.metadata import StoreMetadata, read_metadata
from engram_store.layout.paths import StorePaths


@dataclass(frozen=True, kw_only=True, slots=True)
class TableDescription:
    """Files of one table, as the working manifest names them."""

    generation: int
    segments: int
    segment_slots: int
    """Rows in segments, a row counted once per segment."""
    disk_bytes: int
    """Space really used, all generations and segments together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreDescription:
    """One store."""

    metadata: StoreMetadata
    step: int
    """Steps sealed to disk; a store at work may be ahead of it."""
    snapshots: tuple[int, ...]
    tables: Mapping[int, TableDescription]


def describe(paths: StorePaths) -> StoreDescription:
    """Read a store's description.

    Raises:
        StoreNotFoundError, StoreFileError.
    """
    metadata = read_metadata(paths)
    manifest, _ = read_manifest(paths)
    tables = {}
    for layer in metadata.tables:
        files = manifest.table(layer)
        tables[layer] = TableDescription(
            generation=files.generation,
            segments=len(files.segments),
            segment_slots=sum(segment.slots for segment in files.segments),
            disk_bytes=allocated_bytes(paths.layer(layer)),
        )
    return StoreDescription(
        metadata=metadata,
        step=manifest.step,
        snapshots=tuple(paths.snapshot_steps()),
        tables=tables,
    )
