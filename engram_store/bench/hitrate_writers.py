"""Ways to train a table that is larger than memory, each in a process of its own with a limit.

`run_trainer` starts one, `main` is what it runs. The references update rows where they are in one
file, with our kernels and our cold reads: what differs is where an updated row goes. Everything
that is not the table's is there before the limit: modules, kernels, gradients.
"""

import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from engram_store.bench import plain
from engram_store.bench.cold_place import read_bytes
from engram_store.bench.device import enter, process_bytes
from engram_store.bench.process import child_result
from engram_store.engine.fetch import SLICE_ROWS
from engram_store.engine.memory import process_bytes as anonymous_bytes
from engram_store.kernels.pages import page_ranges
from engram_store.kernels.rows import JIT
from engram_store.paging import choose_reader, major_faults
from engram_store.types import RowIds

STORE, MERGED = "store", "store, merged by heat"
MMAP, PWRITE = "in place, mmap", "in place, pwrite"
_SECONDS = 7200.0
_LEARNING_RATE, _EPS = 0.01, 1e-8
_STILL_READING = 0.01
"""A reference reads ahead as long as a step reads so many pages for a row."""
_PAGE_BYTES = mmap.PAGESIZE
_pwrite = types.ExternalFunction(
    "pwrite", types.int64(types.int32, types.int64, types.int64, types.int64)
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerOrder:
    """What a process is to train."""

    writer: str
    """`STORE`, `MERGED`, `MMAP` or `PWRITE`."""
    layer: int
    dim: int
    room: str
    """Directory of everything below."""
    store: str
    tokens: str = "hitrate-tokens.npy"
    """int64 [steps, segments, time]; what the store is given."""
    updates: str = "hitrate-updates.npz"
    """Rows of every step, int32, ascending; what the references are given."""
    rows_file: str = "hitrate-rows.bin"
    sums_file: str = "hitrate-sums.bin"
    first_step: int
    """Where the store is, and where the text begins."""
    warm_up: int
    steps: int
    """Timed, after the warm-up."""
    most_rows: int
    """Unique rows of a step, at most."""
    limit_bytes: int
    """What the process may take, page cache included, once modules and gradients are there."""
    memory_bytes: int
    """Of it, what the store is told that it may use."""
    group: str | None = None
    """Memory cgroup to enter."""

    def path(self, name: str) -> Path:
        """Of one of the files above."""
        return Path(self.room) / name


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What the timed steps took."""

    step_ms: list[float]
    """From tokens, or rows, to the end of the step's update."""
    reads: list[float]
    """Of 4 KiB from the device in each step, by all threads of the process."""
    written_bytes: int
    """In all timed steps, as the kernel counts it for the process; seals included."""
    faults: int
    """Pages that had to be waited for one by one."""
    overlay_share: float | None = None
    """Share of rows that were in shared memory; None: not a store."""

    @property
    def mean_ms(self) -> float:
        """Of a step: what writes cost now and then counts as it comes."""
        return float(np.mean(self.step_ms))

    @property
    def mean_reads(self) -> float:
        """Of a step."""
        return float(np.mean(self.reads))


def run_trainer(order: TrainerOrder) -> Trained:
    """Train in a process of its own.

    Raises:
        EngramStoreError: the process failed.
    """
    return Trained(**child_result(__name__, asdict(order), _SECONDS))


def main() -> None:
    """Train as the first argument orders, and print what it took."""
    order = TrainerOrder(**json.loads(sys.argv[1]))
    if order.group is not None:
        enter(order.group)
    trained = (_train_in_place if order.writer in (MMAP, PWRITE) else _train_store)(order)
    sys.stdout.write(json.dumps(asdict(trained)) + "\n")


def _limit_memory(order: TrainerOrder) -> None:
    """From now on this process may take so much more memory than it has, and no more."""
    if order.group is not None:
        names = (Path(order.group) / name for name in ("memory.limit_in_bytes", "memory.max"))
        limit = next(path for path in names if path.exists())
        limit.write_text(str(anonymous_bytes() + order.limit_bytes))


class _Steps:
    """Counts what each timed step takes."""

    def __init__(self, order: TrainerOrder) -> None:
        self._left = order.warm_up
        self.step_ms: list[float] = []
        self.reads: list[float] = []
        self._start()

    def _start(self) -> None:
        self._bytes, self._began = read_bytes(), time.perf_counter()

    def done(self) -> bool:
        """A step is; whether the warm-up ended with it."""
        elapsed, read = time.perf_counter() - self._began, read_bytes() - self._bytes
        self._left -= 1
        if self._left < 0:
            self.step_ms.append(1e3 * elapsed)
            self.reads.append(read / _PAGE_BYTES)
        self._start()
        return self._left == 0


# ---------------------------------------------------------------------- the store


def _train_store(order: TrainerOrder) -> Trained:
    """Each window is announced one step ahead; no folds, which would come in one run only."""
    import engram_store

    _load_kernels(order)
    gradients = np.random.default_rng(0).standard_normal((order.most_rows, order.dim), np.float32)
    tokens = np.load(order.path(order.tokens), mmap_mode="r")
    _limit_memory(order)
    with engram_store.open(
        order.path(order.store),
        "train",
        memory_bytes=order.memory_bytes,
        fold_ratio=float("inf"),
    ) as store:
        first, last = order.first_step, order.first_step + order.warm_up + order.steps
        windows = {first: store.announce(tokens[first], first)}
        steps, before, written = _Steps(order), store.stats(), process_bytes()
        for step in range(first, last):
            if step + 1 < last:
                windows[step + 1] = store.announce(tokens[step + 1], step + 1)
            window = windows.pop(step)
            rows, _ = window.rows(order.layer)
            window.push(order.layer, gradients[: len(rows)])
            store.commit(step, lr=_LEARNING_RATE, eps=_EPS)
            if steps.done():
                before, written = store.stats(), process_bytes()
        written = process_bytes() - written
        then, now = (stats.tables[order.layer] for stats in (before, store.stats()))
    unique = now.unique_rows - then.unique_rows
    return Trained(
        step_ms=steps.step_ms,
        reads=steps.reads,
        written_bytes=written,
        faults=now.page_faults - then.page_faults,
        overlay_share=(now.memtable_rows - then.memtable_rows) / max(unique, 1),
    )


def _load_kernels(order: TrainerOrder) -> None:
    """Everything that training needs is compiled and loaded: a tiny store was trained."""
    import engram_store
    from engram_store.recipes import engram

    recipe = engram(
        token_map=np.arange(64, dtype=np.int32), layers=[order.layer], rows_per_head=64, pad_id=0
    )
    tokens = np.arange(64).reshape(1, -1)
    with tempfile.TemporaryDirectory(dir=order.room, prefix="hitrate-warm-up-") as room:
        root = Path(room) / "tiny.engram"
        engram_store.create(root, recipe, dim=order.dim)
        with engram_store.open(root, "train") as store:
            for step in range(3):
                window = store.announce(tokens, step)
                store.announce(tokens, step + 1).close()
                rows, _ = window.rows(order.layer)
                window.push(order.layer, np.ones(rows.shape, np.float32))
                store.commit(step, lr=_LEARNING_RATE)
                store.seal()


# ---------------------------------------------------------------------- in place


def _train_in_place(order: TrainerOrder) -> Trained:
    """Rows are read, and updated where they are, in slices in the order of the file."""
    with np.load(order.path(order.updates)) as updates:
        last = order.first_step + order.warm_up + order.steps
        wanted = [updates[str(step)] for step in range(order.first_step, last)]
    table = InPlaceTable(order)
    table.load_kernels()
    _limit_memory(order)
    steps, faults, written = _Steps(order), major_faults(), process_bytes()
    for rows in wanted:
        table.step(rows)
        if steps.done():
            faults, written = major_faults(), process_bytes()
    return Trained(
        step_ms=steps.step_ms,
        reads=steps.reads,
        written_bytes=process_bytes() - written,
        faults=major_faults() - faults,
    )


class InPlaceTable:
    """A table whose rows are updated where they are: row-wise Adagrad, by our kernels.

    Rows are written through the mapping, or by one pwrite for each. Sums, which are few pages that
    every step touches, are written through a mapping in both cases.

    Args:
        order: which files, and how rows are written.
    """

    def __init__(self, order: TrainerOrder) -> None:
        self._dim, self._row_bytes = order.dim, 2 * order.dim
        self._by_pwrite = order.writer == PWRITE
        self._fd = os.open(order.path(order.rows_file), os.O_RDWR)
        self._rows = _mapped(self._fd, np.uint16, writable=not self._by_pwrite)
        self._rows = self._rows.reshape(-1, order.dim)
        with order.path(order.sums_file).open("r+b") as file:
            self._sums = _mapped(file.fileno(), np.float32, writable=True)
        self._block = np.zeros((order.most_rows, order.dim), np.uint16)
        random = np.random.default_rng(0)
        self._gradients = random.standard_normal((order.most_rows, order.dim), np.float32)
        self._update = plain.rowwise_adagrad(order.dim)
        self._reader = choose_reader()
        self._ranges = np.empty((2 * SLICE_ROWS, 2), np.int64)
        self._numbers = np.arange(SLICE_ROWS, dtype=np.int32)
        self._cold = True

    def step(self, rows: RowIds) -> None:
        """Read rows (int32 [n], ascending) as a forward pass does, then update them.

        Both passes read ahead, one slice at a time, unless the last step found all in memory.
        """
        assert rows.size <= len(self._block)
        before = read_bytes()
        block = self._block[: rows.size]
        for part in self._slices(rows):
            plain.gather(_bytes_of(self._rows), rows[part], _bytes_of(block[part]))
        for part in self._slices(rows):
            if self._by_pwrite:
                self._write(rows[part], block[part], self._gradients[part])
            else:
                self._apply(self._rows, self._sums, rows[part], self._gradients[part])
        read = (read_bytes() - before) / _PAGE_BYTES
        self._cold = read > _STILL_READING * rows.size

    def load_kernels(self) -> None:
        """Compiled, and their threads started: rows of the beginning were read and written."""
        self.step(np.arange(min(2, len(self._rows)), dtype=np.int32))

    def _slices(self, rows: RowIds) -> Iterator[slice]:
        """Of a step; the pages of each are asked for while the one before it is worked on."""
        addresses = self._rows.ctypes.data + rows.astype(np.int64) * self._row_bytes
        self._ask(addresses[:SLICE_ROWS])
        for start in range(0, rows.size, SLICE_ROWS):
            end = start + SLICE_ROWS
            self._ask(addresses[end : end + SLICE_ROWS])
            yield slice(start, min(end, rows.size))

    def _ask(self, addresses: NDArray[np.int64]) -> None:
        if self._cold and addresses.size:
            count = page_ranges(addresses, self._row_bytes, self._ranges)
            self._reader.start(self._ranges[:count])

    def _write(
        self, rows: RowIds, values: NDArray[np.uint16], gradients: NDArray[np.float32]
    ) -> None:
        sums = self._sums[rows]
        self._apply(values, sums, self._numbers[: rows.size], gradients)
        self._sums[rows] = sums
        if _write_rows(self._fd, values.ctypes.data, rows, self._row_bytes) != rows.size:
            raise OSError("a row could not be written; is the disk full?")

    def _apply(self, table: Any, sums: Any, rows: RowIds, gradients: NDArray[np.float32]) -> None:
        rate, eps = np.float32(_LEARNING_RATE), np.float32(_EPS)
        self._update(table, sums, rows, gradients, rate, eps, np.uint64(0))


def _mapped(fd: int, dtype: Any, *, writable: bool) -> NDArray[Any]:
    """A whole file, for random access."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    memory = mmap.mmap(fd, 0, mmap.MAP_SHARED, protection)
    memory.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(memory, dtype)


def _bytes_of(rows: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """uint8 [rows, bytes of a row]."""
    return rows.view(np.uint8)


def _write_each(fd: Any, source: Any, rows: Any, row_bytes: Any) -> Any:
    """One pwrite for each row (int32 [n]) from `source` on; returns how many were written."""
    for i in range(rows.size):
        at = np.int64(rows[i]) * row_bytes
        if _pwrite(fd, source + i * row_bytes, row_bytes, at) != row_bytes:
            return i
    return rows.size


_write_rows = njit(**JIT)(_write_each)
