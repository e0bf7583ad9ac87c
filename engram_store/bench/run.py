"""Which benchmarks there are, and how one is run: in a directory of its own, or in a kept one."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_store.bench.cold import bench_cold
from engram_store.bench.gpu import bench_gpu, require_gpu
from engram_store.bench.gpu_place import GpuWorkload
from engram_store.bench.growth import bench_growth
from engram_store.bench.harness import (
    ColdWorkload,
    ComparedWorkload,
    GrowthWorkload,
    HitrateWorkload,
    RecoverWorkload,
    Report,
    Workload,
    WritesWorkload,
)
from engram_store.bench.hitrate import bench_hitrate
from engram_store.bench.ipc import bench_ipc
from engram_store.bench.machine import describe_directory
from engram_store.bench.process import require_process
from engram_store.bench.recover import bench_recover
from engram_store.bench.text import SEGMENT
from engram_store.bench.train import bench_train, require_train
from engram_store.bench.train_place import TrainWorkload
from engram_store.bench.update import bench_update
from engram_store.bench.window import bench_window
from engram_store.bench.workplace import Say, Workplace, open_workplace
from engram_store.bench.writes import bench_writes
from engram_store.errors import ConfigError

Run = Callable[[Any, Path, Say], Report]
"""Measures a workload of the benchmark's own type in a directory."""


@dataclass(frozen=True, slots=True)
class Bench:
    """One benchmark."""

    run: Run
    workload: type[Workload]
    require: Callable[[], None] | None = None
    """Raises ConfigError where it cannot be run, before anything is made."""


def on_workplace(measure: Callable[[Workplace, Say], Report]) -> Run:
    """A benchmark of a store that has been trained for some steps."""

    def run(workload: Workload, directory: Path, say: Say) -> Report:
        place = open_workplace(workload, directory, say)
        with place.store:
            return measure(place, say)

    return run


BENCHES = {
    "window": Bench(on_workplace(bench_window), ComparedWorkload),
    "update": Bench(on_workplace(bench_update), ComparedWorkload),
    "ipc": Bench(on_workplace(bench_ipc), Workload, require_process),
    "recover": Bench(on_workplace(bench_recover), RecoverWorkload),
    "writes": Bench(bench_writes, WritesWorkload),
    "growth": Bench(bench_growth, GrowthWorkload),
    "cold": Bench(bench_cold, ColdWorkload),
    "hitrate": Bench(bench_hitrate, HitrateWorkload),
    "train": Bench(bench_train, TrainWorkload, require_train),
    "train-cuda": Bench(bench_gpu, GpuWorkload, require_gpu),
}
"""By the name of the command."""


def run_bench(which: str, workload: Workload, directory: Path | None, say: Say) -> Report:
    """Measure.

    Args:
        which: a key of `BENCHES`.
        workload: what to measure; of the type that the benchmark has there.
        directory: where tables are made, and kept for the next run; None: a temporary one.
        say: told what is being done.

    Raises:
        ConfigError: the workload makes no sense, what 'ipc' needs is not installed, or memory or
            disk are too small for it.
        EngramStoreError: a process that was started failed.
    """
    if which not in BENCHES:
        raise ConfigError(f"there is no benchmark {which!r}; there are {sorted(BENCHES)}")
    bench = BENCHES[which]
    if not isinstance(workload, bench.workload):
        raise ConfigError(
            f"bench {which} measures a {bench.workload.__name__}, not a {type(workload).__name__}"
        )
    if min(workload.rows // 1024, workload.tokens // 8, workload.repetitions) < 1:
        raise ConfigError("a benchmark needs 1,024 rows, 8 tokens and 1 step at least")
    if workload.tokens > SEGMENT and workload.tokens % SEGMENT:
        raise ConfigError(f"more than {SEGMENT} tokens must be a multiple of it")
    if bench.require is not None:
        bench.require()
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        return _run(bench, workload, directory, say)
    with tempfile.TemporaryDirectory(prefix="engram-store-bench-") as temporary:
        return _run(bench, workload, Path(temporary), say)


def _run(bench: Bench, workload: Workload, directory: Path, say: Say) -> Report:
    report = bench.run(workload, directory, say)
    report.machine |= describe_directory(directory)
    return report
