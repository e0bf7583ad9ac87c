"""What a window and a commit cost as a table grows: they should not know how large it is.

Tables of all sizes take turns, in the state in which training leaves them: rows in shared memory
and in segments. Their bases were never written, so a hundred million rows need no disk. That also
means that all base rows are one page of zeros, always in the cache; what grows here is the remap
and the memory that overlay rows are spread over. How fast a large base that is really there is
read is what `bench window` measures.
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import engram_store
from engram_store.bench.harness import (
    Case,
    GrowthWorkload,
    Quantity,
    Report,
    Series,
    Target,
    describe_machine,
    measure,
    stopwatch_ms,
)
from engram_store.bench.text import SEGMENT, Text, read_text
from engram_store.bench.workplace import (
    BATCHES,
    LAYER,
    Batch,
    Say,
    make_batch,
    make_recipe,
    overlay_bytes,
    touched,
)
from engram_store.engine import Engine
from engram_store.engine.lookup import LookupScratch
from engram_store.engine.updates import TableUpdate
from engram_store.errors import ConfigError
from engram_store.kernels.rows import locate
from engram_store.optimizers import rule_step
from engram_store.recipes import Recipe
from engram_store.store import Store
from engram_store.types import HyperParameters, RowBlock, TableSpec

HASH, DEDUP, LOCATE, GATHER = "hash", "dedup", "locate", "locate + gather"
WINDOW, COMMIT = "window", "commit"
PARTS = (HASH, DEDUP, LOCATE, GATHER, WINDOW, COMMIT)
_OVERLAY_BYTES = 256 << 20
"""Of each table: all of them are open at once."""
_FILL_STEPS = 8
_FLAT = 1.1
"""What medians of one run may differ by and still be called equal."""
_LEARNING_RATE = 0.01


def bench_growth(workload: GrowthWorkload, directory: Path, say: Say) -> Report:
    """Measure windows and commits of one layer, for tables of several sizes.

    Raises:
        ConfigError: the sizes do not grow.
        SharedMemoryFullError: no room for the memtables of all tables.
    """
    factors = workload.factors
    if len(factors) < 2 or min(factors) < 1 or list(factors) != sorted(set(factors)):
        raise ConfigError(
            f"bench growth compares tables that grow, and factors are {factors}; "
            "give two or more whole numbers, the smallest first, such as (1, 10, 100)"
        )
    segment = min(SEGMENT, workload.tokens)
    say("reading text")
    text = read_text(BATCHES * workload.tokens, segment)
    with contextlib.ExitStack() as stack:
        sizes = [
            stack.enter_context(_table(replace(workload, rows=rows), text, directory, say))
            for rows in (workload.rows * factor for factor in factors)
        ]
        report = Report(
            bench="growth", machine=describe_machine(), workload=_describe(workload, sizes)
        )
        cases = {_line(part, size): case for size in sizes for part, case in size.cases().items()}
        say(f"measuring {workload.repetitions} rounds")
        timings = measure(cases, repetitions=workload.repetitions, batches=BATCHES)
    order = [_line(part, size) for part in PARTS for size in sizes]
    report.timings = sorted(timings, key=lambda timing: order.index(timing.name))
    _judge(report, sizes)
    return report


@dataclass
class _Size:
    """One of the tables, and room to measure it."""

    label: str
    recipe: Recipe
    store: Store
    batches: list[Batch]
    engine: Engine = field(init=False)
    spec: TableSpec = field(init=False)
    slots_used: int = 0

    def __post_init__(self) -> None:
        engine = self.store._engine  # noqa: SLF001 - the parts of a window are timed one by one
        assert isinstance(engine, Engine)
        self.engine, self.spec = engine, self.store.tables[LAYER]
        most, lookups = max(b.rows.size for b in self.batches), self.batches[0].lookups.size
        self._slot: RowBlock = touched(most * self.spec.dim, self.spec.dtype.storage)
        self._slot = self._slot.reshape(most, self.spec.dim)
        self._lookups, self._inverse = touched(lookups, np.int32), touched(lookups, np.int32)
        self._places, self._scratch = touched(most, np.int32), LookupScratch()
        random = np.random.default_rng(0)
        self._gradients: NDArray[np.float32] = random.standard_normal(
            (most, self.spec.dim), np.float32
        )

    @property
    def remap_bytes(self) -> int:
        """Of the array that says where each row is."""
        return 4 * self.spec.rows

    @property
    def unique_rows(self) -> NDArray[np.float64]:
        """Of every batch: larger tables have fewer collisions."""
        return np.array([float(batch.rows.size) for batch in self.batches])

    def cases(self) -> dict[str, Case]:
        """Each of `PARTS`."""
        return {
            HASH: self.hash_only,
            DEDUP: self.deduplicate,
            LOCATE: self.locate,
            GATHER: self.gather,
            WINDOW: self.window,
            COMMIT: self.commit,
        }

    def hash_only(self, number: int) -> None:
        """Tokens to row ids."""
        tokens = self.batches[number].tokens
        self.recipe.rows(LAYER, tokens, out=self._lookups.reshape(*tokens.shape, -1))

    def deduplicate(self, number: int) -> None:
        """Row ids to unique ones."""
        self._scratch.deduplicate(self.batches[number].lookups, self._inverse)

    def locate(self, number: int) -> None:
        """Where each row is: one entry of the remap per row."""
        rows, table = self.batches[number].rows, self.engine.tables[LAYER]
        locate(rows, table.remap, 2 * table.capacity, self._places)

    def gather(self, number: int) -> None:
        """The same, and a copy of each row."""
        rows = self.batches[number].rows
        self.engine.gather(LAYER, rows, self._slot[: rows.size])

    def window(self, number: int) -> None:
        """Tokens to rows."""
        tokens = self.batches[number].tokens
        rows, _ = self._scratch.look_up(self.recipe, LAYER, tokens, None, None)
        self.engine.gather(LAYER, rows, self._slot[: rows.size])

    def commit(self, number: int) -> float:
        """An update of every row of a batch; seals run between commits, not beside them."""
        rows, step = self.batches[number].rows, self.engine.step
        rule = rule_step(self.spec, step, HyperParameters(lr=_LEARNING_RATE))
        update = TableUpdate(LAYER, rows, self._gradients[: rows.size], rule)
        if self.slots_used + rows.size > self.engine.capacity:
            self.engine.freeze().result()
            self.slots_used = 0
        self.slots_used += rows.size
        return stopwatch_ms(lambda: self.engine.commit(step, [update]))


@contextlib.contextmanager
def _table(workload: GrowthWorkload, text: Text, directory: Path, say: Say) -> Iterator[_Size]:
    """A store of about `workload.rows` rows of which some steps were trained; gone afterwards."""
    label = f"{workload.rows / 1e6:g} M rows"
    say(f"making a table of {label}")
    recipe = make_recipe(workload, text.token_map)
    root = directory / f"growth-{workload.rows}.engram"
    shutil.rmtree(root, ignore_errors=True)
    engram_store.create(root, recipe, dim=workload.dim)
    spec = engram_store.inspect(root).metadata.tables[LAYER]
    room = min(_OVERLAY_BYTES, overlay_bytes(spec))
    steps = text.tokens.reshape(BATCHES, -1, text.tokens.shape[1])
    batches = [make_batch(recipe, tokens) for tokens in steps]
    try:
        # Folds would run beside the timed commits in one run and not in the next.
        with engram_store.open(
            root, mode="train", overlay_bytes=room, fold_ratio=float("inf")
        ) as store:
            size = _Size(label, recipe, store, batches)
            for number in range(_FILL_STEPS):
                size.commit(number)
            size.engine.freeze().result()
            size.slots_used = 0
            yield size
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _line(part: str, size: _Size) -> str:
    return f"{part}: {size.label}"


def _describe(workload: GrowthWorkload, sizes: Sequence[_Size]) -> dict[str, object]:
    """The workload as it came out; single values are those of the largest table."""
    last = sizes[-1]
    return {
        **asdict(workload),
        "table_rows": last.spec.rows,
        "row_bytes": last.spec.row_bytes,
        "lookups_per_step": last.batches[0].lookups.size,
        "unique_rows_per_step": round(float(last.unique_rows.mean())),
        "optimizer": str(last.spec.optimizer),
        "overlay_bytes": min(_OVERLAY_BYTES, overlay_bytes(last.spec)),
        "tables": [{"rows": size.spec.rows, "remap_bytes": size.remap_bytes} for size in sizes],
    }


def _judge(report: Report, sizes: Sequence[_Size]) -> None:
    first, last = sizes[0], sizes[-1]
    medians = {timing.name: timing.median_ms for timing in report.timings}
    for part in PARTS:
        for size in sizes[1:]:
            report.references[_line(part, size)] = (_line(part, first),)
        report.series.append(
            Series(
                name=part,
                x_label="rows of the table",
                y_label="times the smallest table's median",
                x=tuple(float(size.spec.rows) for size in sizes),
                y=tuple(medians[_line(part, size)] / medians[_line(part, first)] for size in sizes),
            )
        )
    report.quantities = [
        Quantity(f"unique rows of a step: {size.label}", "rows", size.unique_rows) for size in sizes
    ]
    report.targets = [
        Target.at_most(
            f"a {part}, {last.label} against {first.label}",
            _FLAT,
            medians[_line(part, last)] / medians[_line(part, first)],
            "x",
        )
        for part in (WINDOW, COMMIT)
    ]
    small, large = (size.remap_bytes / 1e6 for size in (first, last))
    more = float(last.unique_rows.mean() / first.unique_rows.mean())
    remap = f"{small:,.1f} MB, then {large:,.1f} MB"
    report.notes = [
        "base rows were never written: one page of zeros for all, always cached, whatever the size",
        f"what grows is the remap, 4 bytes a row: {remap}",
        "'locate' reads it at random and a commit writes it: more misses of cache and page tables",
        f"larger tables have fewer collisions: a step has {more:.2f} times as many unique rows",
    ]
