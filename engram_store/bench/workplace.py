"""A store like one in the middle of training, and the same tables in one file and in memory."""

import contextlib
import json
import mmap
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import engram_store
from engram_store.bench.harness import Workload
from engram_store.bench.text import SEGMENT, read_text
from engram_store.engine import Engine
from engram_store.engine.lookup import LookupScratch
from engram_store.errors import SnapshotMismatchError, StoreFileError
from engram_store.layout.arrays import table_arrays
from engram_store.layout.create import Normal
from engram_store.layout.paths import StorePaths
from engram_store.recipes import Recipe, engram
from engram_store.store import Store
from engram_store.types import RowBlock, RowIds, TableSpec, TokenIds

LAYER = 1
BATCHES = 32
"""Different steps that are measured in turn."""
_FILL_ROWS = 1 << 14
STD = 0.02
"""Of initial rows."""
_TRAINED_STEPS = 8
FIRST_STEP = _TRAINED_STEPS + 1
"""Where every benchmark starts: a snapshot of this step is kept."""
_OVERLAY_BYTES = 512 << 20

Say = Callable[[str], None]


class RepeatedNormal(Normal):
    """Normal rows of which every 16,384 are alike: written as fast as the disk takes them."""

    def rows(self, layer: int, first: int, count: int, spec: TableSpec) -> RowBlock:  # noqa: ARG002
        """As `Normal.rows`, without drawing a billion numbers."""
        return np.resize(_fill_block(spec), (count, spec.dim))


@cache
def _fill_block(spec: TableSpec) -> RowBlock:
    return Normal(std=STD).rows(LAYER, 0, _FILL_ROWS, spec)


@dataclass(frozen=True, slots=True)
class Batch:
    """The look-ups of one step."""

    tokens: TokenIds
    """[segments, time]"""
    lookups: RowIds
    """[look-ups], repeats included."""
    rows: RowIds
    """Unique ones, in order of first look-up."""


@dataclass
class Workplace:
    """What all benchmarks work on."""

    workload: Workload
    recipe: Recipe
    store: Store
    engine: Engine
    spec: TableSpec
    batches: list[Batch]
    flat_file: Path
    """All rows in one file, as numpy wants them."""

    def rows_in_memory(self) -> RowBlock:
        """A copy of the table in anonymous memory, storage dtype [rows, dim]."""
        flat = np.fromfile(self.flat_file, self.spec.dtype.storage)
        return flat.reshape(-1, self.spec.dim)

    def rows_in_small_pages(self) -> RowBlock:
        """The same in pages of 4 KiB, as most files have them in the page cache."""
        length = self.flat_file.stat().st_size
        memory = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        with self.flat_file.open("rb") as file:
            file.readinto(memory)
        return np.frombuffer(memory, self.spec.dtype.storage).reshape(-1, self.spec.dim)

    def unique_rows(self) -> float:
        """Mean number of unique rows of a step."""
        return float(np.mean([batch.rows.size for batch in self.batches]))

    def describe(self) -> dict[str, Any]:
        """The workload as it came out."""
        lookups = self.batches[0].lookups.size
        return {
            **asdict(self.workload),
            "table_rows": self.spec.rows,
            "row_bytes": self.spec.row_bytes,
            "state_bytes": self.spec.state_bytes,
            "dtype": str(self.spec.dtype),
            "optimizer": str(self.spec.optimizer),
            "distinct_tokens": self.recipe.vocabulary,
            "lookups_per_step": lookups,
            "unique_rows_per_step": round(self.unique_rows()),
            "duplication": round(lookups / self.unique_rows(), 2),
            "steps_in_turn": len(self.batches),
            "overlay_bytes": overlay_bytes(self.spec),
        }


def open_workplace(workload: Workload, directory: Path, say: Say) -> Workplace:
    """Make, or find again, everything in `directory`; the store is open for training."""
    segment = min(SEGMENT, workload.tokens)
    say("reading text")
    text = read_text(BATCHES * workload.tokens, segment)
    recipe = make_recipe(workload, text.token_map)
    steps = text.tokens.reshape(BATCHES, -1, segment)
    batches = [make_batch(recipe, tokens) for tokens in steps]
    root = _trained_store(recipe, workload, batches, directory, say)
    say("opening the store")
    store = open_store(root)
    engine = store._engine  # noqa: SLF001 - the parts of a commit are timed one by one
    assert isinstance(engine, Engine)
    spec = store.tables[LAYER]
    _warm(engine)
    return Workplace(workload, recipe, store, engine, spec, batches, directory / "rows.bin")


