"""What a store in a process of its own costs, over the same engine in the trainer's process.

Three transports train the same steps on the same store: embedded, shared memory, messages. A
store has one owner, so they take turns in blocks of rounds, and the blocks are repeated. Every
block starts from the same snapshot.
"""

import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import engram_store
from engram_store.bench.footprint import STEPS, trainer_memory
from engram_store.bench.harness import (
    Quantity,
    Report,
    Target,
    Timing,
    describe_machine,
    stopwatch_ms,
    undisturbed,
)
from engram_store.bench.process import store_process
from engram_store.bench.reads import IN_FLIGHT, loopback_rate, read_rate, windows_of
from engram_store.bench.workplace import (
    BATCHES,
    FIRST_STEP,
    LAYER,
    Batch,
    Say,
    Workplace,
    make_recipe,
    open_store,
    overlay_bytes,
)
from engram_store.errors import EngramStoreError
from engram_store.session import Session
from engram_store.types import TokenIds

EMBEDDED, SHARED, MESSAGES = "embedded", "shared memory", "messages"
WINDOW, READY = "window", "window_ready"
IN_PLACE, OWN, STEP = "push+commit", "push+commit, own", "step"
READS, LOOPBACK = "reads", "loopback socket"
_TRANSPORTS, _LINES = (EMBEDDED, SHARED, MESSAGES), (WINDOW, READY, IN_PLACE, OWN, STEP)
_CYCLES = 5
_WARM_UP = 2
"""Rounds of every block that do not count."""
_PAUSE_SECONDS = 0.02
"""Between rows and gradients, where a model would run."""
_READ_SECONDS = 2.0
"""Of every transport, all cycles together."""
_WINDOW_BYTES = 8_000_000
"""Row bytes of a window that is only read."""
_SMALLER = 8
"""How much smaller the other table is that a trainer's memory is compared on."""
_LEARNING_RATE = 0.01


def bench_ipc(place: Workplace, say: Say) -> Report:
    """Measure sessions with a store process beside an embedded one.

    Raises:
        EngramStoreError: a process that was started failed.
    """
    report = Report(bench="ipc", machine=describe_machine(), workload=place.describe())
    bench = _Transports.of(place)
    place.store.close()  # the transports open it in turn
    for cycle in range(bench.cycles):
        say(f"measuring cycle {cycle + 1} of {bench.cycles}")
        bench.run_cycle(cycle)
    say("measuring the memory of a trainer")
    memory = _trainer_memory(place)
    report.timings = bench.timings()
    report.references = {
        f"{transport}: {line}": (f"{EMBEDDED}: {line}",)
        for transport in (SHARED, MESSAGES)
        for line in _LINES
    }
    report.quantities = [*bench.quantities(), *memory]
    _judge(report)
    report.workload |= {
        "cycles": bench.cycles,
        "rounds_per_cycle": bench.rounds,
        "read_window_tokens": bench.read_windows[0].size,
        "read_window_bytes": bench.read_bytes,
        "reads_in_flight": IN_FLIGHT,
    }
    report.notes = _notes(bench)
    return report


def _notes(bench: "_Transports") -> list[str]:
    """How to read the lines."""
    blocks = f"{bench.cycles} blocks of {bench.rounds} rounds, after {_WARM_UP} of warm-up each"
    windows = f"{IN_FLIGHT} windows of {bench.read_bytes / 1e6:.1f} MB announced at once"
    return [
        f"the transports take turns on one store, always from the same snapshot: {blocks}",
        f"'{WINDOW}', '{OWN}': of a step that nothing was announced ahead of",
        f"'{READY}', '{IN_PLACE}': of one that was announced during the step before",
        f"'{READY}' starts at the end of the commit before; '{STEP}' is that and '{IN_PLACE}'",
        f"'{IN_PLACE}': the gradient is in the window's gradient_buffer; filling it is not timed",
        f"'{MESSAGES}' is TCP on this host; '{READS}': {windows}, by as many threads",
        f"'{LOOPBACK}' moves as many bytes at a time between two threads, and does nothing else",
        f"trainer memory: growth of a fresh trainer's anonymous and shared memory in {STEPS} steps",
    ]


