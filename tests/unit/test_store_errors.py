"""Bad input, bad files and full disks: the right error, nothing changed, and training goes on."""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engram_store
from engram_store import errors, failpoints
from engram_store.engine import catalog, placement
from engram_store.errors import (
    ChecksumError,
    ConfigError,
    DiskFullError,
    FingerprintMismatchError,
    ForeignFileError,
    ReadOnlyError,
    RowRangeError,
    SharedMemoryFullError,
    SnapshotMismatchError,
    StepTooLargeError,
    StoreClosedError,
    StoreExistsError,
    StoreFileError,
    StoreLockedError,
    StoreNotFoundError,
    TruncatedTableError,
    UnknownLayerError,
    UnknownVersionError,
)
from engram_store.layout import manifest as manifests
from engram_store.layout.disk import Disk
from engram_store.layout.documents import digest_of
from engram_store.recipes import Recipe, engram
from engram_store.store import Store
from tests.pairs import (
    INITIAL,
    MakePair,
    MakeStore,
    Pair,
    files_of,
    make_oracle,
    memtable_directory,
    random_tokens,
    specs_of,
    tiny_overlay_bytes,
)

Usage = namedtuple("Usage", "total used free")


def test_every_error_is_drawn_in_the_tree() -> None:
    """Each class once in the docstring, below the class it inherits from."""
    lines = [line for line in (errors.__doc__ or "").splitlines() if "Error" in line]
    depths: dict[int, str] = {}
    drawn: dict[str, str | None] = {}
    for line in lines:
        match = re.match(r"[ │├└─]*(\w+Error)\b", line)
        assert match is not None
        depth = match.start(1)
        depths[depth] = match[1]
        above = [name for at, name in sorted(depths.items()) if at < depth]
        drawn[match[1]] = above[-1] if above else None
    classes = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.EngramStoreError)
    }
    assert drawn.keys() == classes.keys()
    for name, parent in drawn.items():
        if parent is not None:
            assert classes[name].__mro__[1] is classes[parent]


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "int8.*bfloat16"),
        ({"optimizer": "lion"}, "lion.*adam"),
        ({"on_nonfinite": "explode"}, "explode.*skip"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
    ],
)
def test_senseless_settings_make_no_store(
    tmp_path: Path, recipe: Recipe, settings: dict[str, Any], message: str
) -> None:
    """The message says what there is to choose from; nothing is left behind."""
    with pytest.raises(ConfigError, match=message):
        engram_store.create(tmp_path / "a.engram", recipe, **{"dim": 16, **settings})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("std", [0, -1, float("nan"), float("inf")])
def test_initial_rows_need_a_positive_spread(std: float) -> None:
    with pytest.raises(ConfigError, match="leave the initialisation out"):
        engram_store.Normal(std=std)


def test_create_keeps_its_hands_off_what_is_there(
    make_store: MakeStore, tmp_path: Path, recipe: Recipe
) -> None:
    """A store, a file, a directory with something in it; an empty directory is fine."""
    store = make_store()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    before = files_of(tmp_path)
    for path in (store, tmp_path / "file", tmp_path / "full"):
        with pytest.raises(StoreExistsError, match="choose another path or remove it"):
            engram_store.create(path, recipe, dim=16)
    assert files_of(tmp_path) == before

    (tmp_path / "empty").mkdir()
    engram_store.create(tmp_path / "empty", recipe, dim=16)
    engram_store.open(tmp_path / "empty").close()


def test_opening_says_which_modes_there_are(make_store: MakeStore) -> None:
    path = make_store()
    with pytest.raises(ConfigError, match="'read' or 'train', got 'write'"):
        engram_store.open(path, "write")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"restore\(\)"):
        engram_store.open(path, "train", snapshot=0)


def test_an_overlay_below_one_block_is_refused_with_the_least_that_works(
    make_store: MakeStore, recipe: Recipe
) -> None:
    path = make_store()
    least = tiny_overlay_bytes(specs_of(recipe))
    with pytest.raises(ConfigError, match=f"{least - 1:,}.*at least {least:,}"):
        engram_store.open(path, "train", overlay_bytes=least - 1)
    engram_store.open(path, "train", overlay_bytes=least).close()


