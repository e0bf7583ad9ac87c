"""`python -m benchmarks.shape`: run what is missing; write the tables and plots of the results."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.shape.errors import ShapeError

_PROJECT = Path(__file__).parents[2]


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what a command line says; None: that of the process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shape", description=__doc__)
    parser.add_argument(
        "--records", type=Path, default=_PROJECT / "benchmarks" / "results" / "shape.jsonl"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do all runs of the plan that have no record")
    run.add_argument("--dir", type=Path, required=True, help="the base, its text, and stores")
    run.add_argument("--study", action="append", help="only this one; may be repeated")
    run.add_argument("--seconds", type=float, help="begin no run after so long")
    report = commands.add_parser("report", help="write tables and plots from the records")
    report.add_argument("--page", type=Path, default=_PROJECT / "docs" / "results.md")
    report.add_argument("--plots", type=Path, default=_PROJECT / "docs" / "plots")
    options = parser.parse_args(arguments)
    try:
        _run(options) if options.command == "run" else _report(options)
    except ShapeError as error:
        sys.exit(f"error: {error}")


def _run(options: argparse.Namespace) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded
    from benchmarks.shape.plan import STUDIES, planned_runs, study
    from benchmarks.shape.runner import run_missing
    from benchmarks.shape.workshop import SETTINGS, open_workshop

    names = options.study
    studies = STUDIES if names is None else tuple(study(name) for name in names)
    workshop = open_workshop(options.dir, SETTINGS, _say)
    run_missing(workshop, planned_runs(studies), options.records, seconds=options.seconds, say=_say)


def _report(options: argparse.Namespace) -> None:
    from benchmarks.shape.plots import draw_plots
    from benchmarks.shape.records import read_records
    from benchmarks.shape.report import with_tables

    records = read_records(options.records)
    options.page.write_text(with_tables(options.page.read_text(), records))
    draw_plots(records, options.plots)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
