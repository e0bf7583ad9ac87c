"""Runs a benchmark in a directory of its own, or in one that is kept."""

import tempfile
from pathlib import Path

from engram_store.bench.harness import RecoverWorkload, Report, Workload, WritesWorkload
from engram_store.bench.ipc import bench_ipc
from engram_store.bench.process import require_process
from engram_store.bench.recover import bench_recover
from engram_store.bench.text import SEGMENT
from engram_store.bench.update import bench_update
from engram_store.bench.window import bench_window
from engram_store.bench.workplace import Say, open_workplace
from engram_store.bench.writes import bench_writes
from engram_store.errors import ConfigError

_BENCHES = {
    "window": bench_window,
    "update": bench_update,
    "ipc": bench_ipc,
    "recover": bench_recover,
}
_WORKLOADS: dict[str, type[Workload]] = {
    **dict.fromkeys(_BENCHES, Workload),
    "recover": RecoverWorkload,
    "writes": WritesWorkload,
}


def run_bench(which: str, workload: Workload, directory: Path | None, say: Say) -> Report:
    """Measure.

    Args:
        which: 'window', 'update', 'ipc', 'recover' or 'writes'.
        workload: what to measure; a `RecoverWorkload` or a `WritesWorkload` for the last two.
        directory: where tables are made, and kept for the next run; None: a temporary one.
        say: told what is being done.

    Raises:
        ConfigError: the workload makes no sense, what 'ipc' needs is not installed, or memory or
            disk are too small for it.
        EngramStoreError: a process that was started failed.
    """
    if which not in _WORKLOADS:
        raise ConfigError(f"there is no benchmark {which!r}; there are {sorted(_WORKLOADS)}")
    if not isinstance(workload, _WORKLOADS[which]):
        raise ConfigError(
            f"bench {which} measures a {_WORKLOADS[which].__name__}, not a "
            f"{type(workload).__name__}"
        )
    if min(workload.rows // 1024, workload.tokens // 8, workload.repetitions) < 1:
        raise ConfigError("a benchmark needs 1,024 rows, 8 tokens and 1 step at least")
    if workload.tokens > SEGMENT and workload.tokens % SEGMENT:
        raise ConfigError(f"more than {SEGMENT} tokens must be a multiple of it")
    if which == "ipc":
        require_process()
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        return _run(which, workload, directory, say)
    with tempfile.TemporaryDirectory(prefix="engram-store-bench-") as temporary:
        return _run(which, workload, Path(temporary), say)


def _run(which: str, workload: Workload, directory: Path, say: Say) -> Report:
    if isinstance(workload, WritesWorkload):
        return bench_writes(workload, directory, say)
    place = open_workplace(workload, directory, say)
    with place.store:
        return _BENCHES[which](place, say)
