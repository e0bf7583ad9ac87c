"""Benchmarks that users run: every number beside its reference, measured in the same run."""

from engram_store.bench.harness import (
    RecoverWorkload,
    Report,
    Target,
    Timing,
    Workload,
    WritesWorkload,
)
from engram_store.bench.run import run_bench

__all__ = [
    "RecoverWorkload",
    "Report",
    "Target",
    "Timing",
    "Workload",
    "WritesWorkload",
    "run_bench",
]
