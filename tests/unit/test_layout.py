"""The bytes on disk: plain Zarr v3 that other tools open, checksums, and the literal format."""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import xxhash
import zarr
from hypothesis import given
from hypothesis import strategies as st

import engram_store
from engram_store.engine.memtable import Commit, Memtable, boot_id
from engram_store.layout import arrays, checksums
from engram_store.layout.create import create_store, table_specs
from engram_store.layout.disk import Disk
from engram_store.layout.documents import canonical, encode_document, read_document
from engram_store.layout.files import allocated_bytes
from engram_store.layout.manifest import Mark, read_manifest, write_current, write_snapshot
from engram_store.layout.paths import StorePaths
from engram_store.layout.segments import open_segment, read_segment_checksums, write_segment
from engram_store.recipes import Family, LayerHash, Recipe
from engram_store.types import OptimizerKind, TableSpec
from tests.pairs import INITIAL, MakePair, MakeStore, Pair, specs_of, tables_of, tiny_overlay_bytes

SPEC = TableSpec(layer=3, rows=10, dim=2, optimizer=OptimizerKind.ROWWISE_ADAGRAD)
STORE_ID = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of 16 chunks of 1,024 rows."""
    monkeypatch.setattr(arrays, "MAX_CHUNK_BYTES", 1 << 10)


def newest_base(path: Path, layer: int) -> Path:
    return sorted((path / "layers" / str(layer) / "base").glob("g*"))[-1]


def seal_bases_again(path: Path, tables: Mapping[int, TableSpec]) -> None:
    """Give the changed rows of a closed store's base the checksums that they have now."""
    paths, disk = StorePaths(path), Disk()
    manifest, _ = read_manifest(paths)
    for layer, spec in tables.items():
        files = manifest.table(layer)
        base = arrays.read_base_description(paths, spec, files.generation, files.base_digest)
        chunk = np.fromfile(newest_base(path, layer) / "rows" / "c" / "0" / "0", np.uint8)
        identity = arrays.chunk_identity(manifest.store_id, layer, "rows", 0)
        sums = {**base.checksums, "rows": {0: checksums.block_checksums(chunk, identity)}}
        described = arrays.BaseDescription(checksums=sums)
        digest = arrays.write_base_description(paths, spec, files.generation, described, disk)
        manifest = manifest.with_table(replace(files, base_digest=digest))
    write_current(paths, manifest, disk)
    write_snapshot(paths, manifest, disk)


def array_names(spec: TableSpec) -> list[str]:
    return [array.name for array in arrays.table_arrays(spec)]


def read_with_tensorstore(path: Path) -> np.ndarray[Any, Any]:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    return np.asarray(tensorstore.open(spec, open=True).result().read().result())


# ---------------------------------------------------------------------- Zarr


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.usefixtures("small_chunks")
def test_other_tools_open_the_base_and_see_the_same_bytes(make_pair: MakePair, dtype: str) -> None:
    """zarr-python and tensorstore, rows and state, as created and after a fold."""
    pair = make_pair(dtype=dtype)
    for round_ in range(2):
        for layer, tables in tables_of(pair.store).items():
            base = newest_base(pair.path, layer)
            for name, expected in zip(array_names(pair.store.tables[layer]), tables, strict=True):
                array = zarr.open_array(base / name, mode="r")
                assert array.shape == expected.shape
                assert np.asarray(array[:]).tobytes() == expected.tobytes(), round_
                assert read_with_tensorstore(base / name).tobytes() == expected.tobytes()
                assert array.attrs["dtype"] == (dtype if name == "rows" else "float32")
        pair.train(2)
        pair.snapshot()
        pair.store.fold()


def test_the_store_is_a_zarr_group_with_its_description(
    make_store: MakeStore, recipe: Recipe
) -> None:
    """Format version, recipe and tables are attributes; the token map is an array."""
    path = make_store()
    group = zarr.open_group(path, mode="r")
    attributes = group.attrs["engram_store"]
    assert isinstance(attributes, dict)
    assert attributes["format_version"] == 1
    assert attributes["recipe"] == recipe.to_json()
    np.testing.assert_array_equal(np.asarray(group["token_map"]), recipe.token_map)


def test_zeros_take_no_disk(make_store: MakeStore) -> None:
    """No chunk file, also not for the state; a trained chunk gets one by the fold."""
    path = make_store(initial=None)
    assert not list(path.rglob("c/*/0"))
    assert allocated_bytes(path / "layers") < 64 * 1024
    random = make_store("b")
    assert {file.parts[-4] for file in random.rglob("layers/*/base/*/*/c/*/0")} == {"rows"}


