"""The embedded store: exact whatever it does in the background; snapshots; where it lives."""

import itertools
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engram_store
from engram_store.engine import placement
from engram_store.engine.extents import BLOCK_SHIFT, BLOCK_SLOTS, SlotSpace
from engram_store.engine.recovery import RecoveryKind
from engram_store.errors import SnapshotMismatchError
from engram_store.recipes import Recipe
from engram_store.types import OptimizerKind, RowDtype
from tests.pairs import (
    MakePair,
    MakeStore,
    Pair,
    files_of,
    memtable_directory,
    random_tokens,
    specs_of,
    tables_of,
    tiny_overlay_bytes,
)


@pytest.fixture
def busy(make_pair: MakePair, recipe: Recipe) -> Pair:
    """A pair with the least overlay, so that it seals every few steps."""
    return make_pair(options={"overlay_bytes": tiny_overlay_bytes(specs_of(recipe))})


# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize(
    ("optimizer", "dtype"), list(itertools.product(OptimizerKind, RowDtype)), ids=str
)
@pytest.mark.parametrize("tiny", [False, True], ids=["one memtable", "seals and folds"])
def test_tables_equal_the_oracle_bit_for_bit(
    make_pair: MakePair, recipe: Recipe, optimizer: OptimizerKind, dtype: RowDtype, tiny: bool
) -> None:
    """Every row and state, whatever was sealed and folded meanwhile, and after reopening."""
    settings = {"optimizer": optimizer, "dtype": dtype}
    size = tiny_overlay_bytes(specs_of(recipe, **settings))
    options = {"overlay_bytes": size, "fold_ratio": 0.5} if tiny else {"overlay_bytes": 32 * size}
    pair = make_pair(options=options, **settings)

    pair.train(10, shape=(2, 60))
    pair.check()

    stats = pair.store.stats()
    assert (stats.seals >= 2) == tiny
    if tiny:
        pair.store.fold()
        assert pair.store.stats().folds >= 2
        pair.check()
        pair.train(2)
    pair.store.close()
    with engram_store.open(pair.path, "train") as store:
        again = Pair(store, pair.oracle, pair.rng)
        again.check()
        again.train(1)
        again.check()


def test_a_table_created_with_zeros_trains_like_one(make_pair: MakePair, recipe: Recipe) -> None:
    """Rows without a file are zeros until they are trained, also after a fold."""
    pair = make_pair(initial=None, options={"overlay_bytes": tiny_overlay_bytes(specs_of(recipe))})
    pair.check()
    pair.train(6)
    pair.store.fold()
    pair.check()


@pytest.mark.parametrize("dim", [1, 7])
def test_odd_row_lengths_are_fine(make_pair: MakePair, dim: int) -> None:
    """Rows that fill no vector register."""
    pair = make_pair(dim=dim, optimizer="adagrad")
    pair.train(2)
    pair.store.fold()
    pair.check()


def test_tables_may_differ(make_store: MakeStore) -> None:
    """Each layer has its own dtype, width and optimiser if asked to, and they commit together."""
    path = make_store(
        initial=None,
        per_layer={2: {"dim": 8, "dtype": RowDtype.FLOAT32, "optimizer": OptimizerKind.ADAM}},
    )
    with engram_store.open(path, "train") as store:
        window = store.announce(np.array([[5, 6, 7]]), 0)
        for layer, dim in ((1, 16), (2, 8)):
            rows, _ = window.rows(layer)
            assert rows.shape[1] == dim
            window.push(layer, np.ones(rows.shape, np.float32))
        store.commit(0, 0.1)
        changed = {
            layer: int(rows.any(axis=1).sum()) for layer, (rows, _) in tables_of(store).items()
        }
    assert changed == {1: 24, 2: 24}


def test_training_while_it_folds_is_exact(make_pair: MakePair, recipe: Recipe) -> None:
    """A fold in another thread, again and again, changes no byte."""
    options = {"overlay_bytes": tiny_overlay_bytes(specs_of(recipe)), "fold_ratio": 100.0}
    pair = make_pair(options=options)
    done = threading.Event()
    failures: list[BaseException] = []

    def fold() -> None:
        try:
            while not done.is_set():
                pair.store.fold()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=fold)
    thread.start()
    try:
        pair.train(15)
    finally:
        done.set()
        thread.join()
    assert not failures
    assert pair.store.stats().folds >= 2
    pair.check()


