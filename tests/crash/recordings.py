"""Workloads on a tiny store, recorded operation by operation, with their oracle beside them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import engram_store
from engram_store import snapshots
from engram_store.engine.engine import Engine
from engram_store.engine.extents import BLOCK_SLOTS
from engram_store.engine.memtable import _PUBLISHED_OFFSET, slot_bytes
from engram_store.engine.rewind import rewind
from engram_store.engine.updates import TableUpdate
from engram_store.layout.create import Normal, create_store, table_specs
from engram_store.layout.manifest import Mark
from engram_store.layout.metadata import StoreMetadata
from engram_store.layout.paths import StorePaths
from engram_store.optimizers import rule_step
from engram_store.optimizers.reference import apply_reference
from engram_store.recipes import engram
from engram_store.store import Store
from engram_store.testing import RecordingDisk
from engram_store.testing.crash import FileSystem
from engram_store.types import HyperParameters, OptimizerKind, RowDtype, TableSpec
from tests.crash.truth import Call, Recording, State, make_state

STORE = "a.engram"
SESSION = "5e" * 16
NORMAL = Normal(std=0.02)
CHUNK_ROWS = 1024


class Trainer:
    """Trains a store through a recording disk, and its oracle beside it.

    Args:
        root: an empty directory; the store is made in it, and shared memory lies beside.
        durability: of the store.
        initial: initial rows; None: tables of zeros, whose chunks have no files.
        disk: records.
        options: more of `engram_store.open`.
    """

    def __init__(
        self,
        root: Path,
        durability: str,
        initial: Normal | None,
        disk: RecordingDisk,
        **options: Any,
    ) -> None:
        self.root, self.disk = root, disk
        self.metadata = _make_store(root / STORE, initial)
        self.specs = self.metadata.tables
        self.options = {"durability": durability, **options}
        self.start = FileSystem.found(root, STORE, ("LOCK",))
        contents = {
            layer: (
                np.zeros((spec.rows, spec.dim), spec.dtype.storage)
                if initial is None
                else initial.rows(layer, 0, spec.rows, spec),
                np.zeros((spec.rows, spec.state_width), np.float32),
            )
            for layer, spec in self.specs.items()
        }
        self.initial = self.now = make_state(0, (), contents)
        self.snapshots = {0: self.initial}
        self.calls: list[Call] = []
        self.floors: list[tuple[int, int]] = [(0, 0)] if durability != "snapshot" else []
        self.store = self._call("open", self._open)

    def _open(self) -> Store:
        store = engram_store.open(
            self.root / STORE,
            "train",
            overlay_bytes=2 * BLOCK_SLOTS * slot_bytes(list(self.specs.values())),
            memtable_dir=self.root / "memory",
            disk=self.disk,
            **self.options,
        )
        if self.options["durability"] != "snapshot":
            self.floors.append((len(self.disk.operations), store.durable_step))
            store.when_durable(lambda step: self.floors.append((len(self.disk.operations), step)))
        return store

    @property
    def engine(self) -> Engine:
        assert isinstance(self.store._engine, Engine)
        return self.store._engine

    def _call(self, kind: str, action: Callable[[], Any], after: State | None = None) -> Any:
        begin = len(self.disk.operations)
        result = action()
        self.now = after or self.now
        self.calls.append(Call(kind, begin, len(self.disk.operations), self.now))
        return result

    # ------------------------------------------------------------------ what a trainer does

    def commit(self, rows: int = 6, *, chunks: tuple[int, ...] = (0, 2), seed: int = 0) -> None:
        """One step on so many rows of each of these chunks, some of them in several steps."""
        step = self.now.step
        rng = np.random.default_rng([step, seed])
        updates, contents = [], dict(self.now.contents)
        for layer, spec in self.specs.items():
            ids = np.concatenate([_rows_of_chunk(spec, chunk, rows, rng) for chunk in chunks])
            sums = rng.standard_normal((ids.size, spec.dim)).astype(np.float32)
            rule = rule_step(spec, step, HyperParameters(lr=0.1))
            updates.append(TableUpdate(layer, ids, sums, rule))
            table, state = (array.copy() for array in contents[layer])
            table[ids], state[ids] = apply_reference(spec, rule, ids, table[ids], state[ids], sums)
            contents[layer] = table, state
        marks = (Mark(session=SESSION, epoch=1 + seed, step=step),)
        after = make_state(step + 1, marks, contents)
        self._call("commit", lambda: self.engine.commit(step, updates, marks), after)
        call = self.calls[-1]
        published = max(
            index
            for index in range(call.begin, call.end)
            if self.disk.operations[index].kind == "store"
            and self.disk.operations[index].offset == _PUBLISHED_OFFSET
        )
        self.calls[-1] = replace(call, published=published)

    def seal(self) -> None:
        self._call("seal", self.store.seal)

    def freeze(self) -> None:
        """Begin to seal, and go on meanwhile."""
        self._call("seal", self.engine.freeze)

    def snapshot(self) -> None:
        self._call("snapshot", self.store.snapshot)
        self.snapshots[self.now.step] = self.now

    def fold(self) -> None:
        self._call("fold", self.store.fold)

    def merge(self) -> None:
        self._call("merge", self.engine.merge)

    def restore(self, step: int) -> None:
        self._call("restore", lambda: self.store.restore(step), self.snapshots[step])
        if self.floors:
            self.floors.append((self.calls[-1].end, step))

    def keep(self, newest: int) -> None:
        self._call("keep", lambda: self.store.keep_snapshots(newest))
        self.calls[-1] = replace(self.calls[-1], kept=newest)

    def pin(self, name: str, step: int) -> None:
        """Also moves a name."""
        path, disk = self.root / STORE, self.disk
        self._call("pin", lambda: snapshots.pin(path, step, name, move=True, disk=disk))
        self.calls[-1] = replace(self.calls[-1], pin=name, pinned=step)

    def unpin(self, name: str) -> None:
        self._call("unpin", lambda: snapshots.unpin(self.root / STORE, name, disk=self.disk))
        self.calls[-1] = replace(self.calls[-1], pin=name)

    def rewind(self, step: int) -> None:
        """The process dies, and the store goes back before another one opens it."""
        self._call("die", self._die)
        self._rewind(step)

    def close_and_rewind(self, step: int) -> None:
        self._call("close", self.store.close)
        self.snapshots[self.now.step] = self.now
        self._rewind(step)

    def _rewind(self, step: int) -> None:
        paths = StorePaths(self.root / STORE)
        after = self.snapshots[step]
        self._call("rewind", lambda: rewind(paths, self.metadata, step, self.disk), after)
        if self.floors:
            self.floors.append((self.calls[-1].end, step))
        self.store = self._call("open", self._open)

    def reopen(self) -> None:
        self._call("close", self.store.close)
        self.snapshots[self.now.step] = self.now
        self.store = self._call("open", self._open)

    def kill(self) -> None:
        """The process dies and another one recovers the store, which is then a snapshot."""
        self._call("die", self._die)
        self.store = self._call("recover", self._open)
        self.snapshots[self.now.step] = self.now

    def _die(self) -> None:
        engine = self.engine
        engine._let_go()  # threads end, files stay
        engine._close_memtables()
        engine._lock.release()

    def end(self, name: str) -> Recording:
        """Stop recording, let go of the store."""
        self.engine._background.drain()
        operations = list(self.disk.operations)
        floors = list(self.floors)
        self.store.close()
        return Recording(
            name, self.metadata, self.start, operations, self.calls, floors, self.initial
        )


def _rows_of_chunk(
    spec: TableSpec, chunk: int, rows: int, rng: np.random.Generator
) -> NDArray[np.int32]:
    first = chunk * CHUNK_ROWS
    count = min(CHUNK_ROWS, spec.rows - first, 4 * rows)
    return (first + rng.permutation(count)[:rows]).astype(np.int32)


def _make_store(path: Path, initial: Normal | None) -> StoreMetadata:
    """Two tables of three chunks, the last one mostly padding; one without optimiser state."""
    recipe = engram(
        token_map=np.arange(50), layers=[1, 2], rows_per_head=500, heads=2, pad_id=2, seed=1
    )
    sgd = {"optimizer": OptimizerKind.SGD, "dtype": RowDtype.FLOAT32}
    specs = table_specs(recipe, dim=2, overrides={2: sgd})
    create_store(
        path, recipe, [replace(spec, chunk_rows=CHUNK_ROWS) for spec in specs], initial=initial
    )
    return engram_store.inspect(path).metadata


# ---------------------------------------------------------------------- workloads


def life(trainer: Trainer) -> None:
    """Everything a trainer does, one after the other."""
    trainer.commit()
    trainer.commit()
    trainer.seal()
    trainer.commit(chunks=(0,))
    trainer.snapshot()
    trainer.commit(chunks=(0,))
    trainer.freeze()
    trainer.commit(chunks=(0,))
    trainer.fold()
    trainer.commit()
    trainer.restore(3)
    trainer.commit(seed=1)
    trainer.commit(seed=1)
    trainer.snapshot()
    trainer.commit(seed=1)
    trainer.fold()
    trainer.keep(1)
    trainer.reopen()
    trainer.commit(seed=1)


def killed(trainer: Trainer) -> None:
    """A process dies again and again, and the next one goes on."""
    trainer.commit()
    trainer.snapshot()
    trainer.commit()
    trainer.kill()
    trainer.commit()
    trainer.commit()
    trainer.seal()
    trainer.commit()
    trainer.kill()
    trainer.kill()
    trainer.commit()
    trainer.restore(2)
    trainer.kill()
    trainer.commit(seed=1)
    trainer.snapshot()
    trainer.commit(seed=1)


def returning(trainer: Trainer) -> None:
    """A seal, a snapshot and a way back."""
    trainer.commit()
    trainer.snapshot()
    trainer.commit()
    trainer.seal()
    trainer.commit()
    trainer.restore(1)
    trainer.commit(seed=1)


def folding(trainer: Trainer) -> None:
    """A fold of chunks that changed and chunks that are linked, and a step after it."""
    trainer.commit()
    trainer.seal()
    trainer.commit(chunks=(0,))
    trainer.seal()
    trainer.fold()
    trainer.commit()


def merging_once(trainer: Trainer) -> None:
    """Two segments that no snapshot names become one."""
    trainer.commit()
    trainer.seal()
    trainer.commit()
    trainer.seal()
    trainer.merge()
    trainer.commit()


def merging(trainer: Trainer) -> None:
    """Segments become one, twice, while a snapshot still names the first ones."""
    trainer.commit()
    trainer.seal()
    trainer.commit(chunks=(0,))
    trainer.snapshot()
    trainer.commit()
    trainer.seal()
    trainer.merge()
    trainer.commit(chunks=(0,))
    trainer.seal()
    trainer.merge()
    trainer.commit()
    trainer.kill()
    trainer.restore(2)
    trainer.commit(seed=1)


def pinning(trainer: Trainer) -> None:
    """Names come, move and go, and snapshots that have none are dropped in between."""
    trainer.commit()
    trainer.snapshot()
    trainer.pin("best", 1)
    trainer.commit()
    trainer.snapshot()
    trainer.pin("other", 2)
    trainer.commit()
    trainer.snapshot()
    trainer.keep(1)
    trainer.pin("best", 3)
    trainer.keep(1)
    trainer.unpin("other")
    trainer.keep(1)
    trainer.kill()


def rewinding(trainer: Trainer) -> None:
    """Going back without opening: after a death and after a clean end, past what was sealed."""
    trainer.commit()
    trainer.snapshot()
    trainer.pin("best", 1)
    trainer.commit()
    trainer.seal()
    trainer.commit()
    trainer.snapshot()
    trainer.commit()
    trainer.rewind(1)
    trainer.commit(seed=1)
    trainer.commit(seed=1)
    trainer.snapshot()
    trainer.commit(seed=1)
    trainer.close_and_rewind(3)
    trainer.commit(seed=2)


def crowded(trainer: Trainer) -> None:
    """Commits that find their memtable full, and folds in the background."""
    trainer.engine.capacity = 30
    for step in range(9):
        trainer.commit(rows=5, chunks=(step % 2, 2))
        if step == 4:
            trainer.snapshot()


def backwards(trainer: Trainer) -> None:
    """Going back, more than once, to a past that is kept and over a future that is not."""
    trainer.commit()
    trainer.snapshot()
    trainer.commit()
    trainer.restore(1)
    trainer.commit(seed=1)
    trainer.snapshot()
    trainer.commit(seed=1)
    trainer.restore(1)
    trainer.commit(seed=2)
    trainer.seal()
    trainer.restore(1)
    trainer.commit(seed=3)
    trainer.commit(seed=3)
    trainer.snapshot()
    trainer.reopen()
    trainer.keep(2)
    trainer.restore(1)


@dataclass(frozen=True, slots=True)
class Workload:
    """What to record."""

    script: Callable[[Trainer], None]
    durability: str
    initial: Normal | None = NORMAL
    options: Mapping[str, Any] = field(default_factory=dict)
    during: frozenset[str] = frozenset()
    """Calls that `make test` looks at (see `Effort.during`); none: all. `make torture`: all."""

    @property
    def name(self) -> str:
        zeros = " on zeros" if self.initial is None else ""
        return f"{self.script.__name__}{zeros}, durability {self.durability}"

    def record(self, root: Path, disk: RecordingDisk | None = None) -> Recording:
        trainer = Trainer(
            root, self.durability, self.initial, disk or RecordingDisk(), **self.options
        )
        self.script(trainer)
        return trainer.end(self.name)


_FOLDS = {"fold_ratio": 0.02}
WORKLOADS = (
    Workload(life, "snapshot"),
    Workload(life, "step"),
    Workload(life, "group(2)"),
    Workload(killed, "step"),
    Workload(backwards, "step"),
    Workload(merging, "step"),
    Workload(pinning, "snapshot", during=frozenset({"pin", "unpin", "keep"})),
    Workload(rewinding, "step", during=frozenset({"rewind", "pin"})),
    Workload(rewinding, "snapshot", during=frozenset({"rewind"})),
    Workload(crowded, "snapshot", None, _FOLDS),
)
MORE_WORKLOADS = (
    Workload(killed, "snapshot"),
    Workload(backwards, "snapshot"),
    Workload(merging, "snapshot"),
    Workload(pinning, "step"),
    Workload(rewinding, "group(2)"),
    Workload(crowded, "group(2)", None, _FOLDS),
    Workload(killed, "group(2)"),
    Workload(backwards, "group(2)"),
    Workload(crowded, "step", None, _FOLDS),
)
"""For those who have the time."""