@pytest.mark.usefixtures("small_chunks")
def test_unchanged_chunks_are_hard_links_after_a_fold(make_pair: MakePair) -> None:
    """Only chunks with a trained row are written; zeros that stayed zeros get no file."""
    pair = make_pair()
    pair.announce(np.array([[9, 9, 9]]), 0).push_random(pair.rng)
    touched = {
        layer: {
            int(row) // 1024 for row in pair.oracle.announce(np.array([[9, 9, 9]])).row_ids(layer)
        }
        for layer in pair.store.tables
    }
    pair.commit()
    pair.snapshot()
    pair.store.fold()
    for layer, spec in pair.store.tables.items():
        old, new = (pair.path / "layers" / str(layer) / "base" / f"g000{i}" for i in (1, 2))
        layout = arrays.table_arrays(spec)[0]
        assert layout.chunks > 8
        for chunk in range(layout.chunks):
            same = layout.chunk_file(old, chunk).samefile(layout.chunk_file(new, chunk))
            assert same == (chunk not in touched[layer])
        state = new / "state" / "sum" / "c"
        assert {int(entry.name) for entry in state.iterdir()} == touched[layer]
    pair.check()


def test_rows_beyond_the_end_of_a_table_survive_a_fold(make_pair: MakePair) -> None:
    """Zarr pads the last chunk; what another tool wrote there, and sealed, is carried along."""
    pair = make_pair(dtype="float32", optimizer="sgd")
    pair.store.close()
    padding = {}
    for layer, spec in pair.store.tables.items():
        chunk = newest_base(pair.path, layer) / "rows" / "c" / "0" / "0"
        data = np.fromfile(chunk, "<f4").reshape(-1, spec.dim)
        data[spec.rows :] = 7 + layer
        data.tofile(chunk)
        padding[layer] = data[spec.rows :]
        assert len(padding[layer])
    seal_bases_again(pair.path, pair.store.tables)
    with engram_store.open(pair.path, "train") as store:
        again = Pair(store, pair.oracle)
        again.train(2)
        store.snapshot()
        store.fold()
        again.check()
    for layer, spec in pair.store.tables.items():
        folded = np.fromfile(newest_base(pair.path, layer) / "rows" / "c" / "0" / "0", "<f4")
        np.testing.assert_array_equal(folded.reshape(-1, spec.dim)[spec.rows :], padding[layer])


# ---------------------------------------------------------------------- checksums


@pytest.mark.usefixtures("small_chunks")
def test_checksums_of_sealed_files_match_their_bytes(make_pair: MakePair, recipe: Recipe) -> None:
    """Base chunks and segments, written at creation, by seals and by folds."""
    pair = make_pair(options={"overlay_bytes": tiny_overlay_bytes(specs_of(recipe))})
    pair.train(4)
    pair.store.fold()
    pair.train(4)
    pair.snapshot()
    paths, store_id = StorePaths(pair.path), pair.store.store_id
    manifest, _ = read_manifest(paths)
    blocks = 0
    for layer, spec in pair.store.tables.items():
        table = manifest.table(layer)
        base = arrays.read_base_description(paths, spec, table.generation, table.base_digest)
        for array in arrays.table_arrays(spec):
            for chunk, expected in base.checksums[array.name].items():
                data = np.fromfile(
                    array.chunk_file(paths.base(layer, table.generation), chunk), np.uint8
                )
                identity = arrays.chunk_identity(store_id, layer, array.name, chunk)
                assert checksums.first_damaged_block(data, identity, expected) is None
                data[-1] ^= 1
                assert checksums.first_damaged_block(data, identity, expected) == expected.size - 1
                blocks += expected.size
        for ref in table.segments:
            files = open_segment(paths, store_id, spec, ref)
            stored = json.loads((files.directory / "segment.json").read_bytes())["checksums"]
            for name, sums in read_segment_checksums(files, stored).items():
                data = np.fromfile(files.directory / name, np.uint8)
                identity = checksums.identity(store_id, "segment", layer, ref.number, name)
                assert checksums.first_damaged_block(data, identity, sums) is None
                blocks += sums.size
    assert blocks > 50


