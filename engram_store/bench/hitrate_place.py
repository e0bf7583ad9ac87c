"""What `bench hitrate` trains on: text, a store in the middle of training, the table in flat files.

The store is trained without a limit first, with the shared memory that it would take with one: so
what is measured is the state that training leaves, and not how it is reached.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import engram_store
from engram_store.bench.harness import HitrateWorkload
from engram_store.bench.hitrate_writers import MERGED, STORE, Trained, TrainerOrder, run_trainer
from engram_store.bench.text import SEGMENT, read_text
from engram_store.bench.workplace import (
    LAYER,
    STD,
    RepeatedNormal,
    Say,
    make_batch,
    make_recipe,
    write_flat,
)
from engram_store.engine import Engine
from engram_store.engine.memory import forget_cached_pages
from engram_store.engine.memory_plan import least_limit
from engram_store.errors import ConfigError, SnapshotMismatchError, StoreFileError
from engram_store.recipes import Recipe
from engram_store.store import Store
from engram_store.types import TableSpec

MOST_WARM_UP = 16
_LEAST_WARM_UP = 6
_STORE, _KEY = "hitrate.engram", "hitrate.json"
_TABLES = 6
"""How many times the table's size the disk must have free: the store, its segments, flat files."""
_RESERVE_BYTES = 24 << 20
"""Of the memory, not told to the store: stacks, allocators, pages on their way to the disk."""
_LEARNING_RATE = 0.01


@dataclass
class HitratePlace:
    """Everything that the trainers work on, in one directory."""

    workload: HitrateWorkload
    spec: TableSpec
    order: TrainerOrder
    """For the store; limits are those of a point."""
    unique_rows: float
    """Of a step, on average."""
    lookups: int
    """Of a step."""

    @property
    def table_bytes(self) -> int:
        """Rows and state."""
        return self.spec.rows * (self.spec.row_bytes + self.spec.state_bytes)

    @property
    def slot_bytes(self) -> int:
        """Of a row in shared memory, with state and id."""
        return 4 + self.spec.state_bytes + self.spec.row_bytes

    @property
    def least_limit_bytes(self) -> int:
        """Memory without which training does not even begin: the store's own plan, windows."""
        windows = 4 * self.lookups * (8 + 4 + self.spec.row_bytes)
        steps = 3 * self.order.most_rows * self.slot_bytes
        return least_limit([self.spec]) + windows + steps + _RESERVE_BYTES

    def order_of(self, limit_bytes: int) -> TrainerOrder:
        """For a point of the curve; `warm_up` is not known before the store was trained."""
        told = limit_bytes - _RESERVE_BYTES
        return replace(self.order, limit_bytes=limit_bytes, memory_bytes=told)

    def describe(self) -> dict[str, Any]:
        """The workload as it came out."""
        return {
            **asdict(self.workload),
            "table_rows": self.spec.rows,
            "row_bytes": self.spec.row_bytes,
            "state_bytes": self.spec.state_bytes,
            "dtype": str(self.spec.dtype),
            "optimizer": str(self.spec.optimizer),
            "lookups_per_step": self.lookups,
            "unique_rows_per_step": round(self.unique_rows),
            "table_bytes": self.table_bytes,
        }

    # ------------------------------------------------------------------ the store

    def train_store(self, order: TrainerOrder) -> TrainerOrder:
        """From step 0 to where measuring begins, with shared memory as in a point.

        Returns:
            The order with a warm-up long enough that both memtables are filled in it.
        """
        tokens = np.load(order.path(order.tokens), mmap_mode="r")
        random = np.random.default_rng(1)
        gradients = random.standard_normal((order.most_rows, order.dim), np.float32)
        with _opened(order) as store:
            store.restore(0)
            for step in range(order.first_step):
                window = store.announce(tokens[step], step)
                rows, _ = window.rows(LAYER)
                window.push(LAYER, gradients[: len(rows)])
                store.commit(step, lr=_LEARNING_RATE)
            store.snapshot()
            slots = 2 * _engine_of(store).capacity
        filled = min(max(round(slots / self.unique_rows), _LEAST_WARM_UP), MOST_WARM_UP)
        return replace(order, warm_up=filled)

    def go_back(self, order: TrainerOrder) -> None:
        """To where measuring begins, with the segments that training left."""
        with _opened(order) as store:
            store.restore(order.first_step)
            if order.writer == MERGED:
                _engine_of(store).merge()

    # ------------------------------------------------------------------ one process

    def run(self, order: TrainerOrder) -> Trained:
        """One trainer; nothing is cached before.

        Raises:
            EngramStoreError: the process failed.
        """
        os.sync()
        for path in Path(order.room).rglob("*"):
            if path.is_file():
                # A page counts for the memory of who read it first.
                forget_cached_pages(path)
        return run_trainer(order)


