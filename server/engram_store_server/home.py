"""The directory that a process serves: one store, or a directory of stores."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import engram_store
from engram_store.engine.extents import BLOCK_SLOTS
from engram_store.engine.memtable import slot_bytes
from engram_store.engine.placement import StoreLock, overlay_capacity
from engram_store.errors import (
    CapacityError,
    ConfigError,
    EngramStoreError,
    StoreFileError,
    StoreNotFoundError,
)
from engram_store.layout.metadata import read_metadata
from engram_store.layout.paths import StorePaths
from engram_store.lookahead import default_room
from engram_store.store import Store
from engram_store.types import TableSpec
from engram_store_server.config import ServerConfig

_logger = logging.getLogger(__name__)
RESERVED_NAMES = frozenset({"run", "LOCK", "lost+found"})
"""What lies in a directory of stores besides stores: ours, and a new file system's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreHome:
    """Where the stores of a process lie."""

    root: Path
    """The directory that was named."""
    several: bool
    """Whether it is a directory of stores, in which more can be made."""
    paths: Mapping[str, StorePaths]
    """The stores that are there, by name, in the order of names."""

    @property
    def building(self) -> Path:
        """Where stores are made; hidden, so that no start takes what is left there for one."""
        return self.root / ".creating"

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Find out early that a store cannot be served, and keep others from making stores here.

        Raises:
            StoreFileError: what is no store gets no socket.
            StoreLockedError: another process trains a store, or serves the same directory.
        """
        for paths in self.paths.values():
            with naming(paths.root):
                read_metadata(paths)
                StoreLock(paths).release()  # the engine takes it for good
        if not self.several:
            yield
            return
        lock = StoreLock(StorePaths(self.root))
        try:
            # Nobody else makes stores here now: what is left is of a process that was killed.
            shutil.rmtree(self.building, ignore_errors=True)
            yield
        finally:
            lock.release()


def find_stores(root: Path) -> StoreHome:
    """Look what a directory is: a store, or else a directory of stores, possibly empty.

    Every direct subdirectory that is a store counts, under its own name; hidden ones do not.

    Raises:
        StoreNotFoundError: there is no such directory, or it holds other things and no store.
        StoreFileError: it, or one below it, cannot be read.
    """
    if _is_store(StorePaths(root)):
        named = root if root.name not in ("", "..") else root.resolve()
        return StoreHome(root=root, several=False, paths={named.name: StorePaths(root)})
    try:
        entries = sorted(path for path in root.iterdir() if path.name not in RESERVED_NAMES)
    except OSError as error:
        raise StoreNotFoundError(
            root, f"no store here, nor a directory of stores ({error.strerror}); {_ADVICE}"
        ) from None
    shown = [path for path in entries if not path.name.startswith(".")]
    found = {path.name: StorePaths(path) for path in shown if _is_store(StorePaths(path))}
    if shown and not found:
        others = shown[0].name
        raise StoreNotFoundError(
            root, f"no store here nor directly below, but other things ({others}); {_ADVICE}"
        )
    return StoreHome(root=root, several=True, paths=found)


_ADVICE = (
    "make a store with `engram-store create` or engram_store.create, or serve an empty directory "
    "to make stores over the wire"
)


def _is_store(paths: StorePaths) -> bool:
    """Whether a directory is a store, sound or damaged; Zarr groups of others are none.

    Raises:
        StoreFileError: that cannot be told.
    """
    try:
        return paths.current.exists() or b'"engram_store"' in paths.group.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
    except OSError as error:
        raise StoreFileError(
            paths.root,
            f"cannot be looked at ({error.strerror}), so it may be a store; let this user read "
            "it, or move it elsewhere",
        ) from error


def open_stores(home: StoreHome, config: ServerConfig) -> dict[str, Store]:
    """Open every store for training; of those found none stays open if one cannot be opened.

    Raises:
        As `engram_store.open`; the message names the store.
    """
    opened: dict[str, Store] = {}
    try:
        for name, paths in home.paths.items():
            opened[name] = open_store(paths, config, sharers=len(home.paths))
    except BaseException:
        with suppress(Exception):  # logged; why one could not be opened is what counts
            close_stores(opened)
        raise
    return opened


def close_stores(stores: Mapping[str, Store]) -> None:
    """Close every store, also when one cannot be closed.

    Raises:
        As `Store.close`: the first of their errors; the others are logged.
    """
    failed: list[Exception] = []
    for name, store in stores.items():
        try:
            store.close()
        except Exception as error:
            _logger.exception("closing %s failed", name)
            failed.append(error)
        else:
            _logger.info("closed %s at step %d", name, store.step)
    if failed:
        raise failed[0]


def open_store(paths: StorePaths, config: ServerConfig, *, sharers: int) -> Store:
    """Open one of a process's stores for training.

    Args:
        paths: of the store.
        config: of the process.
        sharers: stores that `memory_bytes` and the defaults of `overlay_bytes` and
            `lookahead_bytes` are for.

    Raises:
        As `engram_store.open`; the message names the store.
    """
    with naming(paths.root):
        overlay_bytes = config.overlay_bytes
        memory_bytes = config.memory_bytes and config.memory_bytes // sharers
        alone = sharers == 1 or memory_bytes is not None  # else its plan takes all the memory
        if overlay_bytes is None and not alone:
            overlay_bytes = overlay_share(read_metadata(paths).tables, sharers)
        lookahead_bytes = config.lookahead_bytes
        if lookahead_bytes is None and not alone:
            lookahead_bytes = default_room() // sharers
        store = engram_store.open(
            paths.root,
            "train",
            memory_bytes=memory_bytes,
            overlay_bytes=overlay_bytes,
            memtable_dir=config.memtable_dir,
            lookahead_bytes=lookahead_bytes,
            staleness=config.staleness,
            fold_ratio=config.fold_ratio,
            fold_bytes_per_second=config.fold_rate,
            scrub_bytes_per_second=config.scrub_rate,
            durability=config.durability,
            keep_snapshots=config.keep_snapshots,
        )
    if (report := store.recovery) is not None:
        rows = report.sealed_rows
        _logger.info("%s opened: %s, %d rows taken over", paths.root, report.kind, rows)
    return store


def overlay_share(tables: Mapping[int, TableSpec], sharers: int) -> int:
    """One store's part of the memory that it would take by default if it were alone.

    Args:
        tables: of the store.
        sharers: stores that the memory is for.

    Returns:
        `overlay_bytes`: never less than the store needs.
    """
    specs = list(tables.values())
    blocks = overlay_capacity(specs, None) // sharers // BLOCK_SLOTS
    return 2 * max(blocks, 1) * BLOCK_SLOTS * slot_bytes(specs)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors about a store say which it is."""
    try:
        yield
    except EngramStoreError as error:
        message = getattr(error, "strerror", None) or str(error)
        if str(path) in message:
            raise
        named = f"{path}: {message}"
        if isinstance(error, CapacityError):
            raise CapacityError(error.errno, named) from error
        kind = ConfigError if isinstance(error, ConfigError) else EngramStoreError
        raise kind(named) from error
