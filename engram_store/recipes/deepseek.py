"""Recipe of the DeepSeek-V4.1 checkpoints."""

from collections.abc import Sequence

from numpy.typing import ArrayLike

from engram_store.recipes.checks import checked_token_map, compressed_id
from engram_store.recipes.families import Family
from engram_store.recipes.multipliers import check_order, pcg64_multipliers
from engram_store.recipes.primes import distinct_moduli
from engram_store.recipes.recipe import LayerHash, Recipe

_SEED = 0
"""The checkpoints have no key for a seed."""


def deepseek_v41(
    *,
    token_map: ArrayLike,
    layers: Sequence[int],
    rows_per_head: int,
    pad_id: int,
    max_order: int = 4,
    heads: int = 8,
    image_token_id: int | None = None,
) -> Recipe:
    """The recipe of the DeepSeek-V4.1 checkpoints; names in brackets are their config keys.

    Source: the hash in SGLang 0.5.23, `srt/layers/engram.py`.

    Args:
        token_map: compressed id of every raw id (`compress_vocabulary(tokenizer)`).
        layers: [engram_layer_ids], in the config's sequence.
        rows_per_head: [engram_vocab_size], the wanted rows of one head.
        pad_id: [engram_pad_token_id], the raw id that stands before the start.
        max_order: [engram_max_ngram_size]; orders are 2 up to it.
        heads: [engram_n_heads], hash heads of each order.
        image_token_id: raw id of image tokens, which see no n-gram and end all before them.

    Raises:
        RecipeError: an argument makes no sense.
    """
    check_order(max_order)
    ids = checked_token_map(token_map)
    vocabulary = int(ids.max()) + 1
    orders = tuple(range(2, max_order + 1))
    moduli = distinct_moduli([rows_per_head] * len(orders), heads=heads, layers=len(layers))
    return Recipe(
        family=Family.DEEPSEEK_V41,
        orders=orders,
        heads=heads,
        layers=tuple(
            LayerHash(
                layer=layer,
                multipliers=pcg64_multipliers(
                    vocabulary=vocabulary, order=max_order, seed=_SEED, layer=layer
                ),
                moduli=primes,
            )
            for layer, primes in zip(layers, moduli, strict=True)
        ),
        vocabulary=vocabulary,
        filler=compressed_id(pad_id, ids),
        separator=image_token_id,
        token_map=ids,
    )
