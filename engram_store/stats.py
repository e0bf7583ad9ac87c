"""Frozen records of what a store did: snapshots of counters, never live objects.

How to read them when training waits: `late_unstaged` says that windows come too late to be worked
on ahead (or that `windows_held` kept them from it), `late_cold` that the disk is too slow
(`read_seconds`), `page_faults` that memory is too short, `stall_seconds` that seals and folds are.
"""

from collections.abc import Mapping
from dataclasses import dataclass

WAIT_BUCKETS = 28
"""From less than a microsecond to more than a minute."""
_FIRST_EXPONENT = -20
"""log2 of the seconds below which a wait is in the first bucket."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Waits:
    """How often something took how long: a histogram whose buckets double."""

    counts: tuple[int, ...] = (0,) * WAIT_BUCKETS
    """How many took less than 2^-20 seconds, then from 2^(i - 21) to below 2^(i - 20); the last
    one has everything longer."""
    seconds: float = 0.0
    """All together."""

    @property
    def total(self) -> int:
        """How many there were."""
        return sum(self.counts)

    def below(self, share: float) -> float | None:
        """Seconds that a share (0 to 1) of them stayed below, up to the bucket's end.

        Infinite if they are in the last bucket, None if there were none.
        """
        left = share * self.total
        for bucket, count in enumerate(self.counts[:-1]):
            left -= count
            if count and left <= 0:
                return 2.0 ** (_FIRST_EXPONENT + bucket)
        return float("inf") if self.total else None


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadStats:
    """One hash head of one n-gram order: a column of the recipe, with rows of its own.

    Rows that were in memory are told apart by head in some windows only. What they show is scaled
    to the table's exact counters, so the heads of a table add up to it, up to rounding.
    """

    rows: int
    """Rows of the head's part of the table."""
    lookups: int
    """Exact."""
    unique_rows: int
    """The sum of the next three."""
    overlay_hits: int
    """Rows found in shared memory; scaled."""
    page_hits: int
    """Rows found in files, on pages in memory; scaled."""
    page_misses: int
    """Rows that had to be read; exact."""
    sampled_rows: int
    """Distinct rows that the sampled windows looked up; estimated, within 2 %."""
    touched_rows: int
    """Distinct rows updated since the store was opened; exact as of the last seal."""

    @property
    def touched_share(self) -> float:
        """Share of its rows that were updated: near 1, the head has no room for new n-grams."""
        return self.touched_rows / self.rows


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderStats:
    """The n-grams of one length, which every one of its heads looks up."""

    order: int
    """Tokens of an n-gram."""
    sampled_ngrams: int
    """Distinct n-grams of the sampled windows; estimated, within 2 %."""
    heads: tuple[HeadStats, ...]

    @property
    def ngrams_per_row(self) -> float | None:
        """Distinct n-grams that share a row, in the mean over the rows that they use.

        Of the sampled windows: n-grams of other windows come on top, so this is the least that it
        can be. 1 means no collisions; when it grows to several, rows are shared by n-grams that
        have nothing to do with each other, and the table is small for its text. Each head shares
        in another way, which is what they are there for. None before any sample.
        """
        rows = sum(head.sampled_rows for head in self.heads)
        return max(1.0, self.sampled_ngrams * len(self.heads) / rows) if rows else None

    @property
    def lookups(self) -> int:
        """Of all its heads; exact."""
        return sum(head.lookups for head in self.heads)

    @property
    def unique_rows(self) -> int:
        """The sum of the next three, of all its heads."""
        return sum(head.unique_rows for head in self.heads)

    @property
    def overlay_hits(self) -> int:
        """Rows found in shared memory; scaled from samples."""
        return sum(head.overlay_hits for head in self.heads)

    @property
    def page_hits(self) -> int:
        """Rows found in files, on pages in memory; scaled from samples."""
        return sum(head.page_hits for head in self.heads)

    @property
    def page_misses(self) -> int:
        """Rows that had to be read; exact."""
        return sum(head.page_misses for head in self.heads)

    @property
    def touched_rows(self) -> int:
        """Distinct rows updated since the store was opened; exact as of the last seal."""
        return sum(head.touched_rows for head in self.heads)


