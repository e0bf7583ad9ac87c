"""Every error that engram-store raises on purpose.

    EngramStoreError
    ├── ConfigError                   a setting or an argument makes no sense (ValueError)
    │   └── RecipeError               a recipe's data is inconsistent
    ├── InputError                    what a caller handed over does not fit (ValueError)
    │   ├── TokenRangeError           a token id the recipe cannot hash (IndexError)
    │   ├── RowRangeError             a row id outside its table (IndexError)
    │   ├── ShapeError                wrong shape
    │   ├── DtypeError                wrong dtype (TypeError)
    │   └── NonFiniteGradientError    NaN or infinity in a gradient
    ├── ProtocolError                 a call that does not fit the session's state (RuntimeError)
    │   ├── DuplicateStepError        the step was applied before
    │   ├── StepGapError              a step was left out
    │   ├── MissingGradientError      a training window got no gradient
    │   ├── UnknownLayerError         the store has no table for that layer (KeyError)
    │   ├── UnknownStoreError         the process serves no store of that name (LookupError)
    │   ├── WindowClosedError         the window was committed or closed
    │   ├── ReadOnlyError             a write on a store or window opened for reading
    │   └── StoreClosedError          the store was closed
    ├── StoreFileError                a file is not what it should be (OSError)
    │   ├── StoreNotFoundError        no store in that directory (FileNotFoundError)
    │   ├── StoreExistsError          a store is already there (FileExistsError)
    │   ├── ForeignFileError          a file that engram-store did not write
    │   ├── UnknownVersionError       written by a newer engram-store
    │   ├── TruncatedTableError       a file is shorter or longer than its manifest says
    │   ├── ChecksumError             bytes differ from their checksum
    │   └── DiskFaultError            the disk reports an error
    ├── StoreLockedError              another process has the store open (BlockingIOError)
    ├── FingerprintMismatchError      recipe, tokenizer or tables differ from the store's
    ├── SnapshotMismatchError         a checkpoint names a snapshot this store does not have
    ├── StoreUnreachableError         no store process answers there (ConnectionError)
    ├── DeadlineError                 a store process took too long to answer (TimeoutError)
    └── CapacityError                 no room left (OSError)
        ├── SharedMemoryFullError     /dev/shm or the cgroup cannot hold the memtables
        ├── DiskFullError             the data directory's disk is full
        └── StepTooLargeError         one step updates more rows than a memtable holds

A leaf also inherits the builtin that a caller would look for. When one of these is raised,
stored state is what it was before the call unless the class says otherwise.
"""

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class EngramStoreError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(EngramStoreError, ValueError):
    """A setting or an argument makes no sense."""


class RecipeError(ConfigError):
    """A recipe's data is inconsistent."""


class InputError(EngramStoreError, ValueError):
    """What a caller handed over does not fit."""


class TokenRangeError(InputError, IndexError):
    """A token id that the recipe cannot hash."""

    def __init__(self, token: int, limit: int, where: Sequence[int], *, negative_ok: bool) -> None:
        """`where` is the position of the token in the window, `limit` the first id too large."""
        allowed = f"below {limit}" if negative_ok else f"0..{limit - 1}"
        super().__init__(
            f"token id {token} at position {tuple(where)} is outside the recipe's vocabulary "
            f"(valid: {allowed}); was the text tokenized with another tokenizer?"
        )
        self.token, self.limit, self.where = token, limit, tuple(where)


class RowRangeError(InputError, IndexError):
    """A row id lies outside its table."""

    def __init__(self, table: str, row: int, rows: int) -> None:
        super().__init__(
            f"row {row} is outside table {table!r} (valid: 0..{rows - 1}); "
            "was it hashed with another table's recipe?"
        )
        self.table, self.row, self.rows = table, row, rows


class ShapeError(InputError):
    """An array has the wrong shape."""

    def __init__(self, what: str, got: Sequence[int], expected: str) -> None:
        super().__init__(f"{what} has shape {tuple(got)}, expected {expected}")
        self.got, self.expected = tuple(got), expected


