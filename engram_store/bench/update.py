"""A commit of a step's gradients, beside the same update of a table in ordinary memory."""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.bench import plain
from engram_store.bench.harness import (
    Case,
    ComparedWorkload,
    Report,
    Target,
    Timing,
    describe_machine,
    measure,
    stopwatch_ms,
)
from engram_store.bench.peers.compare import Comparison
from engram_store.bench.workplace import BATCHES, LAYER, Say, Workplace
from engram_store.engine.updates import TableUpdate
from engram_store.optimizers import commit_seed, rule_step
from engram_store.types import HyperParameters, RowBlock

_ENGINE, _STORE, _PUSH = "Engine.commit", "Store.commit", "push (NaN check)"
_MEMORY, _NUMPY, _TORCH = "memory: update", "numpy: update", "torch: update"
_MEMCPY = "memcpy"
_BESIDE_SEAL, _FREEZE = "commit beside a seal", "Engine.freeze"
_REFERENCES = {
    _ENGINE: (_MEMORY, _NUMPY, _TORCH),
    _STORE: (_ENGINE, _TORCH),
    _PUSH: (_MEMCPY,),
    _BESIDE_SEAL: (_ENGINE,),
}
_LEARNING_RATE, _EPS = 0.01, 1e-8
_FREEZES = 30
_COMMITS_PER_FREEZE = 4


def bench_update(place: Workplace, say: Say) -> Report:
    """Measure the commits of one layer; its workload is a `ComparedWorkload`."""
    workload = place.workload
    assert isinstance(workload, ComparedWorkload)
    report = Report(bench="update", machine=describe_machine(), workload=place.describe())
    # It remembers rows as they are before they are trained here.
    comparison = Comparison(place, report, say) if workload.peers else None
    commits = _Commits(place)
    memory = _Memory(place.rows_in_memory(), np.zeros(place.spec.rows, np.float32), commits)
    cases: dict[str, Case] = {
        _ENGINE: commits.engine_commit,
        _MEMORY: memory.update_in_place,
        _NUMPY: memory.update_with_numpy,
        _STORE: commits.store_commit,
        _PUSH: commits.push,
        _MEMCPY: commits.memcpy,
    }
    torch_update = _torch_case(memory)
    if torch_update is None:
        report.notes.append("torch is not installed, so nothing is compared with it")
    else:
        cases[_TORCH] = torch_update
    say(f"measuring {workload.repetitions} rounds")
    report.timings = measure(cases, repetitions=workload.repetitions, batches=BATCHES)
    say("measuring freezes and commits beside a seal")
    report.timings += commits.freezes_and_seals()
    report.references = dict(_REFERENCES)
    _judge(report)
    if comparison is not None:
        del memory, cases, torch_update  # peers need the room
        comparison.steps(commits.step, commits.gradients)
        report.notes += [
            "'step': announce (hash, repeats removed), rows, push, commit, by the public calls",
            "a peer's step gets unique rows and summed gradients for nothing",
            "SparseAdam keeps two float32 values per value, FBGEMM one per row, as the store does",
        ]
    return report


def _judge(report: Report) -> None:
    medians = {timing.name: timing.median_ms for timing in report.timings}
    freeze = report.timing(_FREEZE)
    assert freeze is not None
    torch = medians[_TORCH] / medians[_ENGINE] if _TORCH in medians else None
    report.targets = [
        Target.at_most("a commit, per layer", 10, medians[_ENGINE]),
        Target.times_faster("a commit against torch", 5, torch),
        Target.at_most("price of durability", 2, medians[_ENGINE] - medians[_MEMORY]),
        Target.at_most("a freeze, median", 2, freeze.median_ms),
        Target.at_most("a freeze, longest", 2, freeze.max_ms),
    ]
    report.notes += [
        "'memory' is the same arithmetic in place on rows in anonymous memory (huge pages)",
        "price of durability: Engine.commit minus 'memory'",
        "'numpy' and 'torch' round to nearest; torch runs on one thread, as all others do",
        "Store.commit: the gradients were pushed before, in float32",
    ]


