"""Several ranks that train one store together, each on a thread of its own."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.session import Applied, Session
from engram_store.testing import MemorySession
from engram_store.types import TokenIds
from engram_store_client.transport import connect
from tests.pairs import random_tokens

Pause = Callable[[int, int], float]
"""Seconds that a rank waits before its commit, by rank and step."""


@dataclass(frozen=True)
class RankWindow:
    """A window of one rank, and its gradients by layer."""

    tokens: TokenIds
    seed: int

    def gradients(self, layer: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The same for everybody who trains it."""
        rng = np.random.default_rng((self.seed, layer))
        return rng.standard_normal(shape).astype(np.float32)

    def train(self, session: Session, step: int) -> None:
        """Announce, read and push."""
        window = session.announce(self.tokens, step)
        for layer in session.tables:
            window.push(layer, self.gradients(layer, window.rows(layer)[0].shape))


@dataclass
class Plan:
    """What every rank does in every step."""

    ranks: int
    steps: int
    windows: int = 2
    """Of each rank and step."""
    seed: int = 0
    _windows: dict[tuple[int, int], list[RankWindow]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        for step in range(self.steps):
            for rank in range(self.ranks):
                self._windows[step, rank] = [
                    RankWindow(random_tokens(rng), int(rng.integers(1 << 30)))
                    for _ in range(self.windows)
                ]

    def of(self, step: int, rank: int) -> Sequence[RankWindow]:
        """In the order of their announcement."""
        return self._windows[step, rank]

    def train_alone(self, session: Session) -> None:
        """One trainer that has all the windows, in the order of the ranks."""
        for step in range(self.steps):
            for rank in range(self.ranks):
                for window in self.of(step, rank):
                    window.train(session, step)
            session.commit(step, 0.1)

    def oracle(self, make: Callable[[], MemorySession]) -> MemorySession:
        """The tables in the end."""
        oracle = make()
        self.train_alone(oracle)
        return oracle

    def train_rank(self, session: Session, rank: int, pause: Pause | None = None) -> list[Applied]:
        """One rank's part of every step."""
        applied = []
        for step in range(session.step, self.steps):
            for window in self.of(step, rank):
                window.train(session, step)
            if pause is not None:
                time.sleep(pause(rank, step))
            applied.append(session.commit(step, 0.1))
        return applied

    def train_together(
        self, address: str, pause: Pause | None = None, **options: Any
    ) -> list[list[Applied]]:
        """All ranks, each through a session of its own."""

        def run(rank: int) -> list[Applied]:
            with connect(
                address, job="tests", rank=rank, world_size=self.ranks, **options
            ) as session:
                return self.train_rank(session, rank, pause)

        with ThreadPoolExecutor(self.ranks) as pool:
            return list(pool.map(run, range(self.ranks)))
