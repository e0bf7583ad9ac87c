"""Recipe of the engram-peft library."""

from collections.abc import Sequence

from numpy.typing import ArrayLike

from engram_store.errors import RecipeError
from engram_store.recipes.checks import checked_token_map, compressed_id
from engram_store.recipes.families import Family
from engram_store.recipes.multipliers import pcg64_multipliers
from engram_store.recipes.primes import distinct_moduli
from engram_store.recipes.recipe import LayerHash, Recipe


def engram_peft(
    *,
    token_map: ArrayLike,
    layers: Sequence[int],
    rows_per_order: Sequence[int],
    pad_id: int,
    orders: Sequence[int] = (2, 3),
    heads: int = 8,
    seed: int = 0,
) -> Recipe:
    """The recipe of engram-peft's model and collator.

    Its tables cannot be read with the official hash: windows are oldest-first, and an n-gram
    shorter than the longest one lags behind and never sees the current token. (The library's
    `EngramLayer`, when it hashes by itself, derives other primes for all layers but the
    first; to read tables trained that way, build a recipe with that one layer.)

    Source: engram-peft 1.2.4, `hashing.py` and `compression.py`; 1.2.7 hashes alike.

    Args:
        token_map: compressed ids of the base vocabulary:
            `compress_vocabulary(tokenizer, size=tokenizer.vocab_size)`, without added tokens.
            Ids beyond it are hashed as they are.
        layers: layer numbers; their sequence does not matter.
        rows_per_order: wanted rows of all heads of an order together.
        pad_id: raw id that stands before the start of a sequence.
        orders: n-gram lengths, increasing.
        heads: hash heads of each order.
        seed: the model's hash seed.

    Raises:
        RecipeError: an argument makes no sense.
    """
    if len(rows_per_order) != len(orders) or heads < 1:
        raise RecipeError(
            f"rows_per_order names {len(rows_per_order)} orders, orders has {len(orders)}; "
            f"heads is {heads}"
        )
    ids = checked_token_map(token_map)
    vocabulary = int(ids.max()) + 1
    ascending = sorted(layers)
    moduli = distinct_moduli(
        [rows // heads for rows in rows_per_order], heads=heads, layers=len(ascending)
    )
    return Recipe(
        family=Family.ENGRAM_PEFT,
        orders=tuple(orders),
        heads=heads,
        layers=tuple(
            LayerHash(
                layer=layer,
                multipliers=pcg64_multipliers(
                    vocabulary=vocabulary, order=max(orders, default=0), seed=seed, layer=layer
                ),
                moduli=primes,
            )
            for layer, primes in zip(ascending, moduli, strict=True)
        ),
        vocabulary=vocabulary,
        filler=compressed_id(pad_id, ids),
        token_map=ids,
    )
