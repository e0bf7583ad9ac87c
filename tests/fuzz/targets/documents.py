"""JSON files of a store: what carries a digest is sealed again, so that the inside is reached."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from engram_store.engine.catalog import Catalog, check_files
from engram_store.errors import StoreFileError
from engram_store.layout.arrays import (
    check_array_metadata,
    read_base_description,
    table_arrays,
)
from engram_store.layout.checksums import content_checksum
from engram_store.layout.disk import Disk
from engram_store.layout.documents import digest_of, read_document
from engram_store.layout.inspect import describe, description_json
from engram_store.layout.manifest import check_owner, encode_manifest, read_manifest
from engram_store.layout.metadata import StoreMetadata, read_metadata
from engram_store.layout.verify import verify_store
from engram_store.recipes import Recipe
from engram_store.types import TableSpec
from tests.fuzz.mutators import SEPARATOR, mutate_bytes, mutate_json, mutate_parts, split
from tests.fuzz.samples import manifest, metadata, store_files
from tests.fuzz.target import Target


def sealed(data: bytes) -> tuple[bytes, str]:
    """A document with the digest that its content needs, if it is an object that has one."""
    try:
        body = json.loads(data)
        body.pop("digest", None)
        digest = digest_of(body)
    except (AttributeError, TypeError, ValueError, RecursionError):
        return data, ""
    return json.dumps({**body, "digest": digest}).encode(), digest


def _check_document(data: bytes) -> None:
    """As it is: the digest is wrong after nearly every change."""
    path = store_files().paths.root / "document.json"
    path.write_bytes(data)
    body, digest = read_document(path, "manifest")
    assert digest_of(body) == digest


def _check_manifest(data: bytes) -> None:
    paths = store_files().paths
    data, digest = sealed(data)
    paths.snapshot(7).write_bytes(data)
    try:
        found, actual = read_manifest(paths, 7)
    finally:
        paths.snapshot(7).unlink()
    check_owner(paths.snapshot(7), found, metadata().store_id)
    assert actual == digest
    # Readable means that it can be written again, which is what a seal does with it.
    assert json.loads(encode_manifest(found)[0])["tables"] == json.loads(data)["tables"]
    assert b"\0" not in os.fsencode(found.memtables)
    assert len({table.layer for table in found.tables}) == len(found.tables)
    for table in found.tables:
        numbers = [table.layer, table.generation]
        numbers += [n for segment in table.segments for n in (segment.number, segment.slots)]
        # They are parts of paths and lengths of files.
        assert all(type(number) is int and number >= 0 for number in numbers)


def _check_files(data: bytes) -> None:
    """Every file that a working manifest names, as opening a store reads them."""
    store = store_files()
    data, _ = sealed(data)
    whole = store.paths.current.read_bytes()
    store.paths.current.write_bytes(data)
    try:
        manifest = Catalog(store.paths, store.metadata, Disk()).manifest
        parts = check_files(store.paths, store.metadata, manifest)
        described = describe(store.paths)
    finally:
        store.paths.current.write_bytes(whole)
    assert parts.keys() == described.tables.keys()


def _working_manifests() -> Iterator[bytes]:
    yield store_files().paths.current.read_bytes()
    current, _ = read_manifest(store_files().paths)
    elsewhere = replace(current.tables[1], layer=9)
    for tables in (current.tables[:1], (*current.tables, elsewhere), (elsewhere,)):
        yield encode_manifest(replace(current, tables=tables))[0]


def _manifests() -> Iterator[bytes]:
    yield encode_manifest(manifest())[0]
    yield store_files().paths.snapshot(0).read_bytes()
    yield b"{}"
    yield b"not JSON"
    yield b""


def _check_base(data: bytes) -> None:
    """`base.json` and `checksums` of a generation, whose seals are made right."""
    store = store_files()
    document, sums = split(data, 2)
    try:
        body: Any = json.loads(document)
        body["checksums"] = content_checksum(sums)
        document = json.dumps(body).encode()
    except (TypeError, ValueError, RecursionError):
        pass
    document, digest = sealed(document)
    (store.base_directory / "base.json").write_bytes(document)
    (store.base_directory / "checksums").write_bytes(sums)
    rows = table_arrays(store.spec)[0]
    rows.chunk_file(store.base_directory, 0).parent.mkdir(parents=True, exist_ok=True)
    rows.chunk_file(store.base_directory, 0).write_bytes(bytes(rows.chunk_bytes))
    base = read_base_description(store.paths, store.spec, 1, digest)
    for array in table_arrays(store.spec):
        for chunk, of_chunk in base.checksums[array.name].items():
            assert 0 <= chunk < array.chunks
            assert len(of_chunk) == -(-array.chunk_bytes // (1 << 16))


def _bases() -> Iterator[bytes]:
    directory = store_files().base_directory
    document = json.loads((directory / "base.json").read_bytes())
    sums = (directory / "checksums").read_bytes()
    yield json.dumps(document).encode() + SEPARATOR + sums
    document["chunks"]["rows"] = [0]
    yield json.dumps(document).encode() + SEPARATOR + bytes(8)


def _check_array(data: bytes) -> None:
    store = store_files()
    array = table_arrays(store.spec)[0]
    file = store.base_directory / array.name / "zarr.json"
    whole = _ARRAY.setdefault("zarr.json", file.read_bytes())
    file.write_bytes(data)
    try:
        check_array_metadata(store.base_directory, array)
    finally:
        file.write_bytes(whole)
    body = json.loads(data)
    assert body["shape"] == [array.rows, array.width]
    assert body["codecs"][0]["configuration"]["endian"] == "little"


_ARRAY: dict[str, bytes] = {}


def _arrays() -> Iterator[bytes]:
    yield (store_files().base_directory / "rows" / "zarr.json").read_bytes()
    yield store_files().paths.group.read_bytes()
    yield b"[]"


def _check_group(data: bytes) -> None:
    """The group, its token map's metadata and the token map; digest and fingerprint made right."""
    paths = store_files().paths
    group, token_map, ids = split(data, 3)
    paths.group.write_bytes(_sealed_group(group))
    (paths.token_map / "zarr.json").write_bytes(token_map)
    (paths.token_map / "c" / "0").write_bytes(ids)
    found = read_metadata(paths)
    assert {layer.layer for layer in found.recipe.layers} == set(found.tables)
    assert isinstance(found.store_id, str)
    for spec in found.tables.values():
        sizes = (spec.layer, spec.rows, spec.dim, spec.seed, spec.chunk_rows or 1)
        assert all(type(size) is int for size in sizes)
        assert all(array.chunk_bytes < 2**47 for array in table_arrays(spec))
    json.dumps(description_json(describe(paths)))


