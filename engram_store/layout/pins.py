"""Pins: names that keep snapshots from being removed.

One small document for each name, `snapshots/pins/<name>.json`. Pins need no lock on the store: they
are made and removed while a process trains it.
"""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from engram_store.errors import ConfigError, ForeignFileError, SnapshotMismatchError, StoreFileError
from engram_store.layout.disk import Disk
from engram_store.layout.documents import encode_document, read_document, text, whole
from engram_store.layout.files import make_directory, remove_file, replace_file, sync_directory
from engram_store.layout.paths import StorePaths

NEWEST = "newest"
"""Stands for the newest snapshot wherever a name is accepted."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
_KIND = "pin"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pin:
    """A name of one snapshot."""

    name: str
    step: int
    digest: str
    """Of the snapshot's manifest."""


def snapshot_name(word: str) -> int | str:
    """What a person wrote for a snapshot: a step's number, or a name.

    Raises: ConfigError: neither.
    """
    if re.fullmatch("[0-9]{1,18}", word):
        return int(word)
    if _NAME.fullmatch(word):
        return word
    raise ConfigError(
        f"{word!r:.100} is no snapshot; give its step, the name of a pin, or {NEWEST!r}"
    )


def check_pin_name(name: str) -> None:
    """Raises: ConfigError: snapshots cannot be pinned under this name."""
    if not _NAME.fullmatch(name) or name == NEWEST:
        raise ConfigError(
            f"{name!r:.100} cannot be the name of a pin; it has at most 64 letters, digits, dots, "
            f"dashes and underscores, begins with a letter, and is not {NEWEST!r}"
        )


def pin_file(paths: StorePaths, name: str) -> Path:
    """Where a pin is."""
    return paths.snapshots / "pins" / f"{name}.json"


def pin_names(paths: StorePaths) -> list[str]:
    """Names that are pinned, sorted; whether their files are sound is not looked at."""
    directory = pin_file(paths, "").parent
    if not directory.is_dir():
        return []
    names = (entry.name.removesuffix(".json") for entry in directory.glob("*.json"))
    return sorted(name for name in names if _NAME.fullmatch(name) and name != NEWEST)


def _check_directory(directory: Path) -> None:
    """What holds the pins is a directory, or is not there: then there is no pin.

    Raises: StoreFileError: a link to nothing, say; there may be pins where it led to.
    """
    if os.path.lexists(directory) and not directory.is_dir():
        raise StoreFileError(
            directory,
            "is no directory, so that it cannot be told which snapshots are pinned; put the "
            "directory back (is a disk missing that it links to?), or remove the file",
        )


def _check_kinds(path: Path) -> None:
    """A pin is a file; reading a pipe would wait for ever. Raises: StoreFileError."""
    _check_directory(path.parent)
    if os.path.lexists(path) and not path.is_file() and os.path.lexists(path):
        raise StoreFileError(
            path, "is no file, so that it cannot be told which snapshot is pinned; remove it"
        )


def read_pin(paths: StorePaths, store_id: str, name: str) -> Pin:
    """One pin.

    Raises:
        SnapshotMismatchError: nothing is pinned under this name.
        StoreFileError: its file is damaged, or of another store.
    """
    path = pin_file(paths, name)
    _check_kinds(path)
    try:
        body, _ = read_document(path, _KIND)
    except StoreFileError:
        if os.path.lexists(path):
            raise
        have = ", ".join(pin_names(paths)) or "none"
        raise SnapshotMismatchError(
            f"no snapshot of store {store_id} is pinned as {name!r}; its pins are: {have}"
        ) from None
    try:
        step, digest = whole(body["step"], "step"), text(body["snapshot"], "snapshot")
        owner = text(body["store_id"], "store_id"), text(body["name"], "name")
    except (KeyError, ValueError) as error:
        raise ForeignFileError(path, f"is not a pin of this format: {error!r}") from error
    if owner != (store_id, name):
        raise ForeignFileError(
            path, f"is the pin {owner[1]!r:.100} of store {owner[0]:.100}; remove the file"
        )
    return Pin(name=name, step=step, digest=digest)


def read_pins(paths: StorePaths, store_id: str, *, skip_damaged: bool = False) -> list[Pin]:
    """All pins, by name.

    Args:
        paths, store_id: of the store.
        skip_damaged: leave those out that cannot be read, and log them.

    Raises:
        StoreFileError: one cannot be read; which snapshot it keeps is unknown.
    """
    pins = []
    try:
        _check_directory(pin_file(paths, "").parent)
    except StoreFileError as error:
        if not skip_damaged:
            raise
        _logger.warning("all pins are left out: %s", error)
    for name in pin_names(paths):
        try:
            pins.append(read_pin(paths, store_id, name))
        except SnapshotMismatchError:
            continue  # removed meanwhile
        except StoreFileError as error:
            if not skip_damaged:
                raise StoreFileError(
                    error.path,
                    "is damaged, so that it cannot be told which snapshot is pinned; pin it again "
                    f"with --move, or remove the file ({error})",
                ) from error
            _logger.warning("a pin is left out: %s", error)
    return pins


def pins_by_step(pins: list[Pin]) -> dict[int, tuple[str, ...]]:
    """Names of each pinned step."""
    names: dict[int, tuple[str, ...]] = {}
    for pin in pins:
        names[pin.step] = (*names.get(pin.step, ()), pin.name)
    return names


def write_pin(paths: StorePaths, store_id: str, pin: Pin, disk: Disk) -> None:
    """Make a pin, or move it, atomically and durably. Hold the snapshot (`hold_snapshot`).

    Raises:
        StoreFileError: a directory has its name, or what should hold pins is none.
        DiskFullError, DiskFaultError: it is the old one or the new one.
    """
    path = pin_file(paths, pin.name)
    _check_directory(path.parent)
    if path.is_dir():
        _check_kinds(path)
    make_directory(path.parent, disk)
    content = {
        "store_id": store_id,
        "name": pin.name,
        "step": pin.step,
        "snapshot": pin.digest,
    }
    replace_file(path, encode_document(_KIND, content)[0], disk)


def remove_pin(paths: StorePaths, store_id: str, name: str, disk: Disk) -> None:
    """Take a pin away; one whose file is damaged too.

    Raises:
        ConfigError: no name of a pin. SnapshotMismatchError: nothing is pinned under it.
        StoreFileError: a directory has its name, or what should hold pins is none.
    """
    check_pin_name(name)
    path = pin_file(paths, name)
    if not os.path.lexists(path) or (path.is_dir() and not path.is_symlink()):
        read_pin(paths, store_id, name)
    remove_file(path, disk)
    sync_directory(path.parent, disk)
