"""The disk fails at the first, second, ... n-th change of a file, until nothing fails any more.

Every operation of a store, in every durability mode, with a disk that is full once or for ever,
that reports an error, or that takes half of a write. Each time the operation is done or refused
with words that help, reads go on, nothing half-made is listed or acknowledged, and once the disk
is well again the store goes on as if nothing had happened.
"""

import errno
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import NamedTuple

import pytest

import engram_store
from engram_store.engine import Engine, journal
from engram_store.errors import EngramStoreError
from engram_store.recipes import Recipe
from tests.crash.faults import (
    FAULTS,
    Fault,
    Subject,
    WatchingDisk,
    abandon,
    check_message,
    counts,
    open_files,
)
from tests.pairs import MakeStore, Pair, memtable_directory, specs_of, tiny_overlay_bytes

PLACES = 4
"""Of each fault in each operation, where not all are tried."""
DURABILITIES = ("snapshot", "step", "group(5)")
COMMITS = 4
"""Of the operation 'commits': with the least overlay at least one memtable fills and is sealed."""


class Case(NamedTuple):
    """An operation of a store."""

    prepare: Callable[[Subject], None]
    run: Callable[[Subject], None]
    """Does it; the oracle follows if it was done."""


def nothing(_: Subject) -> None:
    pass


def train_one(subject: Subject) -> None:
    subject.train(1)


def commits(subject: Subject) -> None:
    goal = subject.pair.step - subject.pair.step % COMMITS + COMMITS
    subject.train(goal - subject.pair.step)


def two_snapshots(subject: Subject) -> None:
    subject.snapshot()
    subject.train(1)
    subject.snapshot()
    subject.train(1)


def something_to_fold(subject: Subject) -> None:
    subject.train(1)
    subject.store.seal()


def something_to_merge(subject: Subject) -> None:
    """At least two segments in every table, and a row in both of them."""
    subject.train(1)
    subject.store.seal()
    subject.train(1)
    subject.store.seal()


def merge(subject: Subject) -> None:
    engine = subject.store._engine
    assert isinstance(engine, Engine)
    engine.merge()


def restore_older(subject: Subject) -> None:
    older = sorted(subject.store.snapshots())[-2]
    subject.restore(older)


def garbage(subject: Subject) -> None:
    two_snapshots(subject)
    subject.store.fold()


def keep_one(subject: Subject) -> None:
    subject.store.keep_snapshots(1)


def close(subject: Subject) -> None:
    subject.store.close()
    subject.acknowledged = subject.pair.step


def killed(subject: Subject) -> None:
    subject.train(2)
    abandon(subject.store)


def host_lost(subject: Subject) -> None:
    subject.train(2)
    if subject.journaled:
        subject.wait_durable()
    else:
        subject.snapshot()
    abandon(subject.store)
    shutil.rmtree(subject.shared)


def reopen(subject: Subject) -> None:
    subject.pair = Pair(subject.reopen(), subject.pair.oracle, subject.pair.rng)
    subject.waiting = []