@given(st.integers(0, 3 * checksums.BLOCK_BYTES), st.integers(0, 2**64 - 1))
def test_checksums_of_pieces_are_those_of_the_whole(size: int, identity: int) -> None:
    """A piece knows the number of its first block."""
    data = np.arange(size, dtype=np.uint32).view(np.uint8)[:size]
    whole = checksums.block_checksums(data, identity)
    assert whole.size == -(-size // checksums.BLOCK_BYTES)
    pieces = [
        checksums.block_checksums(data[start : start + checksums.BLOCK_BYTES], identity, block)
        for block, start in enumerate(range(0, size, checksums.BLOCK_BYTES))
    ]
    np.testing.assert_array_equal(whole, np.concatenate([*pieces, np.empty(0, "<u8")]))


def test_a_block_in_the_wrong_place_is_damage() -> None:
    """Equal bytes at another position, or in another file, have another checksum."""
    data = np.zeros(2 * checksums.BLOCK_BYTES, np.uint8)
    first, second = checksums.block_checksums(data, checksums.identity("a"))
    other = checksums.block_checksums(data, checksums.identity("b"))
    assert len({int(first), int(second), *map(int, other)}) == 4


# ---------------------------------------------------------------------- literal bytes


def test_a_segment_byte_by_byte(tmp_path: Path) -> None:
    """docs/format.md: little-endian ids, rows and state, block checksums, a description."""
    paths = StorePaths(tmp_path)
    ids = np.array([7, 2, 9], "<i4")
    rows = np.array([[0x3F80, 0x4000], [1, 2], [3, 0xFFFF]], "<u2")
    state = np.array([[0.5], [1.0], [2.0]], "<f4")

    ref = write_segment(
        paths,
        STORE_ID,
        SPEC,
        5,
        3,
        {"row_ids": [ids], "rows": [rows], "state": [state]},
        Disk(),
    )

    directory = tmp_path / "layers" / "3" / "segments" / "000005"
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert files.keys() == {"row_ids", "rows", "state", "checksums", "segment.json"}
    assert files["row_ids"] == bytes.fromhex("07000000 02000000 09000000")
    assert files["rows"] == bytes.fromhex("803f0040 01000200 0300ffff")
    assert files["state"] == bytes.fromhex("0000003f 0000803f 00000040")
    sums = [
        xxhash.xxh3_64_intdigest(
            files[name], seed=xxhash.xxh3_64_intdigest(f"{STORE_ID}/segment/3/5/{name}".encode())
        )
        for name in ("row_ids", "rows", "state")
    ]
    assert files["checksums"] == struct.pack("<3Q", *sums)
    body = json.loads(files["segment.json"])
    digest = body.pop("digest")
    assert body == {
        "engram_store": "segment",
        "format_version": 1,
        "store_id": STORE_ID,
        "layer": 3,
        "number": 5,
        "slots": 3,
        "block_bytes": 65536,
        "checksums": checksums.content_checksum(files["checksums"]),
    }
    compact = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    assert digest == hashlib.sha256(compact).hexdigest() == ref.digest
    assert (ref.number, ref.slots) == (5, 3)


def test_a_memtable_byte_by_byte(tmp_path: Path) -> None:
    """docs/format.md: identity, the selected commit record, page-aligned arrays."""
    path = tmp_path / "memtable-0"
    memtable = Memtable(path, [SPEC], 4096, Disk())
    memtable.open_as(6, STORE_ID, 2, Commit(40, (0,), ()))
    memtable.tables[0].ids[:2] = [8, 1]
    memtable.tables[0].rows[0] = [0x1122, 0x3344]
    memtable.tables[0].state[1, 0] = 1.0
    mark = Mark(session="f" * 32, epoch=3, step=40, part=1)
    memtable.publish(Commit(41, (2,), (mark,)))
    data = path.read_bytes()
    memtable.close()

    assert data[:8] == b"ENGRMEM2"
    assert data[8:40] == STORE_ID.encode()
    assert data[40:76] == boot_id().encode()
    lineage, _layout, capacity, number = struct.unpack_from("<4Q", data, 80)
    assert (lineage, capacity, number) == (2, 4096, 6)
    # The second record is in force: publishing alternates between page 1 and page 2.
    assert struct.unpack_from("<Q", data, 512) == (2,)
    for sequence, step, count, marks in ((1, 40, 0, 0), (2, 41, 2, 1)):
        start = 4096 * (1 + sequence % 2)
        assert struct.unpack_from("<3Q", data, start) == (sequence, step, count)
        assert data[start + 24 : start + 16 + 8 * 128] == bytes(8 * 127)
        assert struct.unpack_from("<Q", data, start + 16 + 8 * 128) == (marks,)
        record_bytes = 16 + 8 * 128 + 8 + 32 * 56
        (checksum,) = struct.unpack_from("<Q", data, start + record_bytes)
        assert checksum == xxhash.xxh3_64_intdigest(data[start : start + record_bytes])
    first_mark = 4096 + 16 + 8 * 128 + 8
    assert data[first_mark : first_mark + 32] == b"f" * 32
    assert struct.unpack_from("<3Q", data, first_mark + 32) == (3, 40, 1)
    ids, state, rows = 3 * 4096, 3 * 4096 + 4 * 4096, 3 * 4096 + 8 * 4096
    assert data[ids : ids + 8] == bytes.fromhex("08000000 01000000")
    assert data[state + 4 : state + 8] == bytes.fromhex("0000803f")
    assert data[rows : rows + 4] == bytes.fromhex("2211 4433")
    assert len(data) == rows + 4 * 4096


def test_a_memtable_shows_the_commit_before_until_the_next_is_published(tmp_path: Path) -> None:
    """A record that was filled but not selected, or half filled, is not there."""
    memtable = Memtable(tmp_path / "memtable-0", [SPEC], 4096, Disk())
    memtable.open_as(1, STORE_ID, 1, Commit(0, (0,), ()))
    memtable.publish(Commit(1, (5,), ()))
    memtable.tables[0].ids[5:9] = 3
    memtable._records[(2 + 1) % 2]["step"] = 99
    assert memtable.trusted(STORE_ID, 1)
    assert memtable.committed() == Commit(1, (5,), ())
    assert not memtable.trusted("0" * 32, 1)
    assert not memtable.trusted(STORE_ID, 2)
    memtable.release()
    assert not memtable.trusted(STORE_ID, 1)
    memtable.close()


def test_the_fingerprint_is_stable(tmp_path: Path) -> None:
    """A golden value: stores made by any version must go on opening."""
    recipe = Recipe(
        family=Family.ENGRAM,
        orders=(2, 3),
        heads=1,
        layers=(LayerHash(layer=4, multipliers=(3, 5, 7), moduli=((11,), (13,))),),
        vocabulary=5,
        filler=1,
        token_map=np.array([0, 1, 2, 3, 4, 4], np.int32),
    )
    metadata = create_store(tmp_path / "a", recipe, table_specs(recipe, dim=4, overrides={}))
    assert (
        metadata.fingerprint == "6805fca661af1b573f82ac4379fdaa5dc8fb1ca9260626466359ec3cd460dd3c"
    )


def test_a_snapshot_manifest_of_a_new_store(make_store: MakeStore) -> None:
    """Its file is the working manifest's, byte by byte."""
    path = make_store()
    data = (path / "CURRENT.json").read_bytes()
    assert (path / "snapshots" / "000000000.json").read_bytes() == data
    body = json.loads(data)
    assert list(body)[2:5] == ["store_id", "step", "made"]
    assert list(body)[:2] == ["engram_store", "format_version"]
    assert (body["engram_store"], body["step"], body["lineage"], body["sealed"]) == (
        "manifest",
        0,
        1,
        0,
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.text(min_size=1, max_size=6), JSON, max_size=4))
def test_documents_read_back_as_written(content: dict[str, Any]) -> None:
    """Whatever is in them; the digest does not depend on the order of keys."""
    import tempfile

    reserved = {"engram_store", "format_version", "digest"}
    content = {key: value for key, value in content.items() if key not in reserved}
    data, digest = encode_document("thing", content)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "thing.json"
        path.write_bytes(data)
        body, read = read_document(path, "thing")
    assert read == digest
    assert body == {"engram_store": "thing", "format_version": 1, **content}
    assert canonical(body) == canonical(dict(reversed(body.items())))


