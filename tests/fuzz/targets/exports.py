"""Exports: a store with one hostile file, and what becomes of it in a store of its own.

A digest or a checksum would refuse nearly every change, so what depends on a changed file is
sealed again up to the snapshot's manifest, as whoever made the file would do it.
"""

import json
import os
import random
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from engram_store import snapshots
from engram_store.errors import SnapshotMismatchError, StoreFileError, StoreNotFoundError
from engram_store.layout import checksums
from engram_store.layout.arrays import chunk_identity, table_arrays
from engram_store.layout.create import Normal, create_store
from engram_store.layout.disk import Disk
from engram_store.layout.manifest import Origin, read_manifest, write_current, write_snapshot
from engram_store.layout.paths import StorePaths
from engram_store.layout.segments import write_segment
from engram_store.layout.verify import verify_store
from tests.fuzz.mutators import SEPARATOR, mutate_bytes, mutate_json, split
from tests.fuzz.samples import LAYER, SLOTS, metadata, recipe
from tests.fuzz.target import Target
from tests.fuzz.targets.documents import sealed

STEP = 4
_SEALED, _LINK, _COPY, _GONE = 1, 2, 4, 8
"""Bits of an input's first byte: what depends on the file is sealed again; it is a symbolic link
to the content; the export shares no files; the file is not there."""
_NUMBER = 1
"""Of the segment."""


class Exported:
    """A store with a snapshot that has a base with files, and a segment."""

    def __init__(self) -> None:
        root = Path(tempfile.mkdtemp(prefix="export-"))
        self.paths = StorePaths(root / "from")
        with mock.patch("uuid.uuid4", return_value=uuid.UUID(metadata().store_id)):
            specs = list(metadata().tables.values())
            self.metadata = create_store(self.paths.root, recipe(), specs, initial=Normal(std=1.0))
        spec, disk = self.metadata.tables[LAYER], Disk()
        segment = write_segment(
            self.paths,
            self.metadata.store_id,
            spec,
            number=_NUMBER,
            slots=SLOTS,
            parts={
                "row_ids": [np.arange(SLOTS, dtype="<i4") % spec.rows],
                "rows": [np.ones((SLOTS, spec.dim), spec.dtype.storage)],
                "state": [np.ones((SLOTS, spec.state_width), "<f4")],
            },
            disk=disk,
        )
        created, _ = read_manifest(self.paths)
        manifest = replace(
            created.with_segments(LAYER, (segment,)),
            step=STEP,
            sealed=_NUMBER,
            origins=(Origin(store_id="ab" * 16, step=STEP, digest="cd" * 32),),
        )
        self.paths.snapshot(0).unlink()
        write_snapshot(self.paths, manifest, disk)
        write_current(self.paths, manifest, disk)
        self.target, self.elsewhere = root / "to", root / "elsewhere"
        self.files = {
            str(path.relative_to(self.paths.root)): path.read_bytes()
            for path in sorted(self.paths.root.rglob("*"))
            if path.is_file()
        }
        self.snapshot = f"snapshots/{STEP:09d}.json"


@cache
def exported() -> Exported:
    """One per process; what an input changes is written anew after it."""
    return Exported()


# ---------------------------------------------------------------------- sealing again


def _sealed_again(files: dict[str, bytes], changed: str) -> None:
    """Make what depends on a changed file fit it, as far as it can be read."""
    try:
        layer, kind, number = _place(changed)
        if kind == "base":
            digest = _seal_base(files, layer, f"layers/{layer}/base/{number}", changed)
            _name_in_manifest(files, layer, {"base_digest": digest}, None)
        elif kind == "segments":
            digest = _seal_segment(files, layer, f"layers/{layer}/segments/{number}", changed)
            _name_in_manifest(files, layer, None, {"digest": digest})
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError):
        pass
    name = exported().snapshot
    files[name] = sealed(files[name])[0]


def _place(name: str) -> tuple[int, str, str]:
    """Layer, 'base' or 'segments', and which. Raises: IndexError, ValueError: none of them."""
    parts = name.split("/")
    return int(parts[1]), parts[2], parts[3]


def _seal_base(files: dict[str, bytes], layer: int, where: str, changed: str) -> str:
    spec = exported().metadata.tables[layer]
    body: Any = json.loads(files[f"{where}/base.json"])
    if not changed.endswith("/checksums"):
        sums = []
        for array in table_arrays(spec):
            for chunk in body["chunks"][array.name]:
                data = files[f"{where}/{array.name}/c/{chunk}/0"]
                identity = chunk_identity(exported().metadata.store_id, layer, array.name, chunk)
                sums.append(_sums(data, identity))
        files[f"{where}/checksums"] = b"".join(sums)
    body["checksums"] = checksums.content_checksum(files[f"{where}/checksums"])
    files[f"{where}/base.json"], digest = sealed(json.dumps(body).encode())
    return digest


def _seal_segment(files: dict[str, bytes], layer: int, where: str, changed: str) -> str:
    if not changed.endswith("/checksums"):
        names = [name for name in ("row_ids", "rows", "state") if f"{where}/{name}" in files]
        identities = [
            checksums.identity(exported().metadata.store_id, "segment", layer, _NUMBER, name)
            for name in names
        ]
        sums = [_sums(files[f"{where}/{n}"], i) for n, i in zip(names, identities, strict=True)]
        files[f"{where}/checksums"] = b"".join(sums)
    body: Any = json.loads(files[f"{where}/segment.json"])
    body["checksums"] = checksums.content_checksum(files[f"{where}/checksums"])
    files[f"{where}/segment.json"], digest = sealed(json.dumps(body).encode())
    return digest


def _sums(data: bytes, identity: int) -> bytes:
    return checksums.block_checksums(np.frombuffer(data, np.uint8), identity).tobytes()


