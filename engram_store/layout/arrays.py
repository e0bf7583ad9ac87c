"""Base arrays: Zarr v3, uncompressed and unsharded, so that a chunk file is raw rows.

A chunk holds a power of two of rows (an address is then a shift and a mask) and at most 256 MiB.
A chunk that was never written has no file and stands for zeros, but only where the generation's
description says so: a file that is missing against the description is an error, never zeros.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_store.errors import ConfigError, ForeignFileError
from engram_store.layout import checksums
from engram_store.layout.disk import Disk
from engram_store.layout.documents import encode_document, read_document, read_json, whole
from engram_store.layout.files import check_length, replace_file, write_file
from engram_store.layout.paths import StorePaths
from engram_store.types import TableSpec

MAX_CHUNK_BYTES = 256 << 20
MIN_CHUNK_ROWS = 1024
MAX_DIM = 1 << 24
"""Values of a row: far beyond any model, and `MIN_CHUNK_ROWS` of them can still be mapped."""
_MAPPABLE_BYTES = 1 << 40
"""Any version's chunks are smaller; ours are given by `MAX_CHUNK_BYTES`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrayLayout:
    """One array of a table: its rows or its optimiser state."""

    name: str
    """Path below the generation's directory: 'rows', 'state/sum', 'state/moments'."""
    rows: int
    width: int
    dtype: np.dtype[Any]
    chunk_rows: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of this array."""
        return self.width * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk file; the last one is padded to it."""
        return self.chunk_rows * self.row_bytes

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.rows // self.chunk_rows)

    def chunk_file(self, generation: Path, chunk: int) -> Path:
        """File of a chunk (Zarr's default key encoding)."""
        return generation / self.name / "c" / str(chunk) / "0"


