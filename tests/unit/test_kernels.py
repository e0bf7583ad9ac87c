"""Each kernel beside plain numpy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engram_store.kernels import gradients, rows
from engram_store.optimizers.reference import widen

SIZES = st.integers(0, 300)
SEEDS = st.integers(0, 2**32 - 1)


def random_rows(seed: int, n: int, table: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, table, n).astype(np.int32)


@given(SIZES, st.integers(1, 400), SEEDS)
def test_deduplicate_keeps_the_order_of_first_look_up(n: int, table: int, seed: int) -> None:
    """Every id once; the inverse leads back; scratch that is too large changes nothing."""
    lookups = random_rows(seed, n, table)
    unique, inverse = np.full(n, -1, np.int32), np.full(n, -1, np.int32)
    for slots in (1 << max(2 * n - 1, 1).bit_length(), 2048):
        count = rows.deduplicate(lookups, np.empty(slots, np.uint32), unique, inverse)
        _, first = np.unique(lookups, return_index=True)
        np.testing.assert_array_equal(unique[:count], lookups[np.sort(first)])
        np.testing.assert_array_equal(unique[inverse], lookups)


def test_deduplicate_of_colliding_and_extreme_ids() -> None:
    """A full table of equal hashes still ends; ids up to 2^31 - 1."""
    lookups = np.array([2**31 - 1, 0, 2**31 - 1, 2**30, 0] * 50, np.int32)
    unique, inverse = np.empty(250, np.int32), np.empty(250, np.int32)
    assert rows.deduplicate(lookups, np.empty(512, np.int64), unique, inverse) == 3
    np.testing.assert_array_equal(unique[:3], [2**31 - 1, 0, 2**30])
    np.testing.assert_array_equal(unique[inverse], lookups)


@given(SIZES, SEEDS, st.integers(0, 120))
def test_locate_counts_where_rows_are(n: int, seed: int, memtable_slots: int) -> None:
    """0 is the base, up to `memtable_slots` memtables, above it segments."""
    table = 100
    remap = random_rows(seed, table, 150)
    wanted = random_rows(seed + 1, n, table)
    places = np.full(n + 3, -1, np.int32)
    in_memtable, in_segment = rows.locate(wanted, remap, memtable_slots, places)
    np.testing.assert_array_equal(places[:n], remap[wanted])
    assert (places[n:] == -1).all()
    assert in_memtable == ((places[:n] > 0) & (places[:n] <= memtable_slots)).sum()
    assert in_segment == (places[:n] > memtable_slots).sum()


@given(SIZES, SEEDS, st.integers(1, 100).map(lambda half: 2 * half), st.integers(2, 5))
def test_rows_are_found_and_copied_wherever_they_are(
    n: int, seed: int, row_bytes: int, shift: int
) -> None:
    """From base chunks and overlay blocks, every even row length, and not one byte beyond."""
    rng = np.random.default_rng(seed)
    chunks, blocks, block_shift = 5, 4, 3
    base = rng.integers(0, 256, (chunks << shift, row_bytes)).astype(np.uint8)
    overlay = rng.integers(0, 256, (blocks << block_shift, row_bytes)).astype(np.uint8)
    wanted = random_rows(seed, n, len(base))
    places = rng.integers(0, len(overlay) + 1, n).astype(np.int32)
    base_starts = base.ctypes.data + np.arange(chunks) * (row_bytes << shift)
    block_starts = overlay.ctypes.data + np.arange(blocks) * (row_bytes << block_shift)
    out = np.full(n * row_bytes + 70, 7, np.uint8)

    addresses = np.empty(n + 2, np.int64)
    rows.find_addresses(
        wanted, places, base_starts, shift, block_starts, block_shift, row_bytes, addresses
    )
    rows.copy_rows(addresses[:n], row_bytes, out)

    expected = np.where((places == 0)[:, None], base[wanted], overlay[places - 1])
    np.testing.assert_array_equal(out[: n * row_bytes].reshape(n, row_bytes), expected)
    assert (out[n * row_bytes :] == 7).all()


@given(SIZES, SEEDS, st.integers(0, 1000))
def test_the_remap_follows_rows(n: int, seed: int, first: int) -> None:
    """Pointing, moving and forgetting touch the entries that they mean and no other."""
    table = 350
    remap = random_rows(seed, table, 2000)
    ids = np.random.default_rng(seed).permutation(table).astype(np.int32)[:n]
    expected = remap.copy()
    expected[ids] = first + 1 + np.arange(n)
    rows.point_at_slots(ids, first, remap)
    np.testing.assert_array_equal(remap, expected)

    later = ids[::3]  # a later commit moved these on
    rows.point_at_slots(later, 5000, remap)
    moved = remap.copy()
    old = first + 1 + np.arange(n, dtype=np.int32)
    new = (9000 + np.arange(n)).astype(np.int32)
    stayed = ~np.isin(ids, later)
    moved[ids[stayed]] = new[stayed]
    rows.move_places(ids, old, new, remap)
    np.testing.assert_array_equal(remap, moved)

    moved[ids[stayed]] = 0
    rows.forget_slots(ids, 8999, remap)
    np.testing.assert_array_equal(remap, moved)


@given(SIZES, st.integers(1, 400), SEEDS)
def test_last_slots_of_a_log(n: int, table: int, seed: int) -> None:
    """Each row's last position, ascending; the scratch is clean again afterwards."""
    log = random_rows(seed, n, table)
    seen = np.zeros((table >> 3) + 1, np.uint8)
    live = np.empty(n, np.int32)
    count = rows.last_slots(log, seen, live)
    last = {int(row): i for i, row in enumerate(log)}
    np.testing.assert_array_equal(live[:count], sorted(last.values()))
    assert not seen.any()


