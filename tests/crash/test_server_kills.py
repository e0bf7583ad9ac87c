"""A store process that is killed and started again: its trainer sees nothing but a pause.

Real processes and a real SIGKILL. Whatever comes back is compared with the oracle in numpy, and
so are the tables in the end.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import engram_store
from engram_store.errors import ProtocolError, StoreClosedError, StoreUnreachableError
from engram_store.recipes import Recipe
from engram_store_client.transport import connect
from tests.pairs import (
    INITIAL,
    MakeStore,
    Pair,
    TwinWindow,
    assert_same_tables,
    make_oracle,
    memtable_directory,
    random_tokens,
    specs_of,
    tiny_overlay_bytes,
)
from tests.ranks import Plan

SERVER = Path(__file__).with_name("server.py")
KILLED = -9
SECONDS = 60.0
Kill = tuple[str, int]


class StoreKeeper:
    """Keeps a store process running: started again, with the next plan, whenever it was killed."""

    def __init__(self, path: Path, socket: Path, overlay_bytes: int) -> None:
        self.path, self.address = path, f"unix:{socket}"
        self.deaths = 0
        self.store_id = engram_store.inspect(path).metadata.store_id
        self._plan = {"socket": str(socket), "overlay_bytes": overlay_bytes}
        self._plans: Iterator[Kill] = iter(())
        self._loses_memory = self._stopping = False
        self._ready, self._changed = -1, threading.Condition()
        self._thread: threading.Thread | None = None

    def start(self, kills: Sequence[Kill] = ()) -> None:
        """Start the first process; process number n is killed as `kills[n]` says."""
        self._plans = iter(kills)
        self._spawn()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _spawn(self) -> None:
        plan = json.dumps({**self._plan, "kill": next(self._plans, None)})
        self._process = subprocess.Popen(
            [sys.executable, SERVER, self.path, plan], stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        ready = self._process.stdout.readline().startswith(b"engram-store: serving")
        # Opening the store seals what it finds in shared memory, and may be killed there.
        assert ready or self._process.wait() == KILLED
        with self._changed:
            self._ready = self.deaths
            self._changed.notify_all()

    def wait_ready(self, deaths: int, seconds: float) -> bool:
        """Wait for the process after so many deaths; whether it serves."""
        with self._changed:
            return self._changed.wait_for(lambda: self._ready >= deaths, seconds)

    def _keep(self) -> None:
        while self._process.wait() == KILLED and not self._stopping:
            self.deaths += 1
            if self._loses_memory:
                shutil.rmtree(memtable_directory(self.path, self.store_id))
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._spawn()

    def kill(self, *, lose_memory: bool = False) -> None:
        """As `kill -9`, or as if the whole host went down."""
        self._loses_memory = lose_memory
        self._process.kill()

    def stop(self, *, kill: bool = False) -> None:
        """End the store for good."""
        self._stopping = True
        (self._process.kill if kill else self._process.terminate)()
        assert self._thread is not None
        self._thread.join(SECONDS)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture
def keeper(make_store: MakeStore, recipe: Recipe) -> Iterator[StoreKeeper]:
    with tempfile.TemporaryDirectory() as short:  # a socket's path has at most 107 bytes
        overlay_bytes = tiny_overlay_bytes(specs_of(recipe))
        keeper = StoreKeeper(make_store(), Path(short, "run", "store.sock"), overlay_bytes)
        yield keeper
        keeper.stop(kill=True)


def train(pair: Pair, steps: int, keeper: StoreKeeper, kills: Sequence[Kill] = ()) -> None:
    """Two windows a step, announced one step ahead; killed at some moments of some steps."""
    announced: dict[int, list[TwinWindow]] = {}
    to_come = list(kills)
    last = pair.step + steps - 1
    for step in range(pair.step, last + 1):
        for coming in (step, min(step + 1, last)):
            if coming not in announced:
                tokens = [random_tokens(pair.rng) for _ in range(2)]
                announced[coming] = [pair.announce(text, coming) for text in tokens]
        reach("announced", step, keeper, to_come)
        for window in announced.pop(step):
            window.push_random(pair.rng)
            reach("pushed", step, keeper, to_come)
        pair.session.gradient_norm()
        reach("summed", step, keeper, to_come)
        pair.commit()
        reach("committed", step, keeper, to_come)


def reach(moment: str, step: int, keeper: StoreKeeper, to_come: list[Kill]) -> None:
    """Kill at a planned moment, once: the store may be back before the moment comes again."""
    if (moment, step) in to_come:
        to_come.remove((moment, step))
        keeper.kill()


def check_tables(pair: Pair, keeper: StoreKeeper) -> None:
    """Leave, stop the store, and look at its files."""
    pair.session.close()
    keeper.stop()
    with engram_store.open(keeper.path, "train") as store:
        assert store.step == pair.oracle.step
        assert_same_tables(store, pair.oracle)


def test_a_store_killed_while_it_commits_is_one_that_takes_longer(
    keeper: StoreKeeper, recipe: Recipe
) -> None:
    """Before a step is applied, after it but before the answer, while sealing, in a snapshot."""
    keeper.start(
        [
            ("commit.computed", 3),
            ("commit.published", 2),
            ("seal.published", 1),
            ("snapshot.published", 1),
            ("commit.published", 1),
        ]
    )
    with connect(keeper.address) as session:
        pair = Pair(session, make_oracle(recipe, INITIAL))
        train(pair, 9, keeper)
        pair.snapshot()
        train(pair, 3, keeper)

        assert keeper.deaths == 5
        check_tables(pair, keeper)


def test_a_store_killed_between_requests_is_one_that_takes_longer(
    keeper: StoreKeeper, recipe: Recipe
) -> None:
    """With windows announced, gradients pushed, and a gradient norm asked for."""
    kills = [("announced", 1), ("pushed", 3), ("summed", 4), ("committed", 6)]
    keeper.start()
    with connect(keeper.address) as session:
        pair = Pair(session, make_oracle(recipe, INITIAL))
        train(pair, 9, keeper, kills)

        assert keeper.deaths == len(kills)
        check_tables(pair, keeper)


def test_twenty_kills_at_random_moments_change_nothing(keeper: StoreKeeper, recipe: Recipe) -> None:
    """One training through all of them, one that was never disturbed beside it."""
    keeper.start()
    delays = np.random.default_rng(20).uniform(0, 0.25, 20)

    def kill_again_and_again() -> None:
        for number, delay in enumerate(delays):
            assert keeper.wait_ready(number, SECONDS)
            threading.Event().wait(delay)
            keeper.kill()

    killer = threading.Thread(target=kill_again_and_again)
    with connect(keeper.address) as session:
        pair = Pair(session, make_oracle(recipe, INITIAL))
        killer.start()
        while killer.is_alive() or keeper.deaths < len(delays):
            train(pair, 2, keeper)
        train(pair, 2, keeper)

        assert keeper.deaths == len(delays)
        check_tables(pair, keeper)


@pytest.mark.parametrize("moment", ["commit.computed", "commit.published"])
def test_two_ranks_survive_what_one_survives(
    keeper: StoreKeeper, recipe: Recipe, moment: str
) -> None:
    """Killed while it applies a step of both, and between their commits."""
    keeper.start([(moment, 2), (moment, 1)])
    plan = Plan(ranks=2, steps=8)

    def kill_before_rank_one(rank: int, step: int) -> float:
        if (rank, step) == (1, 5):
            keeper.kill()
        return 0.02 * rank

    plan.train_together(keeper.address, kill_before_rank_one)
    keeper.stop()

    assert keeper.deaths == 3
    with engram_store.open(keeper.path, "train") as store:
        assert_same_tables(store, plan.oracle(lambda: make_oracle(recipe, INITIAL)))


def test_a_store_killed_while_it_goes_back_has_gone_back(
    keeper: StoreKeeper, recipe: Recipe
) -> None:
    """A restore that was not answered is done again, whether or not it took effect."""
    keeper.start([("restore.published", 1), ("restore.snapshots_dropped", 1)])
    with connect(keeper.address) as session:
        pair = Pair(session, make_oracle(recipe, INITIAL))
        train(pair, 2, keeper)
        ref = pair.snapshot()
        for _ in range(2):
            train(pair, 2, keeper)
            pair.restore(ref)

        assert keeper.deaths == 2
        train(pair, 3, keeper)
        check_tables(pair, keeper)


def test_a_host_that_lost_steps_ends_the_session_and_names_the_way_out(
    keeper: StoreKeeper, recipe: Recipe
) -> None:
    """Training on would silently skip what was lost; another session can restore and train."""
    keeper.start()
    with connect(keeper.address) as session:
        pair = Pair(session, make_oracle(recipe, INITIAL))
        train(pair, 2, keeper)
        ref = pair.snapshot()
        train(pair, 1, keeper)
        keeper.kill(lose_memory=True)

        with pytest.raises(ProtocolError, match=r"step 2, but it had applied 3 .*restore"):
            train(pair, 1, keeper)
        with pytest.raises(ProtocolError, match="restore the checkpoint"):
            session.snapshot()

    with connect(keeper.address) as session:
        pair = Pair(session, pair.oracle)
        pair.restore(ref)
        train(pair, 2, keeper)
        check_tables(pair, keeper)


def test_a_store_that_stays_away_is_reported_with_its_address(keeper: StoreKeeper) -> None:
    """After `reconnect_seconds`; leaving still works."""
    keeper.start()
    with connect(keeper.address, reconnect_seconds=0.2) as session:
        window = session.announce(np.array([[1, 2, 3]]), 0)
        keeper.stop(kill=True)

        with pytest.raises(StoreUnreachableError, match=r"unix:.*engram-store serve"):
            session.gradient_norm()
        window.close()
    with pytest.raises((StoreClosedError, StoreUnreachableError)):
        session.snapshot()
