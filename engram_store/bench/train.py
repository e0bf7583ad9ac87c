"""Tokens a second of a small model on the CPU: with a store, and with its rows from elsewhere.

All lines train the same model on the same text. They take turns in short blocks: a store works
ahead in the background, which has to happen beside its own steps and not beside those of another
line. What a block left in shared memory is sealed after it, outside the timed part, and the
processor time of that is added to its steps.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import engram_store
from engram_store.bench.harness import (
    Quantity,
    Report,
    Timing,
    describe_machine,
    undisturbed,
)
from engram_store.bench.process import require_process, store_process
from engram_store.bench.train_judge import (
    ADAM,
    ADAM_BACKGROUND,
    BACKGROUND,
    CONSTANT,
    CONSTANT_FORWARD,
    EMBEDDING,
    PROCESS,
    STORE,
    Limits,
    judge,
    limited_notes,
    limited_series,
    notes,
    seal_name,
)
from engram_store.bench.train_limited import LimitedPlace, run_limited
from engram_store.bench.train_place import (
    LOOK_AHEAD,
    STEPS,
    TrainPlace,
    TrainText,
    TrainWorkload,
    describe,
    fresh_store,
    make_train_recipe,
    read_train_text,
)
from engram_store.bench.train_probe import reads_per_second
from engram_store.bench.workplace import LAYER, Say
from engram_store.engine.memory import memory_headroom_bytes
from engram_store.errors import ConfigError, EngramStoreError
from engram_store.stats import StoreStats
from engram_store.types import OptimizerKind, TableSpec

BLOCK = 5
"""Timed steps of a line before it is the next one's turn."""
_DEPTHS = (2, 4)
"""Look-ahead while memory is limited."""
_COPIES = 3
"""Of an embedding in float32: weights and the two moments."""
_SETTLE_SECONDS = 10.0
_IDLE_SECONDS, _IDLE_SHARE = 0.03, 0.1


class UntrainedError(AssertionError):
    """A line did not change its rows: nothing about it may be published."""


def require_train() -> None:
    """Check that there is a model to train.

    Raises:
        ConfigError: a package that it needs is not installed.
    """
    missing = [name for name in ("torch", "engram_store_client") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"bench train trains a model, which needs {', '.join(missing)}: "
            "pip install 'engram-store[torch,server]'"
        )
    require_process()


def bench_train(workload: TrainWorkload, directory: Path, say: Say) -> Report:
    """Measure training on one layer.

    Raises:
        ConfigError: the disk is too small, or tokens cannot be cut into sequences.
        UntrainedError: a line has not changed its rows.
        EngramStoreError: a process that was started failed.
    """
    say("reading text")
    text = read_train_text(workload.steps, workload.tokens)
    recipe = make_train_recipe(workload, text)
    place = TrainPlace.of(recipe, workload.dim, text.steps[:STEPS], text.narrow)
    bench = _Lines(workload, directory, place, say)
    spec = bench.make_store(STORE, OptimizerKind.ROWWISE_ADAGRAD)
    report = Report(
        bench="train", machine=describe_machine(), workload=describe(workload, place, spec)
    )
    bench.run_rowwise()
    bench.run_adam()
    report.timings, report.quantities = bench.timings(), bench.quantities()
    report.references = {
        **dict.fromkeys((STORE, BACKGROUND, PROCESS), (CONSTANT, CONSTANT_FORWARD)),
        **dict.fromkeys((ADAM, ADAM_BACKGROUND), (EMBEDDING, CONSTANT)),
    }
    report.notes = notes(report, bench.without)
    limits = _run_limited(workload, directory, text, say)
    report.workload |= limits.workload
    report.timings += limits.timings()
    report.quantities += limits.quantities()
    report.series = limited_series(limits)
    report.notes += limited_notes(limits)
    judge(report, limits)
    return report


