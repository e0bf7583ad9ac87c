"""n-gram hashing: token ids to row ids, for every published family.

For each position t and order n, in int64 with two's-complement wrap-around:

    mix_n(t) = XOR over k < n of  id[t - look_back[k]] * multipliers[k]
    row      = offset[column] + mix_n(t) mod modulus[column]        (never negative)

where an id that lies before the start, or behind a separator, reads as the filler. Families
differ in the constants of `HashPlan` and in nothing else.

Source: Engram paper (arXiv:2601.07372), section 2.2; the implementations that the builders in
`engram_store.recipes` name.
"""

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any, Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from engram_store.kernels.intrinsics import mulhi
from engram_store.recipes.families import NO_TOKEN
from engram_store.types import RowIds, TokenIds

_JIT: Final[dict[str, Any]] = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "boundscheck": False,
}
_NO_MAP: Final = np.empty(0, np.int32)
_NO_MAP.flags.writeable = False  # as the maps of recipes are: numba compiles once for both


class HashPlan(NamedTuple):
    """The constants of one layer's hash, as the kernel reads them."""

    token_map: NDArray[np.int32]
    """[ids]; ids outside it, and so all if it is empty, are hashed as they are."""
    filler: int
    """Compressed id in place of what a position may not see."""
    separator: int
    """Raw id that hides what lies behind it; `NO_TOKEN`: none does."""
    separator_hides_itself: bool
    look_back: NDArray[np.uint64]
    """[max_order]: how far back the token of each multiplier stands."""
    multipliers: NDArray[np.int64]
    """[max_order]"""
    columns: NDArray[np.uint64]
    """[max_order + 1]: order n has columns `columns[n - 1]` to `columns[n]`."""
    moduli: NDArray[np.uint64]
    """[columns]"""
    reciprocals: NDArray[np.uint64]
    """[columns]: (2^64 - 1) // modulus."""
    offsets: NDArray[np.uint64]
    """[columns]: first row of each column's part of the table."""


def make_plan(
    *,
    token_map: NDArray[np.int32] | None,
    filler: int,
    separator: int | None,
    separator_hides_itself: bool,
    oldest_first: bool,
    orders: Sequence[int],
    multipliers: Sequence[int],
    moduli: Sequence[Sequence[int]],
) -> HashPlan:
    """The plan of one layer; arguments as in `recipes.Recipe`, which checked them."""
    heads = {order: len(of_order) for order, of_order in zip(orders, moduli, strict=True)}
    flat = np.array(list(chain.from_iterable(moduli)), np.uint64)
    back = np.arange(orders[-1], dtype=np.uint64)
    ends = accumulate(heads.get(order, 0) for order in range(1, orders[-1] + 1))
    return HashPlan(
        token_map=_NO_MAP if token_map is None else token_map,
        filler=filler,
        separator=NO_TOKEN if separator is None else separator,
        separator_hides_itself=separator_hides_itself,
        look_back=back[::-1].copy() if oldest_first else back,
        multipliers=np.array(multipliers, np.int64),
        columns=np.array([0, *ends], np.uint64),
        moduli=flat,
        reciprocals=np.uint64(2**64 - 1) // flat,
        offsets=np.cumsum(flat) - flat,
    )


@njit(inline="always")
def _remainder(mix: Any, modulus: Any, reciprocal: Any) -> Any:
    """`mix` mod `modulus`; uint64 all, with reciprocal = (2^64 - 1) // modulus.

    The reciprocal misses 2^64 / modulus by at most 1, so the quotient that it yields is
    right or one too small, for every uint64 mix: one correction makes it exact.

    Source: Barrett, "Implementing the RSA public key encryption algorithm" (1986).
    """
    remainder = mix - mulhi(mix, reciprocal) * modulus
    # A subtraction that goes below zero wraps around to a large number.
    return min(remainder, remainder - modulus)


@njit(**_JIT)
def _look_around(tokens: Any, context: Any, plan: Any, ids: Any, reach: Any) -> None:
    """Compress one sequence, and find how far back each of its positions may look.

    Args:
        tokens: int64 [time].
        context: int64 [context].
        plan: constants of the layer.
        ids: int64 [context + time], out.
        reach: int64 [context + time], out: -1 where a token may not even see itself.
    """
    before = context.size
    first_visible = 0
    for i in range(before + tokens.size):
        token = context[i] if i < before else tokens[i - before]
        separates = token == plan.separator
        if token == NO_TOKEN or (separates and plan.separator_hides_itself):
            first_visible = i + 1
        reach[i] = i - first_visible
        if separates:
            first_visible = i + 1
        mapped = 0 <= token < plan.token_map.size
        ids[i] = plan.token_map[token] if mapped else token