@given(SIZES, SEEDS, st.integers(1, 100).map(lambda half: 2 * half))
def test_slots_of_a_dense_block_are_copied(n: int, seed: int, row_bytes: int) -> None:
    source = np.random.default_rng(seed).integers(0, 256, (60, row_bytes)).astype(np.uint8)
    positions = random_rows(seed, n, 60)
    out = np.full(n * row_bytes + 66, 7, np.uint8)
    addresses = np.empty(n, np.int64)
    rows.slot_addresses(source.reshape(-1), positions, row_bytes, addresses)
    rows.copy_rows(addresses, row_bytes, out)
    np.testing.assert_array_equal(out[: n * row_bytes].reshape(n, row_bytes), source[positions])
    assert (out[n * row_bytes :] == 7).all()


@given(st.lists(st.integers(0, 99), max_size=60), st.integers(0, 5), SEEDS)
def test_newest_in_chunk(ids: list[int], chunk: int, seed: int) -> None:
    """Later calls win; rows of other chunks are left out."""
    places = random_rows(seed, 16, 10)
    expected = places.copy()
    for slot, row in enumerate(ids):
        if chunk * 16 <= row < chunk * 16 + 16:
            expected[row - chunk * 16] = 4096 + slot + 1
    rows.newest_in_chunk(np.array(ids, np.int32), 4096, chunk * 16, places)
    np.testing.assert_array_equal(places, expected)


SPECIAL = st.sampled_from([0.0, -0.0, 1.0, 3e38, -3e38, 1e-45, np.inf, -np.inf, np.nan])


@given(st.lists(st.lists(SPECIAL, min_size=5, max_size=5), min_size=1, max_size=20))
def test_nonfinite_rows_are_found_in_both_formats(values: list[list[float]]) -> None:
    wide = np.array(values, np.float32)
    narrow = (wide.view(np.uint32) >> 16).astype(np.uint16)
    bad = np.empty(len(wide) + 2, np.bool_)
    for bits, exponent, of in (
        (wide.view(np.uint32), np.uint32(0x7F800000), wide),
        (narrow, np.uint16(0x7F80), widen(narrow)),
    ):
        count = gradients.nonfinite_rows(bits, exponent, bad)
        expected = ~np.isfinite(of).all(axis=1)
        np.testing.assert_array_equal(bad[: len(wide)], expected)
        assert count == expected.sum()


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
@given(n=st.integers(0, 60), dim=st.integers(1, 40), seed=SEEDS)
def test_add_rows_adds_in_order(dtype: type, n: int, dim: int, seed: int) -> None:
    """float32 sums of float32 and of bfloat16, bit for bit."""
    rng = np.random.default_rng(seed)
    block = rng.standard_normal((n, dim), np.float32)
    if dtype is np.uint16:
        block = (block.view(np.uint32) >> 16).astype(np.uint16)
    positions = rng.integers(0, 20, n).astype(np.int32)
    sums = rng.standard_normal((20, dim), np.float32)
    expected = sums.copy()
    np.add.at(expected, positions, widen(block))
    gradients.add_rows(block, positions, sums)
    assert sums.tobytes() == expected.tobytes()


@given(st.integers(0, 60), st.integers(1, 40), SEEDS)
def test_sums_of_squares(n: int, dim: int, seed: int) -> None:
    """In float64, up to the order of the additions."""
    block = np.random.default_rng(seed).standard_normal((n, dim), np.float32)
    expected = (block.astype(np.float64) ** 2).sum()
    np.testing.assert_allclose(gradients.sum_of_squares(block), expected, rtol=1e-12)
