"""Which rows are cold, which pages they need, which changed: each kernel beside plain numpy."""

from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engram_store.kernels import pages, rows

SIZES = st.integers(0, 200)
SEEDS = st.integers(0, 2**32 - 1)
ROW_BYTES = st.sampled_from([2, 4, 64, 100, 128, 160, 1000, 4096, 5000, 12288])
PAGE = pages.PAGE_BYTES
UNIT = pages.UNIT_BYTES


@dataclass
class Extents:
    """Extents of one kind: made-up addresses, real residency, some of them without any."""

    starts: NDArray[np.int64]
    vectors: NDArray[np.uint8]
    """[extents, pages and two guards]."""
    vector_addresses: NDArray[np.int64]

    @classmethod
    def random(
        cls, rng: np.random.Generator, count: int, size: int, resident: float, at: int
    ) -> "Extents":
        length = -(-size // UNIT)
        starts = at + np.arange(count) * (length + 3) * UNIT
        vectors = rng.choice(
            np.array([0, 1, 2], np.uint8),
            (count, length + 2),
            p=[(1 - resident) / 2, resident, (1 - resident) / 2],
        )
        addresses = vectors.ctypes.data + 1 + np.arange(count) * (length + 2)
        addresses[rng.random(count) < 0.3] = 0
        return cls(starts, vectors, addresses)

    def pages_of(self, extent: int, offset: int, row_bytes: int) -> NDArray[np.uint8]:
        """A view of the residency of one row; empty where the extent has none."""
        if not self.vector_addresses[extent]:
            return self.vectors[extent, :0]
        return self.vectors[extent, 1 + offset // UNIT : 2 + (offset + row_bytes - 1) // UNIT]


@dataclass
class Case:
    """Random rows of a table whose base has 5 chunks and whose overlay has 4 blocks."""

    row_bytes: int
    chunk_shift: int
    block_shift: int
    base: Extents
    overlay: Extents
    rows: NDArray[np.int32]
    places: NDArray[np.int32]

    @classmethod
    def random(cls, seed: int, n: int, row_bytes: int, resident: float) -> "Case":
        rng = np.random.default_rng(seed)
        chunk_shift, block_shift = (int(shift) for shift in rng.integers(0, 9, 2))
        return cls(
            row_bytes,
            chunk_shift,
            block_shift,
            Extents.random(rng, 5, row_bytes << chunk_shift, resident, 1 << 40),
            Extents.random(rng, 4, row_bytes << block_shift, resident, 1 << 44),
            rng.integers(0, 5 << chunk_shift, n).astype(np.int32),
            (rng.integers(0, (4 << block_shift) + 1, n) * (rng.random(n) < 0.5)).astype(np.int32),
        )

    def residency(self, i: int) -> NDArray[np.uint8]:
        place = int(self.places[i])
        index, shift, extents = (
            (place - 1, self.block_shift, self.overlay)
            if place
            else (int(self.rows[i]), self.chunk_shift, self.base)
        )
        offset = (index & ((1 << shift) - 1)) * self.row_bytes
        return extents.pages_of(index >> shift, offset, self.row_bytes)

    def vectors(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return self.base.vectors.copy(), self.overlay.vectors.copy()

    def split(self) -> tuple[NDArray[np.int64], list[int], list[int]]:
        """Addresses, warm and cold positions of the kernel."""
        n = self.rows.size
        addresses = np.full(n + 1, -7, np.int64)
        warm, cold = np.full(n + 1, -7, np.int32), np.full(n + 1, -7, np.int32)
        count = pages.split_cold(
            self.rows,
            self.places,
            self.base.starts,
            self.base.vector_addresses,
            self.chunk_shift,
            self.overlay.starts,
            self.overlay.vector_addresses,
            self.block_shift,
            self.row_bytes,
            addresses,
            warm,
            cold,
        )
        assert addresses[n] == -7
        assert warm[n] == cold[n] == -7
        return addresses[:n], warm[: n - count].tolist(), cold[:count].tolist()


@given(SEEDS, SIZES, ROW_BYTES, st.sampled_from([0.0, 0.5, 0.98, 1.0]))
def test_rows_are_cold_if_any_of_their_pages_is(
    seed: int, n: int, row_bytes: int, resident: float
) -> None:
    """Each position once, ascending; absent pages of cold rows are being read, no other byte."""
    case = Case.random(seed, n, row_bytes, resident)
    expected_cold = [i for i in range(n) if (case.residency(i) != 1).any()]
    before = case.vectors()

    addresses, warm, cold = case.split()

    assert cold == expected_cold
    assert sorted(warm + cold) == list(range(n))
    assert warm == sorted(warm)
    after = case.vectors()
    for extents, old in zip((case.base, case.overlay), before, strict=True):
        extents.vectors[:] = old
    for i in cold:
        residency = case.residency(i)
        residency[residency == 0] = 2
    for extents, new in zip((case.base, case.overlay), after, strict=True):
        np.testing.assert_array_equal(extents.vectors, new)
    found = np.empty(n, np.int64)
    rows.find_addresses(
        case.rows,
        case.places,
        case.base.starts,
        case.chunk_shift,
        case.overlay.starts,
        case.block_shift,
        row_bytes,
        found,
    )
    np.testing.assert_array_equal(addresses, found)


@given(SEEDS, SIZES, ROW_BYTES)
def test_marked_rows_are_warm_and_no_other_page_changes(seed: int, n: int, row_bytes: int) -> None:
    """Only pages of the given positions; extents without residency have nothing to mark."""
    case = Case.random(seed, n, row_bytes, 0.5)
    case.split()
    done = np.random.default_rng(seed).permutation(n)[: n // 2].astype(np.int32)
    before = case.vectors()

    pages.mark_resident(
        case.rows,
        case.places,
        done,
        case.base.vector_addresses,
        case.chunk_shift,
        case.overlay.vector_addresses,
        case.block_shift,
        row_bytes,
    )

    after = case.vectors()
    for extents, old in zip((case.base, case.overlay), before, strict=True):
        extents.vectors[:] = old
    for i in done:
        case.residency(i)[:] = 1
    for extents, new in zip((case.base, case.overlay), after, strict=True):
        np.testing.assert_array_equal(extents.vectors, new)
    assert not set(case.split()[2]) & set(done.tolist())


def test_a_refresh_believes_the_kernel_but_keeps_what_is_being_read() -> None:
    """Every belief against both answers; bits of the answer above the first mean nothing."""
    believed = np.array([0, 1, 2, 0, 1, 2, 2], np.uint8)
    told = np.array([0, 0, 0, 1, 1, 1, 0xFE], np.uint8)
    assert pages.refresh_resident(believed, told) == 4
    assert believed.tolist() == [0, 0, 2, 1, 1, 1, 2]


@given(SEEDS, SIZES, ROW_BYTES, st.integers(1, 2000))
def test_page_ranges_are_the_distinct_pages_in_order(
    seed: int, n: int, row_bytes: int, spread: int
) -> None:
    """Every page under a row once, no other; neighbours in one range."""
    rng = np.random.default_rng(seed)
    addresses = np.sort((1 << 40) + rng.integers(0, spread, n) * row_bytes)
    ranges = np.full((n + 1, 2), -7, np.int64)

    count = pages.page_ranges(addresses, row_bytes, ranges)

    expected = {
        page for a in addresses for page in range(a // PAGE, (a + row_bytes - 1) // PAGE + 1)
    }
    got = [
        page
        for address, length in ranges[:count]
        for page in range(address // PAGE, (address + length) // PAGE)
    ]
    assert got == sorted(expected)
    assert (ranges[count:] == -7).all()
    assert (ranges[1:count, 0] > ranges[: max(count - 1, 0)].sum(axis=1)).all()
    assert not (ranges[:count] % PAGE).any()


@given(SEEDS, st.integers(1, 300), st.integers(1, 100).map(lambda half: 2 * half))
def test_chosen_rows_are_copied_to_their_places(seed: int, n: int, row_bytes: int) -> None:
    """And rows that were not chosen stay as they are."""
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 255, (n, row_bytes)).astype(np.uint8)
    source = rng.permutation(n)
    addresses = table.ctypes.data + source * row_bytes
    positions = rng.permutation(n)[: rng.integers(0, n + 1)].astype(np.int32)
    out = np.full((n, row_bytes), 255, np.uint8)

    pages.copy_rows_at(addresses, positions, row_bytes, out.reshape(-1))

    expected = np.full((n, row_bytes), 255, np.uint8)
    expected[positions] = table[source[positions]]
    np.testing.assert_array_equal(out, expected)


@given(SEEDS, SIZES, st.integers(0, 3), st.integers(0, 5), st.integers(0, 5))
def test_changed_rows_moved_or_lie_where_something_else_was(
    seed: int, n: int, block_shift: int, base_clock: int, clock: int
) -> None:
    """Places are brought up to date, also of rows that count as unchanged."""
    rng = np.random.default_rng(seed)
    remap = rng.integers(0, 20, 50).astype(np.int32)
    wanted = rng.integers(0, 50, n).astype(np.int32)
    places = np.where(rng.random(n) < 0.6, remap[wanted], rng.integers(0, 20, n)).astype(np.int32)
    block_clocks = rng.integers(0, 6, 20)
    positions = np.full(n + 1, -7, np.int32)
    now = remap[wanted]
    clocks = np.where(now == 0, base_clock, block_clocks[(now - 1) >> block_shift])
    expected = np.flatnonzero((places != now) | (clocks > clock))

    count = pages.changed_places(
        wanted, remap, places, block_clocks, block_shift, base_clock, clock, positions
    )

    np.testing.assert_array_equal(positions[:count], expected)
    np.testing.assert_array_equal(places, now)
    assert positions[n] == -7
