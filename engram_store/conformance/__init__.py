"""Golden vectors: whether this installation computes what the published models compute."""

from engram_store.conformance.comparison import Comparison, close, exact
from engram_store.conformance.report import Report, Tally
from engram_store.conformance.runner import run

__all__ = ["Comparison", "Report", "Tally", "close", "exact", "run"]
