"""What the lines of `bench train` are called, what they promise, and how to read them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engram_store.bench.harness import Quantity, Report, Series, Target, Timing
from engram_store.bench.train_limited import SHARE, Limited
from engram_store.bench.train_place import LOOK_AHEAD

STORE, BACKGROUND, PROCESS = "store", "store, background", "store process"
ADAM, ADAM_BACKGROUND = "Adam store", "Adam store, background"
CONSTANT, CONSTANT_FORWARD = "constant rows", "constant rows, no gradient"
EMBEDDING = "nn.Embedding + SparseAdam"
_MOST_COST, _MOST_WAITING, _MOST_OVER_BOUND = 3.0, 10.0, 1.25
_X = "step"


@dataclass
class Limits:
    """Training with a table that is larger than memory."""

    table_bytes: int
    limit_bytes: int
    reads_per_second: float
    """Random 4 KiB reads of the disk."""
    found: dict[int, Limited] = field(default_factory=dict)
    """By look-ahead."""
    missing: str | None = None
    """Why it was not measured."""

    @property
    def comparable(self) -> bool:
        """Whether the table really is so many times the limit."""
        return self.limit_bytes <= self.table_bytes // SHARE

    @property
    def workload(self) -> dict[str, Any]:
        """For the record."""
        return {
            "limited_table_bytes": self.table_bytes,
            "limit_bytes": self.limit_bytes,
            "reads_per_second": round(self.reads_per_second),
        }

    def bound_ms(self, depth: int) -> float:
        """Least time of a step of the second pass: the model's, or that of its reads."""
        return max(self.found[depth].model_ms, self.reading_ms(depth))

    def reading_ms(self, depth: int) -> float:
        """What the disk takes for the reads of a step of the second pass."""
        return 1e3 * self.found[depth].second.pages_per_step / self.reads_per_second

    def hidden(self, depth: int) -> bool:
        """Whether the disk delivers what a step needs while the model computes."""
        return self.reading_ms(depth) <= self.found[depth].model_ms

    def timings(self) -> list[Timing]:
        """Steps without a table in the same memory, and of both passes."""
        lines = {}
        for depth, found in self.found.items():
            lines[f"little memory, look-ahead {depth}: {CONSTANT}"] = found.constant_ms
            lines[f"little memory, look-ahead {depth}: first pass"] = found.first.step_ms
            lines[f"little memory, look-ahead {depth}: second pass"] = found.second.step_ms
        return [Timing(name, np.array(samples)) for name, samples in lines.items()]

    def quantities(self) -> list[Quantity]:
        """Reads, waiting, and the bound."""
        rows = [("disk: random reads of 4 KiB", "reads/s", self.reads_per_second)]
        for depth, found in self.found.items():
            name, second = f"look-ahead {depth}, second pass", found.second
            steps = len(second.step_ms)
            rows += [
                (f"{name}: pages read", "pages a step", second.pages_per_step),
                (f"{name}: cold rows", "rows a step", second.cold_rows / steps),
                (f"{name}: faults", "pages a step", second.faults / steps),
                (f"{name}: waiting", "ms a step", 1e3 * second.wait_seconds / steps),
                (f"{name}: reads take", "ms a step", self.reading_ms(depth)),
                (f"{name}: bound", "ms a step", self.bound_ms(depth)),
                (f"look-ahead {depth}: trainer and store", "GB",
                 found.memory_bytes / 1e9),
            ]  # fmt: skip
        return [Quantity(name, unit, np.array([value])) for name, unit, value in rows]


def seal_name(line: str) -> str:
    """Of the quantity that says what sealing costs a line."""
    return f"{line}: sealing"


def judge(report: Report, limits: Limits) -> None:
    """Set the targets."""
    cores = int(report.machine["cores"])
    sealing = {quantity.name: quantity.median for quantity in report.quantities}

    def full_ms(line: str) -> float | None:
        """A step and its share of a seal, whose thread takes turns with those of the model."""
        timing = report.timing(line)
        if timing is None:
            return None
        return timing.median_ms + sealing.get(seal_name(line), 0.0) / cores

    def times(line: str, reference: str) -> float | None:
        whole, part = full_ms(line), full_ms(reference)
        return None if whole is None or part is None else whole / part

    def cost(line: str) -> float | None:
        ratio = times(line, CONSTANT)
        return None if ratio is None else 100 * (ratio - 1)

    def faster(line: str) -> float | None:
        return times(EMBEDDING, line)

    report.targets = [
        Target.at_most("the store costs, over constant rows", _MOST_COST, cost(STORE), "%"),
        Target.at_most(
            "the store costs, commits in the background", _MOST_COST, cost(BACKGROUND), "%"
        ),
        Target.at_least("tokens/s with Adam, of nn.Embedding", 1.0, faster(ADAM), "x"),
        Target.at_least(
            "tokens/s with Adam in the background, of nn.Embedding", 1.0, faster(ADAM_BACKGROUND),
            "x",
        ),
        *_limited_targets(limits),
    ]  # fmt: skip


