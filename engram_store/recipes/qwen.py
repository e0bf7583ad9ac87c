"""Recipe of Qwen3.8-Flash-Next's per-layer embedding (PLE)."""

from collections.abc import Sequence

from engram_store.errors import RecipeError
from engram_store.recipes.families import Family
from engram_store.recipes.multipliers import splitmix64_multipliers
from engram_store.recipes.primes import distinct_moduli
from engram_store.recipes.recipe import LayerHash, Recipe


def qwen_ple(
    *,
    vocabulary: int,
    layers: Sequence[int],
    rows_per_head: int,
    eos_id: int,
    orders: Sequence[int] = (2, 3),
    heads: int = 8,
    seed: int = 1234,
    row_multiple: int = 128,
) -> Recipe:
    """The recipe of Qwen3.8-Flash-Next; names in brackets are its config keys.

    Source: `qwen4_exp` in transformers 5.23.0.

    Args:
        vocabulary: [vocab_size]; raw ids are hashed, below this number.
        layers: [ple_layer_ids], counted from ONE as there: number 2 is the module
            `layers.1`. The recipe keeps these numbers; their sequence does not matter.
        rows_per_head: [ngram_vocab_size_base], the wanted rows of one head.
        eos_id: [eos_token_id], its first entry if it is a list. It ends n-grams and stands
            before the start of a sequence.
        orders: 2 up to [ngram_size].
        heads: [heads_per_ngram], hash heads of each order.
        seed: [seed].
        row_multiple: [make_ngram_vocab_size_divisible_by]; tables are stored with unused rows
            up to a multiple of it.

    Raises:
        RecipeError: an argument makes no sense.
    """
    if vocabulary < 1:
        raise RecipeError(f"vocabulary must be at least 1, got {vocabulary}")
    ascending = sorted(layers)
    moduli = distinct_moduli([rows_per_head] * len(orders), heads=heads, layers=len(ascending))
    return Recipe(
        family=Family.QWEN_PLE,
        orders=tuple(orders),
        heads=heads,
        layers=tuple(
            LayerHash(
                layer=layer,
                multipliers=splitmix64_multipliers(
                    vocabulary=vocabulary,
                    order=max(orders, default=0),
                    seed=seed,
                    position=position,
                ),
                moduli=primes,
                row_multiple=row_multiple,
            )
            for position, (layer, primes) in enumerate(zip(ascending, moduli, strict=True))
        ),
        vocabulary=vocabulary,
        filler=eos_id,
        separator=eos_id,
    )
