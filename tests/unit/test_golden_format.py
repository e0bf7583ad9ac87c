"""A store of every released format version is read for ever."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import engram_store
from engram_store import snapshots
from engram_store.layout.paths import StorePaths
from engram_store.layout.verify import verify_store
from engram_store.store import Store
from tests.pairs import tables_of

GOLDEN = Path(__file__).parents[1] / "golden" / "format-1"
FINGERPRINT = "e2b587f5fcc16e833dcd48a01da5cdc23c2bc9c525f219f72c9878276518c328"
ROWS = [[[0, 41, 84, 131], [9, 74, 112, 137], [32, 70, 100, 178], [24, 74, 103, 157]]]
EXPECTED = np.load(GOLDEN / "expected.npz")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A copy: opening makes a lock, training makes much more."""
    return Path(shutil.copytree(GOLDEN / "store", tmp_path / "golden"))


def expect(store: Store, step: int) -> None:
    for layer, (rows, state) in tables_of(store).items():
        assert rows.tobytes() == EXPECTED[f"{step}.{layer}.rows"].tobytes()
        assert state.tobytes() == EXPECTED[f"{step}.{layer}.state"].tobytes()


@pytest.mark.parametrize("step", [0, 3, 5, 7])
def test_every_snapshot_has_its_rows_and_state(store: Path, step: int) -> None:
    with engram_store.open(store, snapshot=step) as opened:
        assert opened.step == step
        expect(opened, step)


def test_training_goes_on_where_it_was(store: Path) -> None:
    """And goes back to a snapshot by its pinned name."""
    with engram_store.open(store, "train") as opened:
        expect(opened, 7)
        window = opened.announce(np.array([[1, 2, 3, 4]]), 7)
        for layer in opened.tables:
            window.push(layer, np.ones(window.rows(layer)[0].shape, np.float32))
        opened.commit(7, 0.1)
        opened.fold()
        opened.restore("golden")
        expect(opened, 3)


def test_nothing_is_found_damaged(store: Path) -> None:
    report = verify_store(StorePaths(store))
    assert report.ok, report.damages
    assert [entry.step for entry in snapshots.describe(store)] == [0, 3, 5, 7]


def test_the_recipe_is_what_it_was() -> None:
    """The same tokens find the same rows, and the fingerprint has not changed."""
    metadata = engram_store.inspect(GOLDEN / "store").metadata
    assert metadata.fingerprint == FINGERPRINT
    rows = metadata.recipe.rows(1, np.array([[1, 2, 59, 0]]))
    assert rows.tolist() == ROWS
