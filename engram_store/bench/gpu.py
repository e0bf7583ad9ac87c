"""Step time of a large frozen model on a GPU: rows from a store, and from its own memory.

Arms train one after the other on the same base, because tables in GPU memory leave no room beside
them; the reference is measured before and after the store, so that a drift would be seen.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engram_store.bench.gpu_place import (
    LOOK_AHEAD,
    GpuPlace,
    GpuWorkload,
    describe_gpu,
    gpu_store,
)
from engram_store.bench.harness import (
    Quantity,
    Report,
    Target,
    Timing,
    describe_machine,
    undisturbed,
)
from engram_store.bench.train import UntrainedError
from engram_store.bench.workplace import Say
from engram_store.errors import ConfigError

STORE, BACKGROUND = "store", "store, commits in the background"
CONSTANT = "constant rows on the GPU"
TABLES = "tables in GPU memory"
SMALL = "store, smaller tables"
_WARM_UP = 3
_MOST_TIMES = 1.02
_MOST_MEMORY = 1.01
_LEAST_CHANGED = 0.5


class Arm(Protocol):
    """What is trained."""

    def step(self) -> float:
        """One training step; returns the loss."""
        ...

    def close(self) -> None:
        """Leave the model as it was."""
        ...


def require_gpu() -> None:
    """Check that there is something to train and to train it on.

    Raises:
        ConfigError: a package that it needs is not installed, or there is no CUDA device.
    """
    names = ("torch", "transformers", "engram_store_client")
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"bench train --device cuda needs {', '.join(missing)}: pip install 'engram-store[hf]'"
        )
    from engram_store.bench.gpu_card import CudaCard

    CudaCard()


def bench_gpu(workload: GpuWorkload, directory: Path, say: Say, card: Any = None) -> Report:
    """Measure training beside a store on a card.

    Args:
        workload: what to measure.
        directory: for the stores.
        say: told what is being done.
        card: where to train; None: the current CUDA device.

    Raises:
        ConfigError: no CUDA device, or the disk is too small.
        UntrainedError: an arm has not changed its rows.
    """
    from engram_store.bench.gpu_arms import build_base
    from engram_store.bench.gpu_card import CudaCard

    card = CudaCard() if card is None else card
    card.limit(workload.vram_bytes)
    say("reading text")
    place = GpuPlace.make(workload)
    say("making the model")
    model = build_base(workload.base, card.device, checkpointing=workload.checkpointing)
    bench = _Arms(workload, directory, card, model, say)
    spec = gpu_store(place, bench.root(STORE), say)
    report = Report(
        bench="train-cuda",
        machine=describe_machine() | card.describe(),
        workload=describe_gpu(workload, place, spec),
    )
    bench.run(place)
    report.timings, report.quantities = bench.timings(), bench.quantities()
    report.references = dict.fromkeys((STORE, BACKGROUND, SMALL), (CONSTANT, TABLES))
    report.targets = judge_gpu(report, workload.smaller)
    report.notes = [
        *_notes(workload),
        *(f"'{n}' is left out: {w}" for n, w in bench.without.items()),
    ]
    return report


@dataclass
class _Arms:
    """All arms, and what they took."""

    workload: GpuWorkload
    directory: Path
    card: Any
    model: Any
    say: Say
    samples: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    facts: list[Quantity] = field(default_factory=list)
    without: dict[str, str] = field(default_factory=dict)
    """Why an arm was left out, by its name."""

    def root(self, name: str) -> Path:
        """Where an arm's store is; one that goes back to its start serves two arms."""
        return self.directory / f"cuda-{'small' if name == SMALL else 'store'}.engram"

    def run(self, place: GpuPlace) -> None:
        """All of them."""
        from engram_store.bench.gpu_arms import ConstantRows, DeviceTables, LocalArm

        layers, device = self.workload.layers, self.card.device
        configs = self._gate_configs(place)

        def constant() -> LocalArm:
            return LocalArm(self.model, place, ConstantRows(place, layers, device), configs)

        def tables() -> LocalArm:
            rows = {layer: place.recipe.layer(layer).rows for layer in layers}
            return LocalArm(self.model, place, DeviceTables(place, rows, device), configs)

        self._measure_local(CONSTANT, constant)
        self._measure_store(STORE, place)
        self._measure_local(CONSTANT, constant)
        self._measure_store(BACKGROUND, place, wait=False)
        self._measure_store(SMALL, GpuPlace.make(self.workload, smaller=self.workload.smaller))
        self._measure_local(CONSTANT, constant)
        self._measure_local(TABLES, tables)

    def _gate_configs(self, place: GpuPlace) -> dict[int, Any]:
        """What the store's gates are, for those of the arms without one."""
        with self._store(STORE, place, wait=True) as arm:
            return dict(arm.memory.gate_configs)

    def _measure_local(self, name: str, make: Any) -> None:
        """An arm without a store, which may not fit."""
        import torch

        self.card.begin_peak()
        try:
            arm = make()
        except torch.OutOfMemoryError as error:
            self.without[name] = f"it does not fit: {error}".splitlines()[0]
            return
        try:
            self._measure(name, arm)
        except torch.OutOfMemoryError as error:
            self.samples.pop(name, None)
            self.without[name] = f"a step does not fit: {error}".splitlines()[0]
        finally:
            arm.close()

    @contextlib.contextmanager
    def _store(self, name: str, place: GpuPlace, *, wait: bool) -> Iterator[Any]:
        from engram_store.bench.gpu_arms import StoreArm, read_all
        from engram_store_client import connect

        gpu_store(place, self.root(name), self.say)
        # Folds would run beside some timed steps only.
        with connect(self.root(name), fold_ratio=float("inf")) as session:
            read_all(session, place)
            self.card.begin_peak()
            arm = StoreArm(self.model, place, session, depth=LOOK_AHEAD, wait=wait)
            try:
                yield arm
            finally:
                arm.close()

    def _measure_store(self, name: str, place: GpuPlace, *, wait: bool = True) -> None:
        """Raises: UntrainedError."""
        with self._store(name, place, wait=wait) as arm:
            self._measure(name, arm)
            self._count(name, arm)

    def _count(self, name: str, arm: Any) -> None:
        """What else a store's arm tells. Raises: UntrainedError."""
        if name == STORE and self.workload.trace is not None:
            from engram_store.bench.gpu_card import record_trace

            self.say("recording a trace")
            record_trace(self.workload.trace, arm.step)
        changed = arm.changed()
        if changed < _LEAST_CHANGED:
            raise UntrainedError(f"{name}: only {changed:.1%} of the rows of a step have changed")
        crossed = arm.memory.transfers()
        for what, unit, value in (
            ("rows changed", "% of the first step", 100 * changed),
            ("pinned", "MB", crossed.pinned_bytes / 1e6),
            ("buffers on the GPU", "MB", crossed.device_bytes / 1e6),
            ("pageable copies", "% of all", 100 * crossed.pageable_copies / max(1, crossed.copies)),
            ("waits for copies", "in all", crossed.waits),
        ):
            self.facts.append(Quantity(f"{name}: {what}", unit, np.array([float(value)])))

    def _measure(self, name: str, arm: Arm) -> None:
        self.say(f"training: {name}")
        with undisturbed():
            for _ in range(_WARM_UP):
                arm.step()
            for _ in range(self.workload.repetitions):
                started = time.perf_counter()
                arm.step()
                self.samples.setdefault(name, []).append((time.perf_counter() - started) * 1e3)
        self.peaks[name] = max(self.peaks.get(name, 0), self.card.peak_bytes())

    def timings(self) -> list[Timing]:
        """A whole step of every arm."""
        return [Timing(name, np.array(samples)) for name, samples in self.samples.items()]

    def quantities(self) -> list[Quantity]:
        """Speed, and memory."""
        tokens = self.workload.tokens
        speeds = [
            Quantity(f"{name}: speed", "tokens/s", tokens * 1e3 / np.array(samples))
            for name, samples in self.samples.items()
        ]
        peaks = [
            Quantity(peak_name(name), "GB", np.array([self.peaks[name] / 1e9]))
            for name in self.samples
        ]
        return [*speeds, *peaks, *self.facts]


