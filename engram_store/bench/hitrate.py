"""What memory is worth: device reads and step time over the memory that training has.

At each point of the curve four trainers have the same memory: the store; the store after its
segments were merged, which orders rows by how often they were updated; and two that update rows
where they are in a file.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from engram_store.bench.device import memory_group
from engram_store.bench.harness import (
    HitrateWorkload,
    Quantity,
    Report,
    Series,
    Target,
    Timing,
    describe_machine,
)
from engram_store.bench.hitrate_place import MOST_WARM_UP, HitratePlace, open_hitrate_place
from engram_store.bench.hitrate_writers import MERGED, MMAP, PWRITE, STORE, Trained
from engram_store.bench.workplace import Say
from engram_store.errors import ConfigError, EngramStoreError

WRITERS = (STORE, MERGED, MMAP, PWRITE)
_JUDGED_SHARE = 1 / 3
_CLOSE = 0.04
"""A point this near to a third counts as one."""
_FASTER = 2.5
_KILLED = "exit code -9"
_START_BYTES = 2 << 30
"""So much more a process may have until it sets its own limit."""
_Point = dict[str, Trained]


def bench_hitrate(workload: HitrateWorkload, directory: Path, say: Say) -> Report:
    """Measure one layer.

    Raises:
        ConfigError: settings make no sense, or the disk is too small.
        EngramStoreError: a process that was started failed.
    """
    shares = workload.shares
    if not shares or min(shares) <= 0 or list(shares) != sorted(set(shares)):
        raise ConfigError(
            f"bench hitrate varies memory, and shares are {shares}; give shares of the table "
            "above 0, the smallest first, such as (0.25, 0.5)"
        )
    if workload.trained_steps < 1:
        raise ConfigError(
            f"trained_steps is {workload.trained_steps}; a store that was never trained has no "
            "segments: give 1 at least"
        )
    try:
        with memory_group(1 << 30):
            pass  # before tables are made for nothing
    except OSError as error:
        return _not_measured(workload, error)
    place = open_hitrate_place(workload, directory, say)
    report = Report(bench="hitrate", machine=describe_machine(), workload=place.describe())
    points: dict[int, _Point] = {}
    too_little: list[int] = []
    try:
        for limit_bytes in _limits(place):
            try:
                points[limit_bytes] = _measure_point(place, limit_bytes, say)
            except EngramStoreError as error:
                if _KILLED not in str(error):
                    raise
                too_little.append(limit_bytes)
    finally:
        for name in (place.order.rows_file, place.order.sums_file):
            place.order.path(name).unlink(missing_ok=True)
    _write(report, place, points)
    report.notes += [
        f"{limit / 1e6:,.0f} MB: no point, the kernel ended a trainer for want of memory"
        for limit in too_little
    ]
    return report


def _not_measured(workload: HitrateWorkload, error: OSError) -> Report:
    sizes = {
        "table_rows": workload.rows,
        "row_bytes": 2 * workload.dim,
        "lookups_per_step": workload.tokens * workload.heads * len(workload.orders),
        "unique_rows_per_step": 0,
    }
    return Report(
        bench="hitrate",
        machine=describe_machine(),
        workload=asdict(workload) | sizes,
        targets=_targets(None),
        notes=[f"nothing is measured: no memory cgroup can be made here ({error})"],
    )


def _limits(place: HitratePlace) -> list[int]:
    """Of each point; those too small to train with are one point, of the least that will do."""
    wanted = [round(share * place.table_bytes) for share in place.workload.shares]
    return sorted({max(limit, place.least_limit_bytes) for limit in wanted})


def _measure_point(place: HitratePlace, limit_bytes: int, say: Say) -> _Point:
    order = place.order_of(limit_bytes)
    memory = f"{limit_bytes / 1e6:,.0f} MB"
    say(f"{memory}: training {order.first_step} steps without a limit")
    order = place.train_store(order)
    point = {}
    for writer in WRITERS:
        say(f"{memory}: {order.warm_up} + {order.steps} steps, {writer}")
        this = replace(order, writer=writer)
        if writer in (STORE, MERGED):
            place.go_back(this)
        with memory_group(limit_bytes + _START_BYTES) as group:
            point[writer] = place.run(replace(this, group=str(group)))
    return point


# ---------------------------------------------------------------------- what came of it


def _write(report: Report, place: HitratePlace, points: dict[int, _Point]) -> None:
    shares = [limit / place.table_bytes for limit in points]
    for share, point in zip(shares, points.values(), strict=True):
        _write_point(report, f"{share:.2f} of the table", point)
    for label, value in (
        ("ms a step", "mean_ms"),
        ("device reads of 4 KiB a step", "mean_reads"),
    ):
        report.series += [
            Series(
                name=writer,
                x_label="memory, as a share of the table",
                y_label=label,
                x=tuple(shares),
                y=tuple(float(getattr(point[writer], value)) for point in points.values()),
            )
            for writer in WRITERS
        ]
    report.targets = _targets(_judged(shares, list(points.values())))
    report.notes = _notes(place, points)


def _write_point(report: Report, where: str, point: _Point) -> None:
    for writer, trained in point.items():
        name = f"{where}: {writer}"
        report.timings.append(Timing(name, np.array(trained.step_ms)))
        steps = len(trained.step_ms)
        values = (
            ("reads of 4 KiB a step", trained.reads),
            ("MB written a step", [trained.written_bytes / 1e6 / steps]),
            ("re-faults a step", [trained.faults / steps]),
        )
        report.quantities += [Quantity(name, unit, np.array(each)) for unit, each in values]
        if trained.overlay_share is not None:
            share = np.array([100 * trained.overlay_share])
            report.quantities.append(Quantity(name, "% of rows in shared memory", share))
    report.quantities.sort(key=lambda quantity: quantity.unit)
    others = tuple(f"{where}: {writer}" for writer in (MMAP, PWRITE))
    for writer in (STORE, MERGED):
        report.references[f"{where}: {writer}"] = others


def _judged(shares: Sequence[float], points: Sequence[_Point]) -> _Point | None:
    """The point at a third of the table; None: none is near."""
    if not points:
        return None
    near = [abs(share - _JUDGED_SHARE) for share in shares]
    best = int(np.argmin(near))
    return points[best] if near[best] <= _CLOSE else None


def _targets(point: _Point | None) -> list[Target]:
    def faster(writer: str) -> float | None:
        return None if point is None else point[writer].mean_ms / point[STORE].mean_ms

    return [
        Target.times_faster(f"memory a third of the table: than {writer}", _FASTER, faster(writer))
        for writer in (MMAP, PWRITE)
    ]


def _notes(place: HitratePlace, points: dict[int, _Point]) -> list[str]:
    workload = place.workload
    notes = [
        f"the store was trained for {workload.trained_steps} steps before, without a limit",
        "it had the shared memory then that it has when it is measured, and never folds",
        f"'{MERGED}': then all its segments became one, most often updated rows first",
        f"measured: {workload.repetitions} steps, after {MOST_WARM_UP} or as fill shared memory",
        "curves and targets are means of them, in which writes count as they come",
        "memory: all that the process takes after modules, kernels and gradients are there",
        "in place: rows and sums in two files, our kernels, our cold reads one slice ahead",
        "in place: rows are read, then updated; nothing is synced. The store seals its updates",
        "reads: those of the process, as the kernel counts them",
    ]
    if _judged([limit / place.table_bytes for limit in points], list(points.values())) is None:
        notes.append("no point is near a third of the table: take more --rows")
    return notes
