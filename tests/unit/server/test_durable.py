"""Durable notices: a trainer hears how far its steps outlive the store's host."""

import threading
from pathlib import Path

import pytest

import engram_store
from engram_store.recipes import Recipe
from engram_store_client.remote import RemoteSession
from tests.pairs import INITIAL, MakeStore, Pair, make_oracle
from tests.servers import serving

SECONDS = 30.0


def wait_durable(session: RemoteSession, step: int) -> None:
    """A notice comes beside the answers, perhaps a little later."""
    for _ in range(int(SECONDS / 0.01)):
        if session.durable_step == step:
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"durable {session.durable_step}, not {step}")


@pytest.mark.parametrize("where", ["unix:", "tcp:"])
@pytest.mark.parametrize("durability", ["step", "group(5)"])
def test_journaled_steps_are_announced(
    make_store: MakeStore, recipe: Recipe, tmp_path: Path, where: str, durability: str
) -> None:
    address = f"unix:{tmp_path / 's.sock'}" if where == "unix:" else where
    with (
        engram_store.open(make_store(), "train", durability=durability) as store,
        serving(store, address) as served,
        RemoteSession(served.removeprefix("tcp://")) as session,
    ):
        pair = Pair(session, make_oracle(recipe, INITIAL))
        for step in range(1, 4):
            pair.train(1)
            wait_durable(session, step)
        with RemoteSession(served.removeprefix("tcp://"), "read") as reader:
            assert reader.durable_step == 3


def test_without_a_journal_a_snapshot_is_announced_to_everybody(
    make_store: MakeStore, recipe: Recipe, tmp_path: Path
) -> None:
    """And going back moves it back."""
    with (
        engram_store.open(make_store(), "train") as store,
        serving(store, f"unix:{tmp_path / 's.sock'}") as address,
        RemoteSession(address) as session,
        RemoteSession(address, "read") as reader,
    ):
        pair = Pair(session, make_oracle(recipe, INITIAL))
        pair.train(2)
        first = pair.snapshot()
        pair.train(1)
        assert session.durable_step == 2
        pair.snapshot()
        wait_durable(session, 3)
        wait_durable(reader, 3)
        pair.restore(first)
        wait_durable(session, 2)
        wait_durable(reader, 2)
