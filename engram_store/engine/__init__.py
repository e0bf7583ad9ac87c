"""The engine: tables made of immutable files and one mutable memtable (ARCHITECTURE.md).

Data walks one way: a commit appends to the open memtable (`memtable`), a full memtable is sealed
into a segment (`seal`), segments are folded into a new base generation (`fold`), and at open all
of it is put together again (`recovery`). `table` knows where each row is at any moment.
"""

from engram_store.engine.engine import Engine
from engram_store.engine.options import EngineOptions
from engram_store.engine.recovery import RecoveryReport

__all__ = ["Engine", "EngineOptions", "RecoveryReport"]
