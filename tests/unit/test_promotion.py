"""Promotion: which rows are packed, that their bytes stay, and what is refused."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import engram_store
from engram_store.engine import packed, promotion
from engram_store.engine.damage import BlockDamage
from engram_store.engine.memory import PAGE_BYTES
from engram_store.engine.packed import PackableTable
from engram_store.engine.promotion import plan_promotion
from engram_store.engine.reader import Reader
from engram_store.errors import (
    CapacityError,
    ChecksumError,
    ConfigError,
    ProtocolError,
    StoreClosedError,
    UnknownLayerError,
)
from engram_store.kernels import uses as kernels
from engram_store.store import Store
from engram_store.types import RowBlock
from tests.pairs import DIM, MakePair, random_tokens, tables_of

ROW_BYTES = 2 * DIM
PADDING = 2 * PAGE_BYTES
"""The last page of the block of either layer."""
Tables = dict[int, tuple[RowBlock, NDArray[np.float32]]]


@pytest.fixture
def trained(make_pair: MakePair) -> tuple[Path, Tables]:
    """A store with rows in the base and in segments, and its contents."""
    pair = make_pair(options={"fold_ratio": 1e6})
    for _ in range(3):
        pair.train(2)
        pair.store.seal()
    pair.store.close()
    return pair.path, {
        layer: (content.rows, content.state) for layer, content in pair.oracle.contents.items()
    }


@pytest.fixture
def store(trained: tuple[Path, Tables]) -> Any:
    with engram_store.open(trained[0], count_uses=True) as store:
        yield store


def reader_of(store: Store) -> Reader:
    assert isinstance(store._engine, Reader)
    return store._engine


def table_of(store: Store, layer: int = 1) -> PackableTable:
    return reader_of(store).tables[layer]


def packed_rows(store: Store, layer: int = 1) -> list[int]:
    """Rows that are read from a packed block, in its order."""
    table = table_of(store, layer)
    if not table._packed:
        return []
    (block,) = table._packed
    places = table.remap[block.rows]
    np.testing.assert_array_equal(places, block.first_slot + 1 + np.arange(block.rows.size))
    return [int(row) for row in block.rows]


def room_for(rows: int) -> int:
    return PADDING + rows * ROW_BYTES


def use(store: Store, layer: int, *rows: int) -> None:
    store.read_rows(layer, np.array(rows).astype(np.int32))


def assert_unchanged(store: Store, expected: Tables) -> None:
    """Every row by the session, every row and its state past it."""
    for layer, (rows, state) in tables_of(store).items():
        assert rows.tobytes() == expected[layer][0].tobytes()
        assert state.tobytes() == expected[layer][1].tobytes()
        mine = reader_of(store).uses
        reader_of(store).uses = None  # looking is no use
        assert (
            store.read_rows(layer, np.arange(len(rows), dtype=np.int32)).tobytes() == rows.tobytes()
        )
        reader_of(store).uses = mine


# ---------------------------------------------------------------------- counting and choosing


@given(st.lists(st.integers(0, 20), max_size=200), st.integers(0, 65_536))
def test_uses_are_counted_and_stay_at_the_most(rows: list[int], before: int) -> None:
    counts = np.full(21, min(before, kernels.MOST_USES), np.uint16)
    expected = np.minimum(counts + np.bincount(rows, minlength=21), 65_535)
    kernels.count_uses(np.array(rows, np.int32), counts)
    np.testing.assert_array_equal(counts, expected)


@given(st.lists(st.sampled_from([0, 1, 2, 3, 9, 65_535]), min_size=1, max_size=60), st.data())
def test_the_rows_used_most_come_first(uses: list[int], data: st.DataObject) -> None:
    """As many as are wanted, and by their ids where they were used equally often."""
    counts = np.array(uses, np.uint16)
    wanted = data.draw(st.integers(0, len(uses)))
    found = promotion._histogram(counts)
    np.testing.assert_array_equal(found, np.bincount(uses, minlength=65_536))

    rows = promotion._most_used(counts, found, wanted)

    assert rows.tolist() == sorted(range(len(uses)), key=lambda row: (-uses[row], row))[:wanted]
    assert promotion._uses_of(found) == sum(uses)
    assert promotion._uses_of(found, wanted) == sum(uses[row] for row in rows)


def histogram(**rows: int) -> NDArray[np.int64]:
    """`n3=5`: five rows were used three times."""
    found = np.zeros(kernels.MOST_USES + 1, np.int64)
    for count, number in rows.items():
        found[int(count[1:])] = number
    return found


def test_room_goes_to_the_rows_used_most_per_byte() -> None:
    """A row of twice the bytes has to be used twice as often; unused ones never get in."""
    used = {1: histogram(n0=100, n4=10, n1=10), 2: histogram(n0=100, n6=10, n3=10)}
    row_bytes = {1: 100, 2: 200}
    assert plan_promotion(used, row_bytes, 1_000) == {1: 10, 2: 0}
    assert plan_promotion(used, row_bytes, 2_200) == {1: 10, 2: 6}
    assert plan_promotion(used, row_bytes, 4_000) == {1: 10, 2: 15}
    # What is left is too small for the larger row, and not for the smaller one.
    assert plan_promotion(used, row_bytes, 3_150) == {1: 11, 2: 10}
    assert plan_promotion(used, row_bytes, 10**9) == {1: 20, 2: 20}
    assert plan_promotion(used, row_bytes, 99) == {1: 0, 2: 0}


# ---------------------------------------------------------------------- at work


def test_the_most_used_rows_are_read_from_one_block(
    store: Store, trained: tuple[Path, Tables]
) -> None:
    """Whether a window or `read_rows` asked for them; all bytes stay what they were."""
    window = store.announce(random_tokens(np.random.default_rng(1)))
    rows = np.sort(window.row_ids(1))
    before, _ = window.rows(1)
    before = before.copy()
    window.close()
    for row in (70, 30, 30, 50, 50, 50, 70):
        use(store, 2, row)
    use(store, 1, int(rows[-1]), int(rows[3]))

    report = store.promote(max_bytes=room_for(4))

    assert packed_rows(store, 2) == [50, 30]
    assert packed_rows(store, 1) == [rows[3], rows[-1]]
    assert (report.rows, report.bytes) == (4, 2 * PAGE_BYTES)
    assert report.share == pytest.approx((3 + 2 + 2 + 2) / (rows.size + 2 + 7))
    assert reader_of(store).promoted == report
    assert_unchanged(store, trained[1])
    window = store.announce(random_tokens(np.random.default_rng(1)))
    assert window.rows(1)[0].tobytes() == before.tobytes()
    assert store.stats().tables[1].unique_rows == 2 * rows.size


def test_a_window_counts_a_row_once(store: Store) -> None:
    """However often its tokens repeat; a window that was not read counts none."""
    store.announce(np.full((1, 30), 7)).row_ids(1)
    with pytest.raises(ProtocolError, match="no row of layers"):
        store.promote(max_bytes=1 << 20)
    window = store.announce(np.full((1, 30), 7))
    window.rows(1)

    report = store.promote(max_bytes=1 << 20, layers=[1])

    assert packed_rows(store) == sorted(window.row_ids(1).tolist())
    assert report.share == 1
    uses = reader_of(store).uses
    assert uses is not None
    assert int(uses[1].copy().max()) == 1


def test_rows_of_unread_layers_and_more_room_than_rows_are_fine(store: Store) -> None:
    """Memory is taken for the rows, not for what was allowed."""
    use(store, 2, *range(300))
    report = store.promote(max_bytes=1 << 30)
    assert packed_rows(store, 1) == []
    assert packed_rows(store, 2) == list(range(300))
    assert (report.rows, report.share) == (300, 1.0)
    assert report.bytes == -(-300 * ROW_BYTES // PAGE_BYTES) * PAGE_BYTES


def test_promoting_again_replaces_what_was_promoted(
    store: Store, trained: tuple[Path, Tables]
) -> None:
    """Rows that leave are read from the files again; the old memory is unmapped, once."""
    use(store, 1, *range(6_000))
    use(store, 2, 3)
    first = store.promote(max_bytes=1 << 20)
    (old,) = table_of(store)._packed
    assert first.rows == 6_001
    for _ in range(2):
        use(store, 1, *range(5_000, 9_000))

    second = store.promote(max_bytes=room_for(4_000) - PAGE_BYTES, layers=[1])

    assert packed_rows(store) == [*range(5_000, 6_000), *range(6_000, 9_000)]
    assert packed_rows(store, 2) == []
    assert second.rows == 4_000
    assert old.memory.bytes.size == 0
    assert_unchanged(store, trained[1])
    (kept,) = table_of(store)._packed
    outside = np.setdiff1d(np.arange(16_000), kept.rows)
    slots = np.arange(kept.first_slot + 1, kept.first_slot + 1 + 4_000)
    assert not np.isin(table_of(store).remap[outside], slots).any()
    # Overlay slots are given back too: otherwise they would run out.
    for _ in range(3):
        use(store, 1, 1)
        store.promote(max_bytes=room_for(5_000))
    assert len(table_of(store)._space._used) == len(table_of(store).segments) + 1
    assert_unchanged(store, trained[1])


def test_rows_may_be_read_while_rows_are_promoted(
    store: Store, trained: tuple[Path, Tables], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, rows and state, on several threads, through many promotions."""
    monkeypatch.setattr(packed, "_BATCH_ROWS", 64)
    monkeypatch.setattr(promotion, "_SLICE_ROWS", 64)
    stop = threading.Event()
    expected = trained[1]

    def read(seed: int) -> int:
        rng, reads = np.random.default_rng(seed), 0
        while not stop.is_set():
            layer = int(rng.integers(1, 3))
            if reads % 3 == 0:
                with store.announce(random_tokens(rng)) as window:
                    rows, got = window.row_ids(layer), window.rows(layer)[0].copy()
            elif reads % 3 == 1:
                rows = rng.integers(0, 3_000, 500, np.int32)
                got = store.read_rows(layer, rows)
            else:
                first = int(rng.integers(0, 9_000))
                rows = np.arange(first, first + 900, dtype=np.int32)
                got, state = table_of(store, layer).read_range(first, 900)
                assert state.tobytes() == expected[layer][1][rows].tobytes()
            assert got.tobytes() == expected[layer][0][rows].tobytes()
            reads += 1
        return reads

    use(store, 1, 5)
    with ThreadPoolExecutor(3) as threads:
        readers = [threads.submit(read, seed) for seed in range(3)]
        try:
            for turn in range(30):
                layers = [[1, 2], [1], [2]][turn % 3]
                use(store, layers[0], *range(100 * turn, 100 * turn + 3_000))
                store.promote(max_bytes=room_for(500 + 200 * (turn % 7)), layers=layers)
        finally:
            stop.set()
        assert all(reader.result() > 3 for reader in readers)
    assert_unchanged(store, expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_tables_with_much_state_or_none(make_pair: MakePair, optimizer: str) -> None:
    """State is not packed, and stays readable."""
    pair = make_pair(optimizer=optimizer, dtype="float32")
    pair.train(2)
    pair.store.close()
    with engram_store.open(pair.path, count_uses=True) as store:
        use(store, 1, *range(2_000))
        assert store.promote(max_bytes=1 << 20).rows == 2_000
        assert_unchanged(
            store, {layer: (c.rows, c.state) for layer, c in pair.oracle.contents.items()}
        )


def test_locked_memory_is_reported_as_it_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel says; where locking is refused the rows are packed all the same."""

    def locked() -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmLck"))

    use(store, 1, *range(1_000))
    before = locked()
    report = store.promote(max_bytes=1 << 20)
    assert locked() - before == (report.bytes if report.locked else 0)

    monkeypatch.setattr(promotion._libc, "mlock", lambda *_: -1)
    use(store, 1, 5)
    report = store.promote(max_bytes=1 << 20)
    assert not report.locked
    assert report.rows == 1_000
    assert locked() == before


def test_rows_of_blocks_that_turn_out_damaged_are_refused_packed_or_not(store: Store) -> None:
    """Their copies may be of damaged bytes."""
    use(store, 1, *range(200))
    store.promote(max_bytes=1 << 20)
    table = table_of(store)
    (block,) = table._packed
    (segment, *_) = (s for s in table.segments if (block.origins > s.first_slot).any())
    slots = block.origins - 1 - segment.first_slot
    hit = (slots >= 0) & (slots < min(segment.files.slots, 500))
    assert 0 < hit.sum() < block.rows.size
    damage = BlockDamage(
        layer=1, path=Path("rows"), block=0, problem="is damaged", first=0, stop=500,
        segment=segment.ref.number, source=None, array="rows",
    )  # fmt: skip

    table.damages = [damage]

    for row in block.rows[hit]:
        with pytest.raises(ChecksumError, match=f"row {row} asked for cannot be served"):
            use(store, 1, row)
    use(store, 1, *block.rows[~hit])


def test_closing_while_rows_are_promoted_is_told(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any moment of it: before the copy, between two batches of patches."""
    use(store, 1, *range(1_000))
    monkeypatch.setattr(packed, "_BATCH_ROWS", 64)
    table, batches = table_of(store), packed.PackableTable._locked_batches

    def closing(self: PackableTable, count: int) -> Any:
        for number, batch in enumerate(batches(self, count)):
            yield batch
            if number == 3:
                break
        store.close()
        yield from batches(self, count)

    monkeypatch.setattr(packed.PackableTable, "_locked_batches", closing)
    with pytest.raises(StoreClosedError, match="open it again"):
        store.promote(max_bytes=1 << 20)
    (block,) = table._packed
    assert block.memory.bytes.size == 0
    with pytest.raises(StoreClosedError):
        store.promote(max_bytes=1 << 20)
    assert reader_of(store).promoted is None


# ---------------------------------------------------------------------- what is refused


def test_a_store_for_training_promotes_nothing(make_pair: MakePair) -> None:
    pair = make_pair()
    with pytest.raises(ProtocolError, match=r"opened for training.*mode='read'"):
        pair.store.promote(max_bytes=1 << 20)
    pair.store.close()
    with pytest.raises(ConfigError, match=r"count_uses is for promote.*mode='read'"):
        engram_store.open(pair.path, "train", count_uses=True)


def test_a_store_that_does_not_count_says_how_it_would(trained: tuple[Path, Tables]) -> None:
    with engram_store.open(trained[0]) as store:
        use(store, 1, 5)
        with pytest.raises(ConfigError, match="open it with count_uses=True"):
            store.promote(max_bytes=1 << 20)


def too_little(store: Store) -> None:
    store.promote(max_bytes=PADDING + ROW_BYTES - 1)


def no_number(store: Store) -> None:
    store.promote(max_bytes=1e6)  # type: ignore[arg-type]


def no_layer(store: Store) -> None:
    store.promote(max_bytes=1 << 20, layers=[])


def another_layer(store: Store) -> None:
    store.promote(max_bytes=1 << 20, layers=[1, 7])


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (too_little, ConfigError, r"max_bytes is 8,223; .* takes at least 8,224"),
        (no_number, ConfigError, "max_bytes is 1000000.0; it is a number of bytes"),
        (no_layer, ConfigError, r"layers is empty; name some of \[1, 2\]"),
        (another_layer, UnknownLayerError, "no table for layer 7"),
    ],
)
def test_what_makes_no_sense_is_refused(
    store: Store, call: Callable[[Store], None], kind: type[Exception], text: str
) -> None:
    """What was promoted before stays."""
    use(store, 1, 5)
    before = store.promote(max_bytes=room_for(1))
    with pytest.raises(kind, match=text):
        call(store)
    assert packed_rows(store) == [5]
    assert reader_of(store).promoted == before


def test_memory_that_is_not_there_is_not_taken(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything would be killed for it."""
    use(store, 1, *range(1_000))
    monkeypatch.setattr(promotion, "memory_headroom_bytes", lambda: 31_999)
    with pytest.raises(CapacityError, match=r"packing 32,000 bytes .* smaller max_bytes"):
        store.promote(max_bytes=1 << 20)
    assert packed_rows(store) == []
    assert reader_of(store).promoted is None
