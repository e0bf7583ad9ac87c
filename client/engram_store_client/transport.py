"""How a trainer reaches a store."""

from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import engram_store
from engram_store.errors import ConfigError
from engram_store.session import Session

_ALLOWED = (
    "give a directory (a path or a file: URL of this machine), unix:///path/of/socket, or "
    "tcp://host:port"
)


def connect(store: str | Path, **options: Any) -> Session:
    """Open a session with a store for training.

    Args:
        store: where the store is. A directory, as a path or as `file:` URL, is opened within
            this process; `unix:///path/of/socket` and `tcp://host:port` name a store process
            (`engram-store serve`).
        options: of `engram_store.open` for a directory. For a store process: `credentials`, a
            `grpc.ChannelCredentials` for TLS, and the fields of
            `engram_store_client.remote.RemoteOptions`.

    Raises:
        ConfigError: an address of another kind, or gRPC is not installed.
        StoreNotFoundError, StoreLockedError: see `engram_store.open`.
        StoreUnreachableError: no store process answers there.
    """
    target = process_address(store)
    if target is None:
        return engram_store.open(local_path(store), mode="train", **options)
    return _connect_to_process(target, **options)


def _connect_to_process(target: str, *, credentials: Any = None, **options: Any) -> Session:
    try:
        import grpc  # noqa: F401 - asked for by name, for a message that helps
    except ImportError as error:
        raise ConfigError(
            f"a store process ({target}) is reached by gRPC: pip install 'engram-store[grpc]', or "
            "open the store's directory"
        ) from error
    from engram_store_client.remote import RemoteOptions, RemoteSession

    try:
        deadlines = RemoteOptions(**options)
    except TypeError as error:
        raise ConfigError(f"unknown option for a store process: {error}") from error
    return RemoteSession(target, "train", deadlines, credentials=credentials)


def process_address(store: str | Path) -> str | None:
    """Where gRPC finds a store process; None: the address names a directory. Pure.

    Raises:
        ConfigError: the address lacks its path, host or port.
    """
    if isinstance(store, Path):
        return None
    url = urlsplit(store)
    if url.scheme == "unix":
        path = unquote(url.path)
        if url.netloc or not path:
            raise ConfigError(f"cannot connect to {store!r}: {_ALLOWED}")
        return f"unix:{path}"
    if url.scheme == "tcp":
        try:
            complete = bool(url.hostname and url.port) and url.path in ("", "/")
        except ValueError:  # a port that is no number
            complete = False
        if not complete:
            raise ConfigError(f"cannot connect to {store!r}: {_ALLOWED}")
        return url.netloc
    return None


def local_path(store: str | Path) -> Path:
    """The directory that an address names. Pure. Raises: ConfigError."""
    if isinstance(store, Path):
        return store
    url = urlsplit(store)
    if not url.scheme or len(url.scheme) == 1:  # "my.engram", "C:\\my.engram"
        return Path(store)
    if url.scheme == "file" and url.netloc in ("", "localhost"):
        return Path(unquote(url.path))
    raise ConfigError(f"cannot connect to {store!r}: {_ALLOWED}")