def test_another_recipe_is_refused_field_by_field(make_store: MakeStore, recipe: Recipe) -> None:
    """Both values of each differing field are printed; the right recipe is accepted."""
    path = make_store()
    other = engram(
        token_map=np.arange(500)[::-1],
        layers=[1, 3],
        rows_per_head=2_000,
        orders=(2, 3),
        heads=4,
        pad_id=2,
    )
    before = files_of(path)
    for mode in ("read", "train"):
        with pytest.raises(FingerprintMismatchError, match=r"layers: store \[1, 2\]") as caught:
            engram_store.open(path, mode, recipe=other)
        assert "token_map" in caught.value.differences
    assert files_of(path) == before
    engram_store.open(path, recipe=recipe).close()


def test_a_store_opened_for_reading_refuses_every_write(
    make_store: MakeStore, tmp_path: Path
) -> None:
    """And says which mode it takes; reading goes on."""
    path = make_store()
    before = files_of(path)
    with engram_store.open(path) as store:
        for call in (
            lambda: store.announce(np.array([[1, 2]]), 0),
            lambda: store.commit(0, 0.1),
            lambda: store.snapshot(),
            lambda: store.restore(0),
            lambda: store.fold(),
            lambda: store.gradient_norm(),
        ):
            with pytest.raises(ReadOnlyError, match="mode='train'"):
                call()
        assert store.read_rows(1, np.array([3])).any()
    assert files_of(path) == before


def test_rows_outside_a_table_are_refused(pair: Pair) -> None:
    """Below, above, and far above what an int32 holds."""
    rows = pair.store.tables[1].rows
    for row in (-1, rows, 2**40):
        with pytest.raises(RowRangeError, match=rf"row {row} .*0\.\.{rows - 1}"):
            pair.store.read_rows(1, np.array([0, row]))
    with pytest.raises(UnknownLayerError, match=r"\[1, 2\]"):
        pair.store.read_rows(9, np.array([0]))
    pair.train(1)


def test_a_closed_store_says_so(pair: Pair) -> None:
    pair.store.close()
    for call in (
        lambda: pair.store.read_rows(1, np.array([0])),
        lambda: pair.store.stats(),
        lambda: pair.store.fold(),
        lambda: pair.store.gradient_norm(),
    ):
        with pytest.raises(StoreClosedError, match="open it again"):
            call()


# ---------------------------------------------------------------------- one writer


def test_a_second_writer_is_refused_and_told_who_the_first_is(pair: Pair) -> None:
    """In the same process and in another one; reading is open to all."""
    with pytest.raises(StoreLockedError, match=f"process {os.getpid()} on .*mode='read'"):
        engram_store.open(pair.path, "train")
    code = f"import engram_store; engram_store.open({str(pair.path)!r}, 'train')"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert other.returncode != 0
    assert f"StoreLockedError: {pair.path} is open for training by process {os.getpid()}" in (
        other.stderr
    )
    with engram_store.open(pair.path) as reader:
        assert reader.step == 0
    pair.train(1)
    pair.check()
    pair.store.close()
    engram_store.open(pair.path, "train").close()


