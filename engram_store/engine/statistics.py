"""Counters behind `StoreStats`: plain additions on the hot path, gauges only when asked."""

import ctypes
import threading
from collections.abc import Mapping as MappingType
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from engram_store.engine.memory import PAGE_BYTES, Mapping
from engram_store.engine.table import Table
from engram_store.stats import StoreStats, TableStats
from engram_store.types import TableSpec

if TYPE_CHECKING:
    from engram_store.engine.engine import Engine
    from engram_store.engine.reader import Reader

_libc = ctypes.CDLL(None, use_errno=True)


def resident_bytes(mapping: Mapping) -> int:
    """Bytes of a mapping in memory (mincore: 12-18 ms per GB, so only for gauges)."""
    pages = np.empty(-(-mapping.bytes.size // PAGE_BYTES), np.uint8)
    failed = _libc.mincore(
        ctypes.c_void_p(mapping.address),
        ctypes.c_size_t(mapping.bytes.size),
        ctypes.c_void_p(pages.ctypes.data),
    )
    return 0 if failed else int((pages & 1).sum()) * PAGE_BYTES


@dataclass(slots=True)
class MaintenanceCounters:
    """Counters of folds, merges and scrubbing; of a store that is only read all stay zero."""

    folds: int = 0
    merges: int = 0
    postponed: int = 0
    commit_waits: int = 0
    scrubbed_blocks: int = 0
    scrub_passes: int = 0
    scrubbed_at: float = 0.0
    problems: list[str] = field(default_factory=list)
    """What is damaged besides single blocks, which the tables know."""


class TableCounters:
    """Counters of one table; each is written by that table's stream or by the committer."""

    def __init__(self) -> None:
        self.lookups = 0
        self.unique_rows = 0
        self.memtable_rows = 0
        self.segment_rows = 0
        self.rows_updated = 0
        self.skipped_rows = 0

    def count_gather(self, lookups: int, unique: int, in_memtable: int, in_segment: int) -> None:
        """A window's rows were gathered."""
        self.lookups += lookups
        self.unique_rows += unique
        self.memtable_rows += in_memtable
        self.segment_rows += in_segment

    def count_update(self, rows: int, skipped: int) -> None:
        """A commit changed rows."""
        self.rows_updated += rows
        self.skipped_rows += skipped

    def record(self, table: Table) -> TableStats:
        """Counters and gauges of now."""
        with table.lock:
            mappings = table.mapped_files()
        # Not under the lock, for which commits wait: one that is closed meanwhile counts nothing.
        resident = sum(resident_bytes(mapping) for mapping in mappings)
        mapped = sum(mapping.bytes.size for mapping in mappings)
        return TableStats(
            lookups=self.lookups,
            unique_rows=self.unique_rows,
            memtable_rows=self.memtable_rows,
            segment_rows=self.segment_rows,
            rows_updated=self.rows_updated,
            skipped_rows=self.skipped_rows,
            resident_bytes=resident,
            mapped_bytes=mapped,
        )


class StoreCounters:
    """Counters of a session."""

    def __init__(self) -> None:
        self.steps = 0
        self.windows = 0
        self.late_windows = 0
        self.wait_seconds = 0.0
        self._lock = threading.Lock()

    def count_wait(self, seconds: float, *, late: bool) -> None:
        """A caller asked for rows and got them after `seconds`."""
        with self._lock:
            self.wait_seconds += seconds
            self.late_windows += late

    def record(
        self, engine: "Engine | Reader", tables: MappingType[int, TableCounters]
    ) -> StoreStats:
        """A frozen copy, with the engine's own counters."""
        specs: MappingType[int, TableSpec] = engine.metadata.tables
        updated = {layer: counters.rows_updated for layer, counters in tables.items()}
        kept = engine.maintenance
        damages = [str(d) for table in engine.tables.values() for d in table.damages]
        return StoreStats(
            tables={layer: c.record(engine.tables[layer]) for layer, c in tables.items()},
            steps=self.steps,
            windows=self.windows,
            late_windows=self.late_windows,
            wait_seconds=self.wait_seconds,
            seals=engine.seals,
            folds=kept.folds,
            merges=kept.merges,
            folds_postponed=kept.postponed,
            commit_waits=kept.commit_waits,
            damaged_blocks=len(damages),
            damages="\n".join([*damages, *kept.problems]),
            scrubbed_blocks=kept.scrubbed_blocks,
            scrub_passes=kept.scrub_passes,
            scrubbed_at=kept.scrubbed_at,
            stall_seconds=engine.stall_seconds,
            bytes_written=engine.bytes_written,
            row_bytes_updated=sum(
                count * (specs[layer].row_bytes + specs[layer].state_bytes + 4)
                for layer, count in updated.items()
            ),
        )
