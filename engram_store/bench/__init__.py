"""Benchmarks that users run: every number beside its reference, measured in the same run."""

from engram_store.bench.harness import (
    ColdWorkload,
    ComparedWorkload,
    GrowthWorkload,
    HitrateWorkload,
    RecoverWorkload,
    Report,
    Target,
    Timing,
    Workload,
    WritesWorkload,
)
from engram_store.bench.run import run_bench

__all__ = [
    "ColdWorkload",
    "ComparedWorkload",
    "GrowthWorkload",
    "HitrateWorkload",
    "RecoverWorkload",
    "Report",
    "Target",
    "Timing",
    "Workload",
    "WritesWorkload",
    "run_bench",
]