def test_a_store_that_could_not_be_opened_is_not_locked(
    make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong after the lock was taken."""
    path = make_store()
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(1 << 20, 1 << 20, 0))
    with pytest.raises(SharedMemoryFullError):
        engram_store.open(path, "train", memtable_dir=tmp_path / "memtables")
    monkeypatch.undo()
    engram_store.open(path, "train").close()


# ---------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Path:
    """A closed store with snapshots at 0, 4 and 8, a folded base and segments over it."""
    path = tmp_path_factory.mktemp("trained") / "a.engram"
    engram_store.create(path, recipe, dim=16, initial=INITIAL)
    with engram_store.open(path, "train", fold_ratio=100) as store:
        pair = Pair(store, make_oracle(recipe, INITIAL))
        pair.train(4)
        store.fold()
        pair.snapshot()
        store.fold()
        pair.train(4)
    return path


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A store of one's own to damage."""
    return Path(shutil.copytree(trained, tmp_path / "copy.engram"))


def open_both_ways(path: Path) -> None:
    for mode in ("read", "train"):
        engram_store.open(path, mode).close()


def refused(path: Path, error: type[Exception], message: str, *modes: str) -> None:
    """Opening fails in every mode, names the file, and changes nothing."""
    before = files_of(path)
    for mode in modes or ("read", "train"):
        with pytest.raises(error, match=message):
            engram_store.open(path, mode).close()  # type: ignore[arg-type]
    assert files_of(path) == before


def base_chunk(path: Path, array: str = "rows") -> Path:
    """A base chunk that the newest snapshot reads."""
    newest = sorted((path / "layers" / "1" / "base").glob("g*"))[-1]
    return newest / array / "c" / "0" / "0"


def segment(path: Path) -> Path:
    """A segment that the newest snapshot reads."""
    return sorted((path / "layers" / "1" / "segments").iterdir())[-1]


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a document and give it the right digest again."""
    body = json.loads(path.read_bytes())
    change(body)
    body.pop("digest", None)
    path.write_text(json.dumps({**body, "digest": digest_of(body)}))


def test_there_is_no_store_where_there_is_none(tmp_path: Path) -> None:
    """Missing, empty and a file."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "missing", tmp_path / "empty", tmp_path / "file"):
        for call in (engram_store.open, engram_store.inspect):
            with pytest.raises(StoreNotFoundError, match="engram-store create"):
                call(path)


def test_other_zarr_groups_are_foreign(tmp_path: Path) -> None:
    for content in (
        '{"zarr_format": 3, "node_type": "group", "attributes": {}}',
        '{"zarr_format": 3, "node_type": "group"}',
        '{"attributes": null}',
        '{"attributes": []}',
        '{"attributes": {"engram_store": 5}}',
        "[]",
        "5",
    ):
        (tmp_path / "zarr.json").write_text(content)
        refused(tmp_path, ForeignFileError, r"zarr\.json: is not the group of an engram-store")


DOCUMENTS: dict[str, Callable[[Path], Path]] = {
    "group": lambda path: path / "zarr.json",
    "manifest": lambda path: path / "CURRENT.json",
    "snapshot": lambda path: path / "snapshots" / "000000008.json",
    "base": lambda path: base_chunk(path).parents[3] / "base.json",
    "segment": lambda path: segment(path) / "segment.json",
    "array": lambda path: base_chunk(path).parents[2] / "zarr.json",
}


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.parametrize(
    "damage", ["cut", "empty", "foreign", "binary", "missing", "pipe", "loop", "directory"]
)
def test_damaged_documents_are_refused_by_name(copy: Path, document: str, damage: str) -> None:
    """Cut off, empty, something else, not text, gone, no file: an error of its own, no guess."""
    path = DOCUMENTS[document](copy)
    data = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "empty":
            path.write_bytes(b"")
        case "foreign":
            path.write_text('{"some": "json"}')
        case "binary":
            path.write_bytes(b"\xff\xfe\x00" + data)
        case "missing":
            path.unlink()
        case "pipe":
            path.unlink()
            os.mkfifo(path)
        case "loop":
            path.unlink()
            path.symlink_to(path.name)
        case "directory":
            path.unlink()
            path.mkdir()
    if (document, damage) == ("snapshot", "missing"):
        # Then it simply is not a snapshot any more; the working manifest still names the files.
        with engram_store.open(copy) as reader:
            assert reader.step == 4
        return
    # Training needs the working manifest alone; a snapshot is missed when it is asked for.
    modes = ["read"] if document == "snapshot" else []
    name = re.escape(path.name if document != "group" else str(copy))
    refused(copy, StoreFileError, name, *modes)


@pytest.mark.parametrize("document", ["group", "manifest", "snapshot", "base", "segment"])
def test_a_flipped_bit_in_a_document_is_noticed(copy: Path, document: str) -> None:
    """Everywhere in it: refused, or it means the same."""
    path = DOCUMENTS[document](copy)
    data = path.read_bytes()
    expected = engram_store.inspect(copy)
    rng = np.random.default_rng(0)
    for position in rng.choice(len(data), min(len(data), 150), replace=False):
        spoiled = bytearray(data)
        spoiled[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(spoiled)
        with contextlib.suppress(StoreFileError), engram_store.open(copy, snapshot=8) as reader:
            found = engram_store.inspect(copy)
            assert (reader.step, found.step) == (8, expected.step), position
            assert reader.metadata.tables == expected.metadata.tables, position
            assert reader.store_id == expected.metadata.store_id, position
    path.write_bytes(data)
    open_both_ways(copy)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda a: a["shape"].__setitem__(0, 5), "shape"),
        (lambda a: a.__setitem__("data_type", "float32"), "data_type"),
        (lambda a: a["codecs"].append({"name": "zstd"}), "codecs"),
        (lambda a: a.__setitem__("fill_value", 1), "fill_value"),
        (
            lambda a: a["chunk_grid"]["configuration"].__setitem__("chunk_shape", [64, 16]),
            "chunk_shape",
        ),
    ],
)
def test_arrays_that_cannot_be_mapped_as_they_are_are_refused(
    copy: Path, change: Callable[[dict[str, Any]], None], what: str
) -> None:
    """Compressed, reshaped or of another dtype: their bytes would be read as other rows."""
    path = DOCUMENTS["array"](copy)
    metadata = json.loads(path.read_bytes())
    change(metadata)
    path.write_text(json.dumps(metadata))
    refused(copy, ForeignFileError, f"has {what} .*this table needs")


