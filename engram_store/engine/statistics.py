"""Counters behind `StoreStats`: plain additions on the hot path, gauges only when asked."""

import contextlib
import enum
import math
import threading
from collections.abc import Mapping as MappingType
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engram_store.engine.cold import Paging
from engram_store.engine.fetch import Fetched
from engram_store.engine.heads import TouchedRows, WindowSamples
from engram_store.engine.memory import PAGE_BYTES, Mapping
from engram_store.engine.table import Table
from engram_store.paging import cached_bytes
from engram_store.recipes import Recipe
from engram_store.stats import WAIT_BUCKETS, StoreStats, TableStats, Waits
from engram_store.types import TableSpec

if TYPE_CHECKING:
    from engram_store.engine.engine import Engine
    from engram_store.engine.reader import Reader
    from engram_store.window import StoreWindow

_SHORTEST_SECONDS = 2.0**-21
"""As good as anything shorter, for which there is no bucket."""


class Late(enum.Enum):
    """Why the rows of a window were not there when they were asked for."""

    UNSTAGED = enum.auto()
    """Nobody had worked on it before its step."""
    COLD = enum.auto()
    """Rows of it had to be read."""
    BEHIND = enum.auto()
    """A commit, or the hashing, was not done."""


@dataclass(slots=True)
class MaintenanceCounters:
    """Counters of what runs beside training; of a store that is only read all stay zero."""

    folds: int = 0
    merges: int = 0
    postponed: int = 0
    commit_waits: int = 0
    scrubbed_blocks: int = 0
    scrub_passes: int = 0
    scrubbed_at: float = 0.0
    problems: list[str] = field(default_factory=list)
    """What is damaged besides single blocks, which the tables know."""
    touched: dict[int, TouchedRows] = field(default_factory=dict)
    """By layer: rows that were updated."""


class WaitCounter:
    """A histogram of times; whoever counts holds a lock."""

    def __init__(self) -> None:
        self._counts = [0] * WAIT_BUCKETS
        self._seconds = 0.0

    def count(self, seconds: float) -> None:
        """Something took so long."""
        # 2^(exponent - 1) <= seconds < 2^exponent
        _, exponent = math.frexp(max(seconds, _SHORTEST_SECONDS))
        self._counts[min(exponent + 20, WAIT_BUCKETS - 1)] += 1
        self._seconds += seconds

    def record(self) -> Waits:
        """A frozen copy."""
        return Waits(counts=tuple(self._counts), seconds=self._seconds)


class TableCounters:
    """Counters of one table; each is written by that table's stream or by the committer.

    Args:
        recipe, spec: of the table.
    """

    def __init__(self, recipe: Recipe, spec: TableSpec) -> None:
        self.lookups = 0
        self.unique_rows = 0
        self.memtable_rows = 0
        self.segment_rows = 0
        self.rows_updated = 0
        self.skipped_rows = 0
        self.cold_rows = 0
        self.cold_bytes = 0
        self.window_pages = 0
        self.copied_again = 0
        self.stale_rows = 0
        self.late = dict.fromkeys(Late, 0)
        self.waits = WaitCounter()
        self.samples = WindowSamples(recipe, spec)

    def count_gather(self, lookups: int, fetched: Fetched, again: int) -> None:
        """A window's rows were gathered; `again`: of them, rows copied a second time."""
        self.lookups += lookups
        self.unique_rows += fetched.rows.size
        self.memtable_rows += fetched.in_memtables
        self.segment_rows += fetched.in_segments
        self.cold_rows += fetched.cold_rows
        self.cold_bytes += fetched.cold_bytes
        self.window_pages += fetched.pages_read
        self.copied_again += again

    def look_at(self, window: "StoreWindow", table: Table, fetched: Fetched) -> None:
        """A window's rows were handed out: look at them more closely, if it is one to be sampled.

        On the table's stream, while the window's memory is its own.
        """
        samples = self.samples
        cold = samples.count_cold(fetched)
        if samples.next_is_due():
            text = window.tokens, window.context, window.attention_mask
            samples.look_at(fetched, 2 * table.capacity, cold, *text)
        fetched.cold = None

    def count_stale(self, rows: int) -> None:
        """Rows were handed out that a commit before their step has changed."""
        self.stale_rows += rows

    def count_update(self, rows: int, skipped: int) -> None:
        """A commit changed rows."""
        self.rows_updated += rows
        self.skipped_rows += skipped

    def record(self, table: Table, touched: TouchedRows | None) -> TableStats:
        """Counters and gauges of now."""
        with table.lock:
            mappings = table.mapped_files()
        # Not under the lock, for which commits wait: one that is closed meanwhile counts nothing.
        mapped = sum(mapping.bytes.size for mapping in mappings)
        by_head, growth = touched.record() if touched else ([], ())
        reads, samples, rows = table.reads, self.samples, self.unique_rows
        return TableStats(
            lookups=self.lookups,
            unique_rows=rows,
            memtable_rows=self.memtable_rows,
            segment_rows=self.segment_rows,
            rows_updated=self.rows_updated,
            skipped_rows=self.skipped_rows,
            resident_bytes=resident_bytes(mappings, table.paging),
            mapped_bytes=mapped,
            cold_rows=self.cold_rows,
            pages_read=reads.pages,
            bytes_read=reads.pages * PAGE_BYTES,
            window_bytes_read=self.window_pages * PAGE_BYTES,
            cold_bytes=self.cold_bytes,
            page_faults=reads.faults,
            read_seconds=reads.seconds,
            longest_read_seconds=reads.longest_seconds,
            rows_copied_again=self.copied_again,
            stale_rows=self.stale_rows,
            late_windows=sum(self.late.values()),
            late_unstaged=self.late[Late.UNSTAGED],
            late_cold=self.late[Late.COLD],
            waits=self.waits.record(),
            touched_rows=sum(by_head),
            growth=growth,
            windows=samples.seen,
            sampled_windows=samples.sampled,
            orders=samples.record(self.lookups, rows, self.memtable_rows, self.cold_rows, by_head),
        )


