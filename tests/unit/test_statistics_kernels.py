"""Counting by head, distinct things in little memory, and growth curves."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engram_store.engine.fetch import Fetched
from engram_store.engine.heads import GROWTH_POINTS, SAMPLE_EVERY, TouchedRows, WindowSamples
from engram_store.kernels import statistics as kernels
from engram_store.kernels.statistics import REGISTERS, HeadRanges
from engram_store.layout.create import table_specs
from engram_store.recipes import Recipe, engram, engram_peft, qwen_ple
from engram_store.types import TableSpec, TokenIds

NO_COLD_ROWS: NDArray[np.int64] = np.zeros(4, np.int64)


def where(ranges: HeadRanges) -> tuple[Any, ...]:
    return ranges.starts, ranges.guesses, ranges.shift


@pytest.mark.parametrize("things", [0, 1, 40, 3_000, 40_000, 1_000_000])
def test_estimates_are_within_three_standard_errors(things: int) -> None:
    """Small numbers are all but exact."""
    ranges = HeadRanges.of([0], 1 << 30)
    rows = np.random.default_rng(things).permutation(1 << 21)[:things].astype(np.int32)
    registers, found = np.zeros((1, REGISTERS), np.uint8), np.zeros((1, 2), np.int64)

    for _ in range(2):  # what was met before changes nothing
        kernels.count_heads(rows, rows, 0, *where(ranges), found, registers)

    assert kernels.estimate_distinct(registers[0]) == pytest.approx(things, rel=0.025)
    assert found[0, 0] == 2 * things


@pytest.mark.parametrize("sizes", [[7], [2, 2, 2], [999_983, 5, 1_000_003, 2], [50] * 400])
def test_rows_are_counted_by_head(sizes: list[int]) -> None:
    """As numpy counts them, with rows at both ends of every head."""
    ends = np.cumsum(sizes)
    offsets, total = [0, *ends[:-1].tolist()], int(ends[-1])
    ranges = HeadRanges.of(offsets, total + 3)
    rng = np.random.default_rng(0)
    edges = np.concatenate([offsets, ends - 1])
    rows = np.unique(np.concatenate([edges, rng.integers(0, total, 5_000)])).astype(np.int32)
    rng.shuffle(rows)
    places = rng.integers(0, 30, rows.size).astype(np.int32)
    cold = np.flatnonzero(places > 20).astype(np.int32)
    found, read = np.zeros((len(sizes), 2), np.int64), np.zeros(len(sizes), np.int64)
    registers = np.zeros((len(sizes), REGISTERS), np.uint8)

    kernels.count_heads(rows, places, 10, *where(ranges), found, registers)
    kernels.count_cold(rows, cold, *where(ranges), read)

    heads = np.searchsorted(offsets, rows, "right") - 1
    memory = (places > 0) & (places <= 10)
    for counts, chosen in zip((*found.T, read), (heads, heads[memory], heads[cold]), strict=True):
        np.testing.assert_array_equal(counts, np.bincount(chosen, minlength=len(sizes)))
    for head, line in enumerate(registers):
        count = np.count_nonzero(heads == head)
        assert kernels.estimate_distinct(line) == pytest.approx(count, rel=0.02, abs=1)


def test_marked_rows_count_once() -> None:
    """However often they come; bits of the same byte are told apart."""
    ranges = HeadRanges.of([0, 100, 5_000], 9_000)
    marks, found = np.zeros(9_000 // 8 + 1, np.uint8), np.zeros(3, np.int64)
    rng = np.random.default_rng(1)
    met: set[int] = set()
    for _ in range(20):
        rows = rng.integers(0, 9_000, 700).astype(np.int32)
        met |= set(rows.tolist())
        kernels.mark_rows(rows, *where(ranges), marks, found)
        expected = np.bincount(np.searchsorted([0, 100, 5_000], [*met], "right") - 1, minlength=3)
        np.testing.assert_array_equal(found, expected)


# ---------------------------------------------------------------------- n-grams


def fetched(rows: NDArray[np.int32], places: NDArray[np.int32] | None = None) -> Fetched:
    where_they_are = np.zeros_like(rows) if places is None else places
    return Fetched(rows, where_they_are, version=0, clock=0, in_memtables=0, in_segments=0)


def look(
    samples: WindowSamples,
    recipe: Recipe,
    tokens: TokenIds,
    context: TokenIds | None = None,
    attention_mask: NDArray[Any] | None = None,
) -> None:
    rows = np.unique(recipe.rows(1, tokens, context=context, attention_mask=attention_mask))
    samples.look_at(fetched(rows), 0, NO_COLD_ROWS, tokens, context, attention_mask)


def spec_of(recipe: Recipe) -> TableSpec:
    (spec,) = table_specs(recipe, overrides={}, dim=8)
    return spec


def distinct(samples: WindowSamples) -> list[int]:
    return [order.sampled_ngrams for order in samples.record(0, 0, 0, 0, [])]


def small(**more: Any) -> Recipe:
    settings = {"rows_per_head": 1_000, "orders": (2, 3), "heads": 2, "pad_id": 7}
    return engram(token_map=np.arange(300) // 2, layers=[1], **{**settings, **more})


def test_distinct_ngrams_are_those_of_the_text() -> None:
    """As compressed ids, with the filler before the start; a brute-force count agrees."""
    recipe, rng = small(), np.random.default_rng(2)
    samples = WindowSamples(recipe, spec_of(recipe))
    seen: list[set[tuple[int, ...]]] = [set(), set()]
    for _ in range(5):
        tokens = rng.integers(0, 300, (4, 200))
        look(samples, recipe, tokens)
        for line in tokens // 2:
            filled = [recipe.filler, recipe.filler, *line.tolist()]
            for at in range(2, len(filled)):
                seen[0].add(tuple(filled[at - 1 : at + 1]))
                seen[1].add(tuple(filled[at - 2 : at + 1]))

    for count, ngrams in zip(distinct(samples), seen, strict=True):
        assert count == pytest.approx(len(ngrams), rel=0.02)


def test_a_text_cut_into_windows_has_the_ngrams_of_the_whole() -> None:
    """With the context of each window; and the same window again adds none."""
    recipe, rng = small(), np.random.default_rng(3)
    text = rng.integers(0, 300, (2, 90))
    whole, parts = (WindowSamples(recipe, spec_of(recipe)) for _ in range(2))
    look(whole, recipe, text)
    context = None
    for start in range(0, 90, 30):
        part = text[:, start : start + 30]
        look(parts, recipe, part, context)
        look(parts, recipe, part, context)
        context = recipe.carry(part, context)

    np.testing.assert_array_equal(parts._ngrams, whole._ngrams)
    assert distinct(parts) == distinct(whole)


def test_ngrams_do_not_reach_across_separators_or_padding() -> None:
    """They are told apart exactly as the hash tells them apart."""
    recipe = qwen_ple(
        layers=[1], rows_per_head=1_000, heads=2, orders=(2, 3), vocabulary=300, eos_id=9
    )
    plain, masked, other = (WindowSamples(recipe, spec_of(recipe)) for _ in range(3))
    tokens = np.array([[1, 2, 9, 3, 4, 9, 9]])
    look(plain, recipe, tokens)
    padded = np.array([[1, 2, 200, 3, 4, 201, 202]])
    look(masked, recipe, padded, attention_mask=np.array([[1, 1, 0, 1, 1, 0, 0]]))
    look(other, recipe, padded)

    np.testing.assert_array_equal(masked._ngrams, plain._ngrams)
    assert (other._ngrams != plain._ngrams).any()


def test_ngrams_of_skipped_orders_that_begin_with_the_oldest_token() -> None:
    """Only orders that are hashed have a line, and each counts the tokens that it hashes."""
    recipe = engram_peft(
        token_map=np.arange(300),
        layers=[1],
        rows_per_order=[2_000] * 2,
        heads=2,
        orders=(2, 4),
        pad_id=7,
    )
    samples, rng = WindowSamples(recipe, spec_of(recipe)), np.random.default_rng(4)
    tokens = rng.integers(0, 300, (3, 300))
    look(samples, recipe, tokens)
    seen: list[set[tuple[int, ...]]] = [set(), set()]
    for line in tokens:
        filled = [recipe.filler] * 3 + line.tolist()
        for at in range(3, len(filled)):
            seen[0].add(tuple(filled[at - 3 : at - 1]))
            seen[1].add(tuple(filled[at - 3 : at + 1]))

    for count, ngrams in zip(distinct(samples), seen, strict=True):
        assert count == pytest.approx(len(ngrams), rel=0.02)


def test_collisions_are_those_of_a_table_that_is_too_small() -> None:
    """About as many n-grams share a row as there are n-grams per row of a full table."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 300, (40, 500))
    collisions = []
    for rows_per_head in (500, 1 << 20):
        recipe = small(rows_per_head=rows_per_head)
        samples = WindowSamples(recipe, spec_of(recipe))
        look(samples, recipe, tokens)
        orders = samples.record(0, 0, 0, 0, [])
        trigrams = orders[1]
        assert trigrams.ngrams_per_row is not None
        collisions.append(trigrams.ngrams_per_row)
        if rows_per_head == 500:
            full = trigrams.sampled_ngrams / trigrams.heads[0].rows
            assert trigrams.ngrams_per_row == pytest.approx(full, rel=0.05)

    assert collisions[0] > 30
    assert collisions[1] < 1.05