@dataclass
class _Commits:
    """Commits on the real engine; a seal never runs beside one unless it is wanted."""

    place: Workplace
    gradients: NDArray[np.float32] = field(init=False)
    """[most rows of a step, dim]"""

    def __post_init__(self) -> None:
        most = max(batch.rows.size for batch in self.place.batches)
        random = np.random.default_rng(0)
        self.gradients = random.standard_normal((most, self.place.spec.dim), np.float32)
        self._copy = np.zeros_like(self.gradients)
        self._slots_used = 0

    def _update(self, number: int) -> TableUpdate:
        rows, engine = self.place.batches[number].rows, self.place.engine
        step = rule_step(self.place.spec, engine.step, HyperParameters(lr=_LEARNING_RATE, eps=_EPS))
        return TableUpdate(LAYER, rows, self.gradients[: rows.size], step)

    def _make_room(self, rows: int) -> None:
        """Seal outside the timed part when the memtable is nearly full."""
        if self._slots_used + rows > self.place.engine.capacity:
            self.place.engine.freeze().result()
            self._slots_used = 0
        self._slots_used += rows

    def engine_commit(self, number: int) -> float:
        """A commit by the engine alone."""
        update = self._update(number)
        self._make_room(update.rows.size)
        return stopwatch_ms(lambda: self.place.engine.commit(self.place.engine.step, [update]))

    def store_commit(self, number: int) -> float:
        """A commit through the session; announcing and pushing are not part of it."""
        store, batch = self.place.store, self.place.batches[number]
        self._make_room(batch.rows.size)
        window = store.announce(batch.tokens, step=store.step)
        window.rows(LAYER)
        window.push(LAYER, self.gradients[: batch.rows.size])
        return stopwatch_ms(lambda: store.commit(store.step, lr=_LEARNING_RATE))

    def step(self, number: int) -> float:
        """A whole step through the public calls."""
        store, batch = self.place.store, self.place.batches[number]
        gradients = self.gradients[: batch.rows.size]
        self._make_room(batch.rows.size)

        def train() -> None:
            window = store.announce(batch.tokens, step=store.step)
            window.rows(LAYER)
            window.push(LAYER, gradients)
            store.commit(store.step, lr=_LEARNING_RATE)

        return stopwatch_ms(train)

    def push(self, number: int) -> float:
        """Handing gradients over."""
        store, batch = self.place.store, self.place.batches[number]
        with store.announce(batch.tokens, step=store.step) as window:
            window.rows(LAYER)
            return stopwatch_ms(lambda: window.push(LAYER, self.gradients[: batch.rows.size]))

    def memcpy(self, number: int) -> None:
        """Copying the same gradients."""
        count = self.place.batches[number].rows.size
        np.copyto(self._copy[:count], self.gradients[:count])

    def freezes_and_seals(self) -> list[Timing]:
        """Freeze after every few commits, and commit while the seal runs."""
        engine = self.place.engine
        freezes: list[float] = []
        beside: list[float] = []
        engine.freeze().result()
        for turn in range(_FREEZES):
            self._slots_used = 0
            for number in range(_COMMITS_PER_FREEZE):
                self.engine_commit((turn + number) % BATCHES)
            started = time.perf_counter()
            sealed = engine.freeze()
            freezes.append((time.perf_counter() - started) * 1e3)
            self._slots_used = 0
            beside.append(self.engine_commit(turn % BATCHES))
            sealed.result()
        return [
            Timing(_BESIDE_SEAL, np.array(beside)),
            Timing(_FREEZE, np.array(freezes)),
        ]


@dataclass
class _Memory:
    """The table and its state in ordinary memory, updated in place by every reference."""

    rows: RowBlock
    sums: NDArray[np.float32]
    commits: _Commits

    def _batch(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        rows = self.commits.place.batches[number].rows
        return rows, self.commits.gradients[: rows.size]

    def update_in_place(self, number: int) -> None:
        """Our arithmetic, bit for bit, without memtable and remap."""
        rows, gradients = self._batch(number)
        plain.rowwise_adagrad(self.rows.shape[1])(
            self.rows,
            self.sums,
            rows,
            gradients,
            np.float32(_LEARNING_RATE),
            np.float32(_EPS),
            commit_seed(self.commits.place.spec, number),
        )

    def update_with_numpy(self, number: int) -> None:
        """What one writes in numpy, bfloat16 by its bits."""
        rows, gradients = self._batch(number)
        sums = self.sums[rows] + np.square(gradients).mean(axis=1)
        self.sums[rows] = sums
        values = (self.rows[rows].astype(np.uint32) << np.uint32(16)).view(np.float32)
        rate = _LEARNING_RATE / (np.sqrt(sums) + np.float32(_EPS))
        bits = (values - rate[:, None].astype(np.float32) * gradients).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        self.rows[rows] = ((bits + (odd + np.uint32(0x7FFF))) >> np.uint32(16)).astype(np.uint16)


def _torch_case(memory: _Memory) -> Case | None:
    """What one writes in torch: sparse row-wise Adagrad on a bfloat16 tensor, one thread."""
    try:
        import torch
    except ImportError:
        return None
    table: Any = torch.from_numpy(memory.rows.view(np.int16)).view(torch.bfloat16)
    sums = torch.from_numpy(memory.sums)

    def update(number: int) -> None:
        rows, gradients = (torch.from_numpy(array) for array in memory._batch(number))  # noqa: SLF001
        index = rows.long()
        sums.index_add_(0, index, gradients.square().mean(1))
        rate = _LEARNING_RATE / (sums[index].sqrt() + _EPS)
        values = table[index].float() - rate[:, None] * gradients
        table.index_copy_(0, index, values.bfloat16())

    def alone(number: int) -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return stopwatch_ms(lambda: update(number))
        finally:
            torch.set_num_threads(threads)

    return alone
