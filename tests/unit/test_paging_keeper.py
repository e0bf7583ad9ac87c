"""The thread that keeps beliefs about pages up to date: its budget, its order, its end."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engram_store.kernels.pages import PAGE_BYTES
from engram_store.paging import Keeper, Residency
from engram_store.paging.residency import PIECE_PAGES
from tests.unit.test_paging import ColdFile, some_pages, wait_until

COST = 0.002
"""Seconds of work for one piece."""


class Machine:
    """Time that passes when somebody rests or works, and a keeper whose thread is the test."""

    def __init__(self, cpu_share: float = 0.01, interval_seconds: float = 2.0) -> None:
        self.now = 100.0
        self.worked = 0.0
        self.log: list[tuple[str, int]] = []
        self.keeper = Keeper(cpu_share, interval_seconds, lambda: self.now, lambda: self.worked)
        self.keeper.stop()  # no thread will be started

    def file(self, name: str, pages: int, *, observable: bool = True) -> "File":
        file = File(self, name, pages)
        file.observable = observable
        self.keeper.register(file)
        return file

    def run(self, seconds: float) -> None:
        """Turns until so much time has passed, or there is nothing left to do."""
        end = self.now + seconds
        while self.now < end:
            rest = self.keeper.turn()
            if rest is None:
                return
            self.now += rest


class File(Residency):
    """One that takes time to be refreshed, and notes it."""

    def __init__(self, machine: Machine, name: str, pages: int) -> None:
        super().__init__(PAGE_BYTES, pages * PAGE_BYTES)
        self.machine, self.name = machine, name

    def refresh(self, first: int = 0, count: int | None = None) -> None:
        self.machine.log.append((self.name, first))
        self.machine.worked += COST
        self.machine.now += COST
        assert count == PIECE_PAGES


def test_files_are_refreshed_piece_by_piece_in_turn() -> None:
    """One piece of a large file a turn; several small files share one; then all over again."""
    machine = Machine()
    machine.file("small", 10)
    machine.file("other", PIECE_PAGES - 20)
    machine.file("large", 2 * PIECE_PAGES + 1)
    turns = []
    for _ in range(6):
        before = len(machine.log)
        rest = machine.keeper.turn()
        assert rest is not None
        machine.now += rest
        turns.append(machine.log[before:])
    assert turns[:3] == [
        [("large", 0)],
        [("large", PIECE_PAGES)],
        [("large", 2 * PIECE_PAGES), ("other", 0), ("small", 0)],
    ]
    assert turns[3] == [("small", 0), ("other", 0), ("large", 0)]


@pytest.mark.parametrize("pages", [10, 300 * PIECE_PAGES])
def test_no_more_than_the_share_of_a_core_is_used(pages: int) -> None:
    """However large the files are; and small ones are refreshed once an interval."""
    machine = Machine(cpu_share=0.01, interval_seconds=2.0)
    machine.file("file", pages)
    machine.run(1000.0)
    assert machine.worked <= 0.01 * 1000 + 2 * COST
    assert len(machine.log) >= (495 if pages == 10 else 0.9 * 0.01 * 1000 / COST)


def test_after_page_faults_everything_is_refreshed_at_ten_times_the_pace() -> None:
    """From the first page on, once; then the pace is the usual one again."""
    machine = Machine(cpu_share=0.01)
    machine.file("large", 100 * PIECE_PAGES)
    machine.run(5.0)
    machine.log.clear()
    machine.keeper.suspect()
    began = machine.now
    while len(machine.log) < 100:
        rest = machine.keeper.turn()
        assert rest is not None
        machine.now += rest
    assert [first for _, first in machine.log] == [i * PIECE_PAGES for i in range(100)]
    hurried = machine.now - began
    assert hurried == pytest.approx(100 * COST * 10, rel=0.02)
    machine.log.clear()
    machine.run(hurried)
    assert 5 <= len(machine.log) <= 12


def test_constant_suspicion_is_answered_within_bounds() -> None:
    """Hurried passes take at most a fifth of the time, so three times the share in all."""
    machine = Machine(cpu_share=0.01)
    machine.file("large", 50 * PIECE_PAGES)
    for _ in range(3000):
        machine.keeper.suspect()
        rest = machine.keeper.turn()
        assert rest is not None
        machine.now += rest
    assert 0.02 < machine.worked / (machine.now - 100.0) < 0.03


def test_what_the_kernel_does_not_tell_is_only_forgotten_on_suspicion() -> None:
    """Otherwise what this process has read would be read again every few seconds."""
    machine = Machine()
    machine.file("hidden", 10, observable=False)
    machine.file("open", 10)
    machine.run(10.0)
    assert {name for name, _ in machine.log} == {"open"}
    machine.keeper.suspect()
    machine.run(5.0)
    assert [name for name, _ in machine.log].count("hidden") == 1


def test_without_files_there_is_nothing_to_do() -> None:
    """Neither before the first nor after the last."""
    machine = Machine()
    assert machine.keeper.turn() is None
    file = machine.file("file", 3 * PIECE_PAGES)
    machine.keeper.turn()
    machine.keeper.forget(file)
    machine.keeper.forget(file)
    assert machine.keeper.turn() is None
    assert machine.log == [("file", 0)]


def test_a_file_that_cannot_be_asked_about_does_not_stop_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is given up, and said."""
    machine = Machine()
    gone = Residency(PAGE_BYTES, 5 * PIECE_PAGES * PAGE_BYTES)
    machine.file("first", 10)
    machine.keeper.register(gone)
    machine.file("second", 10)
    machine.run(5.0)
    assert {name for name, _ in machine.log} == {"first", "second"}
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_forget_waits_for_a_refresh_under_way() -> None:
    """The file may be unmapped when it returns."""
    started, go_on = threading.Event(), threading.Event()
    order = []

    class Slow(Residency):
        def refresh(self, first: int = 0, count: int | None = None) -> None:
            started.set()
            go_on.wait()
            order.append("refreshed")

    keeper = Keeper()
    file = Slow(PAGE_BYTES, 3 * PIECE_PAGES * PAGE_BYTES)
    keeper.register(file)
    started.wait()

    def forget() -> None:
        keeper.forget(file)
        order.append("forgotten")

    forgetting = threading.Thread(target=forget)
    forgetting.start()
    wait_until(lambda: not keeper._files)
    go_on.set()
    forgetting.join()
    keeper.stop()
    assert order == ["refreshed", "forgotten"]


