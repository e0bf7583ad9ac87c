"""Tools to test engram-store and code that uses it."""

from engram_store.testing.disk import FaultyDisk, Operation, RecordingDisk
from engram_store.testing.memory import MemorySession

__all__ = ["FaultyDisk", "MemorySession", "Operation", "RecordingDisk"]
