"""Promotion: rows that a read-only workload uses most are packed in memory that stays.

A row of 128 bytes that is used often keeps a page of 4 KiB in memory, with 31 rows that may be used
never. Packed, 32 such rows share the page, huge pages spare the processor's address translation,
and, locked, none of it is given up for what else is read.
"""

import ctypes
import errno
import threading
from collections.abc import Mapping as MappingType
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.fetch import Fetcher
from engram_store.engine.memory import PAGE_BYTES, Mapping, memory_headroom_bytes
from engram_store.engine.packed import PackableTable
from engram_store.errors import CapacityError, ConfigError, ProtocolError
from engram_store.kernels.uses import MOST_USES, count_uses, most_used, rows_by_count
from engram_store.types import RowIds, TableSpec

_SLICE_ROWS = 1 << 16
"""Rows copied at a time: enough to keep a disk busy, where some have to be read first."""
_libc = ctypes.CDLL(None, use_errno=True)
Histogram = NDArray[np.int64]
"""int64 [MOST_USES + 1]: how many rows of a table were used so often."""


@dataclass(frozen=True, slots=True)
class Promotion:
    """Which rows were packed."""

    rows: int
    """In all tables together."""
    bytes: int
    """Memory that they take, whole pages; at most what was allowed."""
    share: float
    """Of all counted uses of the layers in question, those of packed rows."""
    locked: bool
    """Whether the memory cannot be swapped out. Where it is not, raise the limit on locked memory
    (`ulimit -l`, LimitMEMLOCK of systemd); without swap it makes no difference."""


class UseCounts:
    """How often each row of a table was read: two bytes per row, taken when the first is read."""

    def __init__(self, spec: TableSpec) -> None:
        self._rows = spec.rows
        self._uses: NDArray[np.uint16] | None = None
        # Not the table's: counting makes no other gather wait.
        self._lock = threading.Lock()

    def count(self, rows: RowIds) -> None:
        """Rows were read, int32 [n] in range; a count that reached 65,535 stays there."""
        with self._lock:
            if self._uses is None:
                self._uses = np.zeros(self._rows, np.uint16)
            count_uses(rows, self._uses)

    def copy(self) -> NDArray[np.uint16]:
        """uint16 [rows] as of now; empty if nothing was counted."""
        with self._lock:
            return np.empty(0, np.uint16) if self._uses is None else self._uses.copy()