@pytest.mark.parametrize("document", ["manifest", "snapshot", "base", "segment"])
def test_documents_of_a_newer_version_are_told_from_damaged_ones(copy: Path, document: str) -> None:
    rewrite(DOCUMENTS[document](copy), lambda body: body.update(format_version=2))
    refused(
        copy,
        UnknownVersionError,
        "version 2, this engram-store reads 1; install a newer",
        *{"manifest": ["train"], "snapshot": ["read"]}.get(document, []),
    )


def test_a_store_of_a_newer_version_is_told_from_a_damaged_one(copy: Path) -> None:
    group = json.loads((copy / "zarr.json").read_bytes())
    group["attributes"]["engram_store"]["format_version"] = 2
    (copy / "zarr.json").write_text(json.dumps(group))
    refused(copy, UnknownVersionError, "version 2, this engram-store reads 1; install a newer")


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", 1), ("optimizer", "sgd"), ("on_nonfinite", "skip"), ("stochastic_rounding", False)],
)
def test_a_changed_table_description_is_noticed(
    make_store: MakeStore, field: str, value: object
) -> None:
    """One flipped bit makes seed 0 seed 1: training would silently be another one."""
    path = make_store() / "zarr.json"
    group = json.loads(path.read_bytes())
    group["attributes"]["engram_store"]["tables"][0][field] = value
    path.write_text(json.dumps(group))
    with pytest.raises(ForeignFileError, match="changed"):
        engram_store.open(path.parent).close()


@pytest.mark.parametrize(("document", "mode"), [("manifest", "train"), ("snapshot", "read")])
def test_manifests_of_another_store_are_foreign(copy: Path, document: str, mode: str) -> None:
    """Sound in themselves, put into the wrong directory."""
    rewrite(DOCUMENTS[document](copy), lambda body: body.update(store_id="0" * 32))
    refused(copy, ForeignFileError, "another store", mode)


def test_a_snapshot_under_another_steps_name_is_foreign(copy: Path) -> None:
    (copy / "snapshots" / "000000008.json").rename(copy / "snapshots" / "000000006.json")
    refused(copy, ForeignFileError, "step 8", "read")


def test_a_manifest_that_names_a_segment_twice_is_none(copy: Path) -> None:
    def twice(body: dict[str, Any]) -> None:
        body["tables"][0]["segments"] *= 2

    rewrite(DOCUMENTS["manifest"](copy), twice)
    refused(copy, StoreFileError, "segment twice", "train")


def test_numbers_that_are_none_are_no_document(copy: Path) -> None:
    """JSON as Python reads it knows NaN; a digest of it does not exist."""
    path = DOCUMENTS["manifest"](copy)
    path.write_text(path.read_text().replace('"step": 8', '"step": NaN'))
    refused(copy, StoreFileError, "CURRENT.json", "train")


@pytest.mark.parametrize("array", ["rows", "state/sum"])
def test_a_base_chunk_that_is_missing_is_never_zeros(copy: Path, array: str) -> None:
    """The description lists it, so its absence is an error in every mode."""
    chunk = base_chunk(copy, array)
    chunk.unlink()
    refused(copy, StoreFileError, f"{re.escape(str(chunk))}: is missing; its manifest says")


@pytest.mark.parametrize("array", ["rows", "state/sum"])
@pytest.mark.parametrize("change", [-1, +1, -65536])
def test_a_base_chunk_of_another_length_is_refused(copy: Path, array: str, change: int) -> None:
    """A mapping of a short file would kill the process."""
    chunk = base_chunk(copy, array)
    size = chunk.stat().st_size
    os.truncate(chunk, size + change)
    refused(copy, TruncatedTableError, f"has {size + change} bytes, its manifest says {size}")


