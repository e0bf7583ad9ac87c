"""Making a store over the wire: what was asked for, checked, and then written beside the others."""

import errno
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import EnumType
from typing import Any

import numpy as np

from engram_store import wire
from engram_store.errors import ConfigError, DiskFullError, RecipeError, StoreExistsError
from engram_store.layout.arrays import MAX_DIM
from engram_store.layout.create import Normal, create_store, table_specs
from engram_store.layout.disk import Disk
from engram_store.layout.documents import parse_json, whole
from engram_store.layout.files import disk_errors
from engram_store.layout.paths import StorePaths
from engram_store.recipes import Recipe
from engram_store.store import Store
from engram_store.types import NonFinitePolicy, OptimizerKind, RowDtype, TableSpec
from engram_store.v1 import store_pb2 as pb
from engram_store_server.config import ServerConfig
from engram_store_server.home import RESERVED_NAMES, StoreHome, open_store

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_TABLES = 1024
"""Far more than models have layers; each table takes a thread of the process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Creation:
    """A store that is to be made."""

    name: str
    recipe: Recipe
    tables: Sequence[TableSpec]
    initial: Normal | None
    """Initial rows; None: zeros."""

    @property
    def full_bytes(self) -> int:
        """What the tables take on disk once every row was written, with optimiser state."""
        return sum(spec.rows * (spec.row_bytes + spec.state_bytes) for spec in self.tables)


def decode_creation(request: pb.CreateStoreRequest) -> Creation:
    """What a request asks for. Pure.

    Raises:
        ConfigError: the name, the recipe or an option is not allowed.
        ProtocolError: the token map is not an array.
    """
    _check_name(request.store)
    recipe = _recipe(request)
    options = _json("options_json", request.options_json)
    initial = _initial(options.pop("initial", None))
    layers = _overrides(options.pop("per_layer", {}), recipe)
    settings = _settings("options_json", options)
    if "dim" not in settings:
        raise ConfigError("options_json has no dim; say how many values a row has")
    tables = table_specs(recipe, overrides=layers, **settings)
    return Creation(name=request.store, recipe=recipe, tables=tables, initial=initial)


def _check_name(name: str) -> None:
    """Raises: ConfigError."""
    if not _NAME.fullmatch(name) or name in RESERVED_NAMES:
        raise ConfigError(
            f"a store cannot be named {name!r:.120}; a name is 1 to 100 letters, digits, dots, "
            "dashes and underscores, begins with a letter or a digit, and is none of "
            f"{', '.join(sorted(RESERVED_NAMES))}"
        )


def _recipe(request: pb.CreateStoreRequest) -> Recipe:
    """Raises: RecipeError, ProtocolError."""
    token_map = None
    if request.HasField("token_map"):
        token_map = wire.decode_array(request.token_map)
        if token_map.dtype != np.int32 or token_map.ndim != 1:
            raise RecipeError(
                f"the token map is {token_map.dtype} {token_map.shape}; it must be int32 [raw ids]"
            )
    recipe = Recipe.from_json(_json("recipe_json", request.recipe_json), token_map)
    if len(recipe.layers) > _MAX_TABLES:
        raise RecipeError(
            f"the recipe has {len(recipe.layers):,} layers, each with a table; a store that is "
            f"made over the wire has at most {_MAX_TABLES:,}"
        )
    return recipe


def _json(what: str, text: str) -> dict[str, Any]:
    """Raises: ConfigError."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{what} is not JSON: {error}") from None
    return _object(what, value)


def _object(what: str, value: Any) -> dict[str, Any]:
    """Raises: ConfigError."""
    if not isinstance(value, dict):
        raise ConfigError(f"{what} must be an object of names and values, got {value!r:.100}")
    return value


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r:.100} is neither true nor false")
    return value


_SETTINGS: Mapping[str, Callable[[Any], Any]] = {
    "dim": lambda value: whole(value, "dim", 1, MAX_DIM + 1),
    "dtype": RowDtype,
    "optimizer": OptimizerKind,
    "stochastic_rounding": _switch,
    "on_nonfinite": NonFinitePolicy,
    "seed": lambda value: whole(value, "seed"),
}
"""Settings of a table, each with what reads its JSON value or raises ValueError."""