def test_the_vector_follows_the_page_cache(tmp_path: Path) -> None:
    """The real thread: new files soon, later changes after a suspicion."""
    cold = ColdFile(tmp_path / "cold")
    cold.read(some_pages())
    kept = Residency(cold.address, cold.pages * PAGE_BYTES, cold.path)
    keeper = Keeper()
    keeper.register(kept)
    wait_until(lambda: kept.known and kept.pages.sum() == cold.resident().size)
    cold.evict()
    keeper.suspect()
    wait_until(lambda: not kept.pages.any())
    keeper.forget(kept)
    keeper.stop()
    cold.close()


def test_a_forked_child_does_not_wait_for_a_thread_it_does_not_have(tmp_path: Path) -> None:
    """Not to forget a file, and its own files are refreshed."""
    script = f"""
import os, sys
sys.path.append({str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.unit.test_paging_keeper import *
cold = ColdFile(Path({str(tmp_path / "cold")!r}))
keeper = Keeper()
kept = Residency(cold.address, cold.pages * PAGE_BYTES, cold.path)
keeper.register(kept)
wait_until(lambda: kept.known)
child = os.fork()
if child == 0:
    keeper._busy = kept  # as if the fork had come in the middle of a refresh
    keeper.forget(kept)
    new = Residency(cold.address, cold.pages * PAGE_BYTES, cold.path)
    keeper.register(new)
    wait_until(lambda: new.known)
    keeper.stop()
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=dict(os.environ))
