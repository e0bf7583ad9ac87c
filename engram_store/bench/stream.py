"""What `bench writes` trains on: a stream of text, a store, and the same table in flat files."""

import contextlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import engram_store
from engram_store.bench.harness import WritesWorkload
from engram_store.bench.text import SEGMENT, read_text
from engram_store.bench.workplace import (
    LAYER,
    STD,
    Batch,
    RepeatedNormal,
    Say,
    make_batch,
    make_recipe,
    write_flat,
)
from engram_store.bench.writers import STORE, WriterOrder, Written, run_writer
from engram_store.engine.memory import forget_cached_pages
from engram_store.errors import ConfigError, SnapshotMismatchError, StoreFileError
from engram_store.recipes import Recipe
from engram_store.types import TableSpec

_KEY = "writes.json"
_STORE_DIRECTORY = "writes.engram"
_TABLES = 6
"""How many times the table's size the disk must have free: the store, its segments and a fold."""


@dataclass
class Stream:
    """Everything that the writers work on, in one directory."""

    workload: WritesWorkload
    recipe: Recipe
    spec: TableSpec
    order: WriterOrder
    """For the store, all steps."""
    batches: list[Batch]
    """Of the limited steps."""

    @property
    def table_bytes(self) -> int:
        """Rows and state."""
        return self.spec.rows * (self.spec.row_bytes + self.spec.state_bytes)

    def updated_bytes(self, written: Written) -> int:
        """Bytes of the rows updated, with state and id."""
        return written.rows_updated * (4 + self.spec.state_bytes + self.spec.row_bytes)

    def describe(self) -> dict[str, Any]:
        """The workload as it came out."""
        unique = float(np.mean([batch.rows.size for batch in self.batches]))
        return {
            **asdict(self.workload),
            "table_rows": self.spec.rows,
            "row_bytes": self.spec.row_bytes,
            "state_bytes": self.spec.state_bytes,
            "dtype": str(self.spec.dtype),
            "optimizer": str(self.spec.optimizer),
            "distinct_tokens": self.recipe.vocabulary,
            "lookups_per_step": self.batches[0].lookups.size,
            "unique_rows_per_step": round(unique),
            "table_bytes": self.table_bytes,
        }

    def run(self, order: WriterOrder) -> Written:
        """One writer, from the beginning; what a store learns is forgotten afterwards.

        Raises:
            EngramStoreError: the process failed.
        """
        self._forget_pages()
        written = run_writer(order)
        if order.writer == STORE:
            _go_back(order.path(order.store))
        return written

    def make_flat_files(self) -> None:
        """The table as the references want it: rows in one file, sums in another."""
        order = self.order
        write_flat(order.path(order.store), order.path(order.rows_file))
        np.zeros(self.spec.rows, np.float32).tofile(order.path(order.sums_file))

    def remove_flat_files(self) -> None:
        """They are of no use afterwards."""
        for name in (self.order.rows_file, self.order.sums_file):
            self.order.path(name).unlink(missing_ok=True)

    def _forget_pages(self) -> None:
        """Nothing is cached: a page counts for the memory of who read it first."""
        for path in Path(self.order.room).rglob("*"):
            if path.is_file():
                forget_cached_pages(path)


def open_stream(workload: WritesWorkload, directory: Path, say: Say) -> Stream:
    """Make, or find again, what is trained.

    Raises:
        ConfigError: the disk is too small, or more steps are limited than there are.
    """
    if not 1 <= workload.limited_steps <= workload.repetitions:
        raise ConfigError(
            f"limited steps are {workload.limited_steps}; they are the first of the "
            f"{workload.repetitions} steps, so at least 1 and at most so many"
        )
    say("reading text")
    segment = min(SEGMENT, workload.tokens)
    text = read_text(workload.repetitions * workload.tokens, segment)
    steps = text.tokens.reshape(workload.repetitions, -1, segment)
    recipe = make_recipe(workload, text.token_map)
    root = _fresh_store(recipe, workload, directory, say)
    spec = engram_store.inspect(root).metadata.tables[LAYER]
    batches = [make_batch(recipe, tokens) for tokens in steps[: workload.limited_steps]]
    order = WriterOrder(
        writer=STORE, layer=LAYER, dim=spec.dim, room=str(directory), store=_STORE_DIRECTORY,
        steps=workload.repetitions,
    )  # fmt: skip
    np.save(order.path(order.tokens), steps)
    updates: Any = {str(step): np.sort(batch.rows) for step, batch in enumerate(batches)}
    np.savez(order.path(order.updates), **updates)
    return Stream(workload, recipe, spec, order, batches)


def _fresh_store(recipe: Recipe, workload: WritesWorkload, directory: Path, say: Say) -> Path:
    """A store at step 0; a kept one goes back to it, and is made again where it cannot."""
    root, key = directory / _STORE_DIRECTORY, directory / _KEY
    wanted = json.dumps({"recipe": recipe.fingerprint_fields(), "dim": workload.dim})
    with contextlib.suppress(StoreFileError, SnapshotMismatchError):
        if key.exists() and key.read_text() == wanted:
            _go_back(root)
            return root
    key.unlink(missing_ok=True)
    shutil.rmtree(root, ignore_errors=True)
    needed, free = _TABLES * workload.rows * 2 * workload.dim, shutil.disk_usage(directory).free
    if free < needed:
        raise ConfigError(
            f"bench writes needs about {needed:,} bytes in {directory}, which has {free:,}; give "
            "another --dir, or fewer --rows"
        )
    say("making the table")
    engram_store.create(root, recipe, dim=workload.dim, initial=RepeatedNormal(std=STD))
    key.write_text(wanted)
    return root


def _go_back(root: Path) -> None:
    with engram_store.open(root, "train") as store:
        store.restore(0)
