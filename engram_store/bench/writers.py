"""Three ways to train a table on disk, each in a process of its own: how much does it write?

`run_writer` starts one, `main` is what it runs. The references are what one writes with numpy: rows
and row-wise Adagrad sums in two flat files, updated where they are.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.bench.device import device_bytes, device_of, enter, process_bytes
from engram_store.bench.process import child_result

STORE, MMAP, PWRITE = "store", "in place, mmap", "in place, pwrite"
_SECONDS = 7200.0
_LEARNING_RATE, _EPS = 0.01, 1e-8
_SLICE_ROWS = 1 << 13
"""Rows that a reference computes at a time: its memory is meant for the table."""
_Float32 = NDArray[np.float32]
_Write = Callable[[NDArray[np.int32], NDArray[np.uint16], _Float32], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class WriterOrder:
    """What a process is to train."""

    writer: str
    """`STORE`, `MMAP` or `PWRITE`."""
    layer: int
    dim: int
    room: str
    """Directory of everything below."""
    store: str = "writes.engram"
    tokens: str = "tokens.npy"
    """int64 [steps, segments, time]; what the store is given."""
    updates: str = "updates.npz"
    """Rows of every step, int32, ascending; what the references are given."""
    rows_file: str = "in-place-rows.bin"
    sums_file: str = "in-place-sums.bin"
    steps: int
    folds: bool = False
    """Whether the store folds when it is due, or never."""
    group: str | None = None
    """Memory cgroup to enter."""

    def path(self, name: str) -> Path:
        """Of one of the files above."""
        return Path(self.room) / name


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a process wrote, until everything was durable."""

    process_bytes: int
    """As the kernel counts it for the process."""
    store_bytes: int | None
    """As the store counts it; None: not a store."""
    rows_updated: int
    """A row counts once in every step that updates it."""
    step_ms: list[float]
    """From tokens, or rows, to the end of the step's update."""
    seals: int = 0
    folds: int = 0
    merges: int = 0
    device_bytes: int | None = None
    """At the block device, by everybody meanwhile; None: the device is not visible."""

    @property
    def bytes(self) -> int:
        """At the block device where that is visible."""
        return self.process_bytes if self.device_bytes is None else self.device_bytes


def run_writer(order: WriterOrder) -> Written:
    """Train in a process of its own, and count at the device too.

    Raises:
        EngramStoreError: the process failed.
    """
    counters = device_of(Path(order.room))
    os.sync()  # what was written before it is not the writer's
    before = device_bytes(counters) if counters else 0
    result = child_result(__name__, asdict(order), _SECONDS)
    written = device_bytes(counters) - before if counters else None
    return Written(**result, device_bytes=written)


def main() -> None:
    """Train as the first argument orders, and print what was written."""
    order = WriterOrder(**json.loads(sys.argv[1]))
    if order.group is not None:
        enter(order.group)
    write = {STORE: _train_store, MMAP: _train_mapped, PWRITE: _train_by_pwrite}[order.writer]
    sys.stdout.write(json.dumps(write(order)) + "\n")


# ---------------------------------------------------------------------- the store


