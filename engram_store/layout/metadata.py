"""What a store is: recipe, tables and fingerprint, kept in the Zarr group's attributes.

Everything that decides which row an n-gram reads is stored here and never derived again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram_store.errors import (
    ConfigError,
    FingerprintMismatchError,
    ForeignFileError,
    StoreNotFoundError,
    UnknownVersionError,
)
from engram_store.layout.arrays import MAX_DIM, MIN_CHUNK_ROWS, chunk_rows_limit
from engram_store.layout.documents import FORMAT_VERSION, digest_of, read_json, text, whole
from engram_store.layout.files import check_length
from engram_store.layout.paths import StorePaths
from engram_store.recipes import Recipe
from engram_store.types import TableSpec

_KEY = "engram_store"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreMetadata:
    """The part of a store that never changes."""

    store_id: str
    recipe: Recipe
    tables: Mapping[int, TableSpec]

    def fingerprint_fields(self) -> dict[str, Any]:
        """Everything that decides what a row means and how it is stored."""
        tables = {
            f"layer {layer}": {"rows": spec.rows, "dim": spec.dim, "dtype": str(spec.dtype)}
            for layer, spec in self.tables.items()
        }
        return {**self.recipe.fingerprint_fields(), "tables": tables}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `fingerprint_fields`."""
        return digest_of(self.fingerprint_fields())

    def attributes(self) -> dict[str, Any]:
        """What `create` writes into the group's attributes."""
        content = {
            "format_version": FORMAT_VERSION,
            "store_id": self.store_id,
            "fingerprint": self.fingerprint,
            "recipe": self.recipe.to_json(),
            "tables": [spec.to_json() for spec in self.tables.values()],
        }
        return {_KEY: {**content, "digest": digest_of(content)}}


def check_recipe(metadata: StoreMetadata, recipe: Recipe) -> None:
    """Refuse a recipe other than the store's.

    Raises:
        FingerprintMismatchError: names every differing field with both values.
    """
    mine, theirs = metadata.recipe.fingerprint_fields(), recipe.fingerprint_fields()
    differences = {
        field: (mine.get(field), theirs.get(field))
        for field in sorted(mine.keys() | theirs.keys())
        if mine.get(field) != theirs.get(field)
    }
    if differences:
        raise FingerprintMismatchError("the given recipe", differences)


def read_metadata(paths: StorePaths) -> StoreMetadata:
    """Recipe and tables of the store in a directory.

    Raises:
        StoreNotFoundError: there is no store.
        ForeignFileError: a Zarr group of somebody else, or damaged.
        UnknownVersionError: written by a newer version.
    """
    try:
        group = read_json(paths.group)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreNotFoundError(
            paths.root, "no store here; make one with `engram-store create` or engram_store.create"
        ) from None
    except ValueError as error:
        raise ForeignFileError(paths.group, f"is not JSON: {error}") from error
    attributes = group.get("attributes") if isinstance(group, dict) else None
    attributes = attributes.get(_KEY) if isinstance(attributes, dict) else None
    if not isinstance(attributes, dict):
        raise ForeignFileError(paths.group, "is not the group of an engram-store")
    if attributes.get("format_version") != FORMAT_VERSION:
        raise UnknownVersionError(
            paths.group,
            f"has format version {attributes.get('format_version')!r}, this engram-store reads "
            f"{FORMAT_VERSION}; install a newer engram-store",
        )
    try:
        recipe = Recipe.from_json(attributes["recipe"], token_map=_read_token_map(paths))
        metadata = StoreMetadata(
            store_id=text(attributes["store_id"], "store_id"),
            recipe=recipe,
            tables=decode_tables(attributes["tables"], recipe),
        )
        expected = metadata.attributes()[_KEY]
    except (KeyError, TypeError, ValueError) as error:
        raise ForeignFileError(paths.group, f"its attributes are damaged: {error}") from error
    if expected != attributes:
        raise ForeignFileError(
            paths.group,
            "recipe, token map or tables do not match the stored fingerprint and digest; a file "
            "was changed or replaced since the store was created",
        )
    return metadata


def decode_tables(described: Any, recipe: Recipe) -> dict[int, TableSpec]:
    """Tables by layer, from the JSON values of their descriptions.

    Args:
        described: a list of what `TableSpec.to_json` makes.
        recipe: whose tables they are.

    Raises:
        ConfigError: not table descriptions, or not of this recipe's layers; sizes are checked
            before anything is allocated for them.
    """
    if not isinstance(described, list):
        raise ConfigError(f"tables are described by a list, got {described!r:.100}")
    specs = [_table_spec(table) for table in described]
    rows = {layer.layer: layer.stored_rows for layer in recipe.layers}
    if sorted((spec.layer, spec.rows) for spec in specs) != sorted(rows.items()):
        raise ConfigError(
            f"the recipe has tables {rows} (layer: rows), described are "
            f"{[(spec.layer, spec.rows) for spec in specs]}"
        )
    return {spec.layer: spec for spec in specs}


def _table_spec(described: Any) -> TableSpec:
    """Raises: ConfigError."""
    spec = TableSpec.from_json(described)
    try:
        whole(spec.layer, "layer")
        whole(spec.rows, "rows", 1)
        whole(spec.dim, "dim", 1, MAX_DIM + 1)
        if spec.chunk_rows is not None:
            whole(spec.chunk_rows, "chunk_rows", MIN_CHUNK_ROWS, chunk_rows_limit(spec) + 1)
    except ValueError as error:
        raise ConfigError(f"not a table description: {error}") from error
    if type(spec.seed) is not int or not isinstance(spec.stochastic_rounding, bool):
        raise ConfigError(
            "seed is a whole number and stochastic_rounding true or false, not "
            f"{spec.seed!r:.100} and {spec.stochastic_rounding!r:.100}"
        )
    return spec


def _read_token_map(paths: StorePaths) -> np.ndarray[Any, np.dtype[np.int32]] | None:
    """int32 [vocabulary]; None where the recipe hashes raw ids."""
    metadata = paths.token_map / "zarr.json"
    if not metadata.exists():
        return None
    chunk = paths.token_map / "c" / "0"
    try:
        size = whole(read_json(metadata)["shape"][0], "shape", below=1 << 31)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ForeignFileError(metadata, f"is not the metadata of a Zarr array: {error}") from error
    check_length(chunk, 4 * size)
    return np.fromfile(chunk, "<i4")
