"""Draws the pictures of docs/performance.md from the records in benchmarks/results.

    python benchmarks/draw_records.py            # those of the page
    python benchmarks/draw_records.py ipc        # others

A record keeps medians, 95th percentiles and ranges, which is all that a picture shows.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from engram_store.bench.harness import PeerFact, Quantity, Report, Series, Target, Timing
from engram_store.bench.plots import plot_report

ROOT = Path(__file__).parents[1]
ON_THE_PAGE = ("window", "update", "growth", "cold", "train")


def read_record(path: Path) -> Report:
    """A report with as many samples as its figures need."""
    record: dict[str, Any] = json.loads(path.read_text())
    return Report(
        bench=record["bench"],
        machine=record["machine"],
        workload=record["workload"],
        timings=[_timing(result) for result in record["results"]],
        references={
            result["name"]: tuple(result["ratio_to"])
            for result in record["results"]
            if result["ratio_to"]
        },
        quantities=[_quantity(quantity) for quantity in record.get("quantities", [])],
        series=[
            Series(**series | {"x": tuple(series["x"]), "y": tuple(series["y"])})
            for series in record.get("series", [])
        ],
        peers=[PeerFact(**peer) for peer in record.get("peers", [])],
        targets=[Target(**target) for target in record["targets"]],
        notes=record["notes"],
    )


def _timing(result: dict[str, Any]) -> Timing:
    # 100 samples whose median and 95th percentile are those of the record.
    samples = np.array([result["median_ms"]] * 94 + [result["p95_ms"]] * 6)
    return Timing(result["name"], samples, result.get("rows"))


def _quantity(quantity: dict[str, Any]) -> Quantity:
    samples = [quantity["min"], quantity["median"], quantity["max"]]
    enough = samples if quantity["repetitions"] > 1 else [quantity["median"]]
    return Quantity(quantity["name"], quantity["unit"], np.array(enough))


def main(benches: list[str]) -> None:
    """Draw the records of some benches."""
    for bench in benches:
        report = read_record(ROOT / "benchmarks" / "results" / f"{bench}.json")
        print(plot_report(report, ROOT / "docs" / "plots" / f"{bench}.png"))


if __name__ == "__main__":
    main(sys.argv[1:] or list(ON_THE_PAGE))
