"""Recipes: what they refuse, what they store, how sequences are cut."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engram_store.errors import (
    DtypeError,
    RecipeError,
    ShapeError,
    TokenRangeError,
    UnknownLayerError,
)
from engram_store.recipes import (
    NO_TOKEN,
    Family,
    LayerHash,
    Recipe,
    deepseek_v41,
    engram,
    engram_peft,
    qwen_ple,
)

MAP = np.array([0, 1, 2, 3, 1, 4, 5, 2, 6, 7])
"""Raw ids 1 and 4, and 2 and 7, read alike."""


def official() -> Recipe:
    return engram(token_map=MAP, layers=[1, 5], rows_per_head=[50, 60], heads=2, pad_id=2)


def peft() -> Recipe:
    return engram_peft(
        token_map=MAP, layers=[5, 1], rows_per_order=[100, 120], orders=[2, 4], heads=2, pad_id=2
    )


def deepseek() -> Recipe:
    return deepseek_v41(
        token_map=MAP, layers=[1, 5], rows_per_head=50, heads=2, pad_id=2, image_token_id=8
    )


def qwen() -> Recipe:
    return qwen_ple(vocabulary=20, layers=[2, 4], rows_per_head=50, heads=2, eos_id=3)


FAMILIES = [official, peft, deepseek, qwen]


def tokens(*lines: list[int]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    return np.array(lines, np.int64)


def rows(recipe: Recipe, *lines: list[int]) -> list[list[int]]:
    """Row ids of the last position of each line, in the recipe's first layer."""
    ids: list[list[int]] = recipe.rows(recipe.layers[0].layer, tokens(*lines))[:, -1].tolist()
    return ids