class DtypeError(InputError, TypeError):
    """An array has the wrong dtype."""

    def __init__(self, what: str, got: object, expected: str) -> None:
        super().__init__(f"{what} has dtype {got}, expected {expected}")
        self.got, self.expected = got, expected


class NonFiniteGradientError(InputError):
    """A gradient holds NaN or infinity and the table's setting is to reject such a push."""

    def __init__(self, layer: int, step: int, rows: int, first_row: int) -> None:
        super().__init__(
            f"the gradient of layer {layer} at step {step} holds NaN or infinity in {rows} rows, "
            f"first in row {first_row}; nothing was changed. Lower the learning rate or the loss "
            "scale and push again, or create the table with on_nonfinite='skip' "
            "(leave such rows alone) or 'accept'"
        )
        self.layer, self.step, self.rows, self.first_row = layer, step, rows, first_row


class ProtocolError(EngramStoreError, RuntimeError):
    """A call does not fit the state of the session."""


class DuplicateStepError(ProtocolError):
    """A step that was applied before."""

    def __init__(self, step: int, expected: int) -> None:
        super().__init__(
            f"step {step} was already applied; the next one is {expected}. To train it again, "
            "restore a snapshot from before it"
        )
        self.step, self.expected = step, expected


class StepGapError(ProtocolError):
    """A step was left out."""

    def __init__(self, step: int, expected: int) -> None:
        super().__init__(
            f"step {step} cannot be applied: the next one is {expected}; steps are numbered "
            "without gaps. When resuming, restore the snapshot that the checkpoint names"
        )
        self.step, self.expected = step, expected


class MissingGradientError(ProtocolError):
    """A training window got no gradient for a layer whose rows were read."""

    def __init__(self, step: int, missing: Sequence[int]) -> None:
        layers = ", ".join(str(layer) for layer in missing)
        super().__init__(
            f"step {step} cannot be committed: no gradient was pushed for layers {layers} of a "
            "training window, so their tables would silently stay as they are. Push a gradient, "
            "close() the window to leave it out, or announce it without a step if it was only read"
        )
        self.step, self.missing = step, tuple(missing)


class UnknownLayerError(ProtocolError, KeyError):
    """The store has no table for that layer."""

    def __init__(self, layer: object, layers: Sequence[int]) -> None:
        super().__init__(f"no table for layer {layer!r}; this store has layers {list(layers)}")
        self.layer, self.layers = layer, tuple(layers)

    def __str__(self) -> str:
        return str(self.args[0])


class UnknownStoreError(ProtocolError, LookupError):
    """The process serves no store of that name."""

    def __init__(self, name: str, names: Sequence[str]) -> None:
        if not names:
            problem = "no store is served here yet; make one with create_store()"
        elif name:
            problem = f"no store {name!r} is served here; name one of {', '.join(names)}"
        else:
            problem = f"several stores are served here; name one of {', '.join(names)}"
        super().__init__(problem)
        self.name, self.names = name, tuple(names)


class WindowClosedError(ProtocolError):
    """The window was committed or closed, so its rows are gone."""


class ReadOnlyError(ProtocolError):
    """A write on a store or a window that was opened for reading."""


class StoreClosedError(ProtocolError):
    """The store was closed."""