def _judge(report: Report) -> None:
    medians = {timing.name: timing.median_ms for timing in report.timings}
    values = {quantity.name: quantity.median for quantity in report.quantities}
    lookups = report.workload["lookups_per_step"]

    def added(line: str) -> float:
        return medians[f"{SHARED}: {line}"] - medians[f"{EMBEDDED}: {line}"]

    large, small = (values[_memory_name(smaller)] for smaller in (1, _SMALLER))
    report.targets = [
        Target.at_most("the process adds to a window", 1, added(WINDOW)),
        Target.at_most("the process adds to a window announced ahead", 1, added(READY)),
        Target.at_most("the process adds to push and commit", 2, added(IN_PLACE)),
        Target.at_most(
            "a look-up, from tokens to rows in the trainer",
            0.05, medians[f"{SHARED}: {WINDOW}"] * 1e3 / lookups, "us",
        ),
        Target.at_least("remote_throughput", 1.5, values[f"{MESSAGES}: {READS}"], "GB/s"),
        Target.at_most(
            f"trainer memory, difference to a table {_SMALLER} times smaller",
            10, 100 * abs(large - small) / small, "%",
        ),
    ]  # fmt: skip


@dataclass
class _Transports:
    """All samples, by transport."""

    place: Workplace
    gradients: NDArray[np.float32]
    """[most rows of a step, dim]"""
    read_windows: list[TokenIds]
    read_bytes: int
    """Row bytes of the first of them."""
    cycles: int
    rounds: int
    capacity: int
    """Rows that fit into the open memtable."""
    samples: dict[str, list[float]] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, place: Workplace) -> "_Transports":
        """Nothing measured yet; the store is still open."""
        most = max(batch.rows.size for batch in place.batches)
        repetitions = place.workload.repetitions
        cycles = min(_CYCLES, repetitions)
        windows = windows_of(place.recipe, place.batches, place.spec.row_bytes, _WINDOW_BYTES)
        with place.store.announce(windows[0]) as window:
            read_bytes = window.rows(LAYER)[0].nbytes
        return cls(
            place=place,
            gradients=np.random.default_rng(0).standard_normal((most, place.spec.dim), np.float32),
            read_windows=windows,
            read_bytes=read_bytes,
            cycles=cycles,
            rounds=-(-repetitions // cycles),
            capacity=place.engine.capacity,
        )

    def run_cycle(self, cycle: int) -> None:
        """One block of every transport; every other cycle in the opposite order."""
        turns = [self._run_embedded, self._run_process]
        for turn in turns if cycle % 2 == 0 else reversed(turns):
            turn(cycle)
        self.rates.setdefault(LOOPBACK, []).append(
            loopback_rate(self.read_bytes, _READ_SECONDS / self.cycles)
        )

    def _run_embedded(self, cycle: int) -> None:
        with open_store(self.place.store.path) as session:
            self._block(session, EMBEDDED, cycle)

    def _run_process(self, cycle: int) -> None:
        from engram_store_client import connect

        turns = [SHARED, MESSAGES]
        with store_process(self.place.store.path, overlay_bytes(self.place.spec)) as addresses:
            for transport in turns if cycle % 2 == 0 else reversed(turns):
                with connect(addresses.unix if transport == SHARED else addresses.tcp) as session:
                    check_transport(session, transport)
                    self._block(session, transport, cycle)

    def _block(self, session: Session, transport: str, cycle: int) -> None:
        """Rounds of one transport, on the store as it was; it is left as it was found."""
        first = 2 * self.rounds * cycle
        batches = [
            self.place.batches[(first + number) % BATCHES]
            for number in range(2 * (_WARM_UP + self.rounds))
        ]
        # A page fault per row, once per process that maps the table; training is past that.
        for tokens in [*self.read_windows, *(batch.tokens for batch in batches)]:
            with session.announce(tokens) as window:
                window.rows(LAYER)
        self.rates.setdefault(f"{transport}: {READS}", []).append(
            read_rate(session, self.read_windows, _READ_SECONDS / self.cycles)
        )
        block = _Block(session, self.gradients, self.capacity)
        with undisturbed():
            for number in range(_WARM_UP + self.rounds):
                times = block.round(batches[2 * number], batches[2 * number + 1])
                if number >= _WARM_UP:
                    for line, milliseconds in times.items():
                        self.samples.setdefault(f"{transport}: {line}", []).append(milliseconds)
        session.restore(FIRST_STEP)

    def timings(self) -> list[Timing]:
        """Line by line, the transports beside each other."""
        names = [f"{transport}: {line}" for line in _LINES for transport in _TRANSPORTS]
        return [Timing(name, np.array(self.samples[name])) for name in names]

    def quantities(self) -> list[Quantity]:
        """Rates of reading."""
        names = [*(f"{transport}: {READS}" for transport in _TRANSPORTS), LOOPBACK]
        return [Quantity(name, "GB/s", np.array(self.rates[name])) for name in names]


def check_transport(session: Any, wanted: str) -> None:
    """Check how rows travel, so that no line is measured under another's name.

    Raises:
        EngramStoreError: otherwise than wanted.
    """
    if session.transport != wanted:
        raise EngramStoreError(
            f"the session uses {session.transport}, not {wanted}; can the store's Unix sockets be "
            "reached, and is there room for shared memory?"
        )


@dataclass
class _Block:
    """Rounds over one session."""

    session: Session
    gradients: NDArray[np.float32]
    capacity: int
    slots_used: int = 0

    def round(self, alone: Batch, ahead: Batch) -> dict[str, float]:
        """Two steps, the second announced while the first is under way; milliseconds by line."""
        session, step = self.session, self.session.step
        self._make_room(alone.rows.size + ahead.rows.size)
        times: dict[str, float] = {}

        started = time.perf_counter()
        window = session.announce(alone.tokens, step=step)
        window.rows(LAYER)
        times[WINDOW] = (time.perf_counter() - started) * 1e3

        next_window = session.announce(ahead.tokens, step=step + 1)
        time.sleep(_PAUSE_SECONDS)
        gradients = self.gradients[: alone.rows.size]
        times[OWN] = self._finish(window, gradients, step)
        times[READY] = stopwatch_ms(lambda: next_window.rows(LAYER))

        buffer = next_window.gradient_buffer(LAYER)
        time.sleep(_PAUSE_SECONDS)
        np.copyto(buffer, self.gradients[: ahead.rows.size])
        times[IN_PLACE] = self._finish(next_window, buffer, step + 1)
        times[STEP] = times[READY] + times[IN_PLACE]
        return times

    def _finish(
        self, window: engram_store.Window, gradients: NDArray[np.float32], step: int
    ) -> float:
        """Push and commit; milliseconds."""
        started = time.perf_counter()
        window.push(LAYER, gradients)
        self.session.commit(step, lr=_LEARNING_RATE)
        return (time.perf_counter() - started) * 1e3

    def _make_room(self, rows: int) -> None:
        """Seal outside the timed part when the memtable is nearly full."""
        if self.slots_used + rows > self.capacity:
            self.session.snapshot()
            self.slots_used = 0
        self.slots_used += rows


# ---------------------------------------------------------------------- memory


def _memory_name(smaller: int) -> str:
    return "trainer memory" + ("" if smaller == 1 else f", table {smaller} times smaller")


def _trainer_memory(place: Workplace) -> list[Quantity]:
    """Growth of a trainer over the store, and over one whose table is smaller."""
    tokens = np.stack([batch.tokens for batch in place.batches])
    with store_process(place.store.path, overlay_bytes(place.spec)) as addresses:
        large = trainer_memory(addresses.unix, tokens)
    with tempfile.TemporaryDirectory(dir=place.store.path.parent) as room:
        root = Path(room) / "small.engram"
        smaller = replace(place.workload, rows=place.workload.rows // _SMALLER)
        assert place.recipe.token_map is not None
        recipe = make_recipe(smaller, place.recipe.token_map)
        engram_store.create(root, recipe, dim=smaller.dim)
        spec = engram_store.inspect(root).metadata.tables[LAYER]
        with store_process(root, overlay_bytes(spec)) as addresses:
            small = trainer_memory(addresses.unix, tokens)
    return [
        Quantity(_memory_name(smaller), "MB", np.array([size / 1e6]))
        for smaller, size in ((1, large), (_SMALLER, small))
    ]
