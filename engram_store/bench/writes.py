"""How many bytes training writes, over those of the rows that it updates.

First the store alone, for many steps of text. Then, with memory for a third of the table, the store
beside two writers that update rows where they are in a file.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from engram_store.bench.device import memory_group
from engram_store.bench.harness import (
    Quantity,
    Report,
    Target,
    Timing,
    WritesWorkload,
    describe_machine,
)
from engram_store.bench.stream import Stream, open_stream
from engram_store.bench.workplace import Say
from engram_store.bench.writers import MMAP, PWRITE, STORE, Written

PLAIN, FOLDED = "no folds", "with folds"
_SHARE = 3
"""The table is so many times larger than memory."""
_LEAST_LIMIT = 400 << 20
"""What a process needs that trains a store; with less the kernel would end it."""
_DISAGREE = 1.1
"""From so many times what the process wrote on, somebody else used the device too."""


def bench_writes(workload: WritesWorkload, directory: Path, say: Say) -> Report:
    """Measure one layer.

    Raises:
        ConfigError: the disk is too small, or more steps are limited than there are.
        EngramStoreError: a process that was started failed.
    """
    stream = open_stream(workload, directory, say)
    report = Report(bench="writes", machine=describe_machine(), workload=stream.describe())
    limit_bytes = max(stream.table_bytes // _SHARE, _LEAST_LIMIT)
    report.workload["limit_bytes"] = limit_bytes
    found = {}
    for name, folds in ((PLAIN, False), (FOLDED, True)):
        say(f"training {workload.repetitions} steps, {name}")
        found[name] = stream.run(replace(stream.order, folds=folds))
    try:
        limited = _run_limited(stream, limit_bytes, say)
    except OSError as error:
        limited = {}
        report.notes = [f"nothing is measured with little memory: no memory cgroup here ({error})"]
    report.timings = [
        Timing(f"{name}: step", np.array(written.step_ms))
        for name, written in (found | limited).items()
    ]
    report.references = {f"{STORE}: step": (f"{MMAP}: step", f"{PWRITE}: step")}
    for name, written in (found | limited).items():
        report.quantities += _quantities(stream, name, written)
    _judge(report, stream, found, limited)
    report.notes += _notes(report, stream, found, limited)
    return report


def _run_limited(stream: Stream, limit_bytes: int, say: Say) -> dict[str, Written]:
    """Every writer with little memory. Raises: OSError: a cgroup cannot be made."""
    with memory_group(limit_bytes):
        pass  # before the flat files are made for nothing
    steps = stream.workload.limited_steps
    found = {}
    try:
        stream.make_flat_files()
        for writer in (STORE, MMAP, PWRITE):
            say(f"training {steps} steps with little memory: {writer}")
            with memory_group(limit_bytes) as group:
                order = replace(stream.order, writer=writer, steps=steps, group=str(group))
                found[writer] = stream.run(order)
    finally:
        stream.remove_flat_files()
    return found


def _quantities(stream: Stream, name: str, written: Written) -> list[Quantity]:
    """What everyone who counts says."""
    counted = {
        "the device": written.device_bytes,
        "the process": written.process_bytes,
        "the store": written.store_bytes,
    }
    updated = stream.updated_bytes(written)
    return [
        Quantity(f"{name}: row bytes updated", "GB", np.array([updated / 1e9])),
        *(
            Quantity(f"{name}: written, says {who}", "x", np.array([count / updated]))
            for who, count in counted.items()
            if count is not None
        ),
    ]


def _judge(
    report: Report, stream: Stream, found: dict[str, Written], limited: dict[str, Written]
) -> None:
    third = report.workload["limit_bytes"] <= stream.table_bytes // _SHARE

    def amplification(name: str) -> float:
        return found[name].bytes / stream.updated_bytes(found[name])

    def more(writer: str) -> float | None:
        return limited[writer].bytes / limited[STORE].bytes if limited and third else None

    folded = amplification(FOLDED) if found[FOLDED].folds else None
    report.targets = [
        Target.at_most("bytes written, of row bytes updated", 1.1, amplification(PLAIN), "x"),
        Target.at_most("bytes written with folds, of row bytes updated", 2.2, folded, "x"),
        Target.at_least(f"{MMAP} writes more, memory a third of the table", 10, more(MMAP), "x"),
        Target.at_least(
            f"{PWRITE} writes more, memory a third of the table", 10, more(PWRITE), "x"
        ),
    ]


def _notes(
    report: Report, stream: Stream, found: dict[str, Written], limited: dict[str, Written]
) -> list[str]:
    plain, folded, workload = found[PLAIN], found[FOLDED], report.workload
    steps, limited_steps = stream.workload.repetitions, stream.workload.limited_steps
    where = "by the process, the block device is hidden"
    if plain.device_bytes is not None:
        where = "at the block device, where others count too: keep it quiet, or give it a --dir"
    notes = [
        f"'{PLAIN}', '{FOLDED}': the store, {steps} steps, its defaults",
        *(
            f"'{name}': {store.seals} seals, {store.merges} merges, {store.folds} folds"
            for name, store in found.items()
        ),
        "row bytes updated: row, state and id of a row, once for every step that updates it",
        f"targets: bytes written {where}; until everything is durable",
    ]
    if not folded.folds:
        notes.append(f"'{FOLDED}': none was due in so few steps of so large a table")
    if limited:
        memory, table = (n / 1e6 for n in (workload["limit_bytes"], stream.table_bytes))
        notes += [
            f"'{STORE}', '{MMAP}', '{PWRITE}': the first {limited_steps} steps, nothing cached",
            f"each in a process that has {memory:,.0f} MB in all, for a table of {table:,.0f} MB",
            f"'{MMAP}': rows of a numpy.memmap are assigned; '{PWRITE}': one call for every row",
            "both in numpy, rows in the order of the file; rows and sums are two flat files",
        ]
    if workload["limit_bytes"] > stream.table_bytes // _SHARE:
        notes.append("so small a table cannot be compared with little memory: take more --rows")
    # Only of a store: the kernel counts a large folio whole that a reference changed one row of.
    notes += [
        f"'{name}': the device wrote {written.bytes / written.process_bytes:.1f} times what the "
        "process did; somebody else used it"
        for name, written in (found | limited).items()
        if written.store_bytes is not None and written.bytes > _DISAGREE * written.process_bytes
    ]
    return notes
