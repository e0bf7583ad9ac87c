"""Frozen records of what a store did: snapshots of counters, never live objects."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TableStats:
    """Counters of one table since the store was opened."""

    lookups: int
    """Heads x tokens of all windows whose rows were gathered."""
    unique_rows: int
    """Rows gathered, after removing repeats within a window."""
    memtable_rows: int
    """Of them, rows found in shared memory (touched since the last seal)."""
    segment_rows: int
    """Of them, rows found in sealed segments."""
    rows_updated: int
    """Row updates, a row counted once per step."""
    skipped_rows: int
    """Rows not updated because of NaN or infinity."""
    resident_bytes: int
    """Bytes of the table's files that were in the page cache when last looked at."""
    mapped_bytes: int
    """Bytes of the table's files."""

    @property
    def overlay_hit_rate(self) -> float | None:
        """Share of gathered rows that were in shared memory; None before any.

        Low while training one text: the memtables hold few steps, raise `overlay_bytes`.
        """
        return self.memtable_rows / self.unique_rows if self.unique_rows else None

    @property
    def duplication(self) -> float | None:
        """Look-ups per unique row; higher means fewer bytes to move. None before any."""
        return self.lookups / self.unique_rows if self.unique_rows else None

    @property
    def resident_share(self) -> float | None:
        """Share of the table's file bytes in memory: the chance that a cold row is a page hit."""
        return min(1.0, self.resident_bytes / self.mapped_bytes) if self.mapped_bytes else None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreStats:
    """Counters of a store since it was opened."""

    tables: Mapping[int, TableStats]
    steps: int
    """Commits."""
    windows: int
    """Windows announced."""
    late_windows: int
    """Rows asked for before they were gathered; with look-ahead this should stay near zero."""
    wait_seconds: float
    """Time callers spent waiting in `Window.rows`."""
    seals: int
    folds: int
    stall_seconds: float
    """Time commits waited for a seal or a fold: disk slower than training, or a small overlay."""
    bytes_written: int
    """Bytes written to the data directory."""
    row_bytes_updated: int
    """Bytes of all row updates with their state and id: what a perfect log would write."""
    merges: int = 0
    """Times that several segments of a table became one."""
    folds_postponed: int = 0
    """Folds and merges put off for want of disk space; they begin when there is room."""
    commit_waits: int = 0
    """Commits that waited because folds could not keep up (in `stall_seconds`): the disk is slower
    than training, or `fold_bytes_per_second` is too low."""
    damaged_blocks: int = 0
    """Blocks in use that were found damaged: rows in them are refused."""
    damages: str = ""
    """What was found damaged, one line each: file, block, layer and rows."""
    scrubbed_blocks: int = 0
    """Blocks that the scrubber has compared with their checksums."""
    scrub_passes: int = 0
    """Times that it has been through all files in use."""
    scrubbed_at: float = 0.0
    """Unix time at which the last pass ended; 0: none has yet."""

    @property
    def write_amplification(self) -> float | None:
        """Bytes written per byte of row updates; None before any update."""
        return self.bytes_written / self.row_bytes_updated if self.row_bytes_updated else None
