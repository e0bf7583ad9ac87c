"""Kill a trainer, start another, and compare with a run that was never interrupted."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from engram_store_client.checkpoint import DENSE_FILE
from engram_store_client.demo import worker
from engram_store_client.demo.base import OnStep
from engram_store_client.demo.files import DemoFiles
from engram_store_client.demo.memory import OPTIMIZER_FILE
from engram_store_client.demo.settings import Settings
from engram_store_client.demo.tables import Block, table_blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """What became of the run that was killed."""

    killed_after: int
    """The last step it told about."""
    found_step: int
    """Steps in its store when the next process opened it: what the kill did not take."""
    resumed_at: int
    compared_at: int
    rows: int
    """Rows compared, with their state."""
    losses: int
    """Losses compared: of both processes."""
    differences: tuple[str, ...]

    @property
    def bit_equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences


def kill_and_resume(
    files: DemoFiles, settings: Settings, reference: Sequence[float], on_step: OnStep
) -> Resumed:
    """Run both processes.

    Args:
        files: with the uninterrupted run's store, and its checkpoint of `settings.compare_at`.
        settings: of that run.
        reference: its losses, by step.
        on_step: called with every step of both processes.
    """
    losses: dict[int, list[float]] = {}
    with _worker(files) as (process, messages):
        next(messages)
        killed_after = 0
        for message in messages:
            killed_after = _record(message, losses, on_step)
            if killed_after == settings.kill_after:
                process.kill()
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the run to be killed ended by itself: exit {process.returncode}")
    with _worker(files, worker.RESUME) as (process, messages):
        found = next(messages)["found"]
        for message in messages:
            _record(message, losses, on_step)
    if process.returncode:
        raise RuntimeError(f"the resumed run failed: exit {process.returncode}")
    differences = (
        *different_losses(losses, reference),
        *_different_dense(files),
        *different_tables(
            table_blocks(files.store, settings.compare_at),
            table_blocks(files.killed_store, settings.compare_at),
        ),
    )
    rows = sum(len(block) for _, block, _ in table_blocks(files.store, settings.compare_at))
    return Resumed(
        killed_after=killed_after,
        found_step=found,
        resumed_at=settings.snapshot_at,
        compared_at=settings.compare_at,
        rows=rows,
        losses=sum(map(len, losses.values())),
        differences=differences,
    )


@contextmanager
def _worker(
    files: DemoFiles, *arguments: str
) -> Iterator[tuple["subprocess.Popen[str]", Iterator[Any]]]:
    """A worker process and what it prints; it does not outlive the block."""
    command = [sys.executable, "-m", worker.__name__, str(files.root), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own
    assert process.stdout is not None
    try:
        with process.stdout:
            yield process, map(json.loads, process.stdout)
        process.wait()
    finally:
        process.kill()
        process.wait()


def _record(message: Mapping[str, Any], losses: dict[int, list[float]], on_step: OnStep) -> int:
    step, loss = int(message["step"]), float(message["loss"])
    losses.setdefault(step, []).append(loss)
    on_step(step, loss)
    return step


def different_losses(
    losses: Mapping[int, Sequence[float]], reference: Sequence[float]
) -> list[str]:
    """Every step of both processes, those that were repeated twice."""
    return [
        f"loss of step {step}"
        for step, values in losses.items()
        if any(value != reference[step] for value in values)
    ]


def _different_dense(files: DemoFiles) -> list[str]:
    """Gates and their optimiser."""
    ours, theirs = (_dense(directory) for directory in (files.reference, files.resumed))
    return [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours or name not in theirs or not same_bits(ours[name], theirs[name])
    ]


def _dense(directory: Any) -> dict[str, NDArray[Any]]:
    tensors = load_file(directory / DENSE_FILE)
    for number, state in torch.load(directory / OPTIMIZER_FILE)["state"].items():
        tensors |= {f"optimizer {number} {name}": tensor for name, tensor in state.items()}
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def different_tables(ours: Iterable[Block], theirs: Iterable[Block]) -> list[str]:
    """Rows and optimiser state of all tables. Raises: ValueError when one has more tables."""
    return [
        f"{what} of layer {layer}"
        for (layer, *a), (_, *b) in zip(ours, theirs, strict=True)
        for what, block, other in zip(("rows", "state"), a, b, strict=True)
        if not same_bits(block, other)
    ]


def same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Equal as bytes: -0.0 is not 0.0, a NaN equals itself."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