def resident_bytes(mappings: list[Mapping], paging: Paging | None) -> int:
    """Bytes of mapped files in memory, from what is believed of their pages.

    Where nothing is known yet the kernel is asked for the file; what it does not tell counts as
    not in memory.
    """
    found = 0
    for mapping in mappings:
        believed = None if paging is None else paging.resident_bytes(mapping)
        if believed is None and mapping.path is not None:
            with contextlib.suppress(OSError):  # merged or folded away meanwhile
                believed = cached_bytes(mapping.path)
        found += min(believed or 0, mapping.bytes.size)
    return found


class StoreCounters:
    """Counters of a session."""

    def __init__(self) -> None:
        self.steps = 0
        self.windows = 0
        self.late_windows = 0
        self.held_windows = 0
        self.unused_windows = 0
        self._waits = WaitCounter()
        self._lock = threading.Lock()

    def count_held(self) -> None:
        """A window could not be worked on ahead of its step for want of memory."""
        with self._lock:
            self.held_windows += 1

    def count_unused(self) -> None:
        """A window of a step was closed, neither read nor trained."""
        with self._lock:
            self.unused_windows += 1

    def count_wait(self, table: TableCounters, seconds: float, late: Late | None) -> None:
        """A caller asked for rows and got them after `seconds`; `late`: why not at once."""
        with self._lock:
            self._waits.count(seconds)
            table.waits.count(seconds)
            if late is not None:
                self.late_windows += 1
                table.late[late] += 1

    def record(
        self, engine: "Engine | Reader", tables: MappingType[int, TableCounters]
    ) -> StoreStats:
        """A frozen copy, with the engine's own counters."""
        specs: MappingType[int, TableSpec] = engine.metadata.tables
        updated = {layer: counters.rows_updated for layer, counters in tables.items()}
        kept = engine.maintenance
        damages = [str(d) for table in engine.tables.values() for d in table.damages]
        with self._lock:
            waits = self._waits.record()
        return StoreStats(
            tables={
                layer: counters.record(engine.tables[layer], kept.touched.get(layer))
                for layer, counters in tables.items()
            },
            steps=self.steps,
            windows=self.windows,
            late_windows=self.late_windows,
            windows_held=self.held_windows,
            windows_unused=self.unused_windows,
            wait_seconds=waits.seconds,
            waits=waits,
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
            overlay_shrunk=engine.overlay_changes[0],
            overlay_grown=engine.overlay_changes[1],
            stall_seconds=engine.stall_seconds,
            bytes_written=engine.bytes_written,
            row_bytes_updated=sum(
                count * (specs[layer].row_bytes + specs[layer].state_bytes + 4)
                for layer, count in updated.items()
            ),
        )
