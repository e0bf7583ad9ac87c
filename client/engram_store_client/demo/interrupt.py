"""Kill a trainer, then kill the store under its successor, and compare with the undisturbed run."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from engram_store_client.demo import worker
from engram_store_client.demo.base import OnStep, Sequences
from engram_store_client.demo.compare import different_dense, different_losses, different_tables
from engram_store_client.demo.files import DemoFiles
from engram_store_client.demo.kills import Killer, plan_kills
from engram_store_client.demo.memory import Arm, make_arm
from engram_store_client.demo.process import Outage
from engram_store_client.demo.settings import Settings
from engram_store_client.demo.stores import ServedStore, Stores
from engram_store_client.demo.tables import table_blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Undisturbed:
    """The training that is repeated."""

    losses: Sequence[float]
    """By step."""
    step_seconds: float
    """How long one of its steps took."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interrupted:
    """What became of a training whose trainer and whose store were killed."""

    killed_after: int
    """The last step that the killed trainer told about."""
    found_step: int
    """Steps in the store when the next trainer came: what the kill did not take."""
    resumed_at: int
    """Step of the checkpoint that it went back to."""
    outages: tuple[Outage, ...]
    """The kills of the store, under that trainer; none if the store has no process."""
    compared_at: int
    rows: int
    """Rows compared, with their state."""
    losses: int
    """Losses compared: of both trainers."""
    differences: tuple[str, ...]

    @property
    def bit_equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences


@dataclass(slots=True)
class _Steps:
    """Losses of both trainers."""

    show: OnStep
    losses: dict[int, list[float]] = field(default_factory=dict)

    def add(self, step: int, loss: float) -> None:
        self.losses.setdefault(step, []).append(loss)
        self.show(step, loss)


def interrupt(
    files: DemoFiles,
    stores: Stores,
    model: nn.Module,
    data: Sequences,
    settings: Settings,
    undisturbed: Undisturbed,
    on_step: OnStep,
) -> Interrupted:
    """Train `files.second_store` up to `settings.compare_at`, with every interruption.

    Args:
        files: with the undisturbed run's store, and its checkpoint of that step.
        stores: serves the store; without a process only the trainer is killed.
        model: the frozen model, nothing attached to it.
        data: token ids [sequences, time] to train on.
        settings: of the undisturbed run.
        undisturbed: what to repeat.
        on_step: called with every step of both trainers.

    Raises:
        StoreProcessError, RuntimeError: a process ended that nobody killed.
    """
    steps = _Steps(on_step)
    with _trainer(files.root) as trainer, stores.serve(files.second_store) as store:
        killed_after = _kill_trainer(trainer, store, settings, steps)
        with store.train() as session:
            found = session.step
            arm = make_arm(model, session, settings)
            arm.load(files.checkpoint)
            _train_on(arm, store, data, settings, undisturbed.step_seconds, steps)
            arm.save(files.resumed)
            arm.memory.detach()
        outages = () if store.process is None else store.process.outages
    return Interrupted(
        killed_after=killed_after,
        found_step=found,
        resumed_at=settings.snapshot_at,
        outages=outages,
        compared_at=settings.compare_at,
        rows=sum(len(block) for _, block, _ in table_blocks(files.store, settings.compare_at)),
        losses=sum(map(len, steps.losses.values())),
        differences=_differences(files, settings, steps.losses, undisturbed.losses),
    )


def _kill_trainer(
    trainer: "subprocess.Popen[str]", store: ServedStore, settings: Settings, steps: _Steps
) -> int:
    """Let another process train, and kill it; its last step. Raises: RuntimeError."""
    assert trainer.stdin is not None
    assert trainer.stdout is not None
    with suppress(BrokenPipeError), trainer.stdin:  # if it is gone, that is told below
        trainer.stdin.write(f"{store.address}\n")
    step = 0
    with trainer.stdout:
        for line in trainer.stdout:
            message = json.loads(line)
            step, loss = int(message["step"]), float(message["loss"])
            steps.add(step, loss)
            if step == settings.kill_after:
                trainer.kill()
    if (code := trainer.wait()) != -signal.SIGKILL:
        raise RuntimeError(f"the trainer to be killed ended by itself, with exit code {code}")
    return step


def _train_on(
    arm: Arm,
    store: ServedStore,
    data: Sequences,
    settings: Settings,
    step_seconds: float,
    steps: _Steps,
) -> None:
    """Train up to the comparison, while the store's process, if it has one, is killed."""
    if store.process is None:
        arm.train(data, settings.compare_at, steps.add)
        return
    with Killer(store.process, arm, plan_kills(settings), step_seconds=step_seconds) as killer:

        def add(step: int, loss: float) -> None:
            steps.add(step, loss)
            killer.after(step)

        arm.train(data, settings.compare_at, add)


@contextmanager
def _trainer(directory: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that trains what it is told at standard input; it does not outlive the block.

    Importing torch takes it seconds, so it is started before the store is there.
    """
    command = [sys.executable, "-m", worker.__name__, str(directory)]
    process = subprocess.Popen(  # noqa: S603 - our own
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


def _differences(
    files: DemoFiles,
    settings: Settings,
    losses: Mapping[int, Sequence[float]],
    reference: Sequence[float],
) -> tuple[str, ...]:
    """What is not equal, in both stores as they are on disk."""
    return (
        *different_losses(losses, reference),
        *different_dense(files.reference, files.resumed),
        *different_tables(
            table_blocks(files.store, settings.compare_at),
            table_blocks(files.second_store, settings.compare_at),
        ),
    )