@dataclass(frozen=True, kw_only=True, slots=True)
class TableStats:
    """Counters of one table since the store was opened."""

    lookups: int
    """Heads x tokens of all windows whose rows were gathered."""
    unique_rows: int
    """Rows gathered, after removing repeats within a window."""
    memtable_rows: int
    """Of them, rows found in shared memory (touched since the last seal): overlay hits."""
    segment_rows: int
    """Of them, rows found in sealed segments."""
    rows_updated: int
    """Row updates, a row counted once per step."""
    skipped_rows: int
    """Rows not updated because of NaN or infinity."""
    resident_bytes: int
    """Bytes of the table's files in the page cache, as of the last look, seconds ago."""
    mapped_bytes: int
    """Bytes of the table's files."""

    cold_rows: int = 0
    """Of the rows gathered, those that had to be read from the disk: page misses."""
    pages_read: int = 0
    """Pages that were asked for, for windows, commits and `read_rows`. One that is asked for
    again before it has come counts again."""
    bytes_read: int = 0
    """Of these pages."""
    window_bytes_read: int = 0
    """Of them, for windows: their rows and, where memory is short, the state that their commit will
    need."""
    cold_bytes: int = 0
    """What a disk without pages would have read for windows: bytes of rows and state alone."""
    page_faults: int = 0
    """Pages that were thought to be in memory and had to be waited for, one by one. Many of them:
    memory is so short that pages go before they are used; lower `overlay_bytes` or look ahead
    less."""
    read_seconds: float = 0.0
    """Time that threads spent on reading: for windows, commits and `read_rows`, look-ahead
    included, which nobody waits for. High per page read: the disk is slow, or stalls."""
    longest_read_seconds: float = 0.0
    """The most that one window, or one part of a commit, took to read: seconds mean a stall."""
    rows_copied_again: int = 0
    """Rows gathered ahead of their step that changed, or moved, before it."""
    stale_rows: int = 0
    """Rows handed out that a commit before their step has changed; always 0 in exact mode."""

    late_windows: int = 0
    """Windows of a step whose rows were asked for before they were there."""
    late_unstaged: int = 0
    """Of them, those that nobody had worked on before their step: announce earlier, or, if
    `windows_held` grows, allow more `lookahead_bytes`."""
    late_cold: int = 0
    """Of the others, those with rows that had to be read: the disk is slower than training, see
    `read_seconds`. What is then left was waiting for a commit or for hashing."""
    waits: Waits = Waits()
    """Of everybody who asked for a window's rows for the first time, late or not, windows that are
    only read included."""

    touched_rows: int = 0
    """Distinct rows updated since the store was opened; exact as of the last seal. A row counts
    although a restore took its update back."""
    growth: tuple[tuple[int, int], ...] = ()
    """(step, `touched_rows`) at some seals, the first and the last included; at most 64 points. A
    curve that flattens has seen the n-grams of its text, or has no room left: see
    `HeadStats.touched_share`."""
    windows: int = 0
    """Windows whose rows were gathered."""
    sampled_windows: int = 0
    """Of them, those looked at for `orders`: one of 16, at random."""
    orders: tuple[OrderStats, ...] = ()
    """By length of the n-grams, as in the recipe."""

    @property
    def overlay_hits(self) -> int:
        """Rows gathered from shared memory."""
        return self.memtable_rows

    @property
    def page_hits(self) -> int:
        """Rows gathered from files, on pages that were in memory, or never written."""
        return self.unique_rows - self.memtable_rows - self.cold_rows

    @property
    def page_misses(self) -> int:
        """Rows gathered that had to be read from the disk."""
        return self.cold_rows

    @property
    def overlay_hit_rate(self) -> float | None:
        """Share of gathered rows that were in shared memory; None before any.

        Low while training one text: the memtables hold few steps, raise `overlay_bytes`.
        """
        return self.memtable_rows / self.unique_rows if self.unique_rows else None

    @property
    def page_hit_rate(self) -> float | None:
        """Share of the rows in files whose pages were in memory; None before any.

        Low with a table larger than memory is as it must be: look ahead, so that nobody waits.
        """
        in_files = self.page_hits + self.page_misses
        return self.page_hits / in_files if in_files else None

    @property
    def read_amplification(self) -> float | None:
        """Bytes read per byte of cold rows and state, for windows; None before any.

        A page divided by a row if every cold row has a page to itself, as hashing makes it; lower
        where rows that are used together lie together.
        """
        return self.window_bytes_read / self.cold_bytes if self.cold_bytes else None

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
    """Rows asked for before they were gathered; with look-ahead this should stay near zero. Each
    table counts its own: see `TableStats.late_unstaged`."""
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
    waits: Waits = Waits()
    """Of all tables together."""
    overlay_shrunk: int = 0
    """Times that memtables were made smaller because pages went from memory before they were used;
    raise `memory_bytes`, or the limit of the cgroup."""
    overlay_grown: int = 0
    """Times that they were made larger again."""
    windows_held: int = 0
    """How often a window could not be worked on ahead of its step because `lookahead_bytes` were
    taken."""
    windows_unused: int = 0
    """Windows of a step that were closed and had neither been read nor trained. They take memory
    and the disk's time from others: announce only what is used."""
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
