"""Sealing: which slots of a memtable a segment holds, in what order, and that any order is read."""

from typing import Any
from unittest import mock

import numpy as np
import pytest

import engram_store
from engram_store.engine import seal
from engram_store.layout.paths import StorePaths
from engram_store.layout.verify import verify_store
from tests.pairs import MakePair, Pair, random_tokens


def train_on(pair: Pair, *windows: Any) -> list[list[int]]:
    """One step for each; returns the rows of layer 1 in order of first look-up."""
    rows = []
    for tokens in windows:
        window = pair.announce(tokens, pair.step)
        window.push_random(pair.rng)
        rows.append(window.store.row_ids(1).tolist())
        pair.commit()
    return rows


def test_rows_looked_up_together_lie_side_by_side(make_pair: MakePair) -> None:
    """In a segment each row stands where the last step that had it looked it up."""
    pair = make_pair(options={"fold_ratio": 1e6})
    common, others = random_tokens(pair.rng, (1, 20)), random_tokens(pair.rng, (2, 20))
    steps = train_on(pair, common, others[:1], np.concatenate([common, others[1:]], axis=1))
    pair.store.seal()

    expected: dict[int, None] = {}
    for row in (row for rows in steps for row in rows):
        expected.pop(row, None)
        expected[row] = None
    ids = np.fromfile(pair.path / "layers/1/segments/000001/row_ids", "<i4").tolist()
    assert ids == list(expected)
    assert ids != sorted(ids)
    assert ids[-len(steps[-1]) :] == steps[-1]
    pair.check()


@pytest.mark.parametrize("seed", range(2))
def test_segments_in_any_order_are_read_alike(make_pair: MakePair, seed: int) -> None:
    """Now and reopened, merged, folded and verified: the format promises no order of slots."""
    real = seal.live_slots

    def shuffled(*arguments: Any) -> seal.Live:
        return np.random.default_rng(seed).permutation(real(*arguments))

    pair = make_pair(options={"fold_ratio": 1e6})
    with mock.patch.object(seal, "live_slots", shuffled):
        for _ in range(4):
            pair.train(2)
            pair.store.seal()
            pair.check()
        ids = np.fromfile(pair.path / "layers/1/segments/000001/row_ids", "<i4")
        pair.train(1)
        pair.store.close()
    assert np.unique(ids).size == ids.size
    assert verify_store(StorePaths(pair.path)).ok
    with engram_store.open(pair.path, "train", fold_ratio=1e6) as store:
        again = Pair(store, pair.oracle, pair.rng)
        again.check()
        store._engine.merge()  # type: ignore[union-attr]
        again.check()
        again.train(2)
        store.fold()
        again.check()