# ---------------------------------------------------------------------- samples and growth


def test_one_window_of_sixteen_is_looked_at() -> None:
    """The first of all, and then one of every 16, not always the same one."""
    recipe = small()
    samples = WindowSamples(recipe, spec_of(recipe))
    due = np.array([samples.next_is_due() for _ in range(100 * SAMPLE_EVERY)])

    places = due.reshape(100, SAMPLE_EVERY)
    assert due[0]
    assert (places.sum(axis=1) == 1).all()
    assert len(set(places.argmax(axis=1).tolist())) == SAMPLE_EVERY


def test_heads_add_up_to_the_exact_counters() -> None:
    """What samples show is shared out; nothing is made up where nothing was sampled."""
    recipe = small()
    samples = WindowSamples(recipe, spec_of(recipe))
    empty = samples.record(800, 700, 200, 100, [])
    assert [order.lookups for order in empty] == [400, 400]
    assert all(head.unique_rows == 0 for order in empty for head in order.heads)
    assert [order.ngrams_per_row for order in empty] == [None, None]

    rng = np.random.default_rng(6)
    rows = np.unique(recipe.rows(1, rng.integers(0, 300, (2, 100))))
    window = fetched(rows, rng.integers(0, 20, rows.size).astype(np.int32))
    window.cold = np.flatnonzero(window.places > 15).astype(np.int32)
    cold = samples.count_cold(window)
    samples.look_at(window, 10, cold, rng.integers(0, 300, (2, 100)), None, None)
    window.cold = window.cold[:20]
    samples.count_cold(window)  # of a window that was not sampled
    read = window.cold.size + int(cold.sum())
    orders = samples.record(800, 700, 200, read, [1, 2, 3, 4])

    heads = [head for order in orders for head in order.heads]
    sums = [
        sum(getattr(order, name) for order in orders)
        for name in ("lookups", "unique_rows", "overlay_hits", "page_hits", "page_misses")
    ]
    np.testing.assert_allclose(sums, [800, 700, 200, 500 - read, read], atol=len(heads))
    assert sums[-1] == read
    assert [head.touched_rows for head in heads] == [1, 2, 3, 4]
    assert [order.touched_rows for order in orders] == [3, 7]


