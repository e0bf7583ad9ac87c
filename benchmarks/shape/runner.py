"""Runs what the plan wants and the records do not have yet."""

import fcntl
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.shape.errors import ShapeError
from benchmarks.shape.records import Records, append_record, read_records
from benchmarks.shape.training import execute
from benchmarks.shape.variants import Run
from benchmarks.shape.workshop import Say, Workshop


def run_missing(
    workshop: Workshop,
    runs: Sequence[Run],
    records: Path,
    *,
    seconds: float | None = None,
    say: Say = print,
) -> int:
    """Do all runs that have no record, one after the other.

    May be interrupted, and several processes may share the work: who begins a run holds a lock
    that ends with the process.

    Args:
        workshop: base and text.
        runs: in the order in which they are done.
        records: the file that gets a line per finished run.
        seconds: begin no run after so much time; None: do all.
        say: told about each run.

    Returns:
        How many were done.

    Raises:
        ShapeError: see `read_records`; also when the records belong to another base.
    """
    done, start = 0, time.perf_counter()
    for number, run in enumerate(runs, 1):
        if seconds is not None and time.perf_counter() - start > seconds:
            say("no time is left; run again for the rest")
            break
        with _claimed(workshop, run) as mine:
            known = read_records(records)
            if not mine or run in known.by_run:
                continue
            _check_base(workshop, known, records)
            record = execute(workshop, run)
            append_record(records, record)
        done += 1
        say(f"{number} of {len(runs)}, seed {run.seed}: {run.variant}: {_outcome(record)}")
    return done


def _outcome(record: dict[str, Any]) -> str:
    """For people."""
    found = record["perplexity"]
    return (
        f"prose {found['prose']:.1f}, code {found['code']:.1f}, {record['seconds']['whole']:.0f} s"
    )


def _check_base(workshop: Workshop, known: Records, path: Path) -> None:
    """Refuse to add runs on one base to those on another."""
    own, theirs = workshop.facts["fingerprint"], known.base
    if theirs not in (None, own):
        raise ShapeError(
            f"{path} has runs on the base {theirs}, {workshop.files.root} holds {own}: they "
            "cannot be compared. Name another file by --records, or the directory of that base"
        )


@contextmanager
def _claimed(workshop: Workshop, run: Run) -> Iterator[bool]:
    """Whether this process, and no other, does a run."""
    name = json.dumps([run.variant.to_json(), run.seed], sort_keys=True)
    claims = workshop.files.root / "claims"
    claims.mkdir(exist_ok=True)
    path = claims / hashlib.sha256(name.encode()).hexdigest()[:16]
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
