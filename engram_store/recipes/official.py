"""Recipe of the Engram paper and its official demo; also of Megatron-LM and TinyEngram."""

from collections.abc import Sequence

from numpy.typing import ArrayLike

from engram_store.errors import RecipeError
from engram_store.recipes.checks import checked_token_map, compressed_id
from engram_store.recipes.families import Family
from engram_store.recipes.multipliers import pcg64_multipliers
from engram_store.recipes.primes import distinct_moduli
from engram_store.recipes.recipe import LayerHash, Recipe


def engram(
    *,
    token_map: ArrayLike,
    layers: Sequence[int],
    rows_per_head: int | Sequence[int],
    pad_id: int,
    orders: Sequence[int] = (2, 3),
    heads: int = 8,
    seed: int = 0,
) -> Recipe:
    """The recipe of the paper and the official demo.

    Source: deepseek-ai/Engram, `engram_demo_v1.py`; arXiv:2601.07372, section 2.

    Args:
        token_map: compressed id of every raw id (`compress_vocabulary(tokenizer)`).
        layers: layer numbers as in the model's config, in its sequence: both decide rows.
            (The paper counts layers from one, the demo from zero.)
        rows_per_head: wanted rows of ONE head, one number or one per order; each head gets
            the next free prime from there on. The demo calls it `engram_vocab_size`.
        pad_id: raw id that stands before the start of a sequence.
        orders: n-gram lengths, 2 up to the longest.
        heads: hash heads of each order.
        seed: the model's hash seed.

    Raises:
        RecipeError: an argument makes no sense.
    """
    bases = [rows_per_head] * len(orders) if isinstance(rows_per_head, int) else rows_per_head
    if len(bases) != len(orders):
        raise RecipeError(f"rows_per_head names {len(bases)} orders, orders has {len(orders)}")
    ids = checked_token_map(token_map)
    vocabulary = int(ids.max()) + 1
    moduli = distinct_moduli(bases, heads=heads, layers=len(layers))
    return Recipe(
        family=Family.ENGRAM,
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
            for layer, primes in zip(layers, moduli, strict=True)
        ),
        vocabulary=vocabulary,
        filler=compressed_id(pad_id, ids),
        token_map=ids,
    )
