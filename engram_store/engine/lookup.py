"""From a window's tokens to its unique rows: hash, remove repeats, gather. One stream per table."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.kernels.rows import deduplicate
from engram_store.recipes import Recipe
from engram_store.types import Inverse, RowIds, TokenIds

Allocate = Callable[[int], NDArray[np.uint8]]
"""Makes a buffer of so many bytes; a trainer with a GPU gives pinned memory."""


def plain_memory(size: int) -> NDArray[np.uint8]:
    """Ordinary memory."""
    return np.empty(size, np.uint8)


def buffer_bytes(size: int) -> int:
    """Length of the buffer that `SlotPool.take` gives for so many bytes: a power of two."""
    return 1 << max(size - 1, 4095).bit_length()


def slot_count(n: int) -> int:
    """Slots of a hash table for n rows: a quarter full at most was fastest."""
    return 1 << max(4 * n - 1, 1).bit_length()


class SlotPool:
    """Buffers for gathered rows, used again and again: a fresh one costs a fault per page."""

    def __init__(
        self,
        allocate: Allocate = plain_memory,
        prepare: Callable[[NDArray[np.uint8]], None] | None = None,
    ) -> None:
        """`prepare` is told of every buffer before it is used, new or again."""
        self._allocate, self._prepare = allocate, prepare
        self._free: dict[int, list[NDArray[np.uint8]]] = {}
        self._lock = threading.Lock()

    def take(self, size: int) -> NDArray[np.uint8]:
        """A buffer of at least `size` bytes; see `buffer_bytes`."""
        length = buffer_bytes(size)
        with self._lock:
            free = self._free.get(length)
            buffer = free.pop() if free else None
        if buffer is None:
            buffer = self._allocate(length)
        if self._prepare is not None:
            self._prepare(buffer)
        return buffer

    def give_back(self, buffer: NDArray[np.uint8]) -> None:
        """The buffer may be used for another window."""
        with self._lock:
            self._free.setdefault(buffer.size, []).append(buffer)


class LookupScratch:
    """Reused room for hashing and removing repeats; belongs to one stream."""

    def __init__(self) -> None:
        self._lookups = np.empty(0, np.int32)
        self._unique = np.empty(0, np.int32)
        self._slots = np.empty(0, np.uint32)

    def _grow(self, n: int) -> None:
        if self._lookups.size < n:
            self._lookups = np.empty(n, np.int32)
            self._unique = np.empty(n, np.int32)
            self._slots = np.empty(slot_count(n), np.uint32)

    def look_up(
        self,
        recipe: Recipe,
        layer: int,
        tokens: TokenIds,
        context: TokenIds | None,
        attention_mask: NDArray[Any] | None,
        out: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None,
    ) -> tuple[RowIds, Inverse]:
        """Hash, and remove repeats.

        Args:
            recipe, layer, tokens, context, attention_mask: as for `Recipe.rows`.
            out: where ids and inverse are put, int32 [look-ups] each; None: new memory.

        Returns:
            Unique rows in order of first look-up, and int32 [batch, time, columns] into them.
        """
        shape = (*tokens.shape, recipe.columns)
        n = int(np.prod(shape))
        self._grow(n)
        lookups = self._lookups[:n].reshape(shape)
        recipe.rows(layer, tokens, context=context, attention_mask=attention_mask, out=lookups)
        ids, inverse = (self._unique[:n], np.empty(n, np.int32)) if out is None else out
        slots = self._slots[: slot_count(n)]
        count = deduplicate(lookups.reshape(-1), slots, ids, inverse)
        found = ids[:count].copy() if out is None else ids[:count]
        return found, inverse.reshape(shape)

    def merge(self, parts: list[RowIds]) -> tuple[RowIds, list[NDArray[np.int32]]]:
        """Unique rows of several lists, and each list's positions among them."""
        together = np.concatenate(parts)
        positions = np.empty(together.size, np.int32)
        found = self.deduplicate(together, positions).copy()
        return found, np.split(positions, np.cumsum([part.size for part in parts[:-1]]))

    def deduplicate(self, rows: RowIds, inverse: Inverse) -> RowIds:
        """Unique ids in the scratch (valid until the next call); `inverse` is filled."""
        self._grow(rows.size)
        count = deduplicate(rows, self._slots[: slot_count(rows.size)], self._unique, inverse)
        return self._unique[:count]