def _limited_targets(limits: Limits) -> list[Target]:
    targets = []
    for depth in limits.found or (LOOK_AHEAD,):
        waiting = over = None
        if depth in limits.found and limits.comparable:
            second = limits.found[depth].second
            waiting = second.waiting if limits.hidden(depth) else None
            over = second.mean_ms / limits.bound_ms(depth)
        targets += [
            Target.at_most(
                f"waiting, table {SHARE} times the memory, look-ahead {depth}",
                _MOST_WAITING, waiting, "%",
            ),
            Target.at_most(
                f"step over its bound, table {SHARE} times the memory, look-ahead {depth}",
                _MOST_OVER_BOUND, over, "x",
            ),
        ]  # fmt: skip
    return targets


def limited_series(limits: Limits) -> list[Series]:
    """Steps of both passes, one after the other."""
    series = []
    for depth, found in limits.found.items():
        steps = [*found.first.step_ms, *found.second.step_ms]
        x = tuple(float(number) for number in range(1, len(steps) + 1))
        series.append(
            Series(
                name=f"look-ahead {depth}", x_label=f"{_X}, two passes over the text",
                y_label="ms a step", x=x, y=tuple(steps),
            )
        )  # fmt: skip
    return series


def notes(report: Report, without: dict[str, str]) -> list[str]:
    """How to read the lines that train with everything in memory."""
    model, embedding = report.workload["model"], report.timing(EMBEDDING)
    size = f"{model['blocks']} decoder blocks of width {model['hidden']}"
    text = f"sequences of {model['sequence']}, {model['vocabulary']:,} tokens"
    lines = [
        f"the same model everywhere: {size}, {text}, float32, AdamW",
        f"rows come in before block {model['memory_layer']} through an Engram gate, trained too",
        f"'{CONSTANT}': unique rows and inverse are given, their gradient is computed and dropped",
        f"'{CONSTANT_FORWARD}': the same, but no gradient is computed",
        f"'{STORE}': embedded, row-wise Adagrad, look-ahead {LOOK_AHEAD}, waits for its commits",
        f"'{BACKGROUND}', '{ADAM_BACKGROUND}': commits are left to the background",
        f"'{PROCESS}': a process on a Unix socket, of which only the trainer's CPU is seen",
        "'processor': of this process, all threads; steadier than the step on a busy machine",
        "lines take turns in blocks; what a store wrote is sealed after each of its own",
        "targets add the CPU time of that, divided by the cores, to the steps of the block",
    ]
    if embedding is not None:
        lines.append(f"'{EMBEDDING}': float32 in memory, row ids given; the stores have to hash")
    return [*lines, *(f"'{name}' is left out: {why}" for name, why in without.items())]


def limited_notes(limits: Limits) -> list[str]:
    """How to read the lines that train with little memory."""
    if limits.missing is not None:
        return [f"nothing is measured with little memory: {limits.missing}"]
    memory, table = limits.limit_bytes / 1e6, limits.table_bytes / 1e6
    lines = [
        f"little memory: {memory:,.0f} MB for everything, and a table of {table:,.0f} MB",
        "everything: the trainer, the store with its defaults, the page cache, cold at first",
        "bound: the longer of the model's step and of the step's reads at the disk's rate",
        "the disk's rate: by the store's own reader, pages in ascending order",
    ]
    if not limits.comparable:
        lines.append(f"the table is not {SHARE} times the memory: take more --limited-rows")
    lines += [
        f"look-ahead {depth}: the disk takes {limits.reading_ms(depth):.0f} ms for the reads of a "
        f"step, the model {found.model_ms:.0f} ms: waiting cannot be avoided"
        for depth, found in limits.found.items()
        if not limits.hidden(depth)
    ]
    return lines
