"""A store and its oracle trained side by side: what most tests of the engine are made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import engram_store
from engram_store.engine.engine import Engine
from engram_store.engine.extents import BLOCK_SLOTS
from engram_store.engine.memtable import slot_bytes
from engram_store.engine.placement import shared_directory
from engram_store.engine.reader import Reader
from engram_store.layout.create import table_specs
from engram_store.layout.paths import StorePaths
from engram_store.recipes import Recipe
from engram_store.session import Applied, Session, SnapshotRef, Window
from engram_store.store import Store
from engram_store.testing import MemorySession
from engram_store.types import GradientBlock, OptimizerKind, RowBlock, RowDtype, TableSpec, TokenIds

VOCABULARY = 500
DIM = 16
INITIAL = engram_store.Normal(std=0.02)
Columns = NDArray[np.float32]


def tiny_overlay_bytes(specs: Mapping[int, TableSpec], blocks: int = 1) -> int:
    """The least that a store accepts: two memtables of one block of slots each."""
    return 2 * blocks * BLOCK_SLOTS * slot_bytes(list(specs.values()))


def specs_of(recipe: Recipe, **settings: Any) -> dict[int, TableSpec]:
    """The tables that `engram_store.create` makes with the same settings."""
    settings = {"dim": DIM, **settings}
    for key, kind in (("dtype", RowDtype), ("optimizer", OptimizerKind)):
        if key in settings:
            settings[key] = kind(settings[key])
    if "on_nonfinite" in settings:
        settings["on_nonfinite"] = engram_store.NonFinitePolicy(settings["on_nonfinite"])
    return {spec.layer: spec for spec in table_specs(recipe, overrides={}, **settings)}


def make_oracle(
    recipe: Recipe, initial: engram_store.Normal | None, **settings: Any
) -> MemorySession:
    """A `MemorySession` with the rows that `engram_store.create` would write."""
    specs = specs_of(recipe, **settings)
    rows = {}
    if initial is not None:
        rows = {layer: initial.rows(layer, 0, spec.rows, spec) for layer, spec in specs.items()}
    return MemorySession(recipe, specs, rows)


def random_tokens(rng: np.random.Generator, shape: tuple[int, int] = (2, 40)) -> TokenIds:
    """Ids of the tiny recipe's vocabulary."""
    return rng.integers(0, VOCABULARY, shape)


def tables_of(store: Store) -> dict[int, tuple[RowBlock, Columns]]:
    """Every row and its state, by layer, read past the session."""
    engine: Engine | Reader = store._engine
    return {
        layer: engine.tables[layer].read_range(0, spec.rows) for layer, spec in store.tables.items()
    }


def assert_same_tables(store: Store, oracle: MemorySession) -> None:
    """Every row and every value of optimiser state is the oracle's, bit for bit."""
    for layer, (rows, state) in tables_of(store).items():
        expected = oracle.contents[layer]
        different = int((rows != expected.rows).any(axis=1).sum())
        assert rows.tobytes() == expected.rows.tobytes(), f"{different} rows of layer {layer}"
        assert state.tobytes() == expected.state.tobytes(), f"state of layer {layer}"


def files_of(root: Path) -> dict[str, bytes]:
    """Content of every file below a directory but the lock."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "LOCK"
    }


def memtable_directory(path: Path, store_id: str) -> Path:
    """Where a store keeps its memtables by default."""
    return shared_directory(StorePaths(path), store_id, None)


@dataclass
class TwinWindow:
    """The same window in both sessions."""

    store: Window
    oracle: Window
    layers: tuple[int, ...] = (1, 2)

    def rows(self, layer: int) -> RowBlock:
        """The rows, after comparing them, their ids and the inverse."""
        rows, inverse = self.store.rows(layer)
        expected, expected_inverse = self.oracle.rows(layer)
        np.testing.assert_array_equal(self.store.row_ids(layer), self.oracle.row_ids(layer))
        np.testing.assert_array_equal(inverse, expected_inverse)
        assert inverse.dtype == np.int32
        assert rows.dtype == expected.dtype
        assert rows.tobytes() == expected.tobytes()
        return rows

    def push(self, layer: int, gradients: GradientBlock) -> None:
        """Push the same gradients to both."""
        self.store.push(layer, gradients)
        self.oracle.push(layer, gradients)

    def push_random(self, rng: np.random.Generator) -> None:
        """Read every layer and push a random gradient for it."""
        for layer in self.layers:
            shape = self.rows(layer).shape
            self.push(layer, rng.standard_normal(shape).astype(np.float32))


@dataclass
class Pair:
    """A session and its oracle, always called with the same arguments."""

    session: Session
    oracle: MemorySession
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    @property
    def store(self) -> Store:
        """The session, where it is embedded."""
        assert isinstance(self.session, Store)
        return self.session

    @property
    def path(self) -> Path:
        """Directory of the store."""
        return self.store._engine.paths.root

    @property
    def step(self) -> int:
        """Of both."""
        assert self.session.step == self.oracle.step
        return self.session.step

    def announce(self, tokens: TokenIds, step: int | None = None, **more: Any) -> TwinWindow:
        """Announce to both."""
        return TwinWindow(
            self.session.announce(tokens, step, **more), self.oracle.announce(tokens, step, **more)
        )

    def commit(self, lr: Any = 0.1, **more: Any) -> Applied:
        """Commit the next step of both."""
        step = self.step
        applied = self.session.commit(step, lr, **more)
        assert applied == self.oracle.commit(step, lr, **more)
        return applied

    def train(self, steps: int, windows: int = 2, shape: tuple[int, int] = (2, 40)) -> None:
        """Train with random tokens and gradients, comparing whatever comes back."""
        for _ in range(steps):
            announced = [
                self.announce(random_tokens(self.rng, shape), self.step) for _ in range(windows)
            ]
            for window in announced:
                window.push_random(self.rng)
            self.commit()

    def snapshot(self) -> SnapshotRef:
        """Of both; the store's."""
        self.oracle.snapshot()
        return self.session.snapshot()

    def restore(self, snapshot: SnapshotRef) -> None:
        """Both go back."""
        self.session.restore(snapshot)
        self.oracle.restore(snapshot.step)

    def check(self) -> None:
        """Every row and every state are equal."""
        assert_same_tables(self.store, self.oracle)


MakeStore = Callable[..., Path]
"""`make_store(name="a", initial=..., **settings of create)`: makes a store, returns its path."""
MakePair = Callable[..., Pair]
"""`make_pair(name="a", initial=..., options={...of open}, **settings of create)`."""
