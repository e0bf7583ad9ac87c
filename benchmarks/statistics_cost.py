"""What do statistics cost a window?

Windows of real text are announced, read and closed, one after the other, in blocks: one with the
store's counters as they are, the next without any, in turn. A window is read when it is announced,
so what is counted behind one holds up the next:

    python benchmarks/statistics_cost.py --rows 4000000 --rounds 40

Printed as JSON, for wall and processor time (of all threads, which other processes disturb less):
milliseconds per window of both, and the share that statistics take (median of the blocks' pairs,
its quartiles, and that of the fastest 5 % of either kind). On a busy machine all that says little;
then there is the processor time that is spent inside of what counts, and its share.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from engram_store.bench.harness import Workload, undisturbed
from engram_store.bench.machine import describe_machine
from engram_store.bench.workplace import BATCHES, LAYER, Workplace, open_workplace
from engram_store.engine.fetch import Reads
from engram_store.engine.heads import SAMPLE_EVERY
from engram_store.engine.statistics import StoreCounters, TableCounters

_COUNTED = (
    (TableCounters, "count_gather"),
    (TableCounters, "look_at"),
    (StoreCounters, "count_wait"),
    (Reads, "count"),
)


def _nothing(*_: Any) -> None:
    pass


@contextmanager
def without_statistics() -> Iterator[None]:
    """Nothing is counted."""
    patches = [patch.object(owner, name, _nothing) for owner, name in _COUNTED]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def block_ms(place: Workplace, first: int) -> tuple[float, float]:
    """Milliseconds per window of a block, on the wall's clock and on the processors'.

    One of its windows is sampled, if anything is counted.
    """
    began, began_cpu = time.perf_counter(), time.process_time()
    for number in range(first, first + SAMPLE_EVERY):
        with place.store.announce(place.batches[number % BATCHES].tokens) as window:
            window.rows(LAYER)
    # What was counted behind the last window is part of it.
    place.engine.streams[LAYER].submit(int).result()
    spent = time.perf_counter() - began, time.process_time() - began_cpu
    return 1e3 * spent[0] / SAMPLE_EVERY, 1e3 * spent[1] / SAMPLE_EVERY


def counting_ms(place: Workplace, rounds: int) -> dict[str, float]:
    """Processor time per window inside of what counts, by name."""
    spent = {name: 0.0 for _, name in _COUNTED}

    def timed(name: str, call: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any, **named: Any) -> None:
            began = time.thread_time()
            call(*arguments, **named)
            spent[name] += time.thread_time() - began

        return run

    with ExitStack() as stack:
        for owner, name in _COUNTED:
            stack.enter_context(patch.object(owner, name, timed(name, getattr(owner, name))))
        for turn in range(rounds):
            block_ms(place, 5 * turn)
    return {name: 1e3 * seconds / (rounds * SAMPLE_EVERY) for name, seconds in spent.items()}


def measure(place: Workplace, rounds: int) -> dict[str, Any]:
    """Both kinds of blocks in turn, over the same batches."""
    for turn in range(4):
        block_ms(place, turn * SAMPLE_EVERY)
    counted: list[tuple[float, float]] = []
    plain: list[tuple[float, float]] = []
    with undisturbed():
        for turn in range(rounds):
            for kind in (counted, plain) if turn % 2 else (plain, counted):
                with nullcontext() if kind is counted else without_statistics():
                    kind.append(block_ms(place, 5 * turn))
    result: dict[str, Any] = {}
    for clock, name in enumerate(("wall", "cpu")):
        with_ms, without_ms = (np.array(kind)[:, clock] for kind in (counted, plain))
        shares = np.percentile(with_ms / without_ms - 1, [25, 50, 75])
        fastest = [float(np.percentile(times, 5)) for times in (with_ms, without_ms)]
        result[name] = {
            "with_ms": round(float(np.median(with_ms)), 4),
            "without_ms": round(float(np.median(without_ms)), 4),
            "share": round(float(shares[1]), 4),
            "share_quartiles": [round(float(share), 4) for share in shares[[0, 2]]],
            "fastest_ms": [round(time, 4) for time in fastest],
            "share_of_fastest": round(fastest[0] / fastest[1] - 1, 4),
        }
    counting = counting_ms(place, rounds)
    return result | {
        "counting_cpu_ms": {name: round(spent, 4) for name, spent in counting.items()},
        "counting_share": round(sum(counting.values()) / result["cpu"]["without_ms"], 4),
    }


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    workload = Workload(rows=options.rows, tokens=options.tokens, repetitions=options.rounds)
    with tempfile.TemporaryDirectory(prefix="engram-store-bench-") as directory:
        place = open_workplace(workload, Path(directory), lambda text: print(text, file=sys.stderr))
        with place.store:
            result = measure(place, options.rounds)
            report = {"machine": describe_machine(), "workload": place.describe(), **result}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