def test_readers_in_other_threads_never_see_half_a_step(
    make_pair: MakePair, recipe: Recipe
) -> None:
    """Every row is constant in itself, so a torn or misplaced row would show."""
    settings = {"dtype": "float32", "optimizer": "sgd"}
    size = tiny_overlay_bytes(specs_of(recipe, **settings))
    options = {"overlay_bytes": size, "fold_ratio": 0.3}
    pair = make_pair(initial=None, options=options, **settings)
    store = pair.store
    done = threading.Event()
    torn: list[int] = []

    def read() -> None:
        rng = np.random.default_rng(7)
        while not done.is_set():
            with store.announce(random_tokens(rng)) as window:
                rows, _ = window.rows(1)
                torn.append(int((rows != rows[:, :1]).sum()))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for _ in range(30):
            window = store.announce(random_tokens(pair.rng, (2, 60)), store.step)
            for layer in store.tables:
                n = window.row_ids(layer).size
                window.push(layer, np.repeat(pair.rng.random((n, 1), np.float32), 16, axis=1))
            store.commit(store.step, 0.1)
    finally:
        done.set()
        thread.join()
    assert len(torn) > 5
    assert sum(torn) == 0


def test_evaluation_changes_no_file(pair: Pair) -> None:
    """Windows that are only read, before and after training."""
    pair.train(1)
    pair.snapshot()
    before = files_of(pair.path)
    for _ in range(3):
        with pair.store.announce(random_tokens(pair.rng)) as window:
            window.rows(1)
    pair.check()
    assert files_of(pair.path) == before
    assert pair.step == 1


def test_statistics_add_up(busy: Pair) -> None:
    """Counters agree with what was done; gauges with the files."""
    busy.train(8)
    busy.snapshot()

    stats = busy.store.stats()

    assert (stats.steps, stats.windows) == (8, 16)
    for table in stats.tables.values():
        assert table.lookups == 16 * 80 * 8
        assert 0 < table.memtable_rows + table.segment_rows <= table.unique_rows <= table.lookups
        assert table.duplication is not None
        assert table.duplication >= 1
        assert table.resident_bytes >= 0
    assert stats.seals >= 2
    assert stats.write_amplification is not None
    # Below one: a row updated twice between two seals is written once.
    assert 0 < stats.write_amplification < 1.1


# ---------------------------------------------------------------------- snapshots


def test_a_snapshot_is_not_touched_by_what_follows(busy: Pair) -> None:
    """Later training, sealing, folding and snapshots leave it as it was, file by file."""
    expected = {}
    for _ in range(3):
        busy.train(4)
        ref = busy.snapshot()
        expected[ref.step] = ref, tables_of(busy.store)
        busy.train(3)
        busy.store.fold()
        for step, (known, tables) in expected.items():
            for wanted in (step, known):
                with engram_store.open(busy.path, snapshot=wanted) as reader:
                    assert reader.step == step
                    for layer, (rows, state) in tables_of(reader).items():
                        assert rows.tobytes() == tables[layer][0].tobytes()
                        assert state.tobytes() == tables[layer][1].tobytes()
    assert busy.store.snapshots() == [0, 4, 11, 18]


def test_a_reader_opened_during_training_sees_the_newest_snapshot(busy: Pair) -> None:
    """It needs no lock, and stays at its snapshot however long training goes on."""
    busy.train(3)
    busy.snapshot()
    expected = tables_of(busy.store)
    busy.train(2)
    with engram_store.open(busy.path) as reader:
        assert reader.step == 3
        busy.train(8)
        busy.store.fold()
        busy.snapshot()
        for layer, (rows, _) in tables_of(reader).items():
            assert rows.tobytes() == expected[layer][0].tobytes()
    with engram_store.open(busy.path) as reader:
        assert reader.step == 13


def test_closing_keeps_a_snapshot_of_the_current_step(busy: Pair) -> None:
    """And nothing in shared memory."""
    busy.train(5)
    busy.store.close()

    assert engram_store.inspect(busy.path).snapshots == (0, 5)
    assert not memtable_directory(busy.path, busy.store.store_id).exists()
    with engram_store.open(busy.path) as reader:
        Pair(reader, busy.oracle).check()
    with engram_store.open(busy.path, "train") as store:
        assert store.recovery is not None
        assert store.recovery.kind is RecoveryKind.CLEAN
        assert store.snapshots() == [0, 5]


def test_opening_and_closing_without_training_leaves_every_file_alone(pair: Pair) -> None:
    pair.train(1)
    pair.store.close()
    before = files_of(pair.path)
    engram_store.open(pair.path, "train").close()
    engram_store.open(pair.path, "read").close()
    assert files_of(pair.path) == before


def test_restore_drops_newer_snapshots_and_their_files(busy: Pair) -> None:
    """After training on, sealing and folding both ways."""
    busy.train(4)
    ref = busy.snapshot()
    busy.train(5)
    busy.store.fold()
    newer = busy.snapshot()

    busy.restore(ref)

    busy.check()
    assert busy.store.snapshots() == [0, 4]
    with pytest.raises(SnapshotMismatchError, match="0, 4"):
        engram_store.open(busy.path, snapshot=newer)
    busy.train(9)
    busy.store.fold()
    busy.check()
    busy.store.close()
    with engram_store.open(busy.path, "train") as store:
        Pair(store, busy.oracle).check()