class StoreFileError(EngramStoreError, OSError):
    """A file of a store is not what it should be."""

    def __init__(self, path: Path | str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = Path(path)


class StoreNotFoundError(StoreFileError, FileNotFoundError):
    """There is no store in that directory."""


class StoreExistsError(StoreFileError, FileExistsError):
    """A store, or something else, is already there."""


class ForeignFileError(StoreFileError):
    """A file that engram-store did not write, or not for this store."""


class UnknownVersionError(StoreFileError):
    """A file written by a newer engram-store."""


class TruncatedTableError(StoreFileError):
    """A file is shorter or longer than its manifest says."""

    def __init__(self, path: Path | str, got: int, expected: int) -> None:
        super().__init__(
            path,
            f"has {got} bytes, its manifest says {expected}; the copy is incomplete or the file "
            "was changed. Restore it from a backup, or roll back to an older snapshot",
        )
        self.got, self.expected = got, expected


class ChecksumError(StoreFileError):
    """Bytes differ from their checksum."""


class DiskFaultError(StoreFileError):
    """The disk reports an error: what was asked for may or may not have reached it."""

    def __init__(self, path: Path | str, error: int) -> None:
        super().__init__(
            path,
            f"could not be made durable ({os.strerror(error)}): the disk fails. What was stored "
            "before is intact; look for the disk's errors in the host's log, and try again when "
            "it is well",
        )
        self.errno = error


class StoreLockedError(EngramStoreError, BlockingIOError):
    """Another process has the store open for training."""

    def __init__(self, path: Path | str, holder: str) -> None:
        super().__init__(
            f"{path} is open for training by {holder}; a store has one writer. Stop that process, "
            "or open the store with mode='read' to look at its newest snapshot"
        )
        self.path, self.holder = Path(path), holder


class FingerprintMismatchError(EngramStoreError, ValueError):
    """Recipe, tokenizer or tables differ from what the store was created with."""

    def __init__(self, what: str, differences: Mapping[str, tuple[Any, Any]]) -> None:
        """`differences` maps a field to (the store's value, the caller's value)."""
        lines = "".join(
            f"\n  {field}: store {mine!r}, {what} {theirs!r}"
            for field, (mine, theirs) in differences.items()
        )
        super().__init__(
            f"{what} does not fit this store; rows would mean other n-grams. Differing:{lines}"
        )
        self.differences = dict(differences)


class SnapshotMismatchError(EngramStoreError, ValueError):
    """A checkpoint names a snapshot that this store does not have."""


class StoreUnreachableError(EngramStoreError, ConnectionError):
    """No store process answers at an address."""

    def __init__(self, address: str, problem: str) -> None:
        super().__init__(
            f"no store process answers at {address}: {problem}. Is `engram-store serve` running, "
            "and does it listen there?"
        )
        self.address, self.problem = address, problem


class DeadlineError(EngramStoreError, TimeoutError):
    """A store process took too long to answer; whether it did what was asked is unknown."""

    def __init__(self, asked: str, seconds: float) -> None:
        super().__init__(
            f"the store has not answered for {seconds:g} s: {asked}. It may still be doing it; "
            "its log and statistics tell what it is busy with"
        )
        self.asked, self.seconds = asked, seconds


class CapacityError(EngramStoreError, OSError):
    """There is no room left."""


class SharedMemoryFullError(CapacityError):
    """Shared memory, or the cgroup's memory limit, cannot hold the memtables."""

    def __init__(self, needed_bytes: int, available_bytes: int, where: str) -> None:
        super().__init__(
            errno.ENOSPC,
            f"the memtables need {needed_bytes:,} bytes but {where} leaves {available_bytes:,}; "
            "lower overlay_bytes, enlarge /dev/shm (docker: --shm-size), or raise the memory limit",
        )
        self.needed_bytes, self.available_bytes = needed_bytes, available_bytes


class DiskFullError(CapacityError):
    """The disk of the data directory is full."""


class StepTooLargeError(CapacityError):
    """One step updates more rows of a table than a memtable holds."""

    def __init__(self, layer: int, rows: int, capacity: int, overlay_bytes: int) -> None:
        super().__init__(
            errno.ENOSPC,
            f"the step updates {rows:,} rows of layer {layer}, a memtable holds {capacity:,}; "
            f"open the store with overlay_bytes of at least {overlay_bytes:,}, or use fewer "
            "tokens a step",
        )
        self.layer, self.rows, self.capacity = layer, rows, capacity