def _engine_of(store: Store) -> Engine:
    engine = store._engine  # noqa: SLF001 - nobody else merges by hand
    assert isinstance(engine, Engine)
    return engine


@contextlib.contextmanager
def _opened(order: TrainerOrder) -> Iterator[Store]:
    with engram_store.open(
        order.path(order.store),
        "train",
        memory_bytes=order.memory_bytes,
        fold_ratio=float("inf"),
    ) as store:
        yield store


def open_hitrate_place(workload: HitrateWorkload, directory: Path, say: Say) -> HitratePlace:
    """Make, or find again, what is trained.

    Raises:
        ConfigError: the disk is too small.
    """
    say("reading text")
    segment = min(SEGMENT, workload.tokens)
    steps = workload.trained_steps + MOST_WARM_UP + workload.repetitions
    text = read_text(steps * workload.tokens, segment)
    tokens = text.tokens.reshape(steps, -1, segment)
    recipe = make_recipe(workload, text.token_map)
    root = _fresh_store(recipe, workload, directory, say)
    spec = engram_store.inspect(root).metadata.tables[LAYER]
    batches = [make_batch(recipe, step) for step in tokens[workload.trained_steps :]]
    sizes = [batch.rows.size for batch in batches]
    order = TrainerOrder(
        writer=STORE, layer=LAYER, dim=spec.dim, room=str(directory),
        first_step=workload.trained_steps, warm_up=0, steps=workload.repetitions,
        most_rows=max(sizes) + max(sizes) // 2, limit_bytes=0, memory_bytes=0,
        store=_STORE,
    )  # fmt: skip
    np.save(order.path(order.tokens), tokens)
    updates: Any = {
        str(workload.trained_steps + number): np.sort(batch.rows)
        for number, batch in enumerate(batches)
    }
    np.savez(order.path(order.updates), **updates)
    say("copying the table into flat files")
    write_flat(root, order.path(order.rows_file))
    np.zeros(spec.rows, np.float32).tofile(order.path(order.sums_file))
    return HitratePlace(workload, spec, order, float(np.mean(sizes)), batches[0].lookups.size)


def _fresh_store(recipe: Recipe, workload: HitrateWorkload, directory: Path, say: Say) -> Path:
    """A store at step 0, or one of an earlier run that can go back there."""
    root, key = directory / _STORE, directory / _KEY
    wanted = json.dumps({"recipe": recipe.fingerprint_fields(), "dim": workload.dim})
    with contextlib.suppress(StoreFileError, SnapshotMismatchError):
        if key.exists() and key.read_text() == wanted:
            engram_store.inspect(root)
            return root
    key.unlink(missing_ok=True)
    shutil.rmtree(root, ignore_errors=True)
    needed, free = _TABLES * workload.rows * 2 * workload.dim, shutil.disk_usage(directory).free
    if free < needed:
        raise ConfigError(
            f"bench hitrate needs about {needed:,} bytes in {directory}, which has {free:,}; give "
            "another --dir, or fewer --rows"
        )
    say("making the table")
    engram_store.create(root, recipe, dim=workload.dim, initial=RepeatedNormal(std=STD))
    key.write_text(wanted)
    return root
