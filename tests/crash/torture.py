"""Crash images for as long as you like: `python -m tests.crash.torture --images 1000000`.

Every round records the workloads again, with other threads' timing, and draws other subsets.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.crash.exploring import Effort, Explorer, Report, crash_directory
from tests.crash.recordings import MORE_WORKLOADS, WORKLOADS, Workload

_EFFORT = Effort(subsets=16, cuts=4, boots=4, chains=40, stop_at=1)
Job = tuple[Workload, int, Path]
"""What to explore, the seed, and where."""


def explore(job: Job) -> tuple[str, Report]:
    """All images of one workload, in a process of its own."""
    workload, seed, parent = job
    root = Path(tempfile.mkdtemp(dir=parent))
    return workload.name, Explorer(workload.record(root), root, _EFFORT, seed).run()


def torture(wanted: int, seed: int, workers: int) -> Report:
    """Rounds of all workloads until so many images were tried, or one was not recovered."""
    total, started = Report(), time.monotonic()
    context = multiprocessing.get_context("spawn")
    # Workers that are not needed any more are killed, and leave their directories.
    with crash_directory() as parent, context.Pool(workers, maxtasksperchild=1) as pool:
        while True:
            jobs = [(workload, seed, parent) for workload in WORKLOADS + MORE_WORKLOADS]
            for name, report in pool.imap_unordered(explore, jobs):
                total += report
                seconds = time.monotonic() - started
                print(f"{seconds:7.0f} s  {total}; {name}", flush=True)  # noqa: T201
                if total.violations or total.images >= wanted:
                    return total
            seed += 1


def main() -> int:
    """Returns the exit status: 1 if an image was not recovered."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000, help="how many, at least")
    parser.add_argument("--seed", type=int, default=1, help="of the first round's random subsets")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    arguments = parser.parse_args()
    report = torture(arguments.images, arguments.seed, arguments.workers)
    for violation in report.violations:
        print(violation)  # noqa: T201
    return bool(report.violations)


if __name__ == "__main__":
    sys.exit(main())
