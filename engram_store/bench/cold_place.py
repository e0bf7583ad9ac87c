"""The store that `bench cold` reads: larger than what is read of it, and out of memory each time.

A table of several gigabytes is really written. Before every timed part its files are pushed out of
the page cache and the store is told so, as it would have noticed itself a few seconds later.
"""

import contextlib
import json
import mmap
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import engram_store
from engram_store.bench.harness import ColdWorkload
from engram_store.bench.text import SEGMENT, read_text
from engram_store.bench.workplace import (
    LAYER,
    STD,
    Batch,
    RepeatedNormal,
    Say,
    make_batch,
    make_recipe,
    overlay_bytes,
    touched,
    write_flat,
)
from engram_store.engine import Engine
from engram_store.engine.fetch import Fetcher
from engram_store.engine.memory import PAGE_BYTES, Mapping, forget_cached_pages
from engram_store.engine.table import Table
from engram_store.errors import ConfigError, SnapshotMismatchError, StoreFileError
from engram_store.paging import cached_bytes
from engram_store.recipes import Recipe
from engram_store.store import Store
from engram_store.types import TableSpec

FLAT_FILE = "cold-rows.bin"
_STORE, _KEY = "cold.engram", "cold.json"
_FILES = 2.2
"""How many times the table's bytes the disk must have free: the store and one flat copy."""
_LEARNING_RATE = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What reading some windows took."""

    windows: int
    rows: int
    """Unique rows that were handed out."""
    pages: int
    """Pages of 4 KiB that were asked for."""
    faults: int
    """Pages that had to be waited for one by one."""
    seconds: float
    cpu_seconds: float
    """Of all threads of the process."""
    device_bytes: int
    """Read from the block device, as the kernel counts it for the process."""

    @property
    def pages_per_second(self) -> float:
        """Those asked for, and those faulted in."""
        return (self.pages + self.faults) / self.seconds

    @property
    def cpu_us_per_page(self) -> float:
        """Hashing, copying and everything else included."""
        return self.cpu_seconds * 1e6 / max(self.pages + self.faults, 1)

    def amplification(self, row_bytes: int) -> float:
        """Bytes read for every byte of a row that was handed out."""
        return self.device_bytes / (self.rows * row_bytes)


class Meter:
    """Counts what this process does between `__init__` and `stop`."""

    def __init__(self) -> None:
        self._bytes = read_bytes()
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def stop(self) -> dict[str, Any]:
        """The part of a `Reading` that is measured from outside."""
        return {
            "seconds": time.perf_counter() - self._wall,
            "cpu_seconds": time.process_time() - self._cpu,
            "device_bytes": read_bytes() - self._bytes,
        }


def read_bytes() -> int:
    """Bytes this process caused to be read from a block device since it began."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


