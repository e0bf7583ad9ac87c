"""What a snapshot costs who trains: how long a commit waits, and how many bytes are written."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.bench.harness import Quantity, Timing, stopwatch_ms, undisturbed
from engram_store.bench.workplace import BATCHES, LAYER, Workplace
from engram_store.engine.updates import TableUpdate
from engram_store.optimizers import rule_step
from engram_store.types import HyperParameters

COMMIT, BESIDE, PAUSE, SNAPSHOT = "commit", "slowest beside a snapshot", "pause", "snapshot"
PROPORTION = "bytes of a snapshot, of rows touched"
_SNAPSHOTS = 10
_COMMITS = 4
"""Before each of them."""
_SIZES = (1, 4, 16)
"""Steps between the snapshots whose bytes are counted."""
_PAUSE_SECONDS = 0.02
"""Between commits, where a model would run."""


@dataclass
class Snapshots:
    """Commits on a store while snapshots of it are made."""

    place: Workplace
    gradients: NDArray[np.float32] = field(init=False)
    """[most rows of a step, dim]"""
    slots: int = 0
    """Used in the open memtable."""
    turn: int = 0

    def __post_init__(self) -> None:
        most = max(batch.rows.size for batch in self.place.batches)
        shape = (most, self.place.spec.dim)
        self.gradients = np.random.default_rng(0).standard_normal(shape, np.float32)

    def _rows(self) -> NDArray[np.int32]:
        return self.place.batches[self.turn % BATCHES].rows

    def _commit(self) -> float:
        """Train the next step; milliseconds of its commit."""
        rows, engine = self._rows(), self.place.engine
        step = rule_step(self.place.spec, engine.step, HyperParameters(lr=0.01, eps=1e-8))
        update = TableUpdate(LAYER, rows, self.gradients[: rows.size], step)
        self.slots += rows.size
        self.turn += 1
        return stopwatch_ms(lambda: engine.commit(engine.step, [update]))

    def _start_empty(self) -> None:
        """Nothing in the memtable, and no merge under way: its bytes are not the snapshot's."""
        self.place.engine.seal()
        self.place.engine._background.drain()  # noqa: SLF001 - nobody else has to wait for it
        self.slots = 0

    def pauses(self) -> list[Timing]:
        """Commits go on while another thread makes a snapshot, again and again."""
        alone: list[float] = []
        beside: list[float] = []
        pauses: list[float] = []
        snapshots: list[float] = []
        with undisturbed(), ThreadPoolExecutor(1) as other:
            for _ in range(_SNAPSHOTS):
                self._start_empty()
                before = [self._paced_commit() for _ in range(_COMMITS)]
                future = other.submit(stopwatch_ms, self.place.engine.snapshot)
                slowest = self._commits_until(future)
                snapshots.append(future.result())
                alone += before
                beside.append(slowest)
                pauses.append(max(slowest - float(np.median(before)), 0.0))
        samples = {COMMIT: alone, BESIDE: beside, PAUSE: pauses, SNAPSHOT: snapshots}
        return [Timing(name, np.array(values)) for name, values in samples.items()]

    def _paced_commit(self) -> float:
        time.sleep(_PAUSE_SECONDS)
        return self._commit()

    def _commits_until(self, future: Any) -> float:
        """Commit until the snapshot is made; the slowest one's milliseconds.

        At least once, and not until the memtable is full: then commits would wait for the disk,
        with or without a snapshot.
        """
        self.slots = 0
        slowest = self._commit()
        while not future.done() and self.slots + self._rows().size <= self.place.engine.capacity:
            slowest = max(slowest, self._paced_commit())
        return slowest

    def proportion(self) -> Quantity:
        """Bytes written for a snapshot over row, state and id bytes of the rows touched."""
        engine, spec = self.place.engine, self.place.spec
        per_row = spec.row_bytes + spec.state_bytes + 4
        ratios = []
        for steps in _SIZES:
            self._start_empty()
            touched = []
            for _ in range(steps):
                if self.slots + self._rows().size > engine.capacity:
                    break
                touched.append(self._rows())
                self._commit()
            before = engine.bytes_written
            engine.snapshot()
            distinct = np.unique(np.concatenate(touched)).size
            ratios.append((engine.bytes_written - before) / (distinct * per_row))
        return Quantity(PROPORTION, "x", np.array(ratios))