def peak_name(arm: str) -> str:
    """Name of the quantity with an arm's peak of GPU memory."""
    return f"{arm}: peak of GPU memory"


def judge_gpu(report: Report, smaller: int) -> list[Target]:
    """What is promised, from the report's timings and quantities. Pure."""

    def times(name: str, reference: str) -> float | None:
        mine, other = report.timing(name), report.timing(reference)
        return None if mine is None or other is None else mine.median_ms / other.median_ms

    peaks = {q.name: q.median for q in report.quantities}
    large, small = peaks.get(peak_name(STORE)), peaks.get(peak_name(SMALL))
    return [
        Target.at_most("step, over constant rows", _MOST_TIMES, times(STORE, CONSTANT), "x"),
        Target.at_most(
            "step, commits in the background", _MOST_TIMES, times(BACKGROUND, CONSTANT), "x"
        ),
        Target.at_most(
            f"GPU memory with tables {smaller} times as large",
            _MOST_MEMORY,
            large / small if large and small else None,
            "x",
        ),
    ]


def _notes(workload: GpuWorkload) -> list[str]:
    base, limit = workload.base, workload.vram_bytes / 2**30
    return [
        f"the base: Qwen3's kind, {base.blocks} blocks of width {base.hidden}, random, bfloat16",
        "the base is frozen; gates are trained by AdamW",
        f"GPU memory is limited to {limit:.0f} GiB; peaks are what torch reserved",
        f"rows come in before blocks {', '.join(map(str, workload.layers))}",
        f"'{CONSTANT}': unique rows and inverse are there, their gradient is computed and dropped",
        f"'{TABLES}': row ids are given, so nothing is hashed; row-wise Adagrad on the GPU",
        "a step ends when the host has its loss",
    ]
