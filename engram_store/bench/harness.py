"""Timing, and the records that a benchmark leaves behind."""

import gc
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations of one case, warm-up left out."""

    name: str
    samples_ms: NDArray[np.float64]

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

    @classmethod
    def at_most(cls, what: str, limit: float, measured: float | None, unit: str = "ms") -> "Target":
        """A limit that may not be exceeded; of milliseconds, unless `unit` is another."""
        met = None if measured is None else measured <= limit
        return cls(what=what, target=f"<= {limit:g} {unit}", measured=measured, met=met)

    @classmethod
    def at_least(cls, what: str, least: float, measured: float | None, unit: str) -> "Target":
        """What has to be reached, in `unit`."""
        met = None if measured is None else measured >= least
        return cls(what=what, target=f">= {least:g} {unit}", measured=measured, met=met)

    @classmethod
    def times_faster(cls, what: str, factor: float, measured: float | None) -> "Target":
        """How many times faster than a reference."""
        met = None if measured is None else measured >= factor
        return cls(what=what, target=f">= {factor:g}x", measured=measured, met=met)


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
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def timing(self, name: str) -> Timing | None:
        """One timing, if it was made."""
        return next((timing for timing in self.timings if timing.name == name), None)

    def ratios(self, timing: Timing) -> dict[str, float]:
        """Median over each reference's median: below 1 is faster than the reference."""
        made = {name: self.timing(name) for name in self.references.get(timing.name, ())}
        return {
            name: timing.median_ms / reference.median_ms
            for name, reference in made.items()
            if reference is not None
        }

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "bench": self.bench,
            "machine": self.machine,
            "workload": self.workload,
            "results": [
                {
                    "name": timing.name,
                    "median_ms": round(timing.median_ms, 4),
                    "p95_ms": round(timing.p95_ms, 4),
                    "max_ms": round(timing.max_ms, 4),
                    "repetitions": int(timing.samples_ms.size),
                    "ratio_to": {k: round(v, 4) for k, v in self.ratios(timing).items()},
                }
                for timing in self.timings
            ],
            "quantities": [quantity.to_json() for quantity in self.quantities],
            "targets": [asdict(target) for target in self.targets],
            "notes": self.notes,
        }


Case = Callable[[int], float | None]
"""Runs once for the batch with that number. It may return its own milliseconds, when only a
part of what it does counts."""


def measure(cases: Mapping[str, Case], *, repetitions: int, batches: int) -> list[Timing]:
    """Time cases in turn, round after round, so that noise of the machine hits all alike.

    In a round each case gets another batch, and over the rounds all get the same ones: a case
    never finds the rows that the one before it pulled into the processor's cache.
    """
    samples: dict[str, list[float]] = {name: [] for name in cases}
    stride = max(batches // len(cases), 1)
    with undisturbed():
        for turn in range(WARM_UP + repetitions):
            for position, (name, case) in enumerate(cases.items()):
                batch = (turn + position * stride) % batches
                started = time.perf_counter()
                own = case(batch)
                elapsed = (time.perf_counter() - started) * 1e3
                samples[name].append(elapsed if own is None else own)
    return [Timing(name, np.array(times[WARM_UP:])) for name, times in samples.items()]


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


def describe_machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    names = ("engram-store", "numpy", "numba", "llvmlite", "torch", "grpcio", "protobuf")
    return {
        "cpu": _first_value("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version for name in names if (version := _version(name))},
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def _first_value(path: str, key: str) -> str | None:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
