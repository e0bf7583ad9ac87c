"""Multipliers: the odd random numbers that spread token ids over 63 bits.

They are derived when a recipe is built and stored with it, never derived again: NumPy does
not promise the same random stream in every release.
"""

import numpy as np

from engram_store.errors import RecipeError
from engram_store.recipes.checks import MAX_ORDER

_LAYER_STRIDE = 10007
"""Distance between the seeds of two layers, in every family."""
_MASK64 = 2**64 - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def _half_range(vocabulary: int) -> int:
    """Half of the largest multiplier with which no id below `vocabulary` overflows int64."""
    return max(1, (2**63 - 1) // vocabulary // 2)


def check_order(order: int) -> None:
    """Refuse an n-gram so long that its numbers alone take memory. Raises: RecipeError."""
    if order > MAX_ORDER:
        raise RecipeError(f"n-grams have at most {MAX_ORDER} tokens, got an order of {order:,}")


def pcg64_multipliers(*, vocabulary: int, order: int, seed: int, layer: int) -> tuple[int, ...]:
    """One odd multiplier for each of the `order` tokens of the longest n-gram.

    Source: `NgramHashMapping` of the official demo; DeepSeek-V4.1 and engram-peft do the same.

    Args:
        vocabulary: number of compressed ids.
        order: length of the longest n-gram.
        seed: the model's hash seed.
        layer: number of the layer as its config counts it.

    Raises:
        RecipeError: layer and seed give a negative seed, or the order is above `MAX_ORDER`.
    """
    check_order(order)
    if seed + _LAYER_STRIDE * layer < 0:
        raise RecipeError(f"layers and seeds are not negative, got layer {layer}, seed {seed}")
    generator = np.random.default_rng(seed + _LAYER_STRIDE * layer)
    draws = generator.integers(0, _half_range(vocabulary), size=order, dtype=np.int64)
    return tuple(2 * int(draw) + 1 for draw in draws)


def splitmix64_multipliers(
    *, vocabulary: int, order: int, seed: int, position: int
) -> tuple[int, ...]:
    """The same from another generator, seeded by the layer's position among its kind.

    Source: `qwen4_exp` in transformers 5.23.0.

    Raises:
        RecipeError: the order is above `MAX_ORDER`.
    """
    check_order(order)
    start = seed + _LAYER_STRIDE * position
    half = _half_range(vocabulary)
    draws = (_splitmix64(start + _GOLDEN_GAMMA * (k + 1)) for k in range(order))
    return tuple(2 * (draw % half) + 1 for draw in draws)


def _splitmix64(state: int) -> int:
    """The output of splitmix64 that follows `state` (Steele, Lea, Flood 2014)."""
    word = (state + _GOLDEN_GAMMA) & _MASK64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _MASK64
    return word ^ (word >> 31)
