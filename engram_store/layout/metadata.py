"""What a store is: recipe, tables and fingerprint, kept in the Zarr group's attributes.

Everything that decides which row an n-gram reads is stored here and never derived again.
"""

import json
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
from engram_store.layout.arrays import check_length
from engram_store.layout.documents import FORMAT_VERSION, digest_of
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
        group = json.loads(paths.group.read_bytes())
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
        specs = [TableSpec.from_json(table) for table in attributes["tables"]]
        metadata = StoreMetadata(
            store_id=attributes["store_id"],
            recipe=recipe,
            tables={spec.layer: spec for spec in specs},
        )
    except (ConfigError, KeyError, TypeError) as error:
        raise ForeignFileError(paths.group, f"its attributes are damaged: {error}") from error
    if metadata.attributes()[_KEY] != attributes:
        raise ForeignFileError(
            paths.group,
            "recipe, token map or tables do not match the stored fingerprint and digest; a file "
            "was changed or replaced since the store was created",
        )
    return metadata


def _read_token_map(paths: StorePaths) -> np.ndarray[Any, np.dtype[np.int32]] | None:
    """int32 [vocabulary]; None where the recipe hashes raw ids."""
    metadata = paths.token_map / "zarr.json"
    if not metadata.exists():
        return None
    chunk = paths.token_map / "c" / "0"
    try:
        size = int(json.loads(metadata.read_bytes())["shape"][0])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ForeignFileError(metadata, f"is not the metadata of a Zarr array: {error}") from error
    check_length(chunk, 4 * size)
    return np.fromfile(chunk, "<i4")
