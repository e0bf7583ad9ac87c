"""Making a store: everything is written under a temporary name and becomes real by one rename."""

import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.errors import ConfigError, StoreExistsError
from engram_store.layout import checksums
from engram_store.layout.arrays import (
    ArrayLayout,
    BaseDescription,
    chunk_identity,
    chunk_rows_of,
    table_arrays,
    write_base_description,
)
from engram_store.layout.disk import Disk
from engram_store.layout.files import disk_errors, make_directory, write_file
from engram_store.layout.manifest import (
    Manifest,
    TableFiles,
    now_text,
    write_current,
    write_snapshot,
)
from engram_store.layout.metadata import StoreMetadata
from engram_store.layout.paths import StorePaths
from engram_store.recipes import Recipe
from engram_store.types import RowBlock, RowDtype, TableSpec

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""
_NORMAL_ROWS = 1 << 14
"""Rows drawn from one random stream, so that values do not depend on the chunk size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Normal:
    """Initial rows drawn from a normal distribution."""

    std: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.std) and self.std > 0):
            raise ConfigError(
                f"std of the initial rows must be positive, got {self.std}; "
                "for zeros leave the initialisation out"
            )

    def rows(self, layer: int, first: int, count: int, spec: TableSpec) -> RowBlock:
        """Rows first..first+count-1 in storage dtype; `first` is a multiple of 2^14."""
        from engram_store.kernels.convert import narrow_scaled

        rows = np.empty((count, spec.dim), spec.dtype.storage)
        bits = rows.view(np.int16) if spec.dtype is RowDtype.FLOAT16 else rows
        values = np.empty((_NORMAL_ROWS, spec.dim), np.float32)
        for start in range(0, count, _NORMAL_ROWS):
            block = (first + start) // _NORMAL_ROWS
            seeds = np.random.SeedSequence([self.seed, layer, block])
            np.random.Generator(np.random.PCG64(seeds)).standard_normal(out=values, dtype="f4")
            target = bits[start : start + _NORMAL_ROWS]
            narrow_scaled(values[: len(target)], np.float32(self.std), target)
        return rows


def table_specs(
    recipe: Recipe, *, dim: int, overrides: Mapping[int, Mapping[str, Any]], **common: Any
) -> tuple[TableSpec, ...]:
    """One `TableSpec` per layer of a recipe; `overrides` changes single layers."""
    specs = (
        TableSpec(
            layer=layer.layer,
            rows=layer.stored_rows,
            **{"dim": dim, **common, **overrides.get(layer.layer, {})},
        )
        for layer in recipe.layers
    )
    # Stored, so that another limit in a later version does not move anybody's chunks.
    return tuple(replace(spec, chunk_rows=chunk_rows_of(spec)) for spec in specs)


def create_store(
    path: Path,
    recipe: Recipe,
    tables: Sequence[TableSpec],
    *,
    initial: Normal | None = None,
    progress: Progress | None = None,
) -> StoreMetadata:
    """Make a new store.

    Args:
        path: directory to make; it must not exist or be empty.
        recipe: how tokens become rows.
        tables: one per layer of the recipe.
        initial: initial rows; None is zeros, which use no disk until they are trained.
        progress: told how many bytes of initial rows are written.

    Raises:
        StoreExistsError: something is there already.
        ConfigError: tables and recipe do not fit each other.
        DiskFullError: nothing is left behind.
    """
    _check_tables(recipe, tables)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StoreExistsError(path, "already exists; choose another path or remove it first")
    metadata = StoreMetadata(
        store_id=uuid.uuid4().hex, recipe=recipe, tables={spec.layer: spec for spec in tables}
    )
    building = path.with_name(f".{path.name}.creating-{os.getpid()}")
    disk = Disk()
    make_directory(path.parent.absolute(), disk)
    try:
        with disk_errors(path):
            _write_store(StorePaths(building), metadata, initial, progress, disk)
            disk.rename(building, path)
            disk.sync_directory(path.parent.absolute())
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return metadata


def _check_tables(recipe: Recipe, tables: Sequence[TableSpec]) -> None:
    layers = {layer.layer: layer.stored_rows for layer in recipe.layers}
    given = {spec.layer: spec.rows for spec in tables}
    if layers != given or len(tables) != len(given):
        raise ConfigError(
            f"the recipe has tables {layers} (layer: rows), the table descriptions {given}; "
            "make them with `table_specs`"
        )


def _write_store(
    paths: StorePaths,
    metadata: StoreMetadata,
    initial: Normal | None,
    progress: Progress | None,
    disk: Disk,
) -> None:
    _write_zarr_metadata(paths, metadata, disk)
    total = sum(spec.rows * spec.row_bytes for spec in metadata.tables.values())

    def report() -> None:
        if progress is not None:
            progress(min(disk.written_bytes, total), total)

    files = []
    for spec in metadata.tables.values():
        sums: dict[str, dict[int, checksums.Checksums]] = {}
        for array in table_arrays(spec):
            sums[array.name] = {}
            if initial is None or array.name != "rows":
                continue
            for chunk in range(array.chunks):
                data = _initial_chunk(array, chunk, initial, spec)
                file = array.chunk_file(paths.base(spec.layer, 1), chunk)
                make_directory(file.parent, disk)
                write_file(file, [data], disk)
                disk.sync_directory(file.parent)
                identity = chunk_identity(metadata.store_id, spec.layer, array.name, chunk)
                sums[array.name][chunk] = checksums.block_checksums(data, identity)
                report()
        base = BaseDescription(checksums=sums)
        digest = write_base_description(paths, spec, 1, base, disk)
        files.append(TableFiles(layer=spec.layer, generation=1, base_digest=digest))
    make_directory(paths.snapshots, disk)
    manifest = Manifest(
        store_id=metadata.store_id,
        step=0,
        made=now_text(),
        lineage=1,
        sealed=0,
        tables=tuple(files),
    )
    write_snapshot(paths, manifest, disk)
    write_current(paths, manifest, disk)


def _initial_chunk(
    array: ArrayLayout, chunk: int, initial: Normal, spec: TableSpec
) -> NDArray[np.uint8]:
    """Bytes of one chunk of initial rows; rows beyond the table's end are zeros."""
    first = chunk * array.chunk_rows
    count = min(array.chunk_rows, spec.rows - first)
    data = np.zeros((array.chunk_rows, array.width), array.dtype)
    for start in range(0, count, _NORMAL_ROWS):
        step = min(_NORMAL_ROWS, count - start)
        data[start : start + step] = _normal_block(initial, spec, first + start, step)
    return data.reshape(-1).view(np.uint8)