@njit(inline="always")
def _spread(mix: Any, first: Any, last: Any, plan: Any, t: Any, out: Any) -> None:
    """Rows of one order's columns, where the remainder is never negative.

    Of a negative mix the complement -1 - mix is divided: its remainder counts down from the
    modulus.
    """
    if mix >= 0:
        for column in range(first, last):
            remainder = _remainder(np.uint64(mix), plan.moduli[column], plan.reciprocals[column])
            out[t, column] = plan.offsets[column] + remainder
    else:
        for column in range(first, last):
            modulus = plan.moduli[column]
            remainder = _remainder(np.uint64(~mix), modulus, plan.reciprocals[column])
            out[t, column] = plan.offsets[column] + modulus - np.uint64(1) - remainder


@njit(**_JIT)
def _hash_sequence(ids: Any, reach: Any, plan: Any, out: Any) -> None:
    """Hash one sequence.

    Indices are uint64: of signed ones numba asks each time whether they count from the end,
    which costs a third of this loop.

    Args:
        ids: int64 [context + time].
        reach: int64 [context + time].
        plan: constants of the layer.
        out: int32 [time, columns], out.
    """
    before = np.uint64(ids.size - out.shape[0])
    for t in range(np.uint64(out.shape[0])):
        here = before + t
        mix = np.int64(0)
        for k in range(np.uint64(plan.multipliers.size)):
            back = plan.look_back[k]
            seen = np.int64(back) <= reach[here]
            token = ids[here - back] if seen else np.int64(plan.filler)
            mix ^= token * plan.multipliers[k]
            _spread(mix, plan.columns[k], plan.columns[k + np.uint64(1)], plan, t, out)


@njit(**_JIT)
def _hash_batch(tokens: Any, context: Any, plan: Any, scratch: Any, out: Any) -> None:
    for row in range(tokens.shape[0]):
        _look_around(tokens[row], context[row], plan, scratch[0], scratch[1])
        _hash_sequence(scratch[0], scratch[1], plan, out[row])


def hash_rows(
    tokens: TokenIds,
    context: TokenIds,
    plan: HashPlan,
    scratch: NDArray[np.int64],
    out: RowIds,
) -> None:
    """Row ids of every look-up in one layer. The caller has checked all ids.

    Args:
        tokens: int64 [batch, time] raw ids, C-contiguous.
        context: int64 [batch, max_order - 1], C-contiguous, `NO_TOKEN` before the start.
        plan: constants of the layer.
        scratch: int64 [2, max_order - 1 + time], overwritten.
        out: int32 [batch, time, columns], C-contiguous, overwritten.
    """
    _hash_batch(tokens, context, plan, scratch, out)


def compress_ids(ids: TokenIds, token_map: NDArray[np.int32]) -> TokenIds:
    """Compressed ids; those outside the map stay as they are. In plain numpy."""
    mapped = (ids >= 0) & (ids < token_map.size)
    compressed = ids.astype(np.int64)
    compressed[mapped] = token_map[ids[mapped]]
    return compressed


def reference_rows(tokens: TokenIds, context: TokenIds, plan: HashPlan, out: RowIds) -> None:
    """What `hash_rows` computes, in plain numpy; arguments as there."""
    raw = np.concatenate([context, tokens], axis=1)
    ids = compress_ids(raw, plan.token_map)
    first_visible = _first_visible(raw, plan)
    here = np.arange(context.shape[1], raw.shape[1])
    mix = np.zeros(tokens.shape, np.int64)
    for k, back in enumerate(plan.look_back):
        source = here - int(back)
        visible = source >= first_visible[:, here]
        mix ^= np.where(visible, ids[:, source], np.int64(plan.filler)) * plan.multipliers[k]
        for column in range(int(plan.columns[k]), int(plan.columns[k + 1])):
            out[..., column] = int(plan.offsets[column]) + mix % np.int64(plan.moduli[column])


def _first_visible(raw: TokenIds, plan: HashPlan) -> NDArray[np.int64]:
    """First position that each position of [batch, context + time] may see."""
    behind = np.arange(1, raw.shape[1] + 1)
    separates = raw == plan.separator
    hides_itself = (raw == NO_TOKEN) | (separates & plan.separator_hides_itself)
    first = np.maximum.accumulate(np.where(hides_itself, behind, 0), axis=1)
    later = np.maximum.accumulate(np.where(separates, behind, 0), axis=1)
    first[:, 1:] = np.maximum(first[:, 1:], later[:, :-1])
    return first
