"""Fixtures shared by all tests: a tiny recipe, stores, and stores paired with their oracle."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is loaded, here and in processes that tests start: its threads spin while they wait
# for each other, and tests share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import engram_store
from engram_store import failpoints
from engram_store.recipes import Recipe, engram
from engram_store.store import Store
from tests.pairs import (
    DIM,
    INITIAL,
    MakePair,
    MakeStore,
    Pair,
    make_oracle,
    memtable_directory,
)

# Busy machines are slow at random, which no test here is about.
settings.register_profile("small", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("large", settings.get_profile("small"), max_examples=2_000)
settings.load_profile("small")


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """Two layers of about 16,000 rows, looked up by 500 tokens."""
    return engram(
        token_map=np.arange(500),
        layers=[1, 2],
        rows_per_head=2_000,
        orders=(2, 3),
        heads=4,
        pad_id=2,
    )


@pytest.fixture
def make_store(tmp_path: Path, recipe: Recipe) -> Iterator[MakeStore]:
    """Makes stores below `tmp_path`, and forgets their shared memory afterwards."""
    made: dict[Path, Path] = {}

    def make(
        name: str = "a", initial: engram_store.Normal | None = INITIAL, **settings: Any
    ) -> Path:
        path = tmp_path / f"{name}.engram"
        engram_store.create(path, recipe, **{"dim": DIM, "initial": initial, **settings})
        store_id = engram_store.inspect(path).metadata.store_id
        made[path] = memtable_directory(path, store_id)
        return path

    yield make
    for directory in made.values():
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def make_pair(make_store: MakeStore, recipe: Recipe) -> Iterator[MakePair]:
    """Makes stores opened for training, each with a `MemorySession` of the same rows."""
    opened: list[Store] = []

    def make(
        name: str = "a",
        initial: engram_store.Normal | None = INITIAL,
        options: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Pair:
        path = make_store(name, initial, **settings)
        store = engram_store.open(path, "train", **(options or {}))
        opened.append(store)
        return Pair(store, make_oracle(recipe, initial, **settings))

    yield make
    failpoints.disarm()
    for store in opened:
        store.close()


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    """A small store with overlay to spare, and its oracle."""
    return make_pair()
