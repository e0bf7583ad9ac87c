"""The compiled hash equals plain numpy, and cutting a sequence changes nothing."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engram_store.kernels.hashing import hash_rows, reference_rows
from engram_store.recipes import NO_TOKEN, Family, LayerHash, Recipe
from engram_store.recipes.families import RULES

INT64 = st.integers(NO_TOKEN + 1, 2**63 - 1)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any recipe that can be stored, also with numbers that no builder derives."""
    family = draw(st.sampled_from(Family))
    rules = RULES[family]
    highest = draw(st.integers(2, 5))
    orders = tuple(range(2, highest + 1))
    if rules.skips_orders:
        orders = tuple(sorted(draw(st.sets(st.integers(1, 5), min_size=1))))
    heads = draw(st.integers(1, 3))
    moduli = st.integers(2, 2**31 // (len(orders) * heads) - 1)
    of_order = st.lists(moduli, min_size=heads, max_size=heads).map(tuple)
    layer = LayerHash(
        layer=draw(st.integers(0, 40)),
        multipliers=tuple(draw(st.integers(1, 2**63 - 1)) for _ in range(orders[-1])),
        moduli=tuple(draw(of_order) for _ in orders),
    )
    compressed = st.integers(0, 2**31 - 1)
    ids = draw(st.lists(compressed, min_size=1, max_size=12)) if rules.compresses else None
    size = len(ids) if ids is not None else 12
    separators = st.integers(0, size - 1)
    return Recipe(
        family=family,
        orders=orders,
        heads=heads,
        layers=(layer,),
        vocabulary=size,
        filler=draw(compressed),
        separator=draw(separators if rules.masks_padding else st.none() | separators),
        token_map=None if ids is None else np.array(ids, np.int32),
    )


def draw_ids(data: st.DataObject, recipe: Recipe, shape: tuple[int, int]) -> np.ndarray:
    """Ids that the recipe can hash: mostly few, so that separators meet; sometimes extreme."""
    ids = st.integers(0, min(recipe.id_limit, 12) - 1)
    if recipe.rules.keeps_negative_ids:
        ids |= st.integers(NO_TOKEN + 1, -1)
    if recipe.rules.keeps_large_ids:
        ids |= st.integers(0, recipe.id_limit - 1)
    count = shape[0] * shape[1]
    drawn = data.draw(st.lists(ids, min_size=count, max_size=count))
    return np.array(drawn, np.int64).reshape(shape)


@given(recipes(), st.integers(1, 3), st.integers(0, 9), st.data())
def test_compiled_rows_equal_plain_numpy(
    recipe: Recipe, batch: int, time: int, data: st.DataObject
) -> None:
    """For every family, shape, context, separator and sign."""
    tokens = draw_ids(data, recipe, (batch, time))
    context = draw_ids(data, recipe, (batch, recipe.context_length))
    starts = data.draw(st.lists(st.booleans(), min_size=context.size, max_size=context.size))
    context[np.array(starts, bool).reshape(context.shape)] = NO_TOKEN
    layer = recipe.layers[0]
    expected = np.empty((batch, time, recipe.columns), np.int32)

    reference_rows(tokens, context, recipe._plan(layer.layer), expected)
    got = recipe.rows(layer.layer, tokens, context=context)

    np.testing.assert_array_equal(got, expected)
    flat = got.reshape(-1, recipe.columns)
    ends = np.array([*layer.offsets[1:], layer.rows])
    assert ((flat >= layer.offsets) & (flat < ends)).all()


@given(recipes(), st.lists(st.integers(0, 4), min_size=1, max_size=5), st.data())
def test_rows_do_not_depend_on_where_a_sequence_is_cut(
    recipe: Recipe, lengths: list[int], data: st.DataObject
) -> None:
    """Pieces with carried context equal one pass; pieces may be empty."""
    tokens = draw_ids(data, recipe, (2, sum(lengths)))
    layer = recipe.layers[0].layer
    pieces, context = [], None
    for start, end in pairwise(np.cumsum([0, *lengths])):
        piece = tokens[:, start:end]
        pieces.append(recipe.rows(layer, piece, context=context))
        context = recipe.carry(piece, context)

    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), recipe.rows(layer, tokens))


@given(recipes(), st.integers(1, 8), st.data())
def test_lines_of_a_batch_do_not_touch_each_other(
    recipe: Recipe, time: int, data: st.DataObject
) -> None:
    tokens = draw_ids(data, recipe, (3, time))
    layer = recipe.layers[0].layer
    together = recipe.rows(layer, tokens)
    for line, rows in zip(tokens, together, strict=True):
        np.testing.assert_array_equal(recipe.rows(layer, line[None])[0], rows)


@given(st.integers(2, 2**31 - 1), INT64)
@example(2, 2**63 - 1)
@example(2, NO_TOKEN + 1)
@example(2**31 - 1, 2**63 - 1)
@example(2**31 - 1, NO_TOKEN + 1)
@example(3, -1)
@example(16_000_057, 16_000_057 * (2**63 // 16_000_057))
@example(16_000_057, 16_000_057 * (2**63 // 16_000_057) - 1)
def test_remainders_are_exact_and_never_negative(modulus: int, mix: int) -> None:
    """A single token times 1 is its own mix, so the row shows its remainder."""
    recipe = Recipe(
        family=Family.ENGRAM_PEFT,
        orders=(1,),
        heads=1,
        layers=(LayerHash(layer=0, multipliers=(1,), moduli=((modulus,),)),),
        vocabulary=1,
        filler=0,
        token_map=np.zeros(1, np.int32),
    )
    out = np.empty((1, 1, 1), np.int32)
    scratch = np.empty((2, 1), np.int64)
    none = np.empty((1, 0), np.int64)
    expected = 0 if mix == 0 else mix % modulus

    hash_rows(np.array([[mix]]), none, recipe._plan(0), scratch, out)

    assert out[0, 0, 0] == expected


@pytest.mark.slow
def test_a_whole_window_of_a_large_model_equals_plain_numpy() -> None:
    """16,384 tokens, 24 columns, moduli of DeepSeek-V4.1's size."""
    from engram_store.recipes import deepseek_v41

    recipe = deepseek_v41(
        token_map=np.arange(99_092), layers=[1], rows_per_head=16_000_000, pad_id=2
    )
    tokens = np.random.default_rng(0).integers(0, 99_092, (8, 2_048))
    context = np.full((8, 3), NO_TOKEN)
    expected = np.empty((8, 2_048, 24), np.int32)

    reference_rows(tokens, context, recipe._plan(1), expected)

    np.testing.assert_array_equal(recipe.rows(1, tokens), expected)
