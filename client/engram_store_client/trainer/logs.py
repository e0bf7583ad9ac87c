"""What a Trainer logs about a store: what happened since the log before."""

from collections.abc import Mapping
from dataclasses import dataclass

from engram_store.stats import StoreStats


@dataclass(frozen=True, slots=True)
class Moment:
    """Counters at one time; a log is the difference of two."""

    stats: StoreStats
    steps: int
    """Steps of this trainer."""
    announced_again: int
    skipped: int


def describe(before: Moment, now: Moment) -> dict[str, float]:
    """What happened between two moments. Pure.

    Returns:
        By key: shares are of the rows gathered, evaluation included; a share is left out where
        nothing was gathered. Milliseconds are per step.
    """
    steps = max(1, now.steps - before.steps)
    rows = _difference(before, now, "unique_rows")
    logs = {
        "engram/wait_ms": 1e3 * (now.stats.wait_seconds - before.stats.wait_seconds) / steps,
        "engram/late_windows": float(now.stats.late_windows - before.stats.late_windows),
        "engram/stale_rows": float(_difference(before, now, "stale_rows")),
        "engram/rows_updated": float(_difference(before, now, "rows_updated")),
        "engram/skipped_rows": float(_difference(before, now, "skipped_rows")),
        "engram/skipped_steps": float(now.skipped - before.skipped),
        "engram/announced_again": float(now.announced_again - before.announced_again),
    }
    if rows > 0:
        overlay = _difference(before, now, "memtable_rows") / rows
        cold = _difference(before, now, "cold_rows") / rows
        logs |= {
            "engram/hits_overlay": overlay,
            "engram/hits_page": max(0.0, 1.0 - overlay - cold),
            "engram/cold": cold,
        }
    return logs


def _difference(before: Moment, now: Moment, counter: str) -> int:
    return _sum(now.stats, counter) - _sum(before.stats, counter)


def _sum(stats: StoreStats, counter: str) -> int:
    """Of all tables."""
    return sum(int(getattr(table, counter)) for table in stats.tables.values())


KEYS: Mapping[str, str] = {
    "engram/hits_overlay": "share of the rows that were in shared memory",
    "engram/hits_page": "share that was in files, on pages in memory",
    "engram/cold": "share that had to be read from the disk",
    "engram/wait_ms": "milliseconds per step in which somebody waited for rows",
    "engram/late_windows": "windows asked for before their rows were there",
    "engram/stale_rows": "rows handed out that an earlier step has changed since; 0 in exact mode",
    "engram/rows_updated": "rows that commits changed",
    "engram/skipped_rows": "rows left alone because of NaN or infinity",
    "engram/skipped_steps": "steps skipped because the loss scale was too large",
    "engram/announced_again": "batches announced for another step than theirs, or not at all",
    "engram/grad_norm": "norm of the table gradients of the last step, before clipping",
    "engram/learning_rate": "of the tables, in the last step",
}
"""What each key means; the callback adds the last two."""
