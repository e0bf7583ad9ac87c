"""Checks of what a recipe is made of, and of what is handed to it."""

from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engram_store.errors import DtypeError, RecipeError, ShapeError, TokenRangeError
from engram_store.recipes.families import NO_TOKEN
from engram_store.types import RowIds, TokenIds

ID_LIMIT: Final = 2**31
"""Compressed ids and row ids are int32."""
MAX_ORDER: Final = 1024
"""Tokens of the longest n-gram; every one has a multiplier, which is made before all else."""


def checked_token_map(token_map: ArrayLike) -> NDArray[np.int32]:
    """A read-only int32 [raw ids] copy. Raises: RecipeError."""
    ids = np.asarray(token_map)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        raise RecipeError(f"a token map is integers [raw ids], got {ids.dtype} {list(ids.shape)}")
    if ids.min() < 0 or ids.max() >= ID_LIMIT:
        raise RecipeError(f"compressed ids are 0 to {ID_LIMIT - 1}, got {ids.min()}..{ids.max()}")
    if ids.dtype == np.int32 and not ids.flags.writeable and ids.flags.c_contiguous:
        return ids
    ids = np.array(ids, np.int32, order="C")
    ids.flags.writeable = False
    return ids


def whole_numbers(what: str, values: Iterable[object]) -> tuple[int, ...]:
    """Numbers of a recipe's JSON. Raises: RecipeError: one is true, 1.0 or no number at all."""
    numbers = []
    for value in values:
        if type(value) is not int:
            raise RecipeError(f"{what} must be whole numbers, got {value!r:.100}")
        numbers.append(value)
    return tuple(numbers)


def compressed_id(raw: int, token_map: NDArray[np.int32]) -> int:
    """The compressed id of one raw id. Raises: RecipeError."""
    if not 0 <= raw < len(token_map):
        raise RecipeError(f"token id {raw} is outside the token map (0..{len(token_map) - 1})")
    return int(token_map[raw])


def check_orders(orders: tuple[int, ...], *, gaps_ok: bool) -> None:
    """Refuse lengths of n-grams that no family has. Raises: RecipeError."""
    if not orders or orders[0] < 1 or list(orders) != sorted(set(orders)):
        raise RecipeError(f"orders must be positive and increasing, got {orders}")
    if orders[-1] > MAX_ORDER:
        raise RecipeError(f"n-grams have at most {MAX_ORDER} tokens, got orders {orders}")
    if not gaps_ok and orders != tuple(range(2, len(orders) + 2)):
        raise RecipeError(f"orders must be 2, 3, ... without gaps in this family, got {orders}")


def checked_ids(what: str, ids: TokenIds) -> TokenIds:
    """Ids as C-contiguous int64 with two axes.

    Read-only arrays are copied: numba would compile the kernel once more for them.
    """
    if ids.dtype not in (np.int64, np.int32):
        raise DtypeError(what, ids.dtype, "int64 or int32")
    if ids.ndim != 2:
        raise ShapeError(what, ids.shape, "[batch, time]")
    return np.require(ids, np.int64, ["C_CONTIGUOUS", "WRITEABLE"])


def checked_out(out: RowIds, shape: tuple[int, ...]) -> RowIds:
    """`out`, if rows can be written into it."""
    if out.dtype != np.int32:
        raise DtypeError("out", out.dtype, "int32")
    if out.shape != shape or not out.flags.c_contiguous or not out.flags.writeable:
        raise ShapeError("out", out.shape, f"[batch, time, columns] = {shape}, C-contiguous")
    return out


def check_range(ids: TokenIds, limit: int, *, negative_ok: bool, context: bool = False) -> None:
    """Refuse ids that cannot be hashed.

    Args:
        ids: int64 [batch, time].
        limit: the first id too large.
        negative_ok: negative ids are fine.
        context: the ids stand before a chunk: `NO_TOKEN` is fine, and the error counts
            positions back from the chunk.

    Raises:
        TokenRangeError: names the first such id.
    """
    lowest = NO_TOKEN + 1 if negative_ok else 0
    if not ids.size or (ids.min() >= lowest and ids.max() < limit):
        return
    bad = (ids < lowest) | (ids >= limit)
    if context:
        bad &= ids != NO_TOKEN
    if bad.any():
        row, position = (int(axis) for axis in np.argwhere(bad)[0])
        where = (row, position - ids.shape[1] if context else position)
        raise TokenRangeError(int(ids[row, position]), limit, where, negative_ok=negative_ok)
