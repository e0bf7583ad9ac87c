"""Benchmarks that users run: every number beside its reference, measured in the same run."""

from engram_store.bench.harness import Report, Target, Timing, Workload
from engram_store.bench.run import run_bench

__all__ = ["Report", "Target", "Timing", "Workload", "run_bench"]