@pytest.mark.parametrize("name", ["row_ids", "rows", "state"])
def test_a_segment_file_that_is_missing_or_short_is_refused(copy: Path, name: str) -> None:
    path = segment(copy) / name
    os.truncate(path, path.stat().st_size - 2)
    refused(copy, TruncatedTableError, f"{name}: has")
    path.unlink()
    refused(copy, StoreFileError, f"{name}: is missing")


@pytest.mark.parametrize("where", ["base", "segment"])
def test_damaged_lists_of_checksums_are_noticed(copy: Path, where: str) -> None:
    """They are what damage of rows is found with."""
    path = DOCUMENTS[where](copy).with_name("checksums")
    data = bytearray(path.read_bytes())
    data[3] ^= 16
    path.write_bytes(data)
    refused(copy, ChecksumError, "checksums is itself damaged")
    path.unlink()
    refused(copy, StoreFileError, "checksums: is missing")


def test_row_ids_outside_the_table_are_damage(copy: Path) -> None:
    """They would be stores to wild addresses."""
    path = segment(copy) / "row_ids"
    ids = np.fromfile(path, "<i4")
    for wild in (2**30, -5):
        ids[0] = wild
        ids.tofile(path)
        refused(copy, ChecksumError, "row_ids")


def test_a_flipped_bit_in_row_ids_is_noticed(copy: Path) -> None:
    """It would put a row's values under another row's number."""
    path = segment(copy) / "row_ids"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    refused(copy, ChecksumError, "row_ids")


def test_a_changed_token_map_is_noticed(copy: Path) -> None:
    """Every n-gram would mean another row."""
    path = copy / "token_map" / "c" / "0"
    ids = np.fromfile(path, "<i4")
    ids[17] = 18
    ids.tofile(path)
    refused(copy, ForeignFileError, "token map")
    os.truncate(path, 40)
    refused(copy, TruncatedTableError, "has 40 bytes")


def test_a_store_without_any_snapshot_is_damaged(copy: Path) -> None:
    for path in (copy / "snapshots").iterdir():
        path.unlink()
    refused(copy, StoreFileError, "holds no snapshot", "train")
    refused(copy, SnapshotMismatchError, "has snapshots at steps none", "read")