def chunk_rows_of(spec: TableSpec) -> int:
    """Rows per chunk of a new table, one grid for rows and state.

    Raises:
        ConfigError: a row is too wide.
    """
    if spec.dim > MAX_DIM:
        raise ConfigError(f"a row has at most {MAX_DIM:,} values, got dim {spec.dim:,}")
    widest = max(spec.row_bytes, spec.state_bytes)
    limit = max(MIN_CHUNK_ROWS, 1 << ((MAX_CHUNK_BYTES // widest).bit_length() - 1))
    return min(limit, chunk_rows_limit(spec))


def chunk_rows_limit(spec: TableSpec) -> int:
    """The most rows that a chunk of the table may have.

    Less than twice the rows of the table, and few enough that a chunk can be mapped.
    """
    mappable = _MAPPABLE_BYTES // max(spec.row_bytes, spec.state_bytes)
    return max(MIN_CHUNK_ROWS, min(1 << (spec.rows - 1).bit_length(), mappable))


def table_arrays(spec: TableSpec) -> tuple[ArrayLayout, ...]:
    """The arrays of a table: rows first, then state if its optimiser keeps any."""
    chunk_rows = spec.chunk_rows or chunk_rows_of(spec)
    arrays = [
        ArrayLayout(
            name="rows",
            rows=spec.rows,
            width=spec.dim,
            dtype=spec.dtype.storage,
            chunk_rows=chunk_rows,
        )
    ]
    if spec.state_name is not None:
        arrays.append(
            ArrayLayout(
                name=f"state/{spec.state_name}",
                rows=spec.rows,
                width=spec.state_width,
                dtype=np.dtype("<f4"),
                chunk_rows=chunk_rows,
            )
        )
    return tuple(arrays)


def chunk_identity(store_id: str, layer: int, array: str, chunk: int) -> int:
    """Checksum seed of a chunk file. No generation in it: unchanged chunks are hard links."""
    return checksums.identity(store_id, "base", layer, array, chunk)


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseDescription:
    """Which chunks of a generation have files, and their block checksums."""

    checksums: Mapping[str, Mapping[int, checksums.Checksums]]
    """By array name and chunk number."""


def write_base_description(
    paths: StorePaths,
    spec: TableSpec,
    generation: int,
    base: BaseDescription,
    disk: Disk,
) -> str:
    """Write `checksums` and `base.json` of a generation; returns the description's digest."""
    directory = paths.base(spec.layer, generation)
    blocks = [sums for array in base.checksums.values() for sums in array.values()]
    all_sums = np.concatenate([*blocks, np.empty(0, "<u8")])
    write_file(directory / "checksums", [all_sums], disk)
    content = {
        "layer": spec.layer,
        "generation": generation,
        "block_bytes": checksums.BLOCK_BYTES,
        "checksums": checksums.content_checksum(all_sums.tobytes()),
        "chunks": {name: sorted(array) for name, array in base.checksums.items()},
    }
    data, digest = encode_document("base generation", content)
    replace_file(directory / "base.json", data, disk)
    return digest


def read_base_description(
    paths: StorePaths, spec: TableSpec, generation: int, digest: str
) -> BaseDescription:
    """Inverse of `write_base_description`; also checks every chunk file's length.

    Raises:
        StoreFileError: a file is missing, foreign, truncated or damaged.
    """
    directory = paths.base(spec.layer, generation)
    body, actual = read_document(directory / "base.json", "base generation")
    if actual != digest or body.get("generation") != generation or body.get("layer") != spec.layer:
        raise ForeignFileError(directory / "base.json", "is not the one its manifest names")
    arrays = table_arrays(spec)
    try:
        chunks = {array.name: _chunk_list(body["chunks"], array) for array in arrays}
        expected = whole(body["checksums"], "checksums", below=1 << 64)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ForeignFileError(
            directory / "base.json", f"does not describe this table: {error!r}"
        ) from error
    blocks = {array.name: -(-array.chunk_bytes // checksums.BLOCK_BYTES) for array in arrays}
    count = sum(blocks[name] * len(numbers) for name, numbers in chunks.items())
    all_sums = checksums.read_checksums(directory / "checksums", count, expected)
    found: dict[str, dict[int, checksums.Checksums]] = {}
    start = 0
    for array in arrays:
        check_array_metadata(directory, array)
        found[array.name] = {}
        for chunk in chunks[array.name]:
            check_length(array.chunk_file(directory, chunk), array.chunk_bytes)
            found[array.name][chunk] = all_sums[start : start + blocks[array.name]]
            start += blocks[array.name]
    return BaseDescription(checksums=found)


def _chunk_list(described: Mapping[str, Any], array: ArrayLayout) -> list[int]:
    """Chunks of an array that have files. Raises: ValueError, TypeError, AttributeError."""
    numbers = [whole(n, "chunk", below=array.chunks) for n in described.get(array.name, ())]
    if numbers != sorted(set(numbers)):
        raise ValueError(f"the chunks of {array.name} are not in order")
    return numbers


def check_array_metadata(generation: Path, array: ArrayLayout) -> None:
    """Refuse an array whose chunk files are not the raw rows we would map.

    Raises:
        ForeignFileError: shape, dtype, chunk grid or codecs differ from the table's.
    """
    path = generation / array.name / "zarr.json"
    try:
        metadata = read_json(path)
        # Ours have two bytes at least, so that the order of bytes is always written down.
        codecs = [
            (codec["name"], codec.get("configuration", {}).get("endian"))
            for codec in metadata["codecs"]
        ]
        actual = {
            "shape": metadata["shape"],
            "data_type": metadata["data_type"],
            "chunk_shape": metadata["chunk_grid"]["configuration"]["chunk_shape"],
            "codecs": codecs,
            "fill_value": metadata["fill_value"],
            "chunk keys": metadata["chunk_key_encoding"]["name"],
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ForeignFileError(
            path, f"is not the metadata of a Zarr v3 array of raw rows: {error!r}"
        ) from error
    expected = {
        "shape": [array.rows, array.width],
        "data_type": array.dtype.name,
        "chunk_shape": [array.chunk_rows, array.width],
        "codecs": [("bytes", "little")],
        "fill_value": 0,
        "chunk keys": "default",
    }
    for key, value in expected.items():
        if actual[key] != value:
            raise ForeignFileError(path, f"has {key} {actual[key]}, this table needs {value}")
