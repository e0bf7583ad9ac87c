"""Timing, and the records that a benchmark leaves behind."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.bench.machine import describe_machine as describe_machine

WARM_UP = 5
"""Rounds before timing starts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What is measured; the defaults of the command line are the reference."""

    rows: int
    """Wanted rows of the table; primes make it a little more."""
    tokens: int
    """Tokens of a step, in segments of at most 2,048."""
    repetitions: int
    """Timed rounds."""
    dim: int = 64
    heads: int = 8
    orders: tuple[int, ...] = (2, 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoverWorkload(Workload):
    """What `bench recover` measures; `repetitions` are those of every kill."""

    overlay_rows: int = 5_000_000
    """Rows in shared memory when the store is killed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WritesWorkload(Workload):
    """What `bench writes` measures; `repetitions` are the steps that are trained."""

    limited_steps: int = 5
    """Steps of every writer while memory is a third of the table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedWorkload(Workload):
    """What `bench window` and `bench update` measure."""

    peers: bool = True
    """Compare with other software that is installed, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowthWorkload(Workload):
    """What `bench growth` measures: `rows` are those of the smallest table."""

    factors: tuple[int, ...] = (1, 10, 100)
    """How many times as many rows each table has, the smallest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ColdWorkload(Workload):
    """What `bench cold` measures; `repetitions` are rounds in which everybody has a turn."""

    windows: int = 6
    """Different windows, one after the other in a round."""
    look_ahead: int = 2
    """Steps by which windows are announced ahead of their own."""
    fio_seconds: float = 1.0
    """How long fio reads each time; it does between any two of ours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HitrateWorkload(Workload):
    """What `bench hitrate` measures; `repetitions` are the timed steps of each point."""

    trained_steps: int = 240
    """Steps that the store was trained for before anything is measured."""
    shares: tuple[float, ...] = (1 / 6, 1 / 4, 1 / 3, 1 / 2, 1.0)
    """Memory of each point, as a share of the table; the smallest first."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations of one case, warm-up left out."""

    name: str
    samples_ms: NDArray[np.float64]
    rows: float | None = None
    """Rows of a repetition, of cases that differ in it and are compared row by row."""

    @property
    def ns_per_row(self) -> float | None:
        """Median nanoseconds of a row; None: not compared row by row."""
        return self.median_ms * 1e6 / self.rows if self.rows else None

    @property
    def median_ms(self) -> float:
        """Half of the repetitions took longer."""
        return float(np.median(self.samples_ms))

    @property
    def p95_ms(self) -> float:
        """One repetition in twenty took longer."""
        return float(np.percentile(self.samples_ms, 95))

    @property
    def max_ms(self) -> float:
        """The slowest one."""
        return float(self.samples_ms.max())


@dataclass(frozen=True, slots=True)
class Quantity:
    """What is not a duration: a rate, an amount of memory."""

    name: str
    unit: str
    samples: NDArray[np.float64]

    @property
    def median(self) -> float:
        """Half of the samples are larger."""
        return float(np.median(self.samples))

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "name": self.name,
            "unit": self.unit,
            "median": round(self.median, 4),
            "min": round(float(self.samples.min()), 4),
            "max": round(float(self.samples.max()), 4),
            "repetitions": int(self.samples.size),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A promise, and what this run says about it."""

    what: str
    target: str
    measured: float | None
    """None: not measured here."""
    met: bool | None
    limit: float
    """The number in `target`."""

    @property
    def share(self) -> float | None:
        """1 where the target is just met, more where it is missed; None: not measured."""
        if self.measured is None:
            return None
        least = self.target.startswith(">=")
        part, whole = (self.limit, self.measured) if least else (self.measured, self.limit)
        return part / whole if whole else float("inf")

    @classmethod
    def at_most(cls, what: str, limit: float, measured: float | None, unit: str = "ms") -> "Target":
        """A limit that may not be exceeded; of milliseconds, unless `unit` is another."""
        met = None if measured is None else measured <= limit
        target = f"<= {limit:g} {unit}"
        return cls(what=what, target=target, measured=measured, met=met, limit=limit)

    @classmethod
    def at_least(cls, what: str, least: float, measured: float | None, unit: str) -> "Target":
        """What has to be reached, in `unit`."""
        met = None if measured is None else measured >= least
        target = f">= {least:g} {unit}"
        return cls(what=what, target=target, measured=measured, met=met, limit=least)

    @classmethod
    def times_faster(cls, what: str, factor: float, measured: float | None) -> "Target":
        """How many times faster than a reference."""
        met = None if measured is None else measured >= factor
        target = f">= {factor:g}x"
        return cls(what=what, target=target, measured=measured, met=met, limit=factor)


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One curve: a measured value over something that was varied."""

    name: str
    x_label: str
    """What was varied, with its unit."""
    y_label: str
    """What was measured, with its unit: curves that share both labels are drawn together."""
    x: tuple[float, ...]
    y: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "x": list(self.x), "y": [round(y, 4) for y in self.y]}


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerFact:
    """How other software took part in a run, or why it did not."""

    name: str
    what: str
    """How it was used."""
    version: str | None = None
    missing: str | None = None
    """Why it was not measured; None: it was."""
    table_rows: int | None = None
    """Rows that it held: the first ones of the table."""
    rows_per_batch: int | None = None
    """Unique rows of a step that it was asked for."""
    open_seconds: float | None = None
    """Until it had its table: made, or found from an earlier run, and read once."""


