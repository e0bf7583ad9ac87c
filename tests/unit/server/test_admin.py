"""Unary calls: long ones hold nobody up, and can be given up; what goes wrong has a class.

A trainer whose session begins while somebody restores the store is told the right step, or refused.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from engram_store.errors import (
    DeadlineError,
    EngramStoreError,
    ProtocolError,
    SnapshotMismatchError,
    StoreClosedError,
)
from engram_store.session import Session
from engram_store.store import Store
from engram_store.v1 import store_pb2 as pb
from engram_store_client import connect, connect_admin
from engram_store_server import admin as service
from engram_store_server.jobs import Job, Member, Trainers
from engram_store_server.limits import SessionLimits
from tests.pairs import MakePair, Pair, assert_same_tables
from tests.servers import serving

SECONDS = 60.0


class _Endless:
    """A verification that ends only when it is told to give up."""

    def __init__(self) -> None:
        self.begun, self.ended = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, _paths: Any, *, progress: Callable[[int, int], None]) -> None:
        self.begun.release()
        try:
            while True:
                progress(0, 1)
                threading.Event().wait(0.01)
        finally:
            self.ended.release()


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> _Endless:
    verification = _Endless()
    monkeypatch.setattr(service, "verify_store", verification)
    return verification


@pytest.fixture
def store(make_pair: MakePair) -> Store:
    return make_pair().store


@pytest.fixture
def process(store: Store, tmp_path: Path) -> Iterator[tuple[str, ExitStack]]:
    """The URL of a server, and what stops it."""
    with ExitStack() as running:
        yield running.enter_context(serving(store, f"unix:{tmp_path}/s")), running


def test_a_verification_holds_nobody_up(process: tuple[str, ExitStack], endless: _Endless) -> None:
    """Nor do others that wait for it: every other call is answered meanwhile."""
    url, running = process
    with connect_admin(url) as admin, ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(admin.verify) for _ in range(8)]
        assert endless.begun.acquire(timeout=SECONDS)

        assert [entry.name for entry in admin.list_stores()] == ["tests"]
        assert admin.inspect()["step"] == admin.statistics().steps == 0
        admin.snapshot()
        admin.seal()
        admin.fold()
        assert admin.restore(0) == 0
        assert not any(call.done() for call in waiting)

        running.close()
        for call in waiting:
            with pytest.raises(EngramStoreError):
                call.result(SECONDS)


def test_a_verification_ends_when_nobody_waits_for_it(
    process: tuple[str, ExitStack], endless: _Endless, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one gets its thread."""
    url, _ = process
    with connect_admin(url, work_seconds=0.3) as impatient, pytest.raises(DeadlineError):
        impatient.verify()
    assert endless.ended.acquire(timeout=SECONDS)

    monkeypatch.undo()
    with connect_admin(url) as admin:
        assert admin.verify()["ok"]


def test_a_verification_ends_with_the_process(
    process: tuple[str, ExitStack], endless: _Endless
) -> None:
    """With an error that says so, long before it would have been done."""
    url, running = process
    with connect_admin(url) as admin, ThreadPoolExecutor(1) as threads:
        call = threads.submit(admin.verify)
        assert endless.begun.acquire(timeout=SECONDS)
        running.close()
        with pytest.raises(StoreClosedError, match="given up: the store process is stopping"):
            call.result(SECONDS)