def test_a_damaged_snapshot_does_not_stop_training_and_loses_no_file(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is collected while it is not known what the snapshot needs."""
    (copy / "snapshots" / "000000004.json").write_text("{}")
    before = {path for path in copy.rglob("*") if "layers" in path.parts}
    with engram_store.open(copy, "train") as store:
        store.commit(8, 0.1)
        with pytest.raises(StoreFileError, match=r"000000004\.json"):
            store.restore(4)
        assert store.step == 9
    assert "old files stay" in caplog.text
    assert before <= set(copy.rglob("*"))


def test_a_damaged_old_snapshot_cannot_be_restored_and_changes_nothing(copy: Path) -> None:
    """Training goes on from where it is."""
    with engram_store.open(copy, "train") as store:
        rows = store.read_rows(1, np.arange(500, dtype=np.int32))
        old = copy / "layers" / "1" / "base" / "g0001" / "rows" / "c" / "0" / "0"
        os.truncate(old, 100)
        with pytest.raises(TruncatedTableError):
            store.restore(0)
        assert store.step == 8
        np.testing.assert_array_equal(store.read_rows(1, np.arange(500, dtype=np.int32)), rows)
        store.commit(8, 0.1)


# ---------------------------------------------------------------------- no room


def test_a_step_larger_than_a_memtable_says_what_would_hold_it(
    make_pair: MakePair, recipe: Recipe
) -> None:
    """Nothing is applied; a smaller step goes on, and the advice is good."""
    pair = make_pair(options={"overlay_bytes": tiny_overlay_bytes(specs_of(recipe))})
    large = random_tokens(pair.rng, (8, 120))
    window = pair.store.announce(large, 0)
    for layer in pair.store.tables:
        window.push(layer, np.ones(window.rows(layer)[0].shape, np.float32))

    with pytest.raises(StepTooLargeError, match=r"a memtable holds 4,096.*at least") as caught:
        pair.store.commit(0, 0.1)

    pair.check()
    window.close()
    pair.train(2)
    pair.store.close()
    advised = re.search(r"at least ([\d,]+)", str(caught.value))
    assert advised is not None
    enough = int(advised[1].replace(",", ""))
    with engram_store.open(pair.path, "train", overlay_bytes=enough) as store:
        again = Pair(store, pair.oracle, pair.rng)
        again.announce(large, 2).push_random(pair.rng)
        again.commit()
        again.check()


class FullDisk:
    """A disk that can be filled and emptied behind the store's back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        real = Disk.write

        def write(disk: Disk, fd: int, data: memoryview, offset: int) -> int:
            if self.full:
                real(disk, fd, data[: len(data) // 2], offset)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(disk, fd, data, offset)

        monkeypatch.setattr(Disk, "write", write)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    return FullDisk(monkeypatch)


def fill_memtables(pair: Pair) -> None:
    """Train until both memtables are full and a commit is refused; its windows stay open."""
    for _ in range(40):
        windows = [pair.announce(random_tokens(pair.rng), pair.step) for _ in range(2)]
        for window in windows:
            window.push_random(pair.rng)
        try:
            pair.store.commit(pair.step, 0.1)
        except DiskFullError:
            return
        pair.oracle.commit(pair.oracle.step, 0.1)
    raise AssertionError("the disk never got full")


@pytest.fixture
def busy(make_pair: MakePair, recipe: Recipe) -> Pair:
    options = {"overlay_bytes": tiny_overlay_bytes(specs_of(recipe)), "fold_ratio": 100.0}
    return make_pair(options=options)


def test_on_a_full_disk_reads_go_on_and_training_resumes_with_space(
    busy: Pair, disk: FullDisk
) -> None:
    """The refused commit changed nothing and may simply be repeated."""
    busy.train(4)
    disk.full = True
    fill_memtables(busy)
    step = busy.step
    busy.check()
    with pytest.raises(DiskFullError, match="free space on that disk"):
        busy.store.commit(step, 0.1)
    with pytest.raises(DiskFullError):
        busy.store.snapshot()
    with busy.store.announce(random_tokens(busy.rng)) as window:
        window.rows(1)

    disk.full = False
    busy.commit()

    busy.train(6)
    busy.check()
    busy.snapshot()


def test_a_snapshot_on_a_full_disk_is_none_and_works_later(busy: Pair, disk: FullDisk) -> None:
    """No half snapshot is listed; the next one has the right rows."""
    busy.train(1)
    disk.full = True
    with pytest.raises(DiskFullError):
        busy.store.snapshot()
    assert busy.store.snapshots() == [0]
    busy.train(1)
    disk.full = False
    ref = busy.snapshot()
    busy.train(3)
    busy.restore(ref)
    busy.check()


def test_a_fold_on_a_full_disk_leaves_the_tables_as_they_were(busy: Pair, disk: FullDisk) -> None:
    busy.train(6)
    busy.snapshot()
    before = files_of(busy.path)
    disk.full = True
    with pytest.raises(DiskFullError):
        busy.store.fold()
    busy.check()
    after = files_of(busy.path)
    assert {name: after[name] for name in before} == before
    disk.full = False
    busy.store.fold()
    busy.check()
    busy.train(2)
    busy.check()


def test_a_store_closed_on_a_full_disk_keeps_its_rows_for_the_next_open(
    busy: Pair, disk: FullDisk
) -> None:
    """In shared memory, as after a kill."""
    busy.train(3)
    disk.full = True
    with pytest.raises(DiskFullError):
        busy.store.close()
    disk.full = False
    with engram_store.open(busy.path, "train") as store:
        again = Pair(store, busy.oracle, busy.rng)
        assert again.step == 3
        again.check()
        again.train(2)
        again.check()


@pytest.mark.parametrize("point", ["seal.segment_written", "seal.segments_written", "seal.patched"])
def test_a_seal_that_fails_once_is_tried_again(busy: Pair, point: str) -> None:
    """Wherever it failed; the trainer notices nothing."""
    failpoints.arm(point, failpoints.fail_with_full_disk)
    busy.train(12)
    busy.store.fold()
    busy.check()
    busy.store.close()
    with engram_store.open(busy.path, "train") as store:
        Pair(store, busy.oracle).check()


def test_a_seal_is_not_written_again_once_a_manifest_names_it(
    busy: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its snapshot fails for want of space: what CURRENT names must stay whole on disk."""
    write_snapshot = manifests.write_snapshot

    def fail_once(*args: Any) -> str:
        monkeypatch.setattr(catalog, "write_snapshot", write_snapshot)
        raise DiskFullError(errno.ENOSPC, "no space left")

    busy.train(2)
    monkeypatch.setattr(catalog, "write_snapshot", fail_once)
    with pytest.raises(DiskFullError):
        busy.store.snapshot()
    assert engram_store.inspect(busy.path).step == 2
    named = [path.stat().st_ino for path in segment(busy.path).iterdir()]

    busy.train(4)
    busy.snapshot()

    first = sorted((busy.path / "layers" / "1" / "segments").iterdir())[0]
    assert [path.stat().st_ino for path in first.iterdir()] == named
    busy.check()


def test_creating_on_a_full_disk_leaves_nothing(
    tmp_path: Path, recipe: Recipe, disk: FullDisk
) -> None:
    disk.full = True
    with pytest.raises(DiskFullError):
        engram_store.create(tmp_path / "a.engram", recipe, dim=16, initial=INITIAL)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    directory = tmp_path / "small"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this machine lets nobody mount a tmpfs: {done.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_training_on_a_disk_that_really_fills_up(small_disk: Path, recipe: Recipe) -> None:
    """Until it is full, and again when something was deleted."""
    path = small_disk / "a.engram"
    engram_store.create(path, recipe, dim=16, initial=INITIAL)
    options: dict[str, Any] = {"overlay_bytes": tiny_overlay_bytes(specs_of(recipe))}
    store = engram_store.open(path, "train", fold_ratio=100, **options)
    pair = Pair(store, make_oracle(recipe, INITIAL))
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(64 << 10))
    fill_memtables(pair)
    pair.check()
    with pytest.raises(DiskFullError):
        engram_store.create(small_disk / "b.engram", recipe, dim=16, initial=INITIAL)
    assert sorted(entry.name for entry in small_disk.iterdir()) == ["a.engram", "ballast"]

    ballast.unlink()
    pair.commit()
    pair.train(2)
    pair.check()
    store.close()
    with engram_store.open(path, "train", **options) as again:
        Pair(again, pair.oracle).check()


def test_a_chosen_memtable_directory_that_is_too_small_is_refused(
    make_store: MakeStore, small_disk: Path
) -> None:
    """Before anything is reserved: a full tmpfs would kill the process later."""
    path = make_store()
    with pytest.raises(
        SharedMemoryFullError, match=r"memtables need .*small leaves.*overlay_bytes"
    ):
        engram_store.open(path, "train", memtable_dir=small_disk, overlay_bytes=8 << 20)
    assert not list(small_disk.iterdir())
    engram_store.open(path, "train", memtable_dir=small_disk, overlay_bytes=2 << 20).close()


def test_memtables_fall_back_to_the_disk_with_a_warning(
    make_pair: MakePair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where shared memory is small; training and recovery are the same."""
    disk_usage = shutil.disk_usage
    small = tmp_path / "shm"
    small.mkdir()
    monkeypatch.setattr(placement, "SHARED_MEMORY", small)

    def usage(path: Path) -> Any:
        return Usage(1, 1, 0) if Path(path).is_relative_to(small) else disk_usage(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with caplog.at_level(logging.WARNING):
        pair = make_pair()
    assert "slower and does not survive every crash" in caplog.text
    assert len(list((pair.path / "memtables").iterdir())) == 2
    assert not list(small.rglob("memtable-*"))
    pair.train(3)
    pair.check()
    pair.store.close()
    assert not (pair.path / "memtables").exists()


def test_memtables_that_fit_nowhere_are_refused_before_the_disk_is_full(
    small_disk: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither into shared memory nor onto the disk; nothing is left there."""
    path = small_disk / "a.engram"
    engram_store.create(path, recipe, dim=16)
    monkeypatch.setattr(placement, "SHARED_MEMORY", small_disk)
    free = shutil.disk_usage(small_disk).free
    with pytest.raises(DiskFullError):
        engram_store.open(path, "train", overlay_bytes=8 << 20)
    assert shutil.disk_usage(small_disk).free >= free - 64 * 1024


def test_leftover_memtables_are_gone_after_recovery(make_pair: MakePair, disk: FullDisk) -> None:
    """Whatever a store that died left in shared memory is taken over once and removed."""
    pair = make_pair()
    pair.train(1)
    disk.full = True
    with pytest.raises(DiskFullError):
        pair.store.close()
    disk.full = False
    directory = memtable_directory(pair.path, pair.store.store_id)
    assert len(list(directory.iterdir())) == 2
    store: Store = engram_store.open(pair.path, "train")
    store.close()
    assert not directory.exists()