CASES = {
    "commit": Case(nothing, train_one),
    "commits": Case(nothing, commits),
    "seal": Case(train_one, lambda subject: subject.store.seal()),
    "snapshot": Case(train_one, Subject.snapshot),
    "fold": Case(something_to_fold, lambda subject: subject.store.fold()),
    "merge": Case(something_to_merge, merge),
    "restore": Case(two_snapshots, restore_older),
    "collect": Case(garbage, keep_one),
    "close": Case(train_one, close),
    "recover": Case(killed, reopen),
    "replay": Case(host_lost, reopen),
}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Syncs fail or succeed here without the disk: nothing in this file cuts its power."""
    monkeypatch.setattr(journal, "_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    # Errors that were logged hold on to what failed, and pytest to what was logged.
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def make_subject(make_store: MakeStore, recipe: Recipe) -> Callable[[str], Subject]:
    def make(durability: str) -> Subject:
        path = make_store()
        shared = memtable_directory(path, engram_store.inspect(path).metadata.store_id)
        return Subject(
            path, recipe, durability, tiny_overlay_bytes(specs_of(recipe)), shared, WatchingDisk()
        )

    return make


def strike(subject: Subject, case: Case, fault: Fault, at: int) -> int:
    """One case with one fault at one place; returns how often the disk failed."""
    case.prepare(subject)
    disk = subject.disk
    disk.fail(fault.error, at, forever=fault.forever, kinds=fault.kinds)
    refused = attempt(subject, case)
    fired = disk.fired
    if not subject.store._engine.closed:
        assert subject.store.step == subject.pair.oracle.step
        assert subject.acknowledged <= subject.store.durable_step <= subject.store.step
        subject.check_reads()
    if refused is not None:
        assert fault.error, f"half a write is no error: {refused!r}"
        assert fired, f"refused for no reason: {refused!r}"
        check_message(refused, subject.path)
    disk.heal()
    if refused is not None:
        again = attempt(subject, case)
        assert again is None, f"refused again: {again!r}"
    if subject.store._engine.closed:
        reopen(subject)
    subject.train(1)
    subject.check()
    return fired


def attempt(subject: Subject, case: Case) -> Exception | None:
    """Do it; returns why it was refused, if it was."""
    try:
        case.run(subject)
    except (EngramStoreError, OSError) as error:
        if subject.store._engine.closed and case.run is close:
            # The memtables have what is newer than the files: opening is what comes next.
            return None if subject.disk.fired == 0 else error
        return error
    if not subject.store._engine.closed:
        subject.settle()
    return None


def count_changes(subject: Subject, case: Case) -> int:
    """How many changes of files the operation makes, none of which fails."""
    case.prepare(subject)
    kinds = FAULTS["broken once"].kinds
    subject.disk.fail(errno.EIO, 0, kinds=kinds)
    refused = attempt(subject, case)
    assert refused is None
    changes = subject.disk.calls
    subject.disk.heal()
    if subject.store._engine.closed:
        reopen(subject)
    subject.check()
    return changes


def sweep(subject: Subject, name: str, places: int | None) -> None:
    """Every fault at so many places; None: at all of them, until nothing fails."""
    case = CASES[name]
    # Twice: what is done for the first time changes other files.
    changes = max(count_changes(subject, case) for _ in range(2))
    for kind, fault in FAULTS.items():
        chosen: Iterable[int] = count(1)
        if places is not None:
            rng = random.Random(f"{name} {subject.durability} {kind}")
            chosen = sorted(rng.sample(range(1, changes + 1), min(places, changes)))
        for done, at in enumerate(chosen):
            try:
                fired = strike(subject, case, fault, at)
            except BaseException as error:
                error.add_note(f"{name}, {subject.durability}, {kind}, at {at}")
                counts.add(subject.disk.fired, violation=True)
                raise
            counts.add(fired)
            if not fired and at > changes:
                break
            if done % 4 == 3:
                subject.trim()
        subject.lose_host()


def check_sweep(
    make_subject: Callable[[str], Subject],
    name: str,
    durability: str,
    places: int | None,
) -> None:
    before = open_files()
    subject = make_subject(durability)
    sweep(subject, name, places)
    subject.leave()
    assert open_files() <= before


@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize("name", CASES)
def test_a_disk_that_fails_costs_nothing(
    make_subject: Callable[[str], Subject],
    name: str,
    durability: str,
) -> None:
    """A sample of the places; `make torture` has all of them."""
    check_sweep(make_subject, name, durability, PLACES)


@pytest.mark.torture
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize("name", CASES)
def test_a_disk_that_fails_anywhere_costs_nothing(
    make_subject: Callable[[str], Subject],
    name: str,
    durability: str,
) -> None:
    check_sweep(make_subject, name, durability, None)
