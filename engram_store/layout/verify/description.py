"""What never changes in a store: its description, its token map, and the Zarr metadata."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_store.errors import EngramStoreError, StoreFileError
from engram_store.layout.arrays import ArrayLayout
from engram_store.layout.create import array_attributes
from engram_store.layout.documents import FORMAT_VERSION, digest_of, parse_json
from engram_store.layout.metadata import read_metadata
from engram_store.layout.paths import StorePaths
from engram_store.layout.verify.blocks import BlockReader, open_problem
from engram_store.layout.verify.report import Damage, FileKind
from engram_store.types import TableSpec

_KEY = "engram_store"
_MAX_DOCUMENT_BYTES = 64 << 20
BROKEN = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError)
"""What a document of the wrong shape raises; digests rule it out in all but hostile ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What one has to know of a store to check its tables."""

    store_id: str
    specs: Mapping[int, TableSpec]
    token_map: bool
    """Whether there is one: raw ids may be hashed instead."""


class _DocumentError(Exception):
    """A document is not what it should be; the text is said after the file's name."""


def problem_of(error: Exception, path: Path) -> str:
    """Why a file could not be used, to be said after its name."""
    if isinstance(error, StoreFileError):
        return str(error).removeprefix(f"{path}: ")
    if isinstance(error, OSError):
        return open_problem(error)
    if isinstance(error, _DocumentError | EngramStoreError):
        return str(error)
    return f"is not what its kind of file looks like ({error!r})"


def is_store(paths: StorePaths) -> bool:
    """Whether a directory is a store, perhaps a damaged one."""
    if paths.current.exists() or paths.snapshot_steps():
        return True
    try:
        _attributes(_read_json(paths.group, BlockReader(lambda _: None)))
    except (OSError, _DocumentError):
        return False
    return True


def read_description(
    paths: StorePaths, reader: BlockReader
) -> tuple[Description | None, list[Damage]]:
    """The store's description, None if it is damaged, and the damages of what never changes."""
    damages: list[Damage] = []
    try:
        group = _read_json(paths.group, reader)
        attributes = _attributes(group)
        _check_group(group)
        specs = [TableSpec.from_json(table) for table in attributes["tables"]]
        token_map = attributes["recipe"]["token_map_sha256"]
        description = Description(
            store_id=str(attributes["store_id"]),
            specs={spec.layer: spec for spec in specs},
            token_map=token_map is not None,
        )
    except (OSError, EngramStoreError, _DocumentError, *BROKEN) as error:
        problem = problem_of(error, paths.group)
        return None, [Damage(file="zarr.json", kind=FileKind.GROUP, problem=problem)]
    if token_map is not None:
        damages += _check_token_map(paths, str(token_map), reader)
    for document in group_documents(description):
        damages += check_group_document(paths, document, reader)
    if not damages:
        # What opening refuses beyond that: numbers that make no recipe, a foreign fingerprint.
        try:
            read_metadata(paths)
        except (StoreFileError, *BROKEN) as error:
            problem = problem_of(error, paths.group)
            # Then nothing that it says about tables can be believed.
            return None, [Damage(file="zarr.json", kind=FileKind.GROUP, problem=problem)]
    return description, damages


def group_documents(description: Description) -> list[str]:
    """Zarr groups between the store and its base generations."""
    tables = [f"layers/{layer}" for layer in description.specs]
    groups = ["layers", *tables, *(f"{table}/base" for table in tables)]
    return [f"{group}/zarr.json" for group in groups]


def check_group_document(
    paths: StorePaths, name: str, reader: BlockReader, layer: int | None = None
) -> Iterator[Damage]:
    """Damage of the metadata of a group that only holds other groups and arrays."""
    try:
        _check_group(_read_json(paths.root / name, reader))
    except (OSError, _DocumentError) as error:
        problem = problem_of(error, paths.root / name)
        yield Damage(file=name, kind=FileKind.ZARR, problem=problem, layer=layer)


