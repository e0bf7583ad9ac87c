"""Commits that go on while the trainer does, of a store in another process."""

import errno
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engram_store
from engram_store import wire
from engram_store.engine.memtable import Memtable
from engram_store.errors import (
    DeadlineError,
    DiskFullError,
    StepGapError,
    StoreClosedError,
    WindowClosedError,
)
from engram_store.recipes import Recipe
from engram_store.store import Store
from engram_store.window import Phase
from engram_store_client.remote import RemoteOptions, RemoteSession
from engram_store_server.limits import SessionLimits
from tests.pairs import (
    INITIAL,
    MakeStore,
    Pair,
    TwinWindow,
    assert_same_tables,
    make_oracle,
    random_tokens,
)
from tests.servers import serving

SECONDS = 30.0


@pytest.fixture
def store(make_store: MakeStore) -> Iterator[Store]:
    with engram_store.open(make_store(), "train") as store:
        yield store


@pytest.fixture(params=["unix:", "tcp:"])
def address(store: Store, request: pytest.FixtureRequest) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as short:  # a socket's path has at most 107 bytes
        where = "tcp:" if request.param == "tcp:" else f"unix:{short}/store.sock"
        with serving(store, where) as address:
            yield address.removeprefix("tcp://")


@pytest.fixture
def pair(address: str, recipe: Recipe) -> Iterator[Pair]:
    with RemoteSession(address, options=RemoteOptions(work_seconds=SECONDS)) as session:
        yield Pair(session, make_oracle(recipe, INITIAL))


def begin(pair: Pair) -> "Any":
    """Begin the next commit of the session; the oracle's is done."""
    step = pair.step
    applied = pair.session.begin_commit(step, 0.1)
    pair.oracle.commit(step, 0.1)
    return applied