# ---------------------------------------------------------------------- shapes


@given(
    st.integers(1, 2**31 - 2**20 - 1),
    st.integers(1, 4096),
    st.sampled_from(list(OptimizerKind)),
)
def test_chunks_are_powers_of_two_that_hold_the_table(
    rows: int, dim: int, optimizer: OptimizerKind
) -> None:
    """At most 256 MiB each unless a thousand rows are more, one grid for rows and state."""
    spec = TableSpec(layer=0, rows=rows, dim=dim, optimizer=optimizer)
    layouts = arrays.table_arrays(spec)
    assert len({layout.chunk_rows for layout in layouts}) == 1
    for layout in layouts:
        assert layout.chunk_rows.bit_count() == 1
        assert layout.chunk_rows >= arrays.MIN_CHUNK_ROWS
        assert (layout.chunks - 1) * layout.chunk_rows < rows <= layout.chunks * layout.chunk_rows
        assert layout.chunk_bytes <= arrays.MAX_CHUNK_BYTES or (
            layout.chunk_rows == arrays.MIN_CHUNK_ROWS
        )


@pytest.mark.usefixtures("small_chunks")
def test_initial_rows_do_not_depend_on_the_chunk_size(
    make_store: MakeStore, recipe: Recipe
) -> None:
    """They are those that `Normal` tells, whatever file they lie in; another seed, others."""
    with engram_store.open(make_store()) as store:
        for layer, (rows, _) in tables_of(store).items():
            spec = store.tables[layer]
            assert rows.tobytes() == INITIAL.rows(layer, 0, spec.rows, spec).tobytes()
            other = engram_store.Normal(std=0.02, seed=1).rows(layer, 0, spec.rows, spec)
            assert rows.tobytes() != other.tobytes()
