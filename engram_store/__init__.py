"""Disk-backed memory tables for Engram language models, read and trained at memory speed.

with engram_store.open("my.engram", mode="train") as store:
    window = store.announce(tokens, step=store.step)
    rows, inverse = window.rows(layer=1)
    window.push(layer=1, gradients=gradients)
    store.commit(step=store.step, lr=4e-4)
"""

from engram_store.api import create, inspect, open  # noqa: A004 - reads as engram_store.open
from engram_store.errors import EngramStoreError
from engram_store.layout.create import Normal
from engram_store.session import Applied, Session, SnapshotRef, Window
from engram_store.types import (
    HyperParameters,
    NonFinitePolicy,
    OptimizerKind,
    RowDtype,
    TableSpec,
)

__all__ = [
    "Applied",
    "EngramStoreError",
    "HyperParameters",
    "NonFinitePolicy",
    "Normal",
    "OptimizerKind",
    "RowDtype",
    "Session",
    "SnapshotRef",
    "TableSpec",
    "Window",
    "create",
    "inspect",
    "open",
]