def _name_in_manifest(
    files: dict[str, bytes],
    layer: int,
    base: dict[str, Any] | None,
    segment: dict[str, Any] | None,
) -> None:
    name = exported().snapshot
    body: Any = json.loads(files[name])
    for table in body["tables"]:
        if table["layer"] == layer:
            table.update(base or {})
            for ref in table["segments"] if segment else ():
                ref.update(segment)
    files[name] = json.dumps(body).encode()


# ---------------------------------------------------------------------- the target


def _check_export(data: bytes) -> None:
    """It is refused and nothing is there, or the new store is whole and needs nobody."""
    store = exported()
    kind, name_bytes, content = split(data, 3)
    bits, name = (kind or b"\0")[0], name_bytes.decode(errors="replace")
    if name not in store.files:
        return
    files = {**store.files, name: content}
    if bits & _SEALED:
        _sealed_again(files, name)
    changed = {path for path, found in files.items() if found != store.files[path]} | {name}
    try:
        for path in changed:
            (store.paths.root / path).write_bytes(files[path])
        if bits & (_LINK | _GONE):
            (store.paths.root / name).unlink()
        if bits & _LINK:
            store.elsewhere.write_bytes(files[name])
            (store.paths.root / name).symlink_to(store.elsewhere)
        _check_made(copy=bool(bits & _COPY))
        damaged = content != store.files[name] and not bits & _SEALED
        assert not (damaged and _is_data(Path(name))), "damage was carried on"
    finally:
        shutil.rmtree(store.target, ignore_errors=True)
        for path in changed:
            (store.paths.root / path).unlink(missing_ok=True)
            (store.paths.root / path).write_bytes(store.files[path])


def _check_made(*, copy: bool) -> None:
    store = exported()
    before = {path: path.read_bytes() for path in _files_below(store.paths.root)}
    try:
        report = snapshots.export(store.paths.root, "newest", store.target, copy=copy)
    except Exception:
        beside = [entry.name for entry in store.target.parent.iterdir()]
        assert set(beside) <= {"from", "elsewhere"}, f"a refused export left {beside}"
        raise
    finally:
        after = {path: path.read_bytes() for path in _files_below(store.paths.root)}
        assert after == before, "the store that is exported was changed"
    new = StorePaths(store.target)
    assert report.snapshot.store_id != report.origin.store_id
    assert not any(path.is_symlink() for path in new.root.rglob("*")), "it needs another's files"
    if copy:
        assert not report.linked
        assert all(path.stat().st_nlink == 1 for path in _files_below(new.root))
    verified = verify_store(new)
    assert verified.ok, [(damage.where, damage.problem) for damage in verified.damages]
    assert new.snapshot_steps() == [report.snapshot.step]
    _check_same_data(new)


def _check_same_data(new: StorePaths) -> None:
    """Rows and state are those of the files that it was made of."""
    data = [path for path in _files_below(new.root) if _is_data(path)]
    assert data
    for path in data:
        source = exported().paths.root / path.relative_to(new.root)
        assert path.read_bytes() == source.read_bytes(), f"{path.name} is another one"


def _files_below(root: Path) -> list[Path]:
    return [Path(where) / name for where, _, names in os.walk(root) for name in names
            if (Path(where) / name).is_file()]  # fmt: skip


def _is_data(path: Path) -> bool:
    return path.name in ("row_ids", "rows", "state") or path.parent.parent.name == "c"


def _input(bits: int, name: str, content: bytes) -> bytes:
    return SEPARATOR.join((bytes([bits]), name.encode(), content))


def _exports() -> Iterator[bytes]:
    store = exported()
    yield _input(_SEALED, store.snapshot, store.files[store.snapshot])
    for name, content in store.files.items():
        yield _input(_SEALED, name, content)
        yield _input(_LINK, name, content)
    segment = f"layers/{LAYER}/segments/{_NUMBER:06d}"
    for name in (f"{segment}/rows", f"{segment}/segment.json"):
        yield _input(_COPY, name, store.files[name])
        yield _input(_GONE, name, b"")
        yield _input(_SEALED, name, store.files[name][:-1])
    yield _input(0, f"{segment}/rows", bytes(len(store.files[f"{segment}/rows"])))
    yield _input(_SEALED, f"{segment}/rows", bytes(len(store.files[f"{segment}/rows"])))
    changes: tuple[Callable[[Any], object], ...] = (
        lambda table: table["segments"].append(table["segments"][0]),
        lambda table: table["segments"][0].update(slots=2**40 - 1),
        lambda table: table["segments"][0].update(number=2**62),
        lambda table: table.update(generation=2**62),
        lambda table: table["segments"].clear(),
    )
    for change in changes:
        body = json.loads(store.files[store.snapshot])
        change(next(table for table in body["tables"] if table["layer"] == LAYER))
        for bits in (_SEALED, _SEALED | _COPY):
            yield _input(bits, store.snapshot, json.dumps(body).encode())


def _mutate(data: bytes, rng: random.Random) -> bytes:
    kind, name, content = split(data, 3)
    match rng.randrange(6):
        case 0:
            kind = bytes([rng.randrange(16)])
        case 1:
            chosen = rng.choice(sorted(exported().files))
            name, content = chosen.encode(), exported().files[chosen]
    if rng.randrange(4):
        change = mutate_json if name.endswith(b".json") else mutate_bytes
        content = change(content, rng)
    return SEPARATOR.join((kind, name, content))


TARGETS = (
    Target(
        name="export",
        check=_check_export,
        seeds=_exports,
        allowed=(StoreFileError, SnapshotMismatchError, StoreNotFoundError),
        mutate=_mutate,
    ),
)