@dataclass(kw_only=True)
class Report:
    """Everything one benchmark found out."""

    bench: str
    machine: dict[str, Any]
    workload: dict[str, Any]
    timings: list[Timing] = field(default_factory=list)
    references: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Which timings each timing is compared with, by name."""
    quantities: list[Quantity] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    peers: list[PeerFact] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def timing(self, name: str) -> Timing | None:
        """One timing, if it was made."""
        return next((timing for timing in self.timings if timing.name == name), None)

    def ratios(self, timing: Timing) -> dict[str, float]:
        """Median over each reference's median: below 1 is faster than the reference.

        Of a row where both tell how many rows they had, else of a repetition.
        """
        made = {name: self.timing(name) for name in self.references.get(timing.name, ())}
        return {
            name: _ratio(timing, reference)
            for name, reference in made.items()
            if reference is not None
        }

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "bench": self.bench,
            "machine": self.machine,
            "workload": self.workload,
            "results": [self._result(timing) for timing in self.timings],
            "quantities": [quantity.to_json() for quantity in self.quantities],
            "series": [series.to_json() for series in self.series],
            "peers": [asdict(peer) for peer in self.peers],
            "targets": [asdict(target) for target in self.targets],
            "notes": self.notes,
        }

    def _result(self, timing: Timing) -> dict[str, Any]:
        result: dict[str, Any] = {
            "name": timing.name,
            "median_ms": round(timing.median_ms, 4),
            "p95_ms": round(timing.p95_ms, 4),
            "max_ms": round(timing.max_ms, 4),
            "repetitions": int(timing.samples_ms.size),
            "ratio_to": {name: round(ratio, 4) for name, ratio in self.ratios(timing).items()},
        }
        if timing.rows is not None and timing.ns_per_row is not None:
            result |= {"rows": round(timing.rows), "ns_per_row": round(timing.ns_per_row, 2)}
        return result


def _ratio(timing: Timing, reference: Timing) -> float:
    mine, theirs = timing.ns_per_row, reference.ns_per_row
    if mine is None or theirs is None:
        return timing.median_ms / reference.median_ms
    return mine / theirs


Case = Callable[[int], float | None]
"""Runs once for the batch with that number. It may return its own milliseconds, when only a
part of what it does counts."""


def measure(
    cases: Mapping[str, Case], *, repetitions: int, batches: int, warm_up: int = WARM_UP
) -> list[Timing]:
    """Time cases in turn, round after round, so that noise of the machine hits all alike.

    In a round each case gets another batch, and over the rounds all get the same ones: a case
    never finds the rows that the one before it pulled into the processor's cache.
    """
    samples: dict[str, list[float]] = {name: [] for name in cases}
    stride = max(batches // len(cases), 1)
    with undisturbed():
        for turn in range(warm_up + repetitions):
            for position, (name, case) in enumerate(cases.items()):
                batch = (turn + position * stride) % batches
                started = time.perf_counter()
                own = case(batch)
                elapsed = (time.perf_counter() - started) * 1e3
                samples[name].append(elapsed if own is None else own)
    return [Timing(name, np.array(times[warm_up:])) for name, times in samples.items()]


@contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection meanwhile."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def stopwatch_ms(action: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1e3
