"""The tables of a run: what they will be, or what they are in a store."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from engram_store.errors import ConfigError
from engram_store.recipes import Family, Recipe, deepseek_v41, engram, engram_peft, qwen_ple
from engram_store.types import OptimizerKind, RowDtype, TableSpec

_ANY_IDS = np.arange(16)
"""A token map decides multipliers and never the number of rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableShape:
    """Tables as `engram-store create` makes them, one per layer; or those of a store."""

    recipe: str = "engram"
    layers: tuple[int, ...]
    rows_per_head: int
    """Wanted rows of one hash head; each head gets the next free prime."""
    heads: int = 8
    """Hash heads of each order."""
    orders: tuple[int, ...] = (2, 3)
    dim: int
    """Values of a row."""
    dtype: str = "bfloat16"
    optimizer: str = "rowwise_adagrad"
    stored: tuple[TableSpec, ...] | None = None
    """The tables of a store, which count instead of the sizes above."""

    def __post_init__(self) -> None:
        kinds = {"recipe": Family, "dtype": RowDtype, "optimizer": OptimizerKind}
        for name, kind in kinds.items():
            if getattr(self, name) not in {str(member) for member in kind}:
                allowed = ", ".join(map(str, kind))
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed are {allowed}")

    @property
    def columns(self) -> int:
        """Rows that one token looks up in one layer."""
        return self.heads * len(self.orders)

    @property
    def row_width(self) -> int:
        """Values that one token gets in one layer."""
        return self.columns * self.dim

    @property
    def specs(self) -> tuple[TableSpec, ...]:
        """The tables, their rows exact. Raises: ConfigError."""
        return _specs(self) if self.stored is None else self.stored

    @property
    def parameters(self) -> int:
        """Values of all rows."""
        return sum(spec.rows * spec.dim for spec in self.specs)

    def make_recipe(
        self, *, token_map: ArrayLike, pad_id: int, vocabulary: int, eos_id: int
    ) -> Recipe:
        """The recipe of these sizes for a tokenizer.

        Args:
            token_map, pad_id: of the recipes that compress ids; `qwen3.8-ple` ignores them.
            vocabulary, eos_id: number of raw ids, and the one that ends a text, for `qwen3.8-ple`.

        Raises: RecipeError.
        """
        common: dict[str, Any] = {"layers": self.layers, "heads": self.heads}
        if self.recipe == Family.QWEN_PLE:
            return qwen_ple(
                vocabulary=vocabulary,
                rows_per_head=self.rows_per_head,
                eos_id=eos_id,
                orders=self.orders,
                **common,
            )
        common |= {"token_map": token_map, "pad_id": pad_id}
        if self.recipe == Family.DEEPSEEK_V41:
            longest = self.orders[-1] if self.orders else 0
            if self.orders != tuple(range(2, longest + 1)):
                raise ConfigError(
                    f"{self.recipe} takes orders 2,3,... without gaps, not {list(self.orders)}"
                )
            return deepseek_v41(rows_per_head=self.rows_per_head, max_order=longest, **common)
        if self.recipe == Family.ENGRAM_PEFT:
            rows = [self.rows_per_head * self.heads] * len(self.orders)
            return engram_peft(rows_per_order=rows, orders=self.orders, **common)
        return engram(rows_per_head=self.rows_per_head, orders=self.orders, **common)


@lru_cache(maxsize=256)
def _specs(shape: TableShape) -> tuple[TableSpec, ...]:
    recipe = shape.make_recipe(token_map=_ANY_IDS, pad_id=0, vocabulary=16, eos_id=0)
    return tuple(
        TableSpec(
            layer=layer.layer,
            rows=layer.stored_rows,
            dim=shape.dim,
            dtype=RowDtype(shape.dtype),
            optimizer=OptimizerKind(shape.optimizer),
        )
        for layer in recipe.layers
    )


def tables_of(recipe: Recipe, tables: Mapping[int, TableSpec]) -> TableShape:
    """The tables of a store, or of a session (`session.recipe`, `session.tables`)."""
    specs = tuple(tables.values())
    return TableShape(
        recipe=str(recipe.family),
        layers=tuple(spec.layer for spec in specs),
        rows_per_head=max(layer.rows for layer in recipe.layers) // recipe.columns,
        heads=recipe.heads,
        orders=recipe.orders,
        dim=specs[0].dim,
        dtype=str(specs[0].dtype),
        optimizer=str(specs[0].optimizer),
        stored=specs,
    )


def tables_of_store(directory: str | Path) -> TableShape:
    """The tables of a store directory. Raises: StoreNotFoundError, StoreFileError."""
    import engram_store

    metadata = engram_store.inspect(directory).metadata
    return tables_of(metadata.recipe, metadata.tables)