def test_import_loads_no_compiler_tokenizer_or_torch() -> None:
    """Recipes can be built and stored in a process that never hashes."""
    code = (
        "import sys, engram_store.recipes as r\n"
        "r.qwen_ple(vocabulary=20, layers=[2], rows_per_head=50, heads=2, eos_id=3)\n"
        "print([m for m in ('numba', 'tokenizers', 'torch', 'grpc', 'zarr') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_row_is_offset_plus_xor_of_products_modulo_prime() -> None:
    """The formula, written out for one position and column."""
    recipe = official()
    layer = recipe.layer(1)
    m = layer.multipliers

    got = recipe.rows(1, tokens([6, 9, 4]))[0, 2]

    mix = (1 * m[0]) ^ (7 * m[1]) ^ (5 * m[2])
    assert got[3] == layer.offsets[3] + mix % layer.moduli[1][1]
    assert got[0] == ((1 * m[0]) ^ (7 * m[1])) % layer.moduli[0][0]


def test_peft_2_grams_never_see_the_current_token() -> None:
    """Its windows are oldest-first; only the longest order reaches the current token."""
    first, second = rows(peft(), [5, 6, 3, 0], [5, 6, 3, 9])
    assert first[:2] == second[:2]
    assert first[2:] != second[2:]


def test_left_padding_hashes_like_no_padding() -> None:
    """The filler is the compressed pad, so a padded prompt reads the same rows."""
    for recipe in (official(), deepseek()):
        assert rows(recipe, [2, 7, 2, 5, 6]) == rows(recipe, [9, 2, 2, 5, 6][1:])
        assert rows(recipe, [2, 2, 2, 5, 6]) == rows(recipe, [5, 6])


def test_image_token_sees_only_filler_and_hides_what_lies_behind() -> None:
    """The image token itself hashes like pads only."""
    image, after, fresh = 8, [5, 8, 6], [6]
    assert rows(deepseek(), after) == rows(deepseek(), fresh)
    assert rows(deepseek(), [5, image]) == rows(deepseek(), [2])


def test_image_token_is_told_by_its_raw_id() -> None:
    """Another token that reads alike is an ordinary token."""
    twin = deepseek_v41(
        token_map=MAP, layers=[1], rows_per_head=50, heads=2, pad_id=0, image_token_id=4
    )
    assert rows(twin, [5, 4, 6]) == rows(twin, [6])
    assert rows(twin, [5, 1, 6]) != rows(twin, [6])


def test_eos_sees_the_text_before_it_and_hides_it_from_later_tokens() -> None:
    eos = 3
    assert rows(qwen(), [5, eos]) != rows(qwen(), [eos])
    assert rows(qwen(), [5, eos, 6]) == rows(qwen(), [6])


def test_attention_mask_turns_padding_into_eos_for_qwen_alone() -> None:
    window, mask = tokens([9, 9, 5, 6]), np.array([[0, 0, 1, 1]])
    masked = qwen().rows(2, window, attention_mask=mask)
    np.testing.assert_array_equal(masked, qwen().rows(2, tokens([3, 3, 5, 6])))
    np.testing.assert_array_equal(
        official().rows(1, window, attention_mask=mask), official().rows(1, window)
    )


@pytest.mark.parametrize("make", FAMILIES)
def test_each_family_cuts_sequences_anywhere(make: Callable[[], Recipe]) -> None:
    """Token by token with `carry` equals one pass, separators included."""
    recipe = make()
    window = tokens([5, 8, 6, 3, 3, 1, 8, 0], [8, 3, 2, 9, 3, 8, 8, 1])
    whole = recipe.rows(recipe.layers[1].layer, window)
    context = None
    for t in range(window.shape[1]):
        piece = window[:, t : t + 1]
        got = recipe.rows(recipe.layers[1].layer, piece, context=context)
        np.testing.assert_array_equal(got, whole[:, t : t + 1])
        context = recipe.carry(piece, context)


def test_carry_marks_what_lies_before_the_start() -> None:
    recipe = deepseek()
    assert recipe.carry(tokens([7])).tolist() == [[NO_TOKEN, NO_TOKEN, 7]]
    assert recipe.carry(tokens([1, 2, 5, 6])).tolist() == [[2, 5, 6]]
    context = tokens([NO_TOKEN, 4, 7])
    assert recipe.carry(np.empty((1, 0), np.int64), context).tolist() == context.tolist()


def test_carry_replaces_masked_tokens() -> None:
    mask = np.array([[1, 0]])
    assert qwen().carry(tokens([5, 9]), attention_mask=mask).tolist() == [[5, 3]]


@pytest.mark.parametrize(
    ("make", "bad"), [(official, 10), (deepseek, 10), (deepseek, -1), (qwen, 20), (qwen, -100)]
)
def test_ids_that_cannot_be_hashed_are_refused(make: Callable[[], Recipe], bad: int) -> None:
    """The error names id and position; `out` stays as it was."""
    recipe = make()
    layer = recipe.layers[0].layer
    out = np.full((2, 2, recipe.columns), -7, np.int32)

    with pytest.raises(TokenRangeError) as error:
        recipe.rows(layer, tokens([1, 1], [1, bad]), out=out)

    assert (error.value.token, error.value.where) == (bad, (1, 1))
    assert (out == -7).all()
    context = np.full((1, recipe.context_length), NO_TOKEN)
    context[0, -1] = bad
    with pytest.raises(TokenRangeError) as error:
        recipe.rows(layer, tokens([1]), context=context)
    assert error.value.where == (0, -1)


@pytest.mark.parametrize("make", FAMILIES)
def test_the_marker_of_contexts_is_no_token(make: Callable[[], Recipe]) -> None:
    recipe = make()
    with pytest.raises(TokenRangeError):
        recipe.rows(recipe.layers[0].layer, tokens([NO_TOKEN]))


def test_negative_and_large_ids_pass_where_the_family_lets_them() -> None:
    """Official: negative ids; engram-peft: ids beyond its map as well."""
    assert rows(official(), [5, -100]) != rows(official(), [5, 2])
    assert rows(peft(), [5, -100, 900, 1]) != rows(peft(), [5, 2, 2, 1])


def test_arrays_of_other_shapes_and_dtypes_are_refused() -> None:
    recipe, good = official(), tokens([1, 2])
    with pytest.raises(ShapeError):
        recipe.rows(1, good[0])
    with pytest.raises(DtypeError):
        recipe.rows(1, good.astype(np.float32))
    with pytest.raises(ShapeError):
        recipe.rows(1, good, context=tokens([1]))
    with pytest.raises(DtypeError):
        recipe.rows(1, good, out=np.empty((1, 2, 4), np.int64))
    with pytest.raises(ShapeError):
        recipe.rows(1, good, out=np.empty((4, 2, 1), np.int32).transpose(2, 1, 0))
    with pytest.raises(ShapeError):
        qwen().rows(2, good, attention_mask=np.ones(2))
    with pytest.raises(UnknownLayerError):
        recipe.rows(2, good)


def test_int32_strided_and_read_only_tokens_hash_alike() -> None:
    window = tokens([1, 5, 6, 9], [0, 3, 8, 2])
    expected = official().rows(1, window)
    read_only = window.copy()
    read_only.flags.writeable = False
    others: list[Any] = [window.astype(np.int32), np.asfortranarray(window), read_only]
    for same in others:
        np.testing.assert_array_equal(official().rows(1, same), expected)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_empty_windows_have_no_rows(shape: tuple[int, int]) -> None:
    assert official().rows(1, np.empty(shape, np.int64)).shape == (*shape, 4)


def test_out_is_filled_and_returned() -> None:
    out = np.empty((1, 2, 4), np.int32)
    assert official().rows(5, tokens([1, 2]), out=out) is out
    np.testing.assert_array_equal(out, official().rows(5, tokens([1, 2])))


@pytest.mark.parametrize("make", FAMILIES)
def test_json_keeps_every_number(make: Callable[[], Recipe]) -> None:
    recipe = make()
    stored = json.loads(json.dumps(recipe.to_json()))
    again = Recipe.from_json(stored, recipe.token_map)
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert again.layers == recipe.layers


def test_json_of_another_token_map_or_with_bad_keys_is_refused() -> None:
    data = official().to_json()
    with pytest.raises(RecipeError, match="SHA-256"):
        Recipe.from_json(data, np.arange(10, dtype=np.int32))
    for bad in ({}, data | {"family": "bloom"}, data | {"colour": 1}, data | {"layers": [3]}):
        with pytest.raises(RecipeError):
            Recipe.from_json(bad, official().token_map)


def test_fingerprint_tells_which_field_differs() -> None:
    mine = official().fingerprint_fields()
    other = engram(token_map=MAP, layers=[1, 5], rows_per_head=[50, 60], heads=2, pad_id=5)
    theirs = other.fingerprint_fields()
    assert {key for key in mine if mine[key] != theirs[key]} == {"filler"}
    assert other != official()
    assert official() != "official"
    json.dumps(mine)


def test_token_map_cannot_be_changed() -> None:
    ids = MAP.astype(np.int32)
    recipe = engram(token_map=ids, layers=[1], rows_per_head=50, heads=2, pad_id=2)
    ids[0] = 9
    assert recipe.token_map is not None
    assert recipe.token_map[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        recipe.token_map[0] = 1


def test_layer_sequence_decides_primes_where_the_family_says_so() -> None:
    """Official: as listed. engram-peft and Qwen: sorted."""
    listed = engram(token_map=MAP, layers=[5, 1], rows_per_head=50, heads=2, pad_id=2)
    assert [layer.layer for layer in listed.layers] == [5, 1]
    assert listed.layers[0].moduli == ((53, 59), (61, 67))
    assert [layer.layer for layer in peft().layers] == [1, 5]


def test_qwen_tables_are_stored_with_padding_rows() -> None:
    layer = qwen().layer(2)
    assert (layer.rows, layer.stored_rows) == (53 + 59 + 61 + 67, 256)
    assert official().layer(1).stored_rows == official().layer(1).rows


@pytest.mark.parametrize(
    "change",
    [
        {"layers": []},
        {"layers": [1, 1]},
        {"layers": [-1]},
        {"orders": (2, 4)},
        {"orders": ()},
        {"rows_per_head": 1},
        {"rows_per_head": [50]},
        {"rows_per_head": 2**30},
        {"heads": 0},
        {"pad_id": 10},
        {"token_map": []},
        {"token_map": [0.5]},
        {"token_map": [-1]},
        {"token_map": [2**31]},
    ],
)
def test_arguments_that_make_no_sense_are_refused(change: dict[str, object]) -> None:
    good = {"token_map": MAP, "layers": [1], "rows_per_head": 50, "heads": 2, "pad_id": 2}
    with pytest.raises(RecipeError):
        engram(**(good | change))  # type: ignore[arg-type]


def test_families_ask_for_what_they_need() -> None:
    layer = LayerHash(layer=1, multipliers=(3, 5), moduli=((7,),))
    common = {"orders": (2,), "heads": 1, "layers": (layer,), "vocabulary": 9, "filler": 0}
    with pytest.raises(RecipeError, match="token map"):
        Recipe(family=Family.ENGRAM, **common)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="separator"):
        Recipe(family=Family.QWEN_PLE, **common)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="separator"):
        Recipe(family=Family.QWEN_PLE, separator=9, **common)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="takes no token map"):
        Recipe(family=Family.QWEN_PLE, separator=0, token_map=MAP, **common)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("multipliers", "moduli"),
    [((0, 5), ((7,),)), ((3, 2**63), ((7,),)), ((3, 5), ((1,),)), ((3, 5), ((2**31,),))],
)
def test_numbers_that_cannot_hash_are_refused(
    multipliers: tuple[int, ...], moduli: tuple[tuple[int, ...], ...]
) -> None:
    with pytest.raises(RecipeError):
        LayerHash(layer=1, multipliers=multipliers, moduli=moduli)
