"""What `bench train --device cuda` trains on: text, look-ups of every table, a store at step 0.

Knows no torch, so that the command line can describe a workload without it.
"""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from engram_store.bench.harness import Workload
from engram_store.bench.text import SEGMENT, read_text
from engram_store.bench.train_place import fresh_store
from engram_store.bench.workplace import LAYER, Say
from engram_store.engine.lookup import LookupScratch
from engram_store.errors import ConfigError
from engram_store.recipes import Recipe, engram
from engram_store.types import Inverse, OptimizerKind, RowIds, TableSpec, TokenIds

STEPS = 16
"""Different steps that are trained in turn."""
LOOK_AHEAD = 2
LEARNING_RATE = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseSize:
    """Of the model: Qwen3's kind with tied embeddings. The defaults make 4.0 billion parameters."""

    hidden: int = 2560
    blocks: int = 36
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    mlp: int = 9728
    vocabulary: int = 151_936


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuWorkload(Workload):
    """What `bench train --device cuda` measures; `rows` are those of each table."""

    tables: int = 4
    smaller: int = 4
    """How many times smaller the tables are that the peak of GPU memory is compared with."""
    sequence: int = SEGMENT
    """Tokens of a sequence."""
    vram_bytes: int = 24 << 30
    """Limit on the GPU memory of this process."""
    base: BaseSize = BaseSize()
    checkpointing: bool = True
    """Whether activations are computed again in the backward pass."""
    trace: Path | None = None
    """Where a profiler's trace of three steps of the store goes; None: nowhere."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: sizes that make no sense."""
        if not 1 <= self.tables < self.base.blocks:
            raise ConfigError(
                f"{self.tables} tables for a model of {self.base.blocks} blocks; give each table a "
                "block of its own, but not the first one"
            )
        if self.sequence < 2 or self.tokens % self.sequence:
            raise ConfigError(
                f"{self.tokens} tokens a step in sequences of {self.sequence}; give a multiple, "
                f"such as {max(1, self.tokens // max(self.sequence, 1)) * self.sequence}"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks that look up rows, from the second one on, evenly."""
        step = self.base.blocks - 1
        return tuple(LAYER + number * step // self.tables for number in range(self.tables))


@dataclass(frozen=True, slots=True)
class LookedUp:
    """One step: tokens, and what they look up in each table."""

    tokens: TokenIds
    """[batch, time]"""
    found: dict[int, tuple[RowIds, Inverse]]
    """Unique rows and int32 [batch, time, columns], by layer."""


@dataclass(frozen=True, slots=True)
class GpuPlace:
    """Everything that arms train on, but for tables and gates."""

    recipe: Recipe
    dim: int
    steps: list[LookedUp]

    @classmethod
    def make(cls, workload: GpuWorkload, *, smaller: int = 1) -> Self:
        """Read text and look all of it up, in tables that many times smaller."""
        text = read_text(STEPS * workload.tokens, min(SEGMENT, workload.tokens))
        tokens, token_map = fold_vocabulary(text.tokens, text.token_map, workload.base.vocabulary)
        recipe = engram(
            token_map=token_map,
            layers=list(workload.layers),
            rows_per_head=workload.rows // smaller // (len(workload.orders) * workload.heads),
            pad_id=0,
            orders=workload.orders,
            heads=workload.heads,
        )
        batches = tokens.reshape(STEPS, -1, workload.sequence)
        return cls(recipe, workload.dim, [look_up(recipe, batch) for batch in batches])

    def endlessly(self) -> Iterator[LookedUp]:
        """The steps in turn, again and again."""
        return itertools.cycle(self.steps)

    def most_rows(self, layer: int) -> int:
        """Unique rows of the step that has most."""
        return max(step.found[layer][0].size for step in self.steps)


def fold_vocabulary(
    tokens: TokenIds, token_map: NDArray[np.int32], limit: int
) -> tuple[TokenIds, NDArray[np.int32]]:
    """Ids below `limit`: the commonest have one of their own, the others share the last. Pure.

    Returns:
        The tokens with new ids, and the map of new ids to compressed ones.
    """
    counts = np.bincount(tokens.reshape(-1), minlength=token_map.size)
    order = np.argsort(-counts, kind="stable")
    folded = np.empty(counts.size, np.int64)
    folded[order] = np.minimum(np.arange(counts.size), limit - 1)
    return folded[tokens], token_map[order[:limit]]


def look_up(recipe: Recipe, tokens: TokenIds) -> LookedUp:
    """What the tokens of a step, int64 [batch, time], look up."""
    scratch, found = LookupScratch(), {}
    for layer in recipe.layers:
        rows, inverse = scratch.look_up(recipe, layer.layer, tokens, None, None)
        found[layer.layer] = rows.copy(), inverse.copy()
    return LookedUp(tokens, found)


def gpu_store(place: GpuPlace, root: Path, say: Say) -> TableSpec:
    """A store of row-wise Adagrad at step 0, made or found. Raises: ConfigError: no room."""
    return fresh_store(root, place.recipe, place.dim, OptimizerKind.ROWWISE_ADAGRAD, say)


def describe_gpu(workload: GpuWorkload, place: GpuPlace, spec: TableSpec) -> dict[str, Any]:
    """The workload as it came out."""
    unique = [rows.size for step in place.steps for rows, _ in step.found.values()]
    lookups = sum(inverse.size for _, inverse in place.steps[0].found.values())
    return {
        **asdict(workload),
        "trace": None if workload.trace is None else workload.trace.name,
        "layers": workload.layers,
        "table_rows": spec.rows,
        "row_bytes": spec.row_bytes,
        "table_bytes": spec.rows * spec.row_bytes,
        "dtype": str(spec.dtype),
        "lookups_per_step": lookups,
        "unique_rows_per_step": round(float(np.mean(unique)) * workload.tables),
        "steps_in_turn": STEPS,
        "look_ahead": LOOK_AHEAD,
    }