@dataclass
class ColdPlace:
    """What is read."""

    workload: ColdWorkload
    recipe: Recipe
    store: Store
    spec: TableSpec
    batches: list[Batch]
    flat_file: Path
    """All rows in one file, for those that know nothing of a store."""

    def __post_init__(self) -> None:
        engine = self.store._engine  # noqa: SLF001 - rows are read without a window, too
        assert isinstance(engine, Engine)
        self.table: Table = engine.tables[LAYER]
        self._fetcher = Fetcher(self.table)
        most = max(batch.rows.size for batch in self.batches)
        block = touched(most * self.spec.dim, self.spec.dtype.storage)
        self._block: NDArray[Any] = block.reshape(most, self.spec.dim)
        self._gradients: NDArray[np.float32] = touched(most * self.spec.dim, np.float32)
        self._gradients = self._gradients.reshape(most, self.spec.dim)

    @property
    def base_files(self) -> list[Path]:
        """Of the rows, in the order of the table."""
        return [m.path for m in self.table.arrays[0].mappings if m.path is not None]

    def describe(self) -> dict[str, Any]:
        """The workload as it came out."""
        unique = float(np.mean([batch.rows.size for batch in self.batches]))
        return {
            **asdict(self.workload),
            "table_rows": self.spec.rows,
            "table_bytes": self.spec.rows * self.spec.row_bytes,
            "row_bytes": self.spec.row_bytes,
            "dtype": str(self.spec.dtype),
            "lookups_per_step": self.batches[0].lookups.size,
            "unique_rows_per_step": round(unique),
            "pages_per_step": round(np.mean([self._pages(batch) for batch in self.batches])),
            "reader": self._paging.reader.name,
        }

    def _pages(self, batch: Batch) -> int:
        """Of the base, under the rows of a window."""
        return int(np.unique(batch.rows.astype(np.int64) * self.spec.row_bytes // PAGE_BYTES).size)

    @property
    def _paging(self) -> Any:
        assert self.table.paging is not None
        return self.table.paging

    # ------------------------------------------------------------------ out of memory

    def evict(self) -> float:
        """Push the table out of the page cache; returns the share of it that stayed there."""
        mappings = self.table.mapped_files()
        for mapping in mappings:
            _unload(mapping)
        cached = sum(cached_bytes(m.path) or 0 for m in mappings if m.path is not None)
        for residency in list(self._paging._watched.values()):  # noqa: SLF001 - it must know now
            residency.pages[:] = 0
            residency.refresh()
        return cached / max(sum(m.bytes.size for m in mappings), 1)

    # ------------------------------------------------------------------ two ways to read

    def fetch(self, number: int) -> Reading:
        """The rows of one window, by the engine alone."""
        rows = self.batches[number % len(self.batches)].rows
        meter = Meter()
        fetched = self._fetcher.fetch(rows, [self._block[: rows.size]])
        return Reading(
            windows=1,
            rows=rows.size,
            pages=fetched.pages_read,
            faults=fetched.faults,
            **meter.stop(),
        )

    def train(self) -> Reading:
        """Windows as a trainer asks for them, each announced some steps ahead; then step 0 again.

        Gradients are there already, so that nothing but the store takes time.
        """
        before = self.store.stats().tables[LAYER]
        tokens = [batch.tokens for batch in self.batches]
        steps, ahead = len(tokens), self.workload.look_ahead
        first, rows_read = self.store.step, 0
        meter = Meter()
        windows = [self.store.announce(tokens[k], first + k) for k in range(min(ahead, steps))]
        for number in range(steps):
            if number + ahead < steps:
                later = number + ahead
                windows.append(self.store.announce(tokens[later], first + later))
            rows, _ = windows[number].rows(LAYER)
            rows_read += len(rows)
            windows[number].push(LAYER, self._gradients[: len(rows)])
            self.store.commit(first + number, lr=_LEARNING_RATE)
        measured = meter.stop()
        after = self.store.stats().tables[LAYER]
        self.store.restore(0)
        return Reading(
            windows=steps,
            rows=rows_read,
            pages=after.pages_read - before.pages_read,
            faults=after.page_faults - before.page_faults,
            **measured,
        )


def _unload(mapping: Mapping) -> None:
    """Pages that a page table points at are not let go by the page cache, so that comes first."""
    mapping._memory.madvise(mmap.MADV_DONTNEED)  # noqa: SLF001 - a shared file: nothing is lost
    if mapping.path is not None:
        forget_cached_pages(mapping.path)


@contextlib.contextmanager
def open_cold_place(workload: ColdWorkload, directory: Path, say: Say) -> Iterator[ColdPlace]:
    """Make, or find again, what is read; a context.

    Raises:
        ConfigError: the disk is too small.
    """
    say("reading text")
    segment = min(SEGMENT, workload.tokens)
    text = read_text(workload.windows * workload.tokens, segment)
    recipe = make_recipe(workload, text.token_map)
    steps = text.tokens.reshape(workload.windows, -1, segment)
    batches = [make_batch(recipe, tokens) for tokens in steps]
    root = _fresh_store(recipe, workload, directory, say)
    spec = engram_store.inspect(root).metadata.tables[LAYER]
    with engram_store.open(
        root, mode="train", overlay_bytes=overlay_bytes(spec), fold_ratio=float("inf")
    ) as store:
        store.restore(0)
        yield ColdPlace(workload, recipe, store, spec, batches, directory / FLAT_FILE)


def _fresh_store(recipe: Recipe, workload: ColdWorkload, directory: Path, say: Say) -> Path:
    """A store that was never trained, and a copy of its rows in one file."""
    root, key, flat = directory / _STORE, directory / _KEY, directory / FLAT_FILE
    wanted = json.dumps({"recipe": recipe.fingerprint_fields(), "dim": workload.dim})
    with contextlib.suppress(StoreFileError, SnapshotMismatchError):
        if key.exists() and key.read_text() == wanted and flat.exists():
            engram_store.inspect(root)
            return root
    key.unlink(missing_ok=True)
    flat.unlink(missing_ok=True)
    shutil.rmtree(root, ignore_errors=True)
    needed = round(_FILES * workload.rows * 2 * workload.dim)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ConfigError(
            f"bench cold needs about {needed:,} bytes in {directory}, which has {free:,}; give "
            "another --dir, or fewer --rows"
        )
    say("making the table")
    engram_store.create(root, recipe, dim=workload.dim, initial=RepeatedNormal(std=STD))
    say("copying the table into one file")
    write_flat(root, flat)
    with flat.open("rb") as file:
        os.fsync(file.fileno())  # only what is on the disk can be pushed out of memory
    key.write_text(wanted)
    return root
