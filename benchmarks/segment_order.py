"""In which order should the rows of a sealed segment be written?

Rows of a memtable become a segment in some order. This replays a stream of real text and counts,
for each order, on how many 4 KiB pages of segments the rows of a window lie, and how many of all
its pages a page cache of limited size misses. Only places are simulated, nothing is stored:

    python benchmarks/segment_order.py --steps 240

Every row of a window is updated, so it moves from its segment into the open memtable. Segments are
not merged and nothing is folded. The second half of the steps counts.
"""

import argparse
import json
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engram_store.bench.harness import Workload
from engram_store.bench.machine import describe_machine
from engram_store.bench.text import SEGMENT, read_text
from engram_store.bench.workplace import make_batch, make_recipe
from engram_store.engine.lookup import LookupScratch
from engram_store.kernels.rows import last_slots

PAGE_ROWS = 32
"""Rows of 128 bytes on a page."""
CACHES = (40_000, 80_000, 160_000)
"""Pages of a page cache: 164, 328 and 655 MB."""
Numbers = NDArray[np.int64]
Order = Callable[[Numbers, Numbers, int], Numbers]
"""(row of each slot, its uses in the memtable, rows of the table) to the slots in order."""
ORDERS: dict[str, Order] = {
    "log": lambda ids, _uses, _rows: np.arange(ids.size),
    "most used first": lambda _ids, uses, _rows: np.argsort(-uses, kind="stable"),
    "used twice first": lambda _ids, uses, _rows: np.argsort(uses < 2, kind="stable"),
    "shorter n-grams first": lambda ids, _uses, rows: np.argsort(ids >= rows // 2, kind="stable"),
    "row ids": lambda ids, _uses, _rows: np.argsort(ids, kind="stable"),
}


class Cache:
    """A page cache that forgets what was not used for longest, to a step."""

    def __init__(self, steps: int) -> None:
        self._last = np.full(0, -1, np.int64)
        self._pages = np.zeros(steps, np.int64)
        self._oldest = [0] * len(CACHES)

    def touch(self, pages: Numbers, step: int) -> list[int]:
        """Pages, each once, are used in a step; how many of them each size has not."""
        if (grown := int(pages.max(initial=0)) + 1) > self._last.size:
            more = np.full(2 * grown - self._last.size, -1, np.int64)
            self._last = np.concatenate([self._last, more])
        last = self._last[pages]
        missed = [int(np.count_nonzero(last < max(oldest, 0))) for oldest in self._oldest]
        np.subtract.at(self._pages, last[last >= 0], 1)
        self._pages[step] += pages.size
        self._last[pages] = step
        return missed

    def end_step(self, step: int) -> None:
        """What does not fit is forgotten."""
        held = np.cumsum(self._pages[step::-1])
        fitting = [int(np.searchsorted(held, size, "right")) for size in CACHES]
        self._oldest = [max(step + 1 - steps, 0) for steps in fitting]


def replay(
    batches: list[Numbers], rows: int, memtable_steps: int, order: Order
) -> dict[str, float]:
    """Means per window of the second half of the steps."""
    base_pages = rows // PAGE_ROWS + 1
    place, open_rows = np.arange(rows), np.zeros(rows, np.bool_)
    end, log, found = base_pages * PAGE_ROWS, [], []
    cache = Cache(len(batches))
    for step, batch in enumerate(batches):
        outside = place[batch[~open_rows[batch]]]
        pages = np.unique(outside // PAGE_ROWS)
        in_segments = int(np.count_nonzero(outside >= base_pages * PAGE_ROWS))
        segment_pages = int(np.count_nonzero(pages >= base_pages))
        found.append([in_segments, segment_pages, *cache.touch(pages, step)])
        open_rows[batch] = True
        log.append(batch)
        if len(log) == memtable_steps:
            ids, uses = _live(np.concatenate(log), rows)
            ids = ids[order(ids, uses, rows)]
            place[ids] = end + np.arange(ids.size)
            cache.touch(np.arange(end, end + ids.size, PAGE_ROWS) // PAGE_ROWS, step)
            end += -(-ids.size // PAGE_ROWS) * PAGE_ROWS
            open_rows[:], log = False, []
        cache.end_step(step)
    mean_rows, mean_pages, *missed = np.mean(found[len(batches) // 2 :], axis=0).tolist()
    sizes = [f"missed_pages_{pages * 4096 // 10**6}_mb" for pages in CACHES]
    return {
        "segment_rows": round(mean_rows),
        "segment_pages": round(mean_pages),
        "rows_per_page": round(mean_rows / mean_pages, 3),
        **{name: round(count) for name, count in zip(sizes, missed, strict=True)},
    }


def _live(log: Numbers, rows: int) -> tuple[Numbers, Numbers]:
    """Rows of a memtable by their last slot, and how many slots each has."""
    ids = log.astype(np.int32)
    live = np.empty(ids.size, np.int32)
    live = live[: last_slots(ids, np.zeros((rows >> 3) + 1, np.uint8), live)]
    positions = np.empty(ids.size, np.int32)
    LookupScratch().deduplicate(ids, positions)
    return log[live], np.bincount(positions)[positions[live]]


def main() -> None:
    """Print one line for every order and memtable."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--rows", type=int, default=16_700_000)
    parser.add_argument("--memtable-steps", type=int, nargs="+", default=[3, 8, 19, 50])
    chosen = parser.parse_args()
    segment = min(SEGMENT, chosen.tokens)
    text = read_text(chosen.steps * chosen.tokens, segment)
    workload = Workload(rows=chosen.rows, tokens=chosen.tokens, repetitions=chosen.steps)
    recipe = make_recipe(workload, text.token_map)
    steps = text.tokens.reshape(chosen.steps, -1, segment)
    batches = [make_batch(recipe, tokens).rows.astype(np.int64) for tokens in steps]
    rows = int(max(batch.max() for batch in batches)) + 1
    print(json.dumps({"machine": describe_machine(), "arguments": vars(chosen)}))
    for memtable_steps in chosen.memtable_steps:
        for name, order in ORDERS.items():
            result = replay(batches, rows, memtable_steps, order)
            print(json.dumps({"memtable_steps": memtable_steps, "order": name, **result}))


if __name__ == "__main__":
    main()
