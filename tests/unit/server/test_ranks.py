"""Several ranks, one table: every step is applied once, as if one trainer had it all."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import engram_store
from engram_store import wire
from engram_store.errors import ConfigError, MissingGradientError, ProtocolError
from engram_store.recipes import Recipe
from engram_store.session import Applied
from engram_store.store import Store
from engram_store.v1 import store_pb2 as pb
from engram_store.v1.store_pb2_grpc import StoreServiceStub
from engram_store_client.remote import RemoteOptions, RemoteSession
from tests.pairs import INITIAL, MakeStore, assert_same_tables, make_oracle, random_tokens
from tests.ranks import Pause, Plan
from tests.servers import serving

SECONDS = 30.0


@pytest.fixture
def store(make_store: MakeStore) -> Iterator[Store]:
    with engram_store.open(make_store(), "train") as opened:
        yield opened


@pytest.fixture(params=["unix:", "tcp:"])
def address(store: Store, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    where = f"unix:{tmp_path / 's.sock'}" if request.param == "unix:" else "tcp:"
    with serving(store, where) as served:
        yield served


@pytest.fixture
def socket(store: Store, tmp_path: Path) -> Iterator[str]:
    with serving(store, f"unix:{tmp_path / 's.sock'}") as served:
        yield served


def join(address: str, rank: int, world_size: int = 2, **options: Any) -> RemoteSession:
    given = {"job": "tests", "rank": rank, "world_size": world_size, **options}
    return RemoteSession(address, options=RemoteOptions(**given))


@pytest.mark.parametrize(
    "pause",
    [None, lambda rank, _: 0.02 * rank, lambda rank, step: 0.02 * ((rank + step) % 2)],
    ids=["as it comes", "rank 0 first", "in turn"],
)
def test_ranks_train_what_one_trainer_trains(
    address: str, store: Store, recipe: Recipe, pause: Pause | None
) -> None:
    """Bit for bit, whoever comes first; and every rank hears the same."""
    plan = Plan(ranks=2, steps=6)
    applied = plan.train_together(address, pause)

    assert applied[0] == applied[1]
    assert_same_tables(store, plan.oracle(lambda: make_oracle(recipe, INITIAL)))


@pytest.mark.parametrize("beginning", [{0, 1}, {1}, {0}], ids=["both", "rank 1", "rank 0"])
def test_ranks_begin_commits_together_or_not(
    address: str, store: Store, recipe: Recipe, beginning: set[int]
) -> None:
    """Windows are announced a step ahead; tables are those of one trainer, bit for bit."""
    plan = Plan(ranks=2, steps=8)

    def run(rank: int) -> list[Applied]:
        results: list[Future[Applied]] = []
        with join(address.removeprefix("tcp://"), rank) as session:
            windows = {0: [(w, session.announce(w.tokens, 0)) for w in plan.of(0, rank)]}
            for step in range(8):
                if step < 7:
                    coming = plan.of(step + 1, rank)
                    windows[step + 1] = [(w, session.announce(w.tokens, step + 1)) for w in coming]
                for planned, window in windows.pop(step):
                    for layer in session.tables:
                        shape = window.rows(layer)[0].shape
                        window.push(layer, planned.gradients(layer, shape))
                if rank in beginning:
                    results.append(session.begin_commit(step, 0.1))
                else:
                    results.append(Future())
                    results[-1].set_result(session.commit(step, 0.1))
        return [result.result() for result in results]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))

    assert first == second
    assert_same_tables(store, plan.oracle(lambda: make_oracle(recipe, INITIAL)))


def test_rows_come_early_only_if_every_rank_is_ready_for_them(
    socket: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waits for the commit would not take them back if it failed."""
    asked: list[bool] = []
    commit = store.commit

    def recorded(*args: Any, early: bool, **more: Any) -> Any:
        asked.append(early)
        return commit(*args, early=early, **more)

    monkeypatch.setattr(store, "commit", recorded)
    with join(socket, 0) as first, join(socket, 1) as second:
        for early in (True, False):
            begun = first.begin_commit(first.step, 0.1)
            (second.begin_commit if early else second.commit)(second.step, 0.1)
            begun.result(SECONDS)

    assert asked == [True, False]


def test_three_ranks_with_different_numbers_of_windows(
    socket: str, store: Store, recipe: Recipe
) -> None:
    """One of them has none: it takes part in the commit all the same."""
    plan = Plan(ranks=3, steps=3)
    for step in range(3):
        plan._windows[step, 0].pop()
        plan._windows[step, 1].clear()
    plan.train_together(socket)

    assert_same_tables(store, plan.oracle(lambda: make_oracle(recipe, INITIAL)))


def test_a_step_waits_for_all_its_parts(socket: str, store: Store) -> None:
    """And its commit record names each of them."""
    with join(socket, 0) as first, join(socket, 1) as second, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first.commit, 0, 0.1)
        assert not threading.Event().wait(0.1)
        assert not waiting.done()
        assert store.step == 0

        applied = second.commit(0, 0.1)

        assert waiting.result(SECONDS) == applied
        assert [(mark.part, mark.step) for mark in store.marks] == [(0, 0), (1, 0)]
        assert len({mark.session for mark in store.marks}) == 1