def _train_store(order: WriterOrder) -> dict[str, Any]:
    """All defaults of `engram_store.open`, but for folds where they are unwanted."""
    import engram_store
    from engram_store.layout.disk import Disk

    tokens = np.load(order.path(order.tokens), mmap_mode="r")
    generation, disk, before = _generation(order), Disk(), process_bytes()
    ratio = 1.0 if order.folds else float("inf")
    random = np.random.default_rng(0)
    gradients = random.standard_normal((0, order.dim), np.float32)
    step_ms = []
    with engram_store.open(order.path(order.store), "train", fold_ratio=ratio, disk=disk) as store:
        for step in range(order.steps):
            started = time.perf_counter()
            window = store.announce(tokens[step], step=store.step)
            rows, _ = window.rows(order.layer)
            if len(rows) > len(gradients):
                shape = (len(rows) + len(rows) // 8, order.dim)
                gradients = random.standard_normal(shape, np.float32)
            window.push(order.layer, gradients[: len(rows)])
            store.commit(store.step, lr=_LEARNING_RATE, eps=_EPS)
            step_ms.append((time.perf_counter() - started) * 1e3)
        store.seal()
        statistics = store.stats()
    return {
        "process_bytes": process_bytes() - before,
        "store_bytes": disk.written_bytes,
        "rows_updated": statistics.tables[order.layer].rows_updated,
        "step_ms": step_ms,
        "seals": statistics.seals,
        "merges": statistics.merges,
        # Not of the statistics: closing waits for one that is under way.
        "folds": _generation(order) - generation,
    }


def _generation(order: WriterOrder) -> int:
    """Of the base: every fold makes the next one."""
    import engram_store

    return engram_store.inspect(order.path(order.store)).tables[order.layer].generation


# ---------------------------------------------------------------------- in place


def _train_mapped(order: WriterOrder) -> dict[str, Any]:
    """`numpy.memmap`, as one uses it."""
    rows, sums = _mapped(order, "r+")
    before = process_bytes()

    def write(part: NDArray[np.int32], values: NDArray[np.uint16], totals: _Float32) -> None:
        rows[part] = values
        sums[part] = totals

    answer = _train_in_place(order, rows, sums, write)
    rows.flush()
    sums.flush()
    return {**answer, "process_bytes": process_bytes() - before}


def _train_by_pwrite(order: WriterOrder) -> dict[str, Any]:
    """Rows are read through a mapping and written one by one, in the order of the file."""
    rows, sums = _mapped(order, "r")
    rows_fd, sums_fd = (
        os.open(order.path(name), os.O_WRONLY) for name in (order.rows_file, order.sums_file)
    )
    row_bytes = 2 * order.dim
    before = process_bytes()

    def write(part: NDArray[np.int32], values: NDArray[np.uint16], totals: _Float32) -> None:
        raw, raw_totals = (array.data.cast("B") for array in (values, totals))
        for i, row in enumerate(part.tolist()):
            os.pwrite(rows_fd, raw[i * row_bytes : (i + 1) * row_bytes], row * row_bytes)
            os.pwrite(sums_fd, raw_totals[4 * i : 4 * i + 4], 4 * row)

    answer = _train_in_place(order, rows, sums, write)
    for fd in (rows_fd, sums_fd):
        os.fdatasync(fd)
        os.close(fd)
    return {**answer, "process_bytes": process_bytes() - before}


def _mapped(order: WriterOrder, mode: Any) -> tuple[Any, Any]:
    rows = np.memmap(order.path(order.rows_file), np.uint16, mode).reshape(-1, order.dim)
    return rows, np.memmap(order.path(order.sums_file), np.float32, mode)


def _train_in_place(order: WriterOrder, rows: Any, sums: Any, write: _Write) -> dict[str, Any]:
    """Row-wise Adagrad in numpy, bfloat16 by its bits, rounded to nearest."""
    gradients = np.random.default_rng(0).standard_normal((_SLICE_ROWS, order.dim), np.float32)
    step_ms, updated = [], 0
    with np.load(order.path(order.updates)) as updates:
        for step in range(order.steps):
            wanted = updates[str(step)]
            started = time.perf_counter()
            for first in range(0, wanted.size, _SLICE_ROWS):
                part = wanted[first : first + _SLICE_ROWS]
                write(part, *update_rows(rows[part], sums[part], gradients[: part.size]))
            step_ms.append((time.perf_counter() - started) * 1e3)
            updated += wanted.size
    return {"store_bytes": None, "rows_updated": updated, "step_ms": step_ms}


def update_rows(
    old: NDArray[np.uint16], old_sums: _Float32, gradients: _Float32
) -> tuple[NDArray[np.uint16], _Float32]:
    """One step of row-wise Adagrad.

    Args:
        old: bfloat16 bits [n, dim].
        old_sums: [n] sums of mean squares of the gradients so far.
        gradients: [n, dim].

    Returns:
        New bits and sums.
    """
    sums = old_sums + np.square(gradients).mean(axis=1)
    values = (old.astype(np.uint32) << np.uint32(16)).view(np.float32)
    rate = (_LEARNING_RATE / (np.sqrt(sums) + np.float32(_EPS))).astype(np.float32)
    bits = (values - rate[:, None] * gradients).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + (odd + np.uint32(0x7FFF))) >> np.uint32(16)).astype(np.uint16), sums
