"""What `bench train` trains on: text, the look-ups of its steps, and stores at step 0.

Knows no torch, so that the command line can describe a workload without it.
"""

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import engram_store
from engram_store.bench.harness import Workload
from engram_store.bench.text import read_text
from engram_store.bench.workplace import LAYER, STD, RepeatedNormal, Say, make_recipe
from engram_store.engine.lookup import LookupScratch
from engram_store.errors import ConfigError, SnapshotMismatchError, StoreFileError
from engram_store.layout.metadata import read_metadata
from engram_store.layout.paths import StorePaths
from engram_store.recipes import Recipe
from engram_store.types import Inverse, OptimizerKind, RowIds, TableSpec, TokenIds

TIME = 256
"""Tokens of a sequence: attention over longer ones would outweigh everything else."""
STEPS = 32
"""Different steps that are trained in turn while everything is warm."""
LOOK_AHEAD = 2
LEARNING_RATE = 0.01
HIDDEN, BLOCKS, VOCABULARY = 64, 2, 1024
"""Of the model: width, decoder blocks, tokens that it tells apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainWorkload(Workload):
    """What `bench train` measures; `repetitions` are timed steps of every line."""

    limited_rows: int = 44_000_000
    """Rows of the table that is four times the memory limit."""
    limited_tokens: int = 4096
    """Tokens of a step while memory is limited: the model's activations need some of it, too."""
    limited_steps: int = 64
    """Steps of one pass over the text while memory is limited."""

    @property
    def steps(self) -> int:
        """Steps of text that are needed for everything."""
        return max(STEPS, -(-self.limited_steps * self.limited_tokens // self.tokens))


@dataclass(frozen=True, slots=True)
class Looked:
    """One step: tokens and what they look up."""

    tokens: TokenIds
    """[batch, time]"""
    rows: RowIds
    """Unique ones, in order of first look-up."""
    inverse: Inverse
    """int32 [batch, time, columns]"""


@dataclass(frozen=True, slots=True)
class TrainText:
    """Text and the model's view of it."""

    steps: TokenIds
    """[steps, batch, time]"""
    token_map: NDArray[np.int32]
    """Compressed id of each token, for recipes."""
    narrow: NDArray[np.int64]
    """The model's id of each token: the commonest have one of their own."""

    def cut(self, tokens: int) -> TokenIds:
        """The same text in steps of so many tokens, whole sequences: [steps, batch, time].

        Raises:
            ConfigError: they are no multiple of a sequence.
        """
        time = self.steps.shape[-1]
        if tokens < time or tokens % time:
            raise ConfigError(
                f"steps of {tokens} tokens cannot be cut from sequences of {time}; give a multiple"
            )
        sequences = self.steps.reshape(-1, time)
        steps = len(sequences) * time // tokens
        return sequences[: steps * (tokens // time)].reshape(steps, -1, time)


def read_train_text(steps: int, tokens: int) -> TrainText:
    """`steps` different steps of `tokens` tokens.

    Raises:
        ConfigError: steps cannot be cut into sequences.
    """
    time = min(TIME, tokens)
    if tokens % time:
        raise ConfigError(
            f"bench train was asked for {tokens} tokens a step; more than {TIME} must be a "
            f"multiple of {TIME}, such as {tokens // TIME * TIME}"
        )
    text = read_text(steps * tokens, time)
    counts = np.bincount(text.tokens.reshape(-1), minlength=text.token_map.size)
    narrow = np.empty(counts.size, np.int64)
    narrow[np.argsort(-counts, kind="stable")] = np.arange(counts.size)
    return TrainText(
        text.tokens.reshape(steps, -1, time), text.token_map, np.minimum(narrow, VOCABULARY - 1)
    )


def look_up(recipe: Recipe, tokens: TokenIds) -> Looked:
    """What the tokens of a step, int64 [batch, time], look up."""
    rows, inverse = LookupScratch().look_up(recipe, LAYER, tokens, None, None)
    return Looked(tokens, rows.copy(), inverse.copy())


@dataclass(frozen=True, slots=True)
class TrainPlace:
    """Everything that lines train on, but for their own tables and models."""

    recipe: Recipe
    narrow: NDArray[np.int64]
    """See `TrainText`."""
    dim: int
    looked: list[Looked]

    @classmethod
    def of(cls, recipe: Recipe, dim: int, steps: TokenIds, narrow: NDArray[np.int64]) -> Self:
        """Look up all steps, int64 [steps, batch, time]."""
        return cls(recipe, narrow, dim, [look_up(recipe, tokens) for tokens in steps])

    def endlessly(self) -> Iterator[Looked]:
        """The steps in turn, again and again."""
        return itertools.cycle(self.looked)

    @property
    def most_rows(self) -> int:
        """Unique rows of the step that has most."""
        return max(step.rows.size for step in self.looked)


def describe(workload: TrainWorkload, place: TrainPlace, spec: TableSpec) -> dict[str, Any]:
    """The workload as it came out."""
    unique = float(np.mean([step.rows.size for step in place.looked]))
    return {
        **asdict(workload),
        "table_rows": spec.rows,
        "row_bytes": spec.row_bytes,
        "table_bytes": spec.rows * spec.row_bytes,
        "dtype": str(spec.dtype),
        "lookups_per_step": place.looked[0].inverse.size,
        "unique_rows_per_step": round(unique),
        "steps_in_turn": len(place.looked),
        "look_ahead": LOOK_AHEAD,
        "model": {
            "hidden": HIDDEN, "blocks": BLOCKS, "vocabulary": VOCABULARY, "memory_layer": LAYER,
            "sequence": place.looked[0].tokens.shape[1],
        },
    }  # fmt: skip


def make_train_recipe(workload: Workload, text: TrainText) -> Recipe:
    """One table of about `workload.rows` rows, for the model's second block."""
    return make_recipe(workload, text.token_map)


def fresh_store(
    root: Path, recipe: Recipe, dim: int, optimizer: OptimizerKind, say: Say
) -> TableSpec:
    """A store at step 0; a kept one goes back to it, and is made again where it cannot.

    Raises:
        ConfigError: the disk is too small.
    """
    key = root.with_suffix(".json")
    wanted = json.dumps(
        {"recipe": recipe.fingerprint_fields(), "dim": dim, "optimizer": str(optimizer)}
    )
    with contextlib.suppress(StoreFileError, SnapshotMismatchError):
        if key.exists() and key.read_text() == wanted:
            go_back(root)
            return _spec(root)
    key.unlink(missing_ok=True)
    shutil.rmtree(root, ignore_errors=True)
    rows = sum(layer.rows for layer in recipe.layers)
    needed, free = 3 * rows * 2 * dim, shutil.disk_usage(root.parent).free
    if free < needed:
        raise ConfigError(
            f"bench train needs about {needed:,} bytes for {root.name} in {root.parent}, which has "
            f"{free:,}; give another --dir, or fewer rows"
        )
    say(f"making {root.name}")
    initial = RepeatedNormal(std=STD)
    engram_store.create(root, recipe, dim=dim, optimizer=optimizer, initial=initial)
    key.write_text(wanted)
    return _spec(root)


def go_back(root: Path) -> None:
    """Let a store forget what it learned."""
    with engram_store.open(root, "train") as store:
        store.restore(0)


def _spec(root: Path) -> TableSpec:
    return read_metadata(StorePaths(root)).tables[LAYER]
