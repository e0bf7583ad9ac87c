"""The three things one does with a store directory: create, open, inspect."""

import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engram_store.errors import ConfigError, StoreFileError
from engram_store.layout.create import Normal, Progress, create_store, table_specs
from engram_store.layout.disk import Disk
from engram_store.layout.inspect import StoreDescription, describe
from engram_store.layout.paths import StorePaths
from engram_store.recipes import Recipe
from engram_store.session import SnapshotRef
from engram_store.types import NonFinitePolicy, OptimizerKind, RowDtype

if TYPE_CHECKING:
    from engram_store.store import Mode, Store


def create(
    path: str | Path,
    recipe: Recipe,
    *,
    dim: int,
    dtype: RowDtype | str = RowDtype.BFLOAT16,
    optimizer: OptimizerKind | str = OptimizerKind.ROWWISE_ADAGRAD,
    initial: Normal | None = None,
    stochastic_rounding: bool = True,
    on_nonfinite: NonFinitePolicy | str = NonFinitePolicy.REJECT,
    seed: int = 0,
    per_layer: Mapping[int, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> None:
    """Make a store with one table per layer of a recipe.

    Args:
        path: directory to make.
        recipe: how tokens become rows; stored with the tables and never derived again.
        dim: values of a row.
        dtype: number format of rows.
        optimizer: decides which state is kept beside rows.
        initial: `Normal(std, seed)`, or None for zeros, which take no disk until trained.
        stochastic_rounding: of bfloat16 rows.
        on_nonfinite: what to do with NaN and infinity in gradients.
        seed: of stochastic rounding.
        per_layer: by layer, other values of dim, dtype, optimizer, stochastic_rounding,
            on_nonfinite or seed.
        progress: called with (bytes written, bytes in all) of initial rows.

    Raises:
        StoreExistsError, ConfigError, DiskFullError: nothing is left behind.
    """
    common = _table_options(
        {
            "dim": dim,
            "dtype": dtype,
            "optimizer": optimizer,
            "stochastic_rounding": stochastic_rounding,
            "on_nonfinite": on_nonfinite,
            "seed": seed,
        }
    )
    layers = [layer.layer for layer in recipe.layers]
    for layer in per_layer or {}:
        if layer not in layers:
            raise ConfigError(f"per_layer has layer {layer!r}; the recipe's layers are {layers}")
    overrides = {layer: _table_options(given) for layer, given in (per_layer or {}).items()}
    tables = table_specs(recipe, overrides=overrides, **common)
    create_store(Path(path), recipe, tables, initial=initial, progress=progress)


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError("must be True or False")
    return value


_TABLE_OPTIONS: Mapping[str, Callable[[Any], Any]] = {
    "dim": operator.index,
    "dtype": RowDtype,
    "optimizer": OptimizerKind,
    "stochastic_rounding": _switch,
    "on_nonfinite": NonFinitePolicy,
    "seed": operator.index,
}
"""What a table's description may be given, and what each value is turned into."""


def _table_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Raises: ConfigError."""
    options = {}
    for name, value in given.items():
        if name not in _TABLE_OPTIONS:
            raise ConfigError(f"a table has no option {name!r}; it has {[*_TABLE_OPTIONS]}")
        try:
            options[name] = _TABLE_OPTIONS[name](value)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{name} is {value!r:.100}: {error}; dtypes are {[*map(str, RowDtype)]}, "
                f"optimizers {[*map(str, OptimizerKind)]}, policies {[*map(str, NonFinitePolicy)]}"
            ) from None
    return options


def open(  # noqa: A001 - reads as engram_store.open
    path: str | Path,
    mode: "Mode" = "read",
    *,
    recipe: Recipe | None = None,
    snapshot: SnapshotRef | int | str | None = None,
    memory_bytes: int | None = None,
    overlay_bytes: int | None = None,
    memtable_dir: str | Path | None = None,
    fold_ratio: float = 1.0,
    fold_bytes_per_second: float | None = None,
    scrub_bytes_per_second: float = 0.0,
    durability: str = "snapshot",
    keep_snapshots: int | None = None,
    count_uses: bool = False,
    lookahead_bytes: int | None = None,
    staleness: int = 0,
    allocate: Callable[[int], NDArray[np.uint8]] | None = None,
    disk: Disk | None = None,
) -> "Store":
    """Open a store.

    Args:
        path: the store's directory.
        mode: 'read' serves one snapshot and takes no lock; 'train' is the only writer and
            continues at the last applied step, whatever happened to the process before.
        recipe: what the caller believes it to be; anything else is refused.
        snapshot: for 'read': which one, a pin's name too; None is the newest.
        memory_bytes: for 'train': all that the store may use, which is shared memory, windows
            ahead, indexes, and the page cache of its files; see docs/memory.md. None: what the
            limit of the machine or of the cgroup leaves to this process.
        overlay_bytes: shared memory for updated rows; None: a fifth of the memory that indexes
            leave, at most 1 GiB.
        memtable_dir: where that memory is; None: /dev/shm, or the store's directory where that
            is too small.
        fold_ratio: fold when segments reach this multiple of the base.
        fold_bytes_per_second: how much folds and merges read and write; None: as fast as they can.
        scrub_bytes_per_second: how fast a thread reads all files in use again and again to find
            damages, whose rows are refused then; 0: never.
        durability: when applied steps outlive the host: 'snapshot' (with the next snapshot),
            'step' (before commit returns), or 'group(MS)' (so many milliseconds later). They
            outlive the process in any case.
        keep_snapshots: how many of the newest snapshots stay whenever one is made, beside the
            pinned ones; None: all, because a checkpoint may name any of them.
        count_uses: for 'read': count how often each row is read, which is what `Store.promote`
            goes by; two bytes of memory per row.
        lookahead_bytes: memory of windows that are hashed and gathered ahead of their step, buffers
            and all; later windows wait as tokens until there is room. None: an eighth of the
            memory that indexes leave, at most 2 GiB.
        staleness: how many steps the rows of a window may lag behind. 0 is exact; more lets
            `Window.rows` return that many steps early, and `stats()` counts the rows that were
            out of date.
        allocate: makes the buffers rows are gathered into (pinned memory, say).
        disk: what changes files; a test gives one of `engram_store.testing`.

    Raises:
        StoreNotFoundError, StoreLockedError, FingerprintMismatchError, SnapshotMismatchError,
        StoreFileError (damaged or foreign files), CapacityError, ConfigError.
    """
    from engram_store.engine import EngineOptions
    from engram_store.engine.lookup import plain_memory
    from engram_store.store import Store

    if mode not in ("read", "train"):
        raise ConfigError(f"mode must be 'read' or 'train', got {mode!r}")
    options = EngineOptions(
        memory_bytes=memory_bytes,
        overlay_bytes=overlay_bytes,
        memtable_dir=None if memtable_dir is None else Path(memtable_dir),
        fold_ratio=fold_ratio,
        fold_bytes_per_second=fold_bytes_per_second,
        scrub_bytes_per_second=scrub_bytes_per_second,
        durability=durability,
        keep_snapshots=keep_snapshots,
        lookahead_bytes=lookahead_bytes,
        staleness=staleness,
        disk=disk or Disk(),
    )
    arguments: dict[str, Any] = {
        "snapshot": snapshot,
        "recipe": recipe,
        "allocate": allocate or plain_memory,
        "count_uses": count_uses,
    }
    try:
        return Store(Path(path), mode, options, **arguments)
    except StoreFileError:
        if mode == "train" or snapshot is not None:
            raise
        # A trainer may have replaced the newest snapshot's files while they were being opened.
        return Store(Path(path), mode, options, **arguments)


def inspect(path: str | Path) -> StoreDescription:
    """What the store in a directory is, from its files alone; takes no lock.

    Raises:
        StoreNotFoundError, StoreFileError.
    """
    return describe(StorePaths(Path(path)))
