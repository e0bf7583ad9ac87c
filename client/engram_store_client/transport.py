"""How a trainer reaches a store."""

from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import engram_store
from engram_store.errors import ConfigError
from engram_store.session import Session


def connect(store: str | Path, **options: Any) -> Session:
    """Open a session with a store for training.

    Args:
        store: a store's directory, as a path or as `file:` URL. It is opened within this
            process.
        options: of `engram_store.open`.

    Raises:
        ConfigError: an address of another kind; `unix:` and `tcp:` need a store process, which
            this version does not have.
        StoreNotFoundError, StoreLockedError: see `engram_store.open`.
    """
    directory = local_path(store)
    return engram_store.open(directory, mode="train", **options)


def local_path(store: str | Path) -> Path:
    """The directory that an address names. Pure. Raises: ConfigError."""
    if isinstance(store, Path):
        return store
    url = urlsplit(store)
    if not url.scheme or len(url.scheme) == 1:  # "my.engram", "C:\\my.engram"
        return Path(store)
    if url.scheme == "file" and url.netloc in ("", "localhost"):
        return Path(unquote(url.path))
    raise ConfigError(
        f"cannot connect to {store!r}: this version opens stores within the process, by path or "
        "by a file: URL of this machine (unix: and tcp: need a store process)"
    )