def test_restore_to_the_beginning_and_again(busy: Pair) -> None:
    """Step 0 has a snapshot from the start; every way from there ends where the oracle does."""
    busy.oracle.snapshot()
    for _ in range(3):
        busy.train(7)
        busy.store.restore(0)
        busy.oracle.restore(0)
        busy.check()


def test_a_reference_is_good_after_reopening_and_folding(busy: Pair) -> None:
    """A trainer's checkpoint names it long after."""
    busy.train(4)
    ref = busy.snapshot()
    busy.store.fold()
    assert busy.store.snapshot() == ref
    busy.train(4)
    busy.store.close()
    with engram_store.open(busy.path, "train") as store:
        again = Pair(store, busy.oracle, busy.rng)
        again.restore(ref)
        again.check()
        again.train(2)
        again.check()


def test_old_files_go_when_nothing_names_them(busy: Pair) -> None:
    """After folds, no more generations and segments are kept than manifests name."""
    busy.train(12)
    busy.store.fold()
    busy.snapshot()
    busy.train(6)
    busy.store.fold()
    catalog = busy.store._engine.catalog  # type: ignore[union-attr]
    manifests = [catalog.manifest, *map(catalog.find_snapshot, busy.store.snapshots())]
    for layer in busy.store.tables:
        directory = busy.path / "layers" / str(layer)
        files = [manifest.table(layer) for manifest in manifests]
        assert {path.name for path in (directory / "base").glob("g*")} == {
            f"g{table.generation:04d}" for table in files
        }
        assert {path.name for path in (directory / "segments").iterdir()} == {
            f"{ref.number:06d}" for table in files for ref in table.segments
        }


# ---------------------------------------------------------------------- where it lives


def test_memtables_are_private(pair: Pair) -> None:
    """Files 0600 in a directory 0700: rows are a model's weights."""
    directory = memtable_directory(pair.path, pair.store.store_id)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in directory.iterdir()} == {"memtable-0", "memtable-1"}
    for path in directory.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
    assert (pair.path / "LOCK").stat().st_mode & 0o777 == 0o600


def test_the_shared_directory_of_a_user_is_private(
    make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent of all stores' memtables too: others could swap directories inside it."""
    monkeypatch.setattr(placement, "SHARED_MEMORY", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    with engram_store.open(make_store(), "train"):
        (directory,) = (tmp_path / "shm").iterdir()
        assert directory.stat().st_mode & 0o777 == 0o700


def test_memtables_go_where_they_are_asked_to(make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair(options={"memtable_dir": tmp_path / "memtables"})
    assert len(list((tmp_path / "memtables").rglob("memtable-*"))) == 2
    pair.train(1)
    pair.store.close()
    assert not list((tmp_path / "memtables").rglob("memtable-*"))


def test_capacity_is_whole_blocks_for_both_memtables(recipe: Recipe) -> None:
    """At least one block; by default no more than training could fill."""
    specs = list(specs_of(recipe).values())
    least = tiny_overlay_bytes(specs_of(recipe))
    assert placement.overlay_capacity(specs, least) == BLOCK_SLOTS
    assert placement.overlay_capacity(specs, 2 * least - 1) == BLOCK_SLOTS
    assert placement.overlay_capacity(specs, 2 * least) == 2 * BLOCK_SLOTS
    default = placement.overlay_capacity(specs, None)
    assert default % BLOCK_SLOTS == 0
    assert BLOCK_SLOTS <= default <= 4 * max(spec.rows for spec in specs) + BLOCK_SLOTS


def test_a_store_in_a_copied_directory_is_another_store(busy: Pair, tmp_path: Path) -> None:
    """Copied at work: the copy is at the newest snapshot and both train on."""
    busy.train(3)
    busy.snapshot()
    expected = tables_of(busy.store)
    busy.train(2)
    shutil.copytree(busy.path, tmp_path / "copy")

    with engram_store.open(tmp_path / "copy", "train") as copy:
        assert copy.step == 3
        for layer, (rows, _) in tables_of(copy).items():
            assert rows.tobytes() == expected[layer][0].tobytes()
        busy.train(2)
        busy.check()


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5 * BLOCK_SLOTS)), max_size=30))
def test_slot_space_hands_out_disjoint_runs(calls: list[tuple[bool, int]]) -> None:
    """Whole blocks, never below the reserved ones; given back ones are used again, lowest first."""
    space = SlotSpace(2 * BLOCK_SLOTS)
    held: dict[int, int] = {}
    for take, slots in calls:
        if take or not held:
            first = space.take(slots)
            blocks = -(-slots // BLOCK_SLOTS)
            start = first >> BLOCK_SHIFT
            assert first % BLOCK_SLOTS == 0
            assert start >= 2
            for other, length in held.items():
                assert start + blocks <= other or other + length <= start
            held[start] = blocks
        else:
            gone = sorted(held)[slots % len(held)]
            space.give_back(gone << BLOCK_SHIFT)
            del held[gone]
    lowest = SlotSpace(2 * BLOCK_SLOTS).take(1)
    assert lowest == 2 * BLOCK_SLOTS
