"""Credit: what the open windows of one session may cost, and what happens beyond it."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import engram_store
from engram_store import wire
from engram_store.errors import CapacityError
from engram_store.recipes import Recipe
from engram_store.store import Store
from engram_store.v1 import store_pb2 as pb
from engram_store_client.remote import RemoteOptions, RemoteSession
from engram_store_client.remote.credit import Credit
from engram_store_client.remote.window import RemoteWindow
from engram_store_server.limits import SessionLimits
from tests.pairs import (
    INITIAL,
    MakeStore,
    Pair,
    assert_same_tables,
    make_oracle,
    random_tokens,
    specs_of,
)
from tests.servers import serving

SHAPE = (2, 40)


@pytest.fixture
def store(make_store: MakeStore) -> Iterator[Store]:
    with engram_store.open(make_store(), "train") as opened:
        yield opened


def cost_of(recipe: Recipe, windows: float, *, trains: bool = True) -> int:
    """Credit for so many windows of `SHAPE`."""
    one = wire.session_cost(recipe, specs_of(recipe), SHAPE[0] * SHAPE[1], trains=trains)
    return int(windows * one)


@pytest.fixture(params=["unix:", "tcp:"])
def address(
    store: Store, recipe: Recipe, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[str]:
    """Of a store that gives credit for two and a half training windows."""
    limits = SessionLimits(session_bytes=cost_of(recipe, 2.5))
    where = f"unix:{tmp_path / 's.sock'}" if request.param == "unix:" else "tcp:"
    with serving(store, where, limits) as served:
        yield served.removeprefix("tcp://")


# ---------------------------------------------------------------------- the ledger


def test_windows_are_sent_in_order_as_far_as_credit_goes() -> None:
    """A small one does not overtake a large one that waits: steps stay in order."""
    sent: list[str] = []
    credit = Credit[str](pb.Credits(bytes=10, windows=3), sent.append)
    for number, cost in enumerate([6, 5, 1, 1]):
        credit.submit(number, cost, "abcd"[number])
    assert sent == ["a"]
    assert credit.refusal(0) is None
    assert "open_windows" not in str(credit.refusal(1))

    credit.give_back(0)
    credit.send_waiting()
    assert sent == ["a", "b", "c", "d"]
    assert credit.holders == {1, 2, 3}


def test_a_window_that_waits_can_be_closed() -> None:
    sent: list[str] = []
    credit = Credit[str](pb.Credits(bytes=10, windows=1), sent.append)
    for number in range(3):
        credit.submit(number, 1, "abc"[number])
    assert "open_windows" in str(credit.refusal(2))
    credit.give_back(1)
    credit.give_back(0)
    credit.send_waiting()
    assert sent == ["a", "c"]


def test_a_window_larger_than_all_credit_is_refused_at_once() -> None:
    credit = Credit[str](pb.Credits(bytes=10, windows=9), list[str]().append)
    with pytest.raises(CapacityError, match=r"may need 11 bytes .* take 0 of 10"):
        credit.submit(0, 11, "a")
    credit.submit(1, 10, "b")


# ---------------------------------------------------------------------- sessions


def test_windows_announced_far_ahead_wait_for_credit(
    address: str, store: Store, recipe: Recipe
) -> None:
    """Six steps at once, on credit for two and a half; nothing changes but the time."""
    with RemoteSession(address) as session:
        pair = Pair(session, make_oracle(recipe, INITIAL))
        windows = [pair.announce(random_tokens(pair.rng, SHAPE), step) for step in range(6)]
        for window in windows:
            window.push_random(pair.rng)
            pair.commit()
    assert_same_tables(store, pair.oracle)


def test_a_step_that_needs_more_than_all_credit_is_told_so(
    address: str, store: Store, recipe: Recipe
) -> None:
    """Nothing but its own commit would end the others; it is not waited for."""
    with RemoteSession(address) as session:
        pair = Pair(session, make_oracle(recipe, INITIAL))
        kept = [pair.announce(random_tokens(pair.rng, SHAPE), 0) for _ in range(2)]
        surplus = session.announce(random_tokens(pair.rng, SHAPE), 0)
        with pytest.raises(CapacityError, match=r"Close or commit some.*session_bytes"):
            surplus.rows(1)
        surplus.close()
        for window in kept:
            window.push_random(pair.rng)
        pair.commit()
        pair.train(1)
    assert_same_tables(store, pair.oracle)


def test_a_window_beyond_all_credit_is_refused_where_it_is_announced(address: str) -> None:
    with RemoteSession(address) as session:
        with pytest.raises(CapacityError, match="announce fewer tokens"):
            session.announce(np.zeros((6, 40), np.int64), 0)
        session.commit(0, 0.1)


def test_a_reader_waits_until_another_thread_closes_a_window(
    store: Store, recipe: Recipe, tmp_path: Path
) -> None:
    limits = SessionLimits(session_bytes=cost_of(recipe, 1.5, trains=False))
    tokens = np.zeros(SHAPE, np.int64)
    with (
        serving(store, f"unix:{tmp_path / 's.sock'}", limits) as address,
        RemoteSession(address, "read") as session,
    ):
        first, second = session.announce(tokens), session.announce(tokens)
        expected = first.rows(1)[0].copy()
        closing = threading.Timer(0.1, first.close)
        closing.start()
        np.testing.assert_array_equal(second.rows(1)[0], expected)
        closing.join()


def test_a_reader_that_keeps_everything_open_is_told_in_time(
    store: Store, recipe: Recipe, tmp_path: Path
) -> None:
    limits = SessionLimits(session_bytes=1 << 30, open_windows=2)
    options = RemoteOptions(deadline_seconds=0.1)
    with (
        serving(store, f"unix:{tmp_path / 's.sock'}", limits) as address,
        RemoteSession(address, "read", options) as session,
    ):
        windows = [session.announce(np.zeros(SHAPE, np.int64)) for _ in range(3)]
        with pytest.raises(CapacityError, match=r"2 windows are open.*open_windows"):
            windows[2].rows(1)


def test_credit_counts_again_after_a_reconnect(address: str, store: Store, recipe: Recipe) -> None:
    """The store that comes back sees the open windows, and those alone."""
    with RemoteSession(address) as session:
        pair = Pair(session, make_oracle(recipe, INITIAL))
        windows = [pair.announce(random_tokens(pair.rng, SHAPE), step) for step in range(5)]
        for window in windows:
            session.connection.current_stream()._call.cancel()
            window.push_random(pair.rng)
            pair.commit()
    assert_same_tables(store, pair.oracle)


def test_a_client_that_overdraws_is_refused_and_its_step_with_it(
    address: str, store: Store, recipe: Recipe
) -> None:
    """The store keeps its own books, and never applies a step without one of its windows."""
    with RemoteSession(address) as session:
        # A client that believes to have more credit than it was given.
        session._credit = Credit(pb.Credits(bytes=1 << 40, windows=99), RemoteWindow.send)
        windows = [session.announce(np.zeros(SHAPE, np.int64), 0) for _ in range(3)]
        for window in windows[:2]:
            for layer in session.tables:
                window.push(layer, np.zeros(window.rows(layer)[0].shape, np.float32))
        with pytest.raises(CapacityError, match="session_bytes"):
            windows[2].rows(1)
        norm = session.connection.send(pb.SessionRequest(gradient_norm=pb.GradientNorm()))
        with pytest.raises(CapacityError, match="session_bytes"):
            session.commits.result(norm, "the norm", [])
        assert store.step == 0
        windows[2].close()
        session.commit(0, 0.1)
        assert store.step == 1