def make_recipe(workload: Workload, token_map: NDArray[np.int32]) -> Recipe:
    """One table of about `workload.rows` rows."""
    return engram(
        token_map=token_map,
        layers=[LAYER],
        rows_per_head=workload.rows // (len(workload.orders) * workload.heads),
        pad_id=0,
        orders=workload.orders,
        heads=workload.heads,
    )


def make_batch(recipe: Recipe, tokens: TokenIds) -> Batch:
    """The look-ups of tokens, int64 [segments, time]."""
    rows, inverse = LookupScratch().look_up(recipe, LAYER, tokens, None, None)
    return Batch(tokens, rows[inverse].reshape(-1), rows)


def overlay_bytes(spec: TableSpec) -> int:
    """Two memtables, but no more than the table needs."""
    per_slot = 4 + spec.state_bytes + spec.row_bytes
    return min(_OVERLAY_BYTES, 2 * per_slot * (4 * spec.rows + 8192))


def open_store(root: Path) -> Store:
    """Open the store for training, as every benchmark does."""
    spec = engram_store.inspect(root).metadata.tables[LAYER]
    # Folds would run beside the timed commits in one run and not in the next.
    return engram_store.open(
        root, mode="train", overlay_bytes=overlay_bytes(spec), fold_ratio=float("inf")
    )


def _trained_store(
    recipe: Recipe, workload: Workload, batches: list[Batch], directory: Path, say: Say
) -> Path:
    """A store whose optimiser state is in real files: made, trained for some steps, folded."""
    root, key = directory / "bench.engram", directory / "workload.json"
    wanted = json.dumps({"recipe": recipe.fingerprint_fields(), "dim": workload.dim})
    # A store of another version or one that a killed run damaged is made again.
    with contextlib.suppress(StoreFileError, SnapshotMismatchError):
        if key.exists() and key.read_text() == wanted:
            with open_store(root) as store:
                store.restore(FIRST_STEP)
            return root
    key.unlink(missing_ok=True)
    shutil.rmtree(root, ignore_errors=True)
    say("making the table")
    engram_store.create(root, recipe, dim=workload.dim, initial=RepeatedNormal(std=STD))
    say("training it for some steps and folding it")
    with open_store(root) as store:
        for step in range(_TRAINED_STEPS):
            _train(store, batches[step])
        store.snapshot()
        store.fold()
        # The snapshot that is gone back to must be of the new base.
        _train(store, batches[_TRAINED_STEPS])
    say("copying the table into one file")
    write_flat(root, directory / "rows.bin")
    key.write_text(wanted)
    return root


def _train(store: Store, batch: Batch) -> None:
    window = store.announce(batch.tokens, step=store.step)
    shape = (batch.rows.size, store.tables[LAYER].dim)
    window.push(LAYER, np.random.default_rng(0).standard_normal(shape, np.float32))
    store.commit(store.step, lr=0.01)


def write_flat(root: Path, target: Path) -> None:
    """Copy all rows of a store's base into one file, one after the other."""
    description = engram_store.inspect(root)
    spec = description.metadata.tables[LAYER]
    generation = StorePaths(root).base(LAYER, description.tables[LAYER].generation)
    array = table_arrays(spec)[0]
    with target.open("wb") as file:
        for chunk in range(array.chunks):
            with array.chunk_file(generation, chunk).open("rb") as source:
                shutil.copyfileobj(source, file, 8 << 20)
        file.truncate(spec.rows * spec.row_bytes)


def _warm(engine: Engine) -> None:
    """Every page of the base in memory and in the page tables."""
    for mapping in engine.tables[LAYER].mapped_files():
        mapping.populate_read()


def touched(size: int, dtype: Any) -> NDArray[Any]:
    """Memory whose pages are there already."""
    block = np.empty(size, dtype)
    block.fill(0)
    return block
