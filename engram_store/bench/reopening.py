"""What the processes of `bench recover` do: fill a store until they are killed, and open it again.

`fill_and_kill`, `fill_in_segments` and `reopen` start them; `main` is what they run.
"""

import json
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import engram_store
from engram_store.bench.process import child_result, python_command
from engram_store.bench.workplace import FIRST_STEP, LAYER
from engram_store.engine import Engine
from engram_store.engine.updates import TableUpdate
from engram_store.errors import EngramStoreError
from engram_store.layout.disk import Disk
from engram_store.optimizers import rule_step
from engram_store.store import Store
from engram_store.types import HyperParameters

_STEP_ROWS = 1 << 17
"""Rows of a commit, about as many as the reference step has."""
_SECONDS = 600.0
_FULL = "full"
_LOG_CHARACTERS = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Shop:
    """Which store is filled and opened, and how."""

    root: str
    memtable_dir: str
    """In shared memory, of this benchmark alone."""
    overlay_bytes: int
    rows: int
    """Rows that it is filled with, all different."""

    def open(self, durability: str, disk: Disk | None = None) -> Store:
        """Open it for training; nothing is folded."""
        return engram_store.open(
            self.root, "train", overlay_bytes=self.overlay_bytes, memtable_dir=self.memtable_dir,
            fold_ratio=float("inf"), durability=durability, disk=disk,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Reopened:
    """How long opening took, and what it found."""

    ms: float
    """From `engram_store.open` to the first row that was read."""
    kind: str
    """As `RecoveryKind`."""
    sealed_rows: int
    take_over_ms: float | None
    """Until the first file was written; None where nothing had to be sealed."""
    seal_ms: float | None
    """From then until memtables were opened for the next steps."""
    map_ms: float | None
    """From then to the first row."""


# ---------------------------------------------------------------------- the benchmark's side


def fill_and_kill(shop: Shop, durability: str) -> None:
    """Train until shared memory holds the wanted rows, then kill the trainer.

    Raises:
        EngramStoreError: it ended before, or took too long.
    """
    order = json.dumps({"do": "fill", "shop": asdict(shop), "durability": durability})
    with subprocess.Popen(  # noqa: S603 - our own interpreter
        python_command(__name__, order),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        ready = select.select([process.stdout], [], [], _SECONDS)[0]
        said = process.stdout.readline().strip() if ready else ""
        process.kill()
        if not ready:
            raise EngramStoreError(
                f"the trainer to be killed was not full in {_SECONDS:g} s; is the disk slow? Ask "
                "for fewer --overlay-rows"
            )
        if said != _FULL:
            errors = process.stderr.read()[-_LOG_CHARACTERS:].strip()
            raise EngramStoreError(f"the trainer to be killed ended before it was full: {errors}")


def fill_in_segments(shop: Shop, segments: int) -> None:
    """Train as many rows, sealed in so many segments, and close.

    Raises:
        EngramStoreError: the trainer failed.
    """
    order = {"do": "segments", "shop": asdict(shop), "segments": segments}
    child_result(__name__, order, _SECONDS)


def reopen(shop: Shop, *, go_back: bool) -> Reopened:
    """Open in a fresh process and close; `go_back` to the first snapshot before that.

    Raises:
        EngramStoreError: it could not be opened.
    """
    order = {"do": "open", "shop": asdict(shop), "go_back": go_back}
    return Reopened(**child_result(__name__, order, _SECONDS))


# ---------------------------------------------------------------------- the processes' side


class _MarkingDisk(Disk):
    """Knows when the first file was made, and when the first memtable after it."""

    def __init__(self) -> None:
        super().__init__()
        self.sealing: float | None = None
        self.mapping: float | None = None

    def create(self, path: Path) -> int:
        """As `Disk.create`."""
        if self.sealing is None:
            self.sealing = time.perf_counter()
        return super().create(path)

    def open_shared(self, path: Path, length: int) -> int:
        """As `Disk.open_shared`."""
        if self.sealing is not None and self.mapping is None:
            self.mapping = time.perf_counter()
        return super().open_shared(path, length)


def main() -> None:
    """Do what the first argument orders."""
    order = json.loads(sys.argv[1])
    shop = Shop(**order["shop"])
    if order["do"] == "fill":
        _fill(shop, order["durability"])
    elif order["do"] == "segments":
        _segments(shop, order["segments"])
        sys.stdout.write("{}\n")
    else:
        sys.stdout.write(json.dumps(asdict(_open(shop, go_back=order["go_back"]))) + "\n")


def _fill(shop: Shop, durability: str) -> None:
    store = shop.open(durability)
    _train(store, _different_rows(store, shop.rows))
    sys.stdout.write(f"{_FULL}\n")
    sys.stdout.flush()
    signal.pause()


def _segments(shop: Shop, segments: int) -> None:
    with shop.open("snapshot") as store:
        for rows in np.array_split(_different_rows(store, shop.rows), segments):
            _train(store, rows)
            store.seal()


def _different_rows(store: Store, count: int) -> NDArray[np.int32]:
    """Rows in random order: nothing is sealed twice, so as much is sealed as can be."""
    order = np.random.default_rng(0).permutation(store.tables[LAYER].rows)
    return order[:count].astype(np.int32)


def _train(store: Store, rows: NDArray[np.int32]) -> None:
    """Commits of the engine: tokens could not be made to have exactly these rows."""
    engine: Any = store._engine  # noqa: SLF001
    assert isinstance(engine, Engine)
    spec = store.tables[LAYER]
    shape = (min(_STEP_ROWS, rows.size), spec.dim)
    gradients = np.random.default_rng(0).standard_normal(shape, np.float32)
    for first in range(0, rows.size, _STEP_ROWS):
        part = rows[first : first + _STEP_ROWS]
        step = rule_step(spec, engine.step, HyperParameters(lr=0.01, eps=1e-8))
        engine.commit(engine.step, [TableUpdate(LAYER, part, gradients[: part.size], step)])


def _open(shop: Shop, *, go_back: bool) -> Reopened:
    disk = _MarkingDisk()
    started = time.perf_counter()
    store = shop.open("snapshot", disk)
    store.read_rows(LAYER, np.zeros(1, np.int32))
    ended = time.perf_counter()
    report = store.recovery
    assert report is not None
    if go_back:
        store.restore(FIRST_STEP)
    store.close()
    parts: list[float | None] = [None, None, None]
    if report.sealed_rows:
        assert disk.sealing is not None
        assert disk.mapping is not None
        marks = [started, disk.sealing, disk.mapping, ended]
        parts = [(end - begin) * 1e3 for begin, end in pairwise(marks)]
    return Reopened(
        ms=(ended - started) * 1e3,
        kind=str(report.kind),
        sealed_rows=report.sealed_rows,
        take_over_ms=parts[0],
        seal_ms=parts[1],
        map_ms=parts[2],
    )