def plan_promotion(
    used: MappingType[int, Histogram], row_bytes: MappingType[int, int], room: int
) -> dict[int, int]:
    """How many rows of each table to pack, those that are used most per byte first. Pure.

    Args:
        used: of each layer, how many rows were used so often.
        row_bytes: of each layer.
        room: bytes for the rows of all.

    Returns:
        By layer; 0 where no row fits or is worth it. Rows that were never used are not packed.
    """
    planned = dict.fromkeys(used, 0)
    steps = [
        (count / row_bytes[layer], layer, int(found[count]))
        for layer, found in used.items()
        for count in np.flatnonzero(found[1:]) + 1
    ]
    for _, layer, rows in sorted(steps, key=lambda step: (-step[0], step[1])):
        taken = min(rows, room // row_bytes[layer])
        planned[layer] += taken
        room -= taken * row_bytes[layer]
    return planned


def promote(
    tables: MappingType[int, PackableTable],
    counts: MappingType[int, UseCounts],
    layers: list[int],
    max_bytes: int,
) -> Promotion:
    """Pack rows of some tables; what any table had packed before is given up.

    Args:
        tables: all of the store.
        counts: of their uses.
        layers: those whose rows may be packed.
        max_bytes: memory for all of them.

    Raises:
        ConfigError: no row fits.
        ProtocolError: no row was used yet.
        CapacityError: so much memory is not to be had. What was packed stays so in all three.
        StoreClosedError.
    """
    row_bytes = {layer: tables[layer].spec.row_bytes for layer in layers}
    # The last page of each block is whole.
    padding = PAGE_BYTES * len(layers)
    least = padding + max(row_bytes.values())
    if max_bytes < least:
        raise ConfigError(
            f"max_bytes is {max_bytes:,}; packing rows of layers {layers} takes at least "
            f"{least:,}: a page for each, and a row"
        )
    uses = {layer: counts[layer].copy() for layer in layers}
    used = {layer: _histogram(uses[layer]) for layer in layers}
    total = sum(_uses_of(found) for found in used.values())
    if not total:
        raise ProtocolError(
            f"no row of layers {layers} was read since the store was opened, so nothing tells "
            "which to pack; read some windows of the workload first"
        )
    planned = plan_promotion(used, row_bytes, max_bytes - padding)
    rows = {layer: _most_used(uses.pop(layer), used[layer], planned[layer]) for layer in layers}
    blocks = _copies(tables, {layer: found for layer, found in rows.items() if found.size})
    locked = [_lock(block) for block in blocks.values()]
    promotion = Promotion(
        rows=sum(planned.values()),
        bytes=sum(block.bytes.size for block in blocks.values()),
        share=sum(_uses_of(used[layer], planned[layer]) for layer in layers) / total,
        locked=all(locked),
    )
    try:
        for layer, table in tables.items():
            if layer not in blocks:
                table.unpack()
                continue
            table.pack(rows[layer], blocks[layer])
            del blocks[layer]
    finally:
        for block in blocks.values():
            block.close()
    return promotion


def _histogram(uses: NDArray[np.uint16]) -> Histogram:
    found = np.zeros(MOST_USES + 1, np.int64)
    rows_by_count(uses, found)
    return found


def _uses_of(used: Histogram, rows: int | None = None) -> int:
    """Uses of the rows that are used most; of all of them, if `rows` is None."""
    falling = used[::-1]
    if rows is not None:
        falling = np.diff(np.minimum(np.cumsum(falling), rows), prepend=0)
    return int(falling @ np.arange(MOST_USES, -1, -1))


def _most_used(uses: NDArray[np.uint16], used: Histogram, count: int) -> RowIds:
    """So many rows, most used first."""
    rows = np.empty(count, np.int32)
    most_used(uses, used.sum() - np.cumsum(used), rows)
    return rows


def _copies(
    tables: MappingType[int, PackableTable], rows: MappingType[int, RowIds]
) -> dict[int, Mapping]:
    """The rows of each layer, one after the other. Raises: CapacityError, StoreClosedError."""
    needed = sum(found.size * tables[layer].spec.row_bytes for layer, found in rows.items())
    available = memory_headroom_bytes()
    problem = f"packing {needed:,} bytes of rows takes more memory than the {available:,} that are "
    problem += "left; promote with a smaller max_bytes, or raise the memory limit"
    if needed > available:
        raise CapacityError(errno.ENOMEM, problem)
    blocks: dict[int, Mapping] = {}
    try:
        for layer, found in rows.items():
            length = -(-found.size * tables[layer].spec.row_bytes // PAGE_BYTES) * PAGE_BYTES
            blocks[layer] = Mapping.of_zeros(length, writable=True)
            _copy(tables[layer], found, blocks[layer])
    except BaseException as error:
        for block in blocks.values():
            block.close()
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise CapacityError(errno.ENOMEM, problem) from error
        raise
    return blocks


def _copy(table: PackableTable, rows: RowIds, memory: Mapping) -> None:
    memory.populate()
    shape = rows.size, table.spec.dim
    block = memory.view(table.spec.dtype.storage, 0, shape)
    fetcher = Fetcher(table)
    for start in range(0, rows.size, _SLICE_ROWS):
        fetcher.fetch(rows[start : start + _SLICE_ROWS], [block[start : start + _SLICE_ROWS]])


def _lock(memory: Mapping) -> bool:
    """Keep it from being swapped out, if this process may."""
    length = ctypes.c_size_t(memory.bytes.size)
    return not _libc.mlock(ctypes.c_void_p(memory.address), length)
