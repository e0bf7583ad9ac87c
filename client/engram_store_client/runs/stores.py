"""The store of a run: found, made, opened."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import engram_store
from engram_store.errors import ConfigError
from engram_store.recipes import Recipe, compress_vocabulary
from engram_store.session import Session
from engram_store_client.planning import Plan, TableShape, parse_size, tables_of_store
from engram_store_client.ranks import rank_options
from engram_store_client.runs.settings import CreateSettings, StoreSettings
from engram_store_client.transport import connect, local_path, process_address


def store_directory(settings: StoreSettings) -> Path | None:
    """Where the store is, or will be; None: a store process has it. Raises: ConfigError."""
    if process_address(settings.path) is None:
        return local_path(settings.path)
    if settings.memory is not None or settings.create is not None:
        raise ConfigError(
            f"store.memory and store.create are for a directory; {settings.path} is a store "
            "process: give them to `engram-store serve` and `engram-store create`"
        )
    return None


def wanted_tables(directory: Path, settings: StoreSettings) -> TableShape:
    """The tables that are there, or those that will be made. Raises: ConfigError."""
    if directory.exists() and any(directory.iterdir()):
        return tables_of_store(directory)
    create = settings.create
    if create is None:
        raise ConfigError(
            f"there is no store in {directory}; say in store.create what to make, or make one "
            "with `engram-store create`"
        )
    return TableShape(
        recipe=create.recipe,
        layers=create.layers,
        rows_per_head=create.rows_per_head,
        heads=create.heads,
        orders=create.orders,
        dim=create.dim,
        dtype=create.dtype,
        optimizer=create.optimizer,
    )


def make_store(
    directory: Path, tables: TableShape, create: CreateSettings, tokenizer: Any, seed: int
) -> None:
    """Make the store of a run, with the recipe for its tokenizer.

    Raises: ConfigError, DiskFullError: nothing is left behind.
    """
    normal = engram_store.Normal(std=create.std, seed=seed) if create.std else None
    engram_store.create(
        directory,
        recipe_for(tables, create, tokenizer),
        dim=tables.dim,
        dtype=tables.dtype,
        optimizer=tables.optimizer,
        initial=normal,
        seed=seed,
    )


def recipe_for(tables: TableShape, create: CreateSettings, tokenizer: Any) -> Recipe:
    """The recipe of a run's file for its tokenizer. Raises: ConfigError."""
    pad_id = tokenizer.pad_token_id if create.pad_id is None else create.pad_id
    if pad_id is None:
        raise ConfigError("the tokenizer has no padding token; set store.create.pad_id")
    # engram-peft leaves added tokens out of its map.
    base_only = tables.recipe == "engram-peft"
    compresses = tables.recipe != "qwen3.8-ple"
    size = tokenizer.vocab_size if base_only else None
    return tables.make_recipe(
        token_map=compress_vocabulary(tokenizer, size=size) if compresses else [0],
        pad_id=pad_id,
        vocabulary=len(tokenizer),
        eos_id=tokenizer.eos_token_id,
    )


def open_store(
    settings: StoreSettings, plan: Plan | None, told: Callable[[str], None] | None = None
) -> Session:
    """Open the store for training; ranks of one job share a store process.

    Raises: as `connect`.
    """
    options = {**rank_options(), **settings.options}
    if settings.memory is not None:
        options.setdefault("memory_bytes", parse_size(settings.memory, "store.memory"))
    here = process_address(settings.path) is None
    if here and plan is not None and plan.overlay_bytes is not None:
        options.setdefault("overlay_bytes", plan.overlay_bytes)
        if told is not None:
            told(f"memtables of {plan.overlay_bytes:,} bytes, for steps of this size")
    return connect(settings.path, "train", **options)
