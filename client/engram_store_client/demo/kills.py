"""Kills a store process under a trainer that is in the middle of its steps."""

import threading
from dataclasses import dataclass
from typing import Self

import numpy as np

from engram_store_client.demo.memory import Arm
from engram_store_client.demo.process import StoreProcess
from engram_store_client.demo.settings import Settings


@dataclass(frozen=True, kw_only=True, slots=True)
class KillPlan:
    """Two kills of a store."""

    before_commit: int
    """In this step, when its gradients were handed over and its commit was not asked for."""
    at_random: int
    """From the start of this step on, ..."""
    fraction: float
    """... after so much of a step's usual time; a moment that nothing in the trainer chooses."""


def plan_kills(settings: Settings) -> KillPlan:
    """One kill in each half of the steps from the checkpoint to the comparison. Pure."""
    random = np.random.default_rng([settings.seed, settings.steps])
    first, stop = settings.snapshot_at, settings.compare_at
    middle = (first + stop) // 2
    return KillPlan(
        before_commit=int(random.integers(first, middle)),
        # Not in the last step, if there are others: somebody must have to go on.
        at_random=int(random.integers(middle, max(middle + 1, stop - 1))),
        fraction=float(random.uniform(0.05, 0.95)),
    )


class Killer:
    """Carries out a plan while an arm trains; a context.

    Args:
        store: the process to kill.
        arm: its trainer, which is told nothing.
        plan: when.
        step_seconds: how long a step takes when nothing is killed.
    """

    def __init__(
        self, store: StoreProcess, arm: Arm, plan: KillPlan, *, step_seconds: float
    ) -> None:
        self._store, self._arm, self._plan = store, arm, plan
        self._timer = threading.Timer(plan.fraction * step_seconds, self._kill)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        # After backward and the optimiser of the gates; what follows is the commit.
        self._hook = self._arm.optimizer.register_step_post_hook(
            lambda *_: self._before_commit(self._arm.memory.step)
        )
        return self

    def __exit__(self, *exc: object) -> None:
        self._hook.remove()
        self._timer.cancel()

    def _before_commit(self, step: int) -> None:
        if step == self._plan.before_commit:
            self._kill()

    def after(self, step: int) -> None:
        """Call after every step."""
        if step == self._plan.at_random - 1:
            self._timer.start()
        elif step == self._plan.at_random:
            self._timer.join()  # late on a busy machine, but never left out

    def _kill(self) -> None:
        self._store.kill(self._arm.memory.step)