def _settings(what: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Raises: ConfigError."""
    settings = {}
    for key, value in given.items():
        if key not in _SETTINGS:
            raise ConfigError(
                f"{what} has an unknown key {key!r:.100}; a table's settings are "
                f"{', '.join(_SETTINGS)}, and a store's also initial and per_layer"
            )
        try:
            settings[key] = _SETTINGS[key](value)
        except ValueError as error:
            kind: Any = _SETTINGS[key]
            allowed = f"; allowed are {', '.join(kind)}" if isinstance(kind, EnumType) else ""
            raise ConfigError(f"{key} in {what}: {error}{allowed}") from None
    return settings


def _overrides(given: Any, recipe: Recipe) -> dict[int, dict[str, Any]]:
    """Raises: ConfigError."""
    layers = {str(layer.layer): layer.layer for layer in recipe.layers}
    overrides = {}
    for key, settings in _object("per_layer", {} if given is None else given).items():
        if key not in layers:
            raise ConfigError(
                f"per_layer names layer {key!r:.100}; the recipe has layers {', '.join(layers)}"
            )
        what = f"per_layer of layer {key}"
        overrides[layers[key]] = _settings(what, _object(what, settings))
    return overrides


def _initial(given: Any) -> Normal | None:
    """Raises: ConfigError."""
    if given is None:
        return None
    values = _object("initial", given)
    std, seed = values.get("std"), values.get("seed", 0)
    if values.keys() - {"std", "seed"} or isinstance(std, bool) or not isinstance(std, int | float):
        raise ConfigError(
            f"initial is {given!r:.100}; allowed are null for zeros, or std (a number) and seed "
            "of a normal distribution"
        )
    try:
        return Normal(std=float(std), seed=whole(seed, "seed"))
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"initial: {error}") from None


class StoreMaker:
    """Makes stores beside those that a process serves.

    Args:
        home: where; nobody else makes stores there (`StoreHome.claim`).
        config: how they are opened.
    """

    def __init__(self, home: StoreHome, config: ServerConfig) -> None:
        self._home, self._config = home, config
        self._lock = threading.Lock()
        self._names: set[str] = set()
        """Of stores that are being made."""

    def make(self, creation: Creation, *, sharers: int, go_on: Callable[[], None]) -> Store:
        """Make a store and open it for training.

        It gets its name when it is complete: neither a failure nor a kill leaves anything that
        could be taken for a store.

        Args:
            creation: what to make.
            sharers: stores that the default of `overlay_bytes` is for, this one included.
            go_on: called now and then; what it raises gives the creation up.

        Raises:
            StoreExistsError: something has the name already.
            DiskFullError: the tables do not fit on the disk.
            CapacityError, ConfigError: it cannot be opened; see `engram_store.open`.
        """
        with self._reserved(creation.name):
            self._check_room(creation)
            path = self._home.root / creation.name
            building = self._home.building / creation.name
            try:
                create_store(
                    building,
                    creation.recipe,
                    creation.tables,
                    initial=creation.initial,
                    progress=lambda _done, _total: go_on(),
                )
                with disk_errors(path):
                    building.rename(path)
                    Disk().sync_directory(path.parent)
                try:
                    return open_store(StorePaths(path), self._config, sharers=sharers)
                except BaseException:
                    path.rename(building)
                    raise
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                raise

    @contextmanager
    def _reserved(self, name: str) -> Iterator[None]:
        """Raises: StoreExistsError."""
        path = self._home.root / name
        with self._lock:
            if name in self._names:
                raise StoreExistsError(path, "is being made already; choose another name")
            if path.exists() or path.is_symlink():
                raise StoreExistsError(path, "already exists; choose another name")
            self._names.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._names.discard(name)

    def _check_room(self, creation: Creation) -> None:
        """Raises: DiskFullError."""
        free, needed = shutil.disk_usage(self._home.root).free, creation.full_bytes
        if needed > free:
            raise DiskFullError(
                errno.ENOSPC,
                f"the tables of {creation.name} take {needed:,} bytes once every row was written, "
                f"with optimizer state; the disk of {self._home.root} has {free:,} free. Choose "
                "fewer rows, a smaller dim or dtype, or make the store with `engram-store create`, "
                "which leaves that to you",
            )
