"""A store process that is killed while a commit goes on beside its trainer.

Real processes and a real SIGKILL, between the rows that are handed out early and the moment at
which the commit is real, and right after it. The tables in the end are the oracle's.
"""

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engram_store
from engram_store.recipes import Recipe
from engram_store.session import Applied
from engram_store_client.remote import RemoteSession
from engram_store_client.transport import connect
from tests.integration.serving import StoreProcess
from tests.pairs import (
    INITIAL,
    MakeStore,
    Pair,
    TwinWindow,
    assert_same_tables,
    make_oracle,
    random_tokens,
)

SERVER = Path(__file__).with_name("held_server.py")
KILLED = -9
STEPS, KILLED_STEP = 8, 4


class HeldStore:
    """A store process that stops somewhere, is killed there, and is started again."""

    def __init__(self, path: Path, directory: Path) -> None:
        self.path, self.directory = path, directory
        self.address = f"unix:{directory}/store.sock"
        self._socket = directory / "store.sock"
        self._after: StoreProcess | None = None
        self._first: subprocess.Popen[bytes] | None = None

    def start(self, point: str, hit: int) -> None:
        """The process that is killed the `hit`-th time that it reaches `point`."""
        self._first = subprocess.Popen(
            [sys.executable, SERVER, self.path, self._socket, point, str(hit), self.directory],
            stdout=subprocess.PIPE,
        )
        assert self._first.stdout is not None
        assert self._first.stdout.readline().startswith(b"engram-store: serving")

    def wait_until_reached(self) -> None:
        """Until the process stands still at its point."""
        until((self.directory / "reached").exists)

    def kill_and_start_again(self) -> None:
        """The process dies where it stands, and another one takes its place."""
        assert self._first is not None
        assert self._first.stdout is not None
        (self.directory / "go").touch()
        assert self._first.wait(60) == KILLED
        self._first.stdout.close()
        self._after = StoreProcess(self.path, "--socket", str(self._socket))

    def end(self) -> None:
        """Stop whatever runs."""
        if self._first is not None and self._first.poll() is None:
            self._first.kill()
            self._first.communicate()
        if self._after is not None and self._after.running:
            assert self._after.end()[0] == 0


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process is about to do."""
    for _ in range(6_000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came to be")


@pytest.fixture
def held(make_store: MakeStore) -> Iterator[HeldStore]:
    with tempfile.TemporaryDirectory() as short:  # a socket's path has at most 107 bytes
        held = HeldStore(make_store(), Path(short))
        yield held
        held.end()


def has_rows(window: Any) -> bool:
    """Whether the store has sent all rows of a window."""
    return all(asked.answer.done() for asked in window._asked.values())


@pytest.mark.parametrize("early", [True, False], ids=["rows were given", "rows were not given"])
@pytest.mark.parametrize("point", ["commit.computed", "commit.published"])
def test_a_store_killed_while_a_commit_goes_on_is_one_that_takes_longer(
    held: HeldStore, recipe: Recipe, point: str, *, early: bool
) -> None:
    """Rows that were given early are those of the commit that is sent again, and are trained."""
    held.start(point, KILLED_STEP + 1)
    with connect(held.address) as session:
        pair = Pair(session, make_oracle(recipe, INITIAL))
        windows: dict[int, TwinWindow] = {}
        begun: list[tuple[Future[Applied], Applied]] = []

        def announce(step: int) -> None:
            if step not in windows:
                windows[step] = pair.announce(random_tokens(pair.rng), step)

        for step in range(STEPS):
            announce(step)
            if early or step != KILLED_STEP:
                announce(step + 1)
            if not early or step != KILLED_STEP + 1:  # that one was pushed before the kill
                windows[step].push_random(pair.rng)
            applied = session.begin_commit(step, 0.1)
            begun.append((applied, pair.oracle.commit(step, 0.1)))
            announce(step + 1)
            if step == KILLED_STEP:
                held.wait_until_reached()
                later = windows[step + 1]
                if early:
                    until(partial(has_rows, later.store))
                    later.push_random(pair.rng)
                assert has_rows(later.store) == early
                assert not applied.done()
                held.kill_and_start_again()
        windows[STEPS].store.close()
        assert [applied.result() for applied, _ in begun] == [expected for _, expected in begun]
    held.end()
    with engram_store.open(held.path, "train") as store:
        assert store.step == STEPS
        assert_same_tables(store, pair.oracle)


def test_a_stale_store_process_tells_its_trainers(make_store: MakeStore) -> None:
    """`staleness` and `lookahead_bytes` are settings of the process; rows come early by that."""
    process = StoreProcess(make_store(), "--staleness", "1", "--lookahead-bytes", "1000000")
    try:
        with connect(f"unix:{process.socket}") as session:
            assert isinstance(session, RemoteSession)
            assert session.staleness == 1
            window = session.announce(random_tokens(np.random.default_rng(0)), 1)
            assert window.rows(1)[0].any()
    finally:
        assert process.end()[0] == 0