def check_array_document(
    paths: StorePaths, name: str, spec: TableSpec, array: ArrayLayout, reader: BlockReader
) -> Iterator[Damage]:
    """Damage of the metadata of a base array."""
    expected = {
        **_plain_array([array.rows, array.width], [array.chunk_rows, array.width]),
        "data_type": array.dtype.name,
        "dimension_names": ["row", "value"],
        "attributes": array_attributes(spec, array),
    }
    try:
        _check_fields(_read_json(paths.root / name, reader), expected)
    except (OSError, _DocumentError) as error:
        problem = problem_of(error, paths.root / name)
        yield Damage(file=name, kind=FileKind.ZARR, problem=problem, layer=spec.layer)


def _read_json(path: Path, reader: BlockReader) -> dict[str, Any]:
    with path.open("rb") as file:
        data = file.read(_MAX_DOCUMENT_BYTES)
    reader.count(len(data))
    try:
        document = parse_json(data)
    except ValueError as error:
        raise _DocumentError(f"is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise _DocumentError("is not a JSON object")
    return document


def _attributes(group: dict[str, Any]) -> dict[str, Any]:
    """The store's own attributes, after checking their digest."""
    outer = group.get("attributes")
    attributes = outer.get(_KEY) if isinstance(outer, dict) else None
    if not isinstance(attributes, dict):
        raise _DocumentError("is not the group of an engram-store")
    content = {key: value for key, value in attributes.items() if key != "digest"}
    try:
        actual = digest_of(content)
    except (ValueError, RecursionError):  # NaN, say: Python reads it, nobody writes it
        actual = None
    if attributes.get("digest") != actual:
        raise _DocumentError("recipe, tables or identity do not match their digest")
    if content.get("format_version") != FORMAT_VERSION:
        raise _DocumentError(
            f"has format version {content.get('format_version')!r}, this engram-store reads "
            f"{FORMAT_VERSION}; install a newer engram-store"
        )
    return attributes


def _check_token_map(paths: StorePaths, digest: str, reader: BlockReader) -> Iterator[Damage]:
    name, chunk = "token_map/zarr.json", "token_map/c/0"
    try:
        data = (paths.root / chunk).read_bytes()
        reader.count(len(data))
        if hashlib.sha256(data).hexdigest() != digest:
            raise _DocumentError("does not match the SHA-256 in the store's description")
    except (OSError, _DocumentError) as error:
        problem = problem_of(error, paths.root / chunk)
        yield Damage(file=chunk, kind=FileKind.TOKEN_MAP, problem=problem)
        data = b""
    try:
        document = _read_json(paths.root / name, reader)
        # The length comes from the map itself where that is whole.
        shape = [len(data) // 4] if data else document.get("shape")
        _check_fields(
            document, {**_plain_array(shape, shape), "data_type": "int32", "attributes": {}}
        )
    except (OSError, _DocumentError) as error:
        problem = problem_of(error, paths.root / name)
        yield Damage(file=name, kind=FileKind.TOKEN_MAP, problem=problem)


def _plain_array(shape: Any, chunk_shape: Any) -> dict[str, Any]:
    """Fields of an array whose chunk files are raw little-endian rows."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "fill_value": 0,
    }


def _check_group(document: dict[str, Any]) -> None:
    """Attributes of a group are its owner's; those of the store have a digest."""
    optional = {"attributes": document.get("attributes"), "consolidated_metadata": ...}
    _check_fields(document, {"zarr_format": 3, "node_type": "group"}, optional)
    if not isinstance(document.get("attributes"), dict):
        raise _DocumentError("has no attributes, or some that are no JSON object")


def _check_fields(
    document: dict[str, Any],
    expected: Mapping[str, Any],
    optional: Mapping[str, Any] | None = None,
) -> None:
    """Compare the fields of Zarr metadata; `...` in `optional` stands for any value.

    A field that is not known here would have to be understood (Zarr v3, section 'metadata'), so it
    is refused as Zarr readers refuse it.
    """
    optional = {"storage_transformers": []} if optional is None else optional
    for key, value in expected.items():
        if key not in document or document[key] != value:
            raise _DocumentError(f"has {key} {document.get(key)!r}, it should be {value!r}")
    for key in document.keys() - expected.keys():
        if key not in optional or optional[key] not in (..., document[key]):
            raise _DocumentError(f"has {key} {document[key]!r}, which does not belong there")