@dataclass
class _Line:
    """One line, its samples, and what ends its blocks."""

    name: str
    step: Callable[[], float]
    seal: Callable[[], Any] | None = None
    samples: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Processor time of a step, all threads of this process."""
    sealing: list[float] = field(default_factory=list)
    """Processor time of sealing what a step left, per step."""

    def block(self, timed: int) -> None:
        """Some steps; the first one finds what was worked on meanwhile, and does not count."""
        self.step()
        cpu = time.process_time()
        for _ in range(timed):
            started = time.perf_counter()
            self.step()
            self.samples.append((time.perf_counter() - started) * 1e3)
        self.cpu.append((time.process_time() - cpu) * 1e3 / timed)
        _settle()
        if self.seal is not None:
            cpu = time.process_time()
            self.seal()
            self.sealing.append((time.process_time() - cpu) * 1e3 / (timed + 1))


def _settle() -> None:
    """Wait until background threads have nothing left to do."""
    until = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < until:
        cpu = time.process_time()
        time.sleep(_IDLE_SECONDS)
        if time.process_time() - cpu < _IDLE_SHARE * _IDLE_SECONDS:
            return


@dataclass
class _Lines:
    """All lines, in two groups that fit into memory one after the other."""

    workload: TrainWorkload
    directory: Path
    place: TrainPlace
    say: Say
    lines: dict[str, _Line] = field(default_factory=dict)
    facts: list[Quantity] = field(default_factory=list)
    without: dict[str, str] = field(default_factory=dict)
    """Why a line was left out, by its name."""

    def make_store(self, name: str, optimizer: OptimizerKind) -> TableSpec:
        """A line's own store, at step 0."""
        recipe, dim = self.place.recipe, self.workload.dim
        return fresh_store(self._root(name), recipe, dim, optimizer, self.say)

    def _root(self, name: str) -> Path:
        return self.directory / f"train-{name.replace(', ', '-').replace(' ', '-')}.engram"

    def run_rowwise(self) -> None:
        """Row-wise Adagrad in the store, waited for and not, and in a process."""
        from engram_store.bench.train_arms import ConstantRows, LocalLine

        with contextlib.ExitStack() as stack:
            free = LocalLine(self.place, ConstantRows(self.place, gradients=True))
            forward = LocalLine(self.place, ConstantRows(self.place, gradients=False))
            stores = self._stores(OptimizerKind.ROWWISE_ADAGRAD, STORE, BACKGROUND)
            self._run(
                [
                    _Line(CONSTANT, free.step),
                    _Line(CONSTANT_FORWARD, forward.step),
                    *(stack.enter_context(line) for line in stores),
                    stack.enter_context(self._process()),
                ]
            )

    def run_adam(self) -> None:
        """Adam in the store, beside what torch has for it."""
        from engram_store.bench.train_arms import ConstantRows, EmbeddedRows, LocalLine

        rows = self.place.recipe.layer(LAYER).rows
        needed, there = _COPIES * 4 * rows * self.place.dim, memory_headroom_bytes()
        with contextlib.ExitStack() as stack:
            free = LocalLine(self.place, ConstantRows(self.place, gradients=True))
            stores = self._stores(OptimizerKind.ADAM, ADAM, ADAM_BACKGROUND)
            lines = [
                _Line(CONSTANT, free.step),
                *(stack.enter_context(line) for line in stores),
            ]
            if needed > 0.8 * there:
                self.without[EMBEDDING] = (
                    f"it takes {needed / 1e9:.1f} GB of memory and {there / 1e9:.1f} GB are free"
                )
                self._run(lines)
                return
            self.say("filling the embedding in memory")
            table = EmbeddedRows(self.place, rows)
            embedding = LocalLine(self.place, table)
            self._run([*lines, _Line(EMBEDDING, embedding.step)])
            self._check(EMBEDDING, table.changed())

    def _stores(
        self, optimizer: OptimizerKind, waited: str, background: str
    ) -> Sequence[contextlib.AbstractContextManager[_Line]]:
        """Lines of embedded stores: commits that are waited for, and others."""
        names = ((waited, True), (background, False))
        return [self._embedded(name, optimizer, wait=wait) for name, wait in names]

    @contextlib.contextmanager
    def _embedded(self, name: str, optimizer: OptimizerKind, *, wait: bool) -> Iterator[_Line]:
        from engram_store.bench.train_arms import StoreLine, read_all

        spec = self.make_store(name, optimizer)
        # Folds would run beside the timed steps of one line and not beside those of another.
        with engram_store.open(
            self._root(name),
            mode="train",
            overlay_bytes=self._overlay_bytes(spec),
            fold_ratio=float("inf"),
        ) as store:
            read_all(store, self.place)
            line = StoreLine(self.place, store, depth=LOOK_AHEAD, wait=wait)
            before = store.stats()
            yield _Line(name, line.step, store.seal)
            self._count(name, before, store.stats())
            line.close()
            self._check(name, line.changed())

    @contextlib.contextmanager
    def _process(self) -> Iterator[_Line]:
        """A store process; its own processor time is not seen from here."""
        from engram_store.bench.train_arms import StoreLine, read_all
        from engram_store_client import connect

        spec = self.make_store(PROCESS, OptimizerKind.ROWWISE_ADAGRAD)
        with (
            store_process(self._root(PROCESS), self._overlay_bytes(spec)) as addresses,
            connect(addresses.unix) as session,
        ):
            read_all(session, self.place)
            line = StoreLine(self.place, session, depth=LOOK_AHEAD)
            yield _Line(PROCESS, line.step, session.snapshot)
            line.close()
            self._check(PROCESS, line.changed())

    def _overlay_bytes(self, spec: TableSpec) -> int:
        """So that no memtable fills within a block: it is sealed after it."""
        per_slot = 4 + spec.state_bytes + spec.row_bytes
        return 2 * per_slot * ((BLOCK + 2) * self.place.most_rows + 8192)

    def _run(self, lines: Sequence[_Line]) -> None:
        """All lines in turn; every other time in the opposite order."""
        rounds = -(-self.workload.repetitions // BLOCK)
        with undisturbed():
            for line in lines:
                line.block(1)
                line.samples, line.cpu, line.sealing = [], [], []
            for number in range(rounds):
                self.say(f"training, round {number + 1} of {rounds}: {lines[-1].name} and others")
                for line in lines if number % 2 == 0 else reversed(lines):
                    line.block(BLOCK)
        for line in lines:
            held = self.lines.setdefault(line.name, _Line(line.name, line.step))
            held.samples += line.samples
            held.cpu += line.cpu
            held.sealing += line.sealing

    def _check(self, name: str, changed: float) -> None:
        """Raises: UntrainedError."""
        if changed < 0.5:
            raise UntrainedError(f"{name}: only {changed:.1%} of the rows of a step have changed")
        self.facts.append(
            Quantity(f"{name}: rows changed", "% of the first step", np.array([100 * changed]))
        )

    def _count(self, name: str, before: StoreStats, after: StoreStats) -> None:
        """What a store says about its steps."""
        then, now = before.tables[LAYER], after.tables[LAYER]
        waited = 1e3 * (after.wait_seconds - before.wait_seconds)
        counts = (
            ("rows copied twice", "rows a step", now.rows_copied_again - then.rows_copied_again),
            ("rows not in memory", "rows a step", now.cold_rows - then.cold_rows),
            ("waited for rows", "ms a step", waited),
        )
        steps = after.steps - before.steps
        self.facts += [
            Quantity(f"{name}: {what}", unit, np.array([count / steps]))
            for what, unit, count in counts
        ]

    def timings(self) -> list[Timing]:
        """A whole step of every line."""
        return [Timing(name, np.array(line.samples)) for name, line in self.lines.items()]

    def quantities(self) -> list[Quantity]:
        """Speed, processor time, and what stores count."""
        tokens = self.workload.tokens
        speeds = [
            Quantity(f"{name}: speed", "tokens/s", tokens * 1e3 / np.array(line.samples))
            for name, line in self.lines.items()
        ]
        cpu = [
            Quantity(f"{name}: processor", "CPU ms a step", np.array(line.cpu))
            for name, line in self.lines.items()
        ]
        sealing = [
            Quantity(seal_name(name), "CPU ms a step", np.array(line.sealing))
            for name, line in self.lines.items()
            if line.sealing and name != PROCESS
        ]
        return [*speeds, *cpu, *sealing, *self.facts]


def _run_limited(workload: TrainWorkload, directory: Path, text: TrainText, say: Say) -> Limits:
    """The same with a table four times the memory limit, for every look-ahead."""
    larger = replace(workload, rows=workload.limited_rows)
    recipe = make_train_recipe(larger, text)
    root = directory / "train-limited.engram"
    spec = fresh_store(root, recipe, workload.dim, OptimizerKind.ROWWISE_ADAGRAD, say)
    table_bytes = spec.rows * (spec.row_bytes + spec.state_bytes)
    steps = text.cut(workload.limited_tokens)[: workload.limited_steps]
    place = LimitedPlace.make(root, steps, text.narrow, table_bytes)
    say("measuring the disk")
    limits = Limits(table_bytes, place.limit_bytes, reads_per_second(root, LAYER))
    try:
        for depth in _DEPTHS:
            say(f"training with little memory, look-ahead {depth}")
            limits.found[depth] = run_limited(place, depth)
    except OSError as error:
        limits.missing = f"no memory cgroup here ({error})"
    except EngramStoreError as error:
        # What was measured before is not lost because of it.
        limits.missing = str(error)
    return limits