def test_a_rank_that_loses_its_connection_holds_the_others_up_and_no_more(
    socket: str, store: Store, recipe: Recipe
) -> None:
    """Broken before every commit of rank 1; nothing is lost or applied twice."""
    plan = Plan(ranks=2, steps=4)

    def run(rank: int) -> None:
        with join(socket, rank) as session:

            def break_stream(_rank: int, _step: int) -> float:
                if rank:
                    session.connection.current_stream()._call.cancel()
                return 0.0

            plan.train_rank(session, rank, break_stream)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))

    assert_same_tables(store, plan.oracle(lambda: make_oracle(recipe, INITIAL)))


def test_a_rank_whose_connection_breaks_while_another_applies_the_step_has_its_part_in_it(
    socket: str, store: Store, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its windows are closed only after the commit, which names it."""
    plan = Plan(ranks=2, steps=2)
    commit = store.commit
    with join(socket, 0) as first, join(socket, 1) as second, ThreadPoolExecutor(1) as pool:

        def broken(*args: Any, **more: Any) -> Any:
            monkeypatch.setattr(store, "commit", commit)
            second.connection.current_stream()._call.cancel()
            threading.Event().wait(0.2)  # more than enough for the store to notice
            applied = commit(*args, **more)
            marks.extend(store.marks)
            return applied

        marks: list[Any] = []
        monkeypatch.setattr(store, "commit", broken)
        waiting = pool.submit(plan.train_rank, second, 1, lambda *_: 0.0)
        plan.train_rank(first, 0, lambda _, step: 0.0 if step else 0.3)
        waiting.result(SECONDS)

    assert [mark.part for mark in marks] == [0, 1]
    assert_same_tables(store, plan.oracle(lambda: make_oracle(recipe, INITIAL)))


def test_a_rank_that_dies_is_waited_for_and_comes_back_with_all_others(
    socket: str, store: Store, recipe: Recipe
) -> None:
    """Its commit counts no more. A process that takes its place alone would not know the step."""
    plan = Plan(ranks=2, steps=1)
    with join(socket, 0) as first, ThreadPoolExecutor(2) as pool:
        doomed = join(socket, 1)
        for window in plan.of(0, 1):
            window.train(doomed, 0)
        lost = pool.submit(doomed.commit, 0, 0.1)
        assert not threading.Event().wait(0.05)
        doomed.close()
        with pytest.raises(ProtocolError):
            lost.result(SECONDS)
        other = pool.submit(plan.train_rank, first, 0)
        assert not threading.Event().wait(0.05)
        assert not other.done()

        with pytest.raises(ProtocolError, match=r"epoch 1 of rank 1 .* begin again together"):
            join(socket, 1)
        first.close()
        with pytest.raises(ProtocolError):
            other.result(SECONDS)

    plan.train_together(socket)
    assert_same_tables(store, plan.oracle(lambda: make_oracle(recipe, INITIAL)))


def test_ranks_must_make_the_same_calls(socket: str, store: Store) -> None:
    """What differs is named; who waits goes on waiting and gets its step."""
    with join(socket, 0) as first, join(socket, 1) as second, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first.commit, 0, 0.1)
        assert not threading.Event().wait(0.05)
        with pytest.raises(ProtocolError, match=r"rank 1 asks for the gradient norm of step 0"):
            second.gradient_norm()
        with pytest.raises(ProtocolError, match=r"the commit of step 0 with other arguments"):
            second.commit(0, 0.2)

        second.commit(0, 0.1)
        waiting.result(SECONDS)
        assert store.step == 1


def test_the_gradient_norm_is_that_of_all_ranks(socket: str, recipe: Recipe) -> None:
    plan = Plan(ranks=2, steps=1)
    oracle = make_oracle(recipe, INITIAL)
    for rank in range(2):
        for window in plan.of(0, rank):
            window.train(oracle, 0)

    def run(rank: int) -> float:
        with join(socket, rank) as session:
            for window in plan.of(0, rank):
                window.train(session, 0)
            return session.gradient_norm()

    with ThreadPoolExecutor(2) as pool:
        norms = list(pool.map(run, range(2)))

    assert norms[0] == norms[1]
    assert norms[0] == pytest.approx(oracle.gradient_norm(), rel=1e-6)


def test_a_rank_without_its_gradient_is_told_and_the_others_wait(
    socket: str, store: Store, recipe: Recipe
) -> None:
    plan = Plan(ranks=2, steps=1)
    with join(socket, 0) as first, join(socket, 1) as second, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(plan.train_rank, first, 0)
        windows = [(w, second.announce(w.tokens, 0)) for w in plan.of(0, 1)]
        with pytest.raises(MissingGradientError):
            second.commit(0, 0.1)
        for planned, window in windows:
            for layer in second.tables:
                shape = window.rows(layer)[0].shape
                window.push(layer, planned.gradients(layer, shape))
        second.commit(0, 0.1)
        waiting.result(SECONDS)

    assert_same_tables(store, plan.oracle(lambda: make_oracle(recipe, INITIAL)))


def test_going_back_is_done_by_all_ranks_together(
    socket: str, store: Store, recipe: Recipe
) -> None:
    """Any rank takes the snapshot; windows of the forgotten steps are closed everywhere."""
    plan = Plan(ranks=2, steps=3)
    with join(socket, 0) as first, join(socket, 1) as second, ThreadPoolExecutor(2) as pool:
        ranks = (first, second)
        start = second.snapshot()
        list(pool.map(plan.train_rank, ranks, range(2)))
        left = first.announce(random_tokens(np.random.default_rng(1)), 3)

        list(pool.map(lambda session: session.restore(start), ranks))

        assert [session.step for session in ranks] == [0, 0]
        assert left.closed
        list(pool.map(plan.train_rank, ranks, range(2)))
    assert_same_tables(store, plan.oracle(lambda: make_oracle(recipe, INITIAL)))


# ---------------------------------------------------------------------- who may join


def test_ranks_agree_on_how_many_they_are(socket: str) -> None:
    with (
        join(socket, 0),
        pytest.raises(ProtocolError, match=r"has 3 ranks; those that are connected say 2"),
    ):
        join(socket, 1, 3)


def test_another_job_is_refused_while_a_rank_trains(socket: str) -> None:
    with (
        join(socket, 1),
        pytest.raises(ProtocolError, match="another session is training this store"),
    ):
        join(socket, 0, job="another")
    with join(socket, 0, job="another"):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 2}, "need a common name"),
        ({"rank": 2, "world_size": 2, "job": "a"}, "ranks count from 0"),
        ({"rank": -1}, "ranks count from 0"),
    ],
)
def test_options_of_ranks_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RemoteOptions(**options)


def hello(**changes: Any) -> pb.SessionRequest:
    fields = {
        "protocol": wire.PROTOCOL,
        "oldest_protocol": wire.OLDEST_PROTOCOL,
        "mode": pb.MODE_TRAIN,
        "session_id": "a" * 32,
        "epoch": 1,
        **changes,
    }
    return pb.SessionRequest(id=1, hello=pb.Hello(**fields))


class RawSession:
    """A session by hand: it says whatever a test wants."""

    def __init__(self, address: str, first: pb.SessionRequest) -> None:
        self._go_on = threading.Event()
        self._channel = grpc.insecure_channel(address)

        def requests() -> Iterator[pb.SessionRequest]:
            yield first
            self._go_on.wait(SECONDS)

        self._call = StoreServiceStub(self._channel).Session(requests())
        self.answer: pb.SessionResponse = next(self._call)

    def close(self) -> None:
        self._go_on.set()
        self._call.cancel()
        self._channel.close()


def greet(address: str, first: pb.SessionRequest) -> pb.SessionResponse:
    session = RawSession(address, first)
    session.close()
    return session.answer


def test_epoch_zero_is_an_epoch(socket: str) -> None:
    """It is the default of the field: who forgets it must not stop the store for everybody."""
    first = RawSession(socket, hello(epoch=0))
    assert first.answer.HasField("welcome")
    again = greet(socket, hello(epoch=0))
    first.close()

    assert "epoch 0 of rank 0 was replaced by 0" in again.failure.message


def test_an_older_epoch_is_fenced(socket: str) -> None:
    newest = RawSession(socket, hello(epoch=3))
    assert newest.answer.HasField("welcome")
    refused = greet(socket, hello(epoch=2))
    newest.close()

    assert "epoch 2 of rank 0 was replaced by 3" in refused.failure.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank 2 of 2; ranks count from 0"),
        ({"world_size": 33}, "trained by at most 32"),
        ({"session_id": "short"}, "32 hexadecimal digits"),
        ({"mode": pb.MODE_UNSPECIFIED}, "and a mode"),
        ({"store": "unheard-of"}, "no store 'unheard-of' is served here; name one of tests"),
        ({"fingerprint": "0" * 64}, "fingerprint"),
    ],
)
def test_a_hello_that_makes_no_sense_is_refused(
    socket: str, changes: dict[str, Any], message: str
) -> None:
    assert message in greet(socket, hello(**changes)).failure.message


@pytest.mark.parametrize(
    ("newest", "oldest", "accepted"),
    [
        (wire.PROTOCOL, wire.OLDEST_PROTOCOL, True),
        (wire.PROTOCOL + 1, wire.PROTOCOL, True),
        (wire.PROTOCOL + 2, wire.PROTOCOL + 1, False),
        (wire.OLDEST_PROTOCOL - 1, 0, False),
    ],
    ids=["the same", "one newer that speaks ours", "too new", "too old"],
)
def test_neighbouring_versions_understand_each_other(
    socket: str, newest: int, oldest: int, *, accepted: bool
) -> None:
    """What both speak is used; otherwise both are named."""
    answer = greet(socket, hello(protocol=newest, oldest_protocol=oldest))
    if accepted:
        assert answer.welcome.protocol == wire.PROTOCOL
    else:
        assert "update the older of the two" in answer.failure.message
