"""Sessions with a store process: waiting, breaking, coming back, and what is refused."""

import errno
import itertools
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engram_store
from engram_store import wire
from engram_store.errors import (
    CapacityError,
    ConfigError,
    DeadlineError,
    ProtocolError,
    ReadOnlyError,
    StoreUnreachableError,
)
from engram_store.recipes import Recipe
from engram_store.store import Store
from engram_store_client.remote import RemoteOptions, RemoteSession
from engram_store_client.remote.pending import Pending
from engram_store_client.remote.resume import Verdict, delays, judge
from engram_store_client.remote.window import Pushed, count_rows
from engram_store_client.transport import connect, process_address
from tests.pairs import (
    INITIAL,
    MakeStore,
    Pair,
    assert_same_tables,
    make_oracle,
    random_tokens,
)
from tests.servers import serving

SECONDS = 30.0
_SMALL = [("grpc.max_receive_message_length", 8_000), ("grpc.use_local_subchannel_pool", 1)]


@pytest.fixture
def store(make_store: MakeStore) -> Iterator[Store]:
    with engram_store.open(make_store(), "train") as store:
        yield store


@pytest.fixture
def address(store: Store) -> Iterator[str]:
    with (
        tempfile.TemporaryDirectory() as short,  # a socket's path has at most 107 bytes
        serving(store, f"unix:{short}/store.sock") as address,
    ):
        yield address


@pytest.fixture
def session(address: str) -> Iterator[RemoteSession]:
    with RemoteSession(address) as session:
        yield session


def break_stream(session: RemoteSession) -> None:
    """As when the network fails: both sides lose the stream, and nothing else."""
    session.connection.current_stream()._call.cancel()