def _normal_block(initial: Normal, spec: TableSpec, first: int, count: int) -> RowBlock:
    aligned = first // _NORMAL_ROWS * _NORMAL_ROWS
    return initial.rows(spec.layer, aligned, first - aligned + count, spec)[first - aligned :]


def _write_zarr_metadata(paths: StorePaths, metadata: StoreMetadata, disk: Disk) -> None:
    """The group, the token map and the (still empty) arrays of the first generation."""
    # Imported here: zarr takes most of a second to import and only creation needs it.
    import zarr

    root = zarr.create_group(paths.root, zarr_format=3, attributes=metadata.attributes())
    token_map = metadata.recipe.token_map
    raw: dict[str, Any] = {"compressors": None, "filters": None}
    if token_map is not None:
        array = root.create_array(
            "token_map",
            shape=token_map.shape,
            chunks=token_map.shape,
            dtype="<i4",
            # Zarr leaves out chunks of zeros, and a file that is missing is an error here.
            config={"write_empty_chunks": True},
            **raw,
        )
        array[:] = token_map
    for spec in metadata.tables.values():
        generation = paths.base(spec.layer, 1).relative_to(paths.root)
        for layout in table_arrays(spec):
            root.create_array(
                str(generation / layout.name),
                shape=(layout.rows, layout.width),
                chunks=(layout.chunk_rows, layout.width),
                dtype=layout.dtype,
                fill_value=0,
                dimension_names=("row", "value"),
                attributes=array_attributes(spec, layout),
                **raw,
            )
    _sync_tree(paths.root, disk)


def array_attributes(spec: TableSpec, layout: ArrayLayout) -> dict[str, Any]:
    """Attributes of a base array's Zarr metadata: what its numbers are."""
    if layout.name == "rows" and spec.dtype is RowDtype.BFLOAT16:
        return {"dtype": "bfloat16", "note": "uint16 holds the bits of bfloat16 values"}
    return {"dtype": layout.dtype.name}


def _sync_tree(root: Path, disk: Disk) -> None:
    """Make everything below a directory durable."""
    for directory, _, names in os.walk(root):
        for name in names:
            fd = os.open(Path(directory) / name, os.O_RDONLY)
            disk.sync(fd)
            disk.close(fd)
        disk.sync_directory(Path(directory))