def prepared(pair: Pair, store: Store) -> tuple[TwinWindow, TwinWindow]:
    """A window that is pushed, and that of the step after it, staged in the store."""
    for _ in range(2):  # windows are made ready for early rows once a commit has asked for them
        pair.announce(random_tokens(pair.rng), pair.step).push_random(pair.rng)
        begin(pair).result()
    now, later = (pair.announce(random_tokens(pair.rng), pair.step + ahead) for ahead in (0, 1))
    now.push_random(pair.rng)
    assert isinstance(pair.session, RemoteSession)
    pair.session.connection.settle()
    (staged,) = store._announced.of_step(pair.step + 1)
    until(lambda: all(lookup.phase is Phase.STAGED for lookup in staged.lookups.values()))
    return now, later


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    for _ in range(3_000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came to be")


class Held:
    """Holds the store up before a commit becomes real, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.go_on, publish = threading.Event(), Memtable.publish

        def held_up(memtable: Memtable, commit: Any) -> None:
            monkeypatch.setattr(Memtable, "publish", publish)
            assert self.go_on.wait(SECONDS)
            if error is not None:
                raise error
            publish(memtable, commit)

        monkeypatch.setattr(Memtable, "publish", held_up)


def go_on_training(pair: Pair, store: Store) -> None:
    """Two steps more; everything is the oracle's then."""
    pair.train(2)
    pair.session.close()
    assert_same_tables(store, pair.oracle)


# ---------------------------------------------------------------------- early rows


def test_rows_come_while_the_commit_goes_on(
    pair: Pair, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of after it; they can be trained, and later steps announced."""
    _, later = prepared(pair, store)
    held, before = Held(monkeypatch), store.step
    applied = begin(pair)

    later.push_random(pair.rng)
    last = pair.announce(random_tokens(pair.rng), before + 2)

    assert not applied.done()
    assert (store._engine.step, pair.session.step) == (before, before + 1)
    with pytest.raises(StepGapError):
        last.store.rows(1)
    held.go_on.set()
    assert applied.result().step == before
    pair.commit()
    last.push_random(pair.rng)
    pair.commit()
    go_on_training(pair, store)


def test_a_commit_does_not_give_rows_early_unless_it_is_asked_to(
    pair: Pair, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a client that knows nothing of it, and by one that waits."""
    _, later = prepared(pair, store)
    held = Held(monkeypatch)
    committing = threading.Thread(target=pair.commit)
    committing.start()
    assert isinstance(pair.session, RemoteSession)
    asked = pair.session._windows[later.store.number]._asked  # type: ignore[attr-defined]
    assert not threading.Event().wait(0.1)
    assert not any(pending.answer.done() for pending in asked.values())
    held.go_on.set()
    committing.join()
    later.push_random(pair.rng)
    pair.commit()
    go_on_training(pair, store)


@pytest.mark.parametrize("read", [True, False])
def test_a_commit_that_fails_takes_back_what_it_gave(
    pair: Pair, store: Store, monkeypatch: pytest.MonkeyPatch, *, read: bool
) -> None:
    """Read or not; the step can be committed again, and its rows are given out again."""
    _, later = prepared(pair, store)
    last = pair.announce(random_tokens(pair.rng), pair.step + 2)
    held = Held(monkeypatch, DiskFullError(errno.ENOSPC, "no room"))
    step = pair.step
    applied = pair.session.begin_commit(step, 0.1)
    if read:
        later.store.rows(1)
        later.store.push(1, np.ones_like(later.store.gradient_buffer(1)))
    held.go_on.set()

    assert isinstance(applied.exception(), DiskFullError)
    assert pair.session.step == step
    until(lambda: later.store.closed)  # type: ignore[attr-defined]
    with pytest.raises(WindowClosedError):
        later.store.rows(1)
    later.oracle.close()
    pair.commit()
    pair.announce(random_tokens(pair.rng), step + 1).push_random(pair.rng)
    pair.commit()
    last.push_random(pair.rng)
    pair.commit()
    go_on_training(pair, store)


def test_rows_are_not_waited_for_when_the_commit_failed_before_it_gave_any(
    pair: Pair, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its window stays open for when the step is committed after all."""
    _, later = prepared(pair, store)
    make_room, engine = store._engine._make_room, store._engine  # type: ignore[union-attr]

    def refused(updates: Any) -> None:
        monkeypatch.setattr(engine, "_make_room", make_room)
        raise DiskFullError(errno.ENOSPC, "no room")

    monkeypatch.setattr(engine, "_make_room", refused)
    applied = pair.session.begin_commit(pair.step, 0.1)
    with pytest.raises((DiskFullError, StepGapError)):
        later.store.rows(1)
    assert isinstance(applied.exception(), DiskFullError)
    pair.commit()
    later.push_random(pair.rng)
    pair.commit()
    go_on_training(pair, store)


@pytest.mark.parametrize("read_before", [True, False])
def test_a_connection_that_breaks_while_a_commit_goes_on(
    pair: Pair, store: Store, monkeypatch: pytest.MonkeyPatch, *, read_before: bool
) -> None:
    """The commit is applied once, and rows that were given early stay good."""
    _, later = prepared(pair, store)
    held = Held(monkeypatch)
    applied = begin(pair)
    if read_before:
        later.push_random(pair.rng)
    assert isinstance(pair.session, RemoteSession)
    pair.session.connection.current_stream()._call.cancel()
    held.go_on.set()
    if not read_before:
        later.push_random(pair.rng)

    assert applied.result().step == pair.step - 1
    pair.commit()
    go_on_training(pair, store)


def test_a_window_that_waits_for_credit_gets_it_from_the_commit_under_way(
    store: Store, recipe: Recipe
) -> None:
    """It is not told that only a commit would help."""
    tokens = random_tokens(np.random.default_rng(0))
    cost = wire.session_cost(recipe, store.tables, tokens.size, trains=True)
    limits = SessionLimits(session_bytes=cost)
    with serving(store, "tcp:", limits) as address:
        session = RemoteSession(address.removeprefix("tcp://"))
        pair = Pair(session, make_oracle(recipe, INITIAL))
        for step in range(4):
            pair.announce(tokens, step).push_random(pair.rng)
            begin(pair)
        go_on_with_one_window(pair, tokens)
    assert_same_tables(store, pair.oracle)


def go_on_with_one_window(pair: Pair, tokens: Any) -> None:
    pair.announce(tokens, pair.step).push_random(pair.rng)
    pair.commit()
    pair.session.close()


def test_an_answer_that_does_not_come_in_time_is_an_error_of_the_commit(
    store: Store, recipe: Recipe, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for rows of the next step is told the same; leaving still works."""
    with RemoteSession(address) as first:
        _, later = prepared(Pair(first, make_oracle(recipe, INITIAL)), store)
        held = Held(monkeypatch)
        first.connection._options = RemoteOptions(work_seconds=0.05)
        applied = first.begin_commit(first.step, 0.1)
        assert isinstance(applied.exception(SECONDS), DeadlineError)
        with pytest.raises((StepGapError, WindowClosedError)):
            later.store.rows(1)
        held.go_on.set()


def test_a_session_that_is_lost_ends_the_commit_too(
    pair: Pair, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for ever."""
    prepared(pair, store)
    held = Held(monkeypatch)
    applied = begin(pair)
    assert isinstance(pair.session, RemoteSession)
    pair.session.connection._fail(StoreClosedError("gone"))
    assert isinstance(applied.exception(SECONDS), StoreClosedError)
    held.go_on.set()


# ---------------------------------------------------------------------- staleness


@pytest.mark.parametrize("where", ["unix:", "tcp:"])
def test_a_stale_store_gives_rows_early(make_store: MakeStore, tmp_path: Path, where: str) -> None:
    """As many steps as it was opened with, and the client knows; a commit takes none back."""
    path = make_store(initial=None, optimizer="sgd", dtype="float32")
    where = where if where == "tcp:" else f"unix:{tmp_path}/s"
    tokens = np.arange(80).reshape(2, 40)
    with (
        engram_store.open(path, "train", staleness=2) as store,
        serving(store, where) as address,
        RemoteSession(address.removeprefix("tcp://")) as session,
    ):
        assert session.staleness == 2
        windows = [session.announce(tokens, step) for step in range(4)]
        assert not windows[2].rows(1)[0].any()
        assert windows[3].row_ids(1).size
        with pytest.raises(StepGapError):
            windows[3].rows(1)
        for step in range(2):
            for layer in (1, 2):
                rows, _ = windows[step].rows(layer)
                windows[step].push(layer, -np.ones(rows.shape, np.float32))
            session.begin_commit(step, 1.0).result()
        assert not windows[2].rows(1)[0].any()
        assert windows[3].rows(1)[0].min() >= 1.0


def test_an_exact_store_says_so(pair: Pair) -> None:
    assert isinstance(pair.session, RemoteSession)
    assert pair.session.staleness == 0