def lose_stream_unseen(session: RemoteSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a network swallows everything: the store still believes in the old stream."""
    stream = session.connection.current_stream()
    # What abort() does that the store does not see.
    quiet = (lambda: None) if stream.slots is None else stream.slots.close
    monkeypatch.setattr(stream, "abort", quiet)
    session.connection._lost(stream, StoreUnreachableError("here", "silence"))


# ---------------------------------------------------------------------- decisions


@pytest.mark.parametrize(
    ("store", "session", "committing", "restoring", "verdict"),
    [
        (5, 5, False, False, Verdict.RESEND),
        (5, 5, True, False, Verdict.RESEND),
        (6, 5, True, False, Verdict.APPLIED),
        (2, 5, False, True, Verdict.RESEND),
    ],
)
def test_a_store_that_came_back_where_it_was_left_goes_on(
    store: int, session: int, committing: bool, restoring: bool, verdict: Verdict
) -> None:
    """An unanswered commit was applied or not; an unanswered restore may be done again."""
    assert judge(store, session, committing=committing, restoring=restoring) is verdict


@pytest.mark.parametrize(
    ("store", "committing", "message"),
    [
        (4, False, "lost"),
        (4, True, "lost"),
        (6, False, "somebody else"),
        (7, True, "somebody else"),
    ],
)
def test_a_store_that_came_back_elsewhere_ends_the_session(
    store: int, committing: bool, message: str
) -> None:
    """The message says to restore the checkpoint."""
    with pytest.raises(ProtocolError, match=rf"{message}.* restore"):
        judge(store, 5, committing=committing, restoring=False)


def test_attempts_get_rarer_up_to_a_bound() -> None:
    """Half to one and a half times the nominal delay."""
    first, *_, last = itertools.islice(delays(), 20)
    assert 0.025 <= first <= 0.075
    assert 1 <= last <= 3


def test_rows_of_a_step_are_counted_once_and_skipped_in_all_windows() -> None:
    """As the store counts them."""
    rows = [np.array([1, 2, 3], np.int32), np.array([3, 4], np.int32)]
    bad = np.array([True, False])
    nothing: Any = None
    parts = [Pushed(nothing, rows[0], None), Pushed(nothing, rows[1], bad)]

    assert count_rows(parts) == (3, 1)
    assert count_rows([]) == (0, 0)


# ---------------------------------------------------------------------- breaking


def test_a_broken_stream_is_replaced_without_losing_or_repeating_anything(
    session: RemoteSession, store: Store, recipe: Recipe
) -> None:
    """At any moment: with windows announced, gradients pushed, or nothing under way."""
    pair = Pair(session, make_oracle(recipe, INITIAL))
    for moment in range(12):
        windows = [pair.announce(random_tokens(pair.rng), pair.step) for _ in range(2)]
        if moment % 4 == 0:
            break_stream(session)
        windows[0].push_random(pair.rng)
        if moment % 4 == 1:
            break_stream(session)
        windows[1].push_random(pair.rng)
        if moment % 4 == 2:
            break_stream(session)
        pair.commit()
        if moment % 4 == 3:
            break_stream(session)
    session.close()

    assert store.step == 12
    assert_same_tables(store, pair.oracle)


def test_a_stream_that_the_store_still_believes_in_is_replaced_whole(
    session: RemoteSession, store: Store, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came by the old stream is not counted twice."""
    pair = Pair(session, make_oracle(recipe, INITIAL))
    for _ in range(10):
        windows = [pair.announce(random_tokens(pair.rng), pair.step) for _ in range(2)]
        windows[0].push_random(pair.rng)
        lose_stream_unseen(session, monkeypatch)
        windows[1].push_random(pair.rng)
        pair.commit()
    session.close()

    assert_same_tables(store, pair.oracle)


def test_a_commit_under_way_on_the_old_stream_is_waited_for(
    session: RemoteSession, store: Store, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new stream learns that the step was applied; `Applied` has the counts all the same."""
    started, commit = threading.Event(), store.commit

    def slow_commit(*args: Any, **more: Any) -> Any:
        started.set()
        lost.join(0.3)
        return commit(*args, **more)

    def lose() -> None:
        started.wait()
        lose_stream_unseen(session, monkeypatch)

    lost = threading.Thread(target=lose)
    lost.start()
    pair = Pair(session, make_oracle(recipe, INITIAL))
    monkeypatch.setattr(store, "commit", slow_commit)
    pair.train(1)
    lost.join()
    monkeypatch.setattr(store, "commit", commit)
    pair.train(2)
    session.close()

    assert_same_tables(store, pair.oracle)


def test_rows_asked_for_before_a_break_still_come(session: RemoteSession, recipe: Recipe) -> None:
    """Of a window that is two steps ahead."""
    pair = Pair(session, make_oracle(recipe, INITIAL))
    ahead = pair.announce(random_tokens(pair.rng), 2)
    break_stream(session)
    pair.train(2)

    ahead.push_random(pair.rng)
    pair.commit()


def test_an_answer_that_does_not_come_is_named_with_its_deadline(address: str) -> None:
    """Here the rows of a step whose time has not come."""
    with RemoteSession(address, options=RemoteOptions(work_seconds=0.05)) as session:
        window = session.announce(np.array([[1, 2]]), 1)
        with pytest.raises(DeadlineError, match=r"0\.05 s: rows of layer 1"):
            window._receive(1)


def test_a_request_that_no_message_holds_is_refused_here(
    session: RemoteSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the wire it would break the stream, and break it again when it is sent again."""
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 5_000)
    with pytest.raises(ProtocolError, match=r"has 8,\d\d\d bytes.*fewer tokens"):
        session.announce(np.zeros((2, 1000), np.int64))

    assert session.snapshot().step == 0


def test_an_answer_that_no_message_holds_ends_the_session(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gRPC's reason; coming back would only repeat it."""
    with RemoteSession(address, options=RemoteOptions(shared_memory=False)) as session:
        monkeypatch.setattr("engram_store_client.remote.stream._CHANNEL_OPTIONS", _SMALL)
        break_stream(session)
        window = session.announce(random_tokens(np.random.default_rng(0), (4, 100)))

        with pytest.raises(ProtocolError, match="RESOURCE_EXHAUSTED"):
            window.rows(1)


# ---------------------------------------------------------------------- refusing


def test_a_forked_process_is_told_to_connect_itself(session: RemoteSession) -> None:
    """Every call, and leaving does nothing: the connection is the parent's."""
    session.connection._process = os.getpid() + 1
    try:
        for call in (session.snapshot, session.stats, lambda: session.announce(np.array([[1]]))):
            with pytest.raises(ProtocolError, match="after the fork"):
                call()
        session.close()
    finally:
        session.connection._process = os.getpid()

    assert session.snapshot().step == 0


def test_a_second_trainer_is_refused_and_a_reader_is_not(
    session: RemoteSession, address: str
) -> None:
    """The reader sees what was trained, and cannot train."""
    with pytest.raises(ProtocolError, match="another session is training"):
        RemoteSession(address)
    tokens = np.array([[1, 2, 3]])
    with RemoteSession(address, "read") as reader:
        with reader.announce(tokens) as window, session.announce(tokens) as same:
            assert window.rows(1)[0].tobytes() == same.rows(1)[0].tobytes()
        for call in (lambda: reader.announce(tokens, 0), lambda: reader.commit(0, 0.1)):
            with pytest.raises(ReadOnlyError, match="mode='read'"):
                call()


def test_leaving_makes_room_for_the_next_trainer(address: str) -> None:
    """At once: `close` waits until the store has let go."""
    for _ in range(3):
        with RemoteSession(address) as session:
            session.announce(np.array([[1, 2]]), session.step)


def test_a_window_that_the_store_refuses_says_why(session: RemoteSession, store: Store) -> None:
    """When its rows or their ids are asked for; closing it leaves it out of its step."""
    with session.announce(np.array([[1, 2, 3]])) as kept:
        assert len(kept.rows(1)[0])
        before = store.announce

        def refuse(*_arguments: Any, **_more: Any) -> Any:
            raise CapacityError(errno.ENOSPC, "no room for it")

        store.announce = refuse  # type: ignore[method-assign]
        refused = session.announce(np.array([[1, 2, 3]]), 0)
        for call in (refused.rows, refused.row_ids):
            with pytest.raises(CapacityError, match="no room for it"):
                call(1)
        with pytest.raises(CapacityError, match="no room for it"):
            session.gradient_norm()
        store.announce = before  # type: ignore[method-assign]
        refused.close()
        assert session.commit(0, 0.1).step == 0


def test_a_socket_that_is_not_there_is_named(tmp_path: Path) -> None:
    """With what to start."""
    with pytest.raises(StoreUnreachableError, match=r"nothing\.sock.*engram-store serve"):
        connect(f"unix:{tmp_path}/nothing.sock", connect_seconds=0)


def test_a_store_that_is_still_starting_is_waited_for(store: Store) -> None:
    with tempfile.TemporaryDirectory() as short, ThreadPoolExecutor(1) as pool:
        address = f"unix:{short}/store.sock"
        coming = pool.submit(connect, address)
        assert not threading.Event().wait(0.2)
        assert not coming.done()
        with serving(store, address):
            coming.result(SECONDS).close()


@pytest.mark.parametrize("options", [{"patience": 3}, {"reconnect_seconds": -1}, {"mode": "x"}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        connect("unix:/nowhere.sock", **options)


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("unix:///run/a.sock", "unix:/run/a.sock"),
        ("unix:run/a%20b.sock", "unix:run/a b.sock"),
        ("tcp://host:7070", "host:7070"),
        ("tcp://[::1]:7070/", "[::1]:7070"),
        ("my.engram", None),
        (Path("unix:x"), None),
    ],
)
def test_addresses_of_store_processes(address: str | Path, target: str | None) -> None:
    """As gRPC writes them; None names a directory."""
    assert process_address(address) == target


@pytest.mark.parametrize("address", ["unix:", "unix://run/x", "tcp://host", "tcp://h:port", "tcp:"])
def test_incomplete_addresses_are_refused_with_what_is_allowed(address: str) -> None:
    with pytest.raises(ConfigError, match="unix:///path/of/socket"):
        connect(address)


def test_without_grpc_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded store goes on working without it."""
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(ConfigError, match=r"engram-store\[grpc\]"):
        connect("tcp://localhost:7070")


def test_a_request_is_answered_once() -> None:
    """A late answer after an error, or the other way round, changes nothing."""
    pending = Pending(request=Any, window=None)  # type: ignore[arg-type]
    assert pending.settle(ProtocolError("first"))
    assert not pending.settle(ProtocolError("second"))


def test_waits_are_those_of_the_session_that_waited(address: str) -> None:
    """The store sends rows when it has them; only who asks for them knows whether that was late."""
    rng = np.random.default_rng(0)
    with connect(address) as trainer, connect(address, "read") as reader:
        for _ in range(3):
            with reader.announce(random_tokens(rng)) as window:
                window.rows(1)
                window.rows(1)  # they are there: no second wait
        window = trainer.announce(random_tokens(rng), 0)
        for layer in trainer.tables:
            window.rows(layer)
        read, trained = reader.stats(), trainer.stats()
    assert sum(read.waits.counts) == sum(read.tables[1].waits.counts) == 3
    assert read.late_windows == 0
    assert read.wait_seconds == read.waits.seconds > 0
    assert sum(trained.waits.counts) == len(trained.tables)
    assert [sum(table.waits.counts) for table in trained.tables.values()] == [1, 1]
    assert trained.late_windows <= len(trained.tables)
