"""Unary calls: long ones hold nobody up, and can be given up; what goes wrong has a class."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from engram_store.errors import DeadlineError, EngramStoreError, StoreClosedError
from engram_store.store import Store
from engram_store_client import connect_admin
from engram_store_server import admin as service
from tests.pairs import MakePair
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
