"""What a store is, told from its files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_store.layout.files import allocated_bytes
from engram_store.layout.manifest import check_layers, read_manifest
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

    path: Path
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
    check_layers(paths.current, manifest, metadata.tables)
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
        path=paths.root,
        metadata=metadata,
        step=manifest.step,
        snapshots=tuple(paths.snapshot_steps()),
        tables=tables,
    )


def description_json(description: StoreDescription) -> dict[str, Any]:
    """Everything a description holds, as JSON types."""
    metadata = description.metadata
    return {
        "path": str(description.path),
        "store_id": metadata.store_id,
        "fingerprint": metadata.fingerprint,
        "step": description.step,
        "snapshots": list(description.snapshots),
        "disk_bytes": sum(table.disk_bytes for table in description.tables.values()),
        "recipe": metadata.recipe.to_json(),
        "tables": [
            {
                **spec.to_json(),
                "generation": (files := description.tables[layer]).generation,
                "segments": files.segments,
                "segment_slots": files.segment_slots,
                "disk_bytes": files.disk_bytes,
            }
            for layer, spec in metadata.tables.items()
        ],
    }