def test_a_mistake_of_ours_is_told_as_such(
    process: tuple[str, ExitStack],
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the log too; the process goes on."""

    def fail() -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(store, "seal", fail)
    with connect_admin(process[0]) as admin:
        with pytest.raises(EngramStoreError, match=r"internal error.*ZeroDivisionError"):
            admin.seal()
        assert "a call failed" in caplog.text
        admin.fold()


def test_a_record_of_another_version_is_an_error(
    process: tuple[str, ExitStack], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a crash of whoever asked."""
    monkeypatch.setattr(service, "describe", lambda _: None)
    monkeypatch.setattr(service, "description_json", lambda _: [1, 2])
    monkeypatch.setattr(service, "asdict", lambda _: {"tables": {"1": {}}})
    with connect_admin(process[0]) as admin:
        for ask in (admin.inspect, admin.statistics):
            with pytest.raises(EngramStoreError, match="store's"):
                ask()


# ---------------------------------------------------------------------- restores and trainers


class _SlowRestore:
    """A restore that has begun and goes on when it is told to; trainers are admitted meanwhile."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.admitted, self._go_on = (threading.Event() for _ in range(3))
        real_restore, real_admit = store.restore, Trainers.admit

        def restore(snapshot: Any) -> None:
            self.begun.set()
            assert self._go_on.wait(SECONDS)
            real_restore(snapshot)

        async def admit(trainers: Trainers, member: Member) -> Job:
            job = await real_admit(trainers, member)
            self.admitted.set()
            return job

        monkeypatch.setattr(store, "restore", restore)
        monkeypatch.setattr(Trainers, "admit", admit)

    def go_on(self) -> None:
        self._go_on.set()


@pytest.fixture
def trained(make_pair: MakePair) -> Pair:
    """At step 3, with a snapshot at step 1."""
    pair = make_pair()
    pair.train(1)
    pair.snapshot()
    pair.train(2)
    return pair


@pytest.fixture
def slow(trained: Pair, monkeypatch: pytest.MonkeyPatch) -> Iterator[_SlowRestore]:
    restore = _SlowRestore(trained.store, monkeypatch)
    yield restore
    restore.go_on()


def _serving(pair: Pair, tmp_path: Path, handover_seconds: float) -> Any:
    limits = SessionLimits(handover_seconds=handover_seconds)
    return serving(pair.store, f"unix:{tmp_path}/s", limits)


def _check_trains_from_1(session: Session, pair: Pair) -> None:
    """The next step is step 1 of the way back, and gives what it gives without a server."""
    assert session.step == 1
    pair.oracle.restore(1)
    twin = Pair(session, pair.oracle, pair.rng)
    twin.train(2)
    assert_same_tables(pair.store, pair.oracle)


def test_a_trainer_that_comes_during_a_restore_is_told_the_step_after_it(
    trained: Pair, slow: _SlowRestore, tmp_path: Path
) -> None:
    """Not the one that is about to be forgotten: it would train steps that nobody asks for."""
    with (
        _serving(trained, tmp_path, SECONDS) as url,
        connect_admin(url) as admin,
        ThreadPoolExecutor(2) as threads,
    ):
        restoring = threads.submit(admin.restore, 1)
        assert slow.begun.wait(SECONDS)
        coming = threads.submit(connect, url)
        assert slow.admitted.wait(SECONDS)
        # Answered by the loop that welcomes: a welcome that does not wait has been sent by now.
        assert [entry.step for entry in admin.list_stores()] == [3]
        slow.go_on()

        assert restoring.result(SECONDS) == 1
        with coming.result(SECONDS) as session:
            _check_trains_from_1(session, trained)


def test_a_trainer_is_refused_while_a_restore_takes_long(
    trained: Pair, slow: _SlowRestore, tmp_path: Path
) -> None:
    """It says why, it leaves nothing behind, and the next one is told the right step."""
    with (
        _serving(trained, tmp_path, 0.05) as url,
        connect_admin(url) as admin,
        ThreadPoolExecutor(1) as threads,
    ):
        restoring = threads.submit(admin.restore, 1)
        assert slow.begun.wait(SECONDS)
        for _ in range(2):
            with pytest.raises(ProtocolError, match=r"tests is going back to a snapshot.*again"):
                connect(url)
        connect(url, mode="read").close()
        slow.go_on()

        assert restoring.result(SECONDS) == 1
        assert admin.restore(1) == 1
        with connect(url) as session:
            _check_trains_from_1(session, trained)


def test_a_restore_that_nobody_waits_for_holds_trainers_back_all_the_same(
    trained: Pair, slow: _SlowRestore, tmp_path: Path
) -> None:
    """Its call was given up, its thread goes on."""
    with (
        _serving(trained, tmp_path, SECONDS) as url,
        connect_admin(url) as admin,
        ThreadPoolExecutor(1) as threads,
    ):
        request = pb.RestoreSnapshotRequest(snapshot=pb.SnapshotRef(step=1))
        restoring = admin._stub.RestoreSnapshot.future(request)
        assert slow.begun.wait(SECONDS)
        restoring.cancel()
        admin.list_stores()  # on the same connection, so that the store has heard of it
        coming = threads.submit(connect, url)
        assert slow.admitted.wait(SECONDS)
        assert [entry.step for entry in admin.list_stores()] == [3]
        slow.go_on()

        with coming.result(SECONDS) as session:
            _check_trains_from_1(session, trained)


def test_a_trainer_that_waits_goes_on_if_the_restore_fails(
    trained: Pair, slow: _SlowRestore, tmp_path: Path
) -> None:
    """There is no snapshot at step 2: nothing changed, and nobody waits for ever."""
    with (
        _serving(trained, tmp_path, SECONDS) as url,
        connect_admin(url) as admin,
        ThreadPoolExecutor(2) as threads,
    ):
        restoring = threads.submit(admin.restore, 2)
        assert slow.begun.wait(SECONDS)
        coming = threads.submit(connect, url)
        assert slow.admitted.wait(SECONDS)
        slow.go_on()

        with pytest.raises(SnapshotMismatchError):
            restoring.result(SECONDS)
        with coming.result(SECONDS) as session:
            assert session.step == 3
            with pytest.raises(ProtocolError, match="being trained"):
                admin.restore(1)