def test_a_growth_curve_stays_short_and_ends_with_the_newest_seal() -> None:
    """However many seals; its points are true ones, spread over all of them."""
    recipe = small()
    spec = spec_of(recipe)
    touched, rng = TouchedRows(recipe, spec), np.random.default_rng(7)
    truth: dict[int, int] = {}
    met: set[int] = set()
    for seal in range(1_000):
        rows = rng.integers(0, spec.rows, 8).astype(np.int32)
        met |= set(rows.tolist())
        touched.add(rows, 10 * seal)
        truth[10 * seal] = len(met)
        by_head, curve = touched.record()
        assert sum(by_head) == len(met)
        assert curve[-1] == (10 * seal, len(met))
        assert curve[0] == (0, truth[0])
        assert min(seal + 1, GROWTH_POINTS // 2) <= len(curve) <= GROWTH_POINTS

    assert dict(curve).items() <= truth.items()
    steps = np.diff([step for step, _ in curve])
    assert steps.max() <= 2 * 1_000 * 10 / (GROWTH_POINTS // 2)
    assert steps[:-1].min() == steps[:-1].max()


def test_a_growth_curve_has_no_points_of_steps_that_were_taken_back() -> None:
    """After a restore it goes on from there."""
    recipe = small()
    touched = TouchedRows(recipe, spec_of(recipe))
    for step in (10, 20, 30, 15, 15, 40):
        touched.add(np.array([step], np.int32), step)

    assert touched.record()[1] == ((10, 1), (15, 4), (40, 5))