def _sealed_group(data: bytes) -> bytes:
    try:
        body = json.loads(data)
        attributes = body["attributes"]["engram_store"]
        attributes.pop("digest", None)
        recipe = Recipe.from_json(attributes["recipe"], store_files().metadata.recipe.token_map)
        specs = [TableSpec.from_json(table) for table in attributes["tables"]]
        tables = {spec.layer: spec for spec in specs}
        described = StoreMetadata(store_id=attributes["store_id"], recipe=recipe, tables=tables)
        attributes["fingerprint"] = described.fingerprint
        attributes["digest"] = digest_of(attributes)
        return json.dumps(body).encode()
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return data


def _groups() -> Iterator[bytes]:
    paths = store_files().paths
    parts = [paths.group, paths.token_map / "zarr.json", paths.token_map / "c" / "0"]
    yield SEPARATOR.join(part.read_bytes() for part in parts)
    yield b"{}" + SEPARATOR + b"{}" + SEPARATOR


def _check_verify(data: bytes) -> None:
    """One file of a store with another content: told, never raised."""
    store = store_files()
    name, content = split(data, 2)
    if name not in _STORE:
        return
    path = store.paths.root / name.decode()
    path.write_bytes(content)
    try:
        report = verify_store(store.paths)
    finally:
        path.write_bytes(_STORE[name])
    json.dumps(report.to_json())
    advice = [report.advice(damage) for damage in report.damages]
    assert all(advice) or report.ok
    same, binary = content == _STORE[name], not name.endswith(b".json")
    assert report.ok if same else not (binary and report.ok)


_STORE: dict[bytes, bytes] = {}


def _stores() -> Iterator[bytes]:
    root = store_files().paths.root
    for path in sorted(root.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(root)).encode()
            _STORE[name] = path.read_bytes()
            yield name + SEPARATOR + _STORE[name]


def _check_names(data: bytes) -> None:
    """File names in the snapshots' directory: every step that is told has its file."""
    paths = store_files().paths
    made = [
        paths.snapshots / name.decode(errors="surrogateescape")
        for name in data.split(b"\n")[:20]
        if name.strip(b".") and b"/" not in name and b"\0" not in name and len(name) < 200
    ]
    try:
        for path in made:
            path.touch()
        steps = paths.snapshot_steps()
        assert len(set(steps)) == len(steps)
        assert all(paths.snapshot(step).exists() for step in steps)
    finally:
        for path in made:
            if path != paths.snapshot(0):
                path.unlink(missing_ok=True)


def _names() -> Iterator[bytes]:
    yield b"000000007.json\n000000012.json.tmp\n1234567890.json\nnotes.txt"
    yield b"0000000012.json\n000000012.json"
    yield "\N{ARABIC-INDIC DIGIT THREE}".encode() * 9 + b".json"


_FILES = (StoreFileError,)
TARGETS = (
    Target(
        name="document",
        check=_check_document,
        seeds=_manifests,
        allowed=_FILES,
        mutate=mutate_json,
    ),
    Target(
        name="manifest",
        check=_check_manifest,
        seeds=_manifests,
        allowed=_FILES,
        mutate=mutate_json,
    ),
    Target(
        name="store-files",
        check=_check_files,
        seeds=_working_manifests,
        allowed=_FILES,
        mutate=mutate_json,
    ),
    Target(
        name="base",
        check=_check_base,
        seeds=_bases,
        allowed=_FILES,
        mutate=mutate_parts(mutate_json, mutate_bytes),
    ),
    Target(
        name="array-metadata",
        check=_check_array,
        seeds=_arrays,
        allowed=_FILES,
        mutate=mutate_json,
    ),
    Target(
        name="group",
        check=_check_group,
        seeds=_groups,
        allowed=_FILES,
        mutate=mutate_parts(mutate_json, mutate_json, mutate_bytes),
    ),
    Target(
        name="verify",
        check=_check_verify,
        seeds=_stores,
        allowed=_FILES,
        mutate=lambda data, rng: mutate_parts(lambda name, _: name, mutate_json)(data, rng),
    ),
    Target(name="snapshot-names", check=_check_names, seeds=_names, allowed=()),
)
