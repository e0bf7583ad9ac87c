"""Extents: pieces of memory in which rows lie one after the other, and the addresses of them.

The base has one per chunk file, a segment and a memtable one per block of slots. Beside every
address is that of the extent's residency: one byte per page, which says whether it is believed to
be in memory (`paging.residency`).
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.memory import Mapping
from engram_store.kernels import pages
from engram_store.kernels import rows as kernels
from engram_store.layout.arrays import ArrayLayout, BaseDescription
from engram_store.layout.manifest import SegmentRef
from engram_store.layout.segments import SegmentFiles
from engram_store.types import RowIds

BLOCK_SHIFT = 12
BLOCK_SLOTS = 1 << BLOCK_SHIFT


@dataclass(slots=True)
class Split:
    """Rows of one array, parted into those in memory and those to be read. Reused room."""

    addresses: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """int64 [>= n], of every row."""
    warm: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """int32 [>= n - cold_rows]: positions of rows in memory."""
    cold: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """int32 [>= cold_rows]: positions of the others."""
    cold_rows: int = 0

    def grow(self, n: int) -> None:
        """Make room for n rows."""
        if self.addresses.size < n:
            self.addresses = np.empty(n + n // 4, np.int64)
            self.warm = np.empty(n + n // 4, np.int32)
            self.cold = np.empty(n + n // 4, np.int32)


@dataclass(slots=True)
class ArrayMemory:
    """Addresses of one array of a table: its rows, or its optimiser state."""

    layout: ArrayLayout
    chunks: NDArray[np.int64]
    """int64 [chunks]: address of each base chunk."""
    chunk_pages: NDArray[np.int64]
    """int64 [chunks]: address of its residency; 0: always in memory."""
    blocks: NDArray[np.int64]
    """int64 [blocks]: address of each block of overlay slots."""
    block_pages: NDArray[np.int64]
    """int64 [blocks]: address of its residency; 0: always in memory."""
    mappings: list[Mapping] = field(default_factory=list)
    """Of the base generation."""

    @classmethod
    def of(cls, layout: ArrayLayout, blocks: int) -> "ArrayMemory":
        """Nothing mapped yet."""
        chunks, overlay = np.zeros(layout.chunks, np.int64), np.zeros(blocks, np.int64)
        return cls(layout, chunks, chunks.copy(), overlay, overlay.copy())

    @property
    def shift(self) -> int:
        """log2 of the rows per chunk."""
        return self.layout.chunk_rows.bit_length() - 1

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of slots; a multiple of the page size."""
        return self.layout.row_bytes << BLOCK_SHIFT

    def grow(self, blocks: int) -> None:
        """Have room for the addresses of so many blocks."""
        have = self.blocks.size
        if have < blocks:
            room = max(2 * have, blocks)
            self.blocks = np.concatenate([self.blocks, np.zeros(room - have, np.int64)])
            self.block_pages = np.concatenate([self.block_pages, np.zeros(room - have, np.int64)])

    def map_blocks(self, first: int, count: int, address: int, residency: int) -> None:
        """Blocks first..first+count-1 lie at `address`; `residency` is 0 for shared memory."""
        steps = np.arange(count, dtype=np.int64)
        self.blocks[first : first + count] = address + steps * self.block_bytes
        pages_per_block = self.layout.row_bytes if residency else 0  # 4,096 slots, 4,096-byte pages
        self.block_pages[first : first + count] = residency + steps * pages_per_block

    def split(self, rows: RowIds, places: NDArray[np.int32], split: Split) -> None:
        """Find addresses, and which rows have to be read. Their pages count as being read then.

        Args:
            rows: int32 [n].
            places: int32 [n] from `kernels.rows.locate`.
            split: filled.
        """
        split.grow(rows.size)
        split.cold_rows = pages.split_cold(
            rows,
            places,
            self.chunks,
            self.chunk_pages,
            self.shift,
            self.blocks,
            self.block_pages,
            BLOCK_SHIFT,
            self.layout.row_bytes,
            split.addresses,
            split.warm,
            split.cold,
        )

    def mark_resident(
        self, rows: RowIds, places: NDArray[np.int32], positions: NDArray[np.int32]
    ) -> None:
        """The pages of the rows at `positions` were read; hold the table's lock, or have entered.

        Args:
            rows, places: int32 [n].
            positions: int32 [any], which of them.
        """
        pages.mark_resident(
            rows,
            places,
            positions,
            self.chunk_pages,
            self.shift,
            self.block_pages,
            BLOCK_SHIFT,
            self.layout.row_bytes,
        )

    def find(
        self, rows: RowIds, places: NDArray[np.int32], addresses: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Addresses of rows at known places: the first n of `addresses`, which are filled."""
        kernels.find_addresses(
            rows,
            places,
            self.chunks,
            self.shift,
            self.blocks,
            BLOCK_SHIFT,
            self.layout.row_bytes,
            addresses,
        )
        return addresses[: rows.size]

    def copy(
        self,
        rows: RowIds,
        places: NDArray[np.int32],
        addresses: NDArray[np.int64],
        out: NDArray[Any],
    ) -> None:
        """Copy this array's values of rows at known places into `out` [n, width], in order."""
        found = self.find(rows, places, addresses)
        kernels.copy_rows(found, self.layout.row_bytes, as_bytes(out))


@dataclass(frozen=True, slots=True)
class OpenedBase:
    """A base generation whose chunk files are mapped, and not read from yet."""

    generation: int
    description: BaseDescription
    files: list[dict[int, Mapping]]
    """Of every array, by chunk."""

    def close(self) -> None:
        """It is not needed after all."""
        for mapping in (mapping for files in self.files for mapping in files.values()):
            mapping.close()


@dataclass(frozen=True, slots=True)
class Segment:
    """A mapped segment and the overlay slots it occupies."""

    ref: SegmentRef
    files: SegmentFiles
    first_slot: int
    mappings: tuple[Mapping, ...]


class SlotSpace:
    """Hands out runs of overlay blocks, first fit."""

    def __init__(self, reserved_slots: int) -> None:
        self._reserved = reserved_slots >> BLOCK_SHIFT
        self._used: dict[int, int] = {}

    def take(self, slots: int) -> int:
        """First slot of a free run; raises OverflowError beyond 2^31 slots."""
        needed = -(-slots // BLOCK_SLOTS)
        start = self._reserved
        for first, length in sorted(self._used.items()):
            if first - start >= needed:
                break
            start = first + length
        if (start + needed) << BLOCK_SHIFT >= 2**31:
            raise OverflowError("more than 2^31 overlay slots; fold more often")
        self._used[start] = needed
        return start << BLOCK_SHIFT

    def give_back(self, first_slot: int) -> None:
        """Free a run taken before."""
        del self._used[first_slot >> BLOCK_SHIFT]


def as_bytes(out: NDArray[Any]) -> NDArray[np.uint8]:
    """The memory of a C-contiguous array, for kernels that copy rows."""
    return out.reshape(-1).view(np.uint8)
