"""Runs a benchmark in a directory of its own, or in one that is kept."""

import tempfile
from pathlib import Path

from engram_store.bench.harness import Report, Workload
from engram_store.bench.text import SEGMENT
from engram_store.bench.update import bench_update
from engram_store.bench.window import bench_window
from engram_store.bench.workplace import Say, open_workplace
from engram_store.errors import ConfigError

_BENCHES = {"window": bench_window, "update": bench_update}


def run_bench(which: str, workload: Workload, directory: Path | None, say: Say) -> Report:
    """Measure.

    Args:
        which: 'window' or 'update'.
        workload: what to measure.
        directory: where tables are made, and kept for the next run; None: a temporary one.
        say: told what is being done.

    Raises:
        ConfigError: the workload makes no sense.
    """
    if which not in _BENCHES:
        raise ConfigError(f"there is no benchmark {which!r}; there are {sorted(_BENCHES)}")
    if min(workload.rows // 1024, workload.tokens // 8, workload.repetitions) < 1:
        raise ConfigError("a benchmark needs 1,024 rows, 8 tokens and 1 step at least")
    if workload.tokens > SEGMENT and workload.tokens % SEGMENT:
        raise ConfigError(f"more than {SEGMENT} tokens must be a multiple of it")
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        return _run(which, workload, directory, say)
    with tempfile.TemporaryDirectory(prefix="engram-store-bench-") as temporary:
        return _run(which, workload, Path(temporary), say)


def _run(which: str, workload: Workload, directory: Path, say: Say) -> Report:
    place = open_workplace(workload, directory, say)
    with place.store:
        return _BENCHES[which](place, say)
