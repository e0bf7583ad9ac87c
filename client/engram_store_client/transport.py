"""How a trainer reaches a store."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import SplitResult, unquote, urlsplit

import engram_store
from engram_store.errors import ConfigError, ProtocolError, StoreUnreachableError
from engram_store.session import Session
from engram_store_client.devices.host_memory import HostMemory, assign

_ALLOWED = (
    "give a directory (a path or a file: URL of this machine), unix:///path/of/socket, or "
    "tcp://host:port"
)


def connect(
    url: str | Path,
    /,
    mode: Literal["train", "read"] = "train",
    *,
    tls_ca: str | Path | None = None,
    tls_cert: str | Path | None = None,
    tls_key: str | Path | None = None,
    tls_server_name: str | None = None,
    **options: Any,
) -> Session:
    """Open a session with a store.

    Args:
        url: where the store is. A directory, as a path or as `file:` URL, is opened within
            this process; `unix:///path/of/socket` and `tcp://host:port` name a store process
            (`engram-store serve`). `tcp:` without any TLS option is plain text, for a process
            that was started with --insecure.
        mode: 'train', or 'read': windows without a step only, beside whoever trains.
        tls_ca: PEM file of the CA that signed the store's certificate: connect with TLS. The TLS
            files are read again for every connection of the session.
        tls_cert: PEM file of the certificate to show, signed by the store's `tls_client_ca`.
        tls_key: PEM file of its key: no pass phrase, closed to other users.
        tls_server_name: the name in the store's certificate, where it is not the host of `url`.
        options: of `engram_store.open` for a directory. For a store process: `credentials`, a
            `grpc.ChannelCredentials` for TLS instead of those files, and the fields of
            `engram_store_client.remote.RemoteOptions`.

    Raises:
        ConfigError: an address of another kind, TLS options that do not go together or a file
            of them that cannot be used, or gRPC is not installed.
        StoreNotFoundError, StoreLockedError: see `engram_store.open`.
        StoreUnreachableError: no store process answers there.
        ProtocolError: the store process refuses the session, or the two do not agree on TLS.
    """
    tls = {"tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key}
    files = {name: Path(path) for name, path in tls.items() if path is not None}
    target = process_address(url)
    check_tls_options(files, tls_server_name, url, reached=target)
    if target is None:
        return _open_directory(url, mode, **options)
    return _connect_to_process(target, mode, files, tls_server_name, **options)


def _open_directory(url: str | Path, mode: Literal["train", "read"], **options: Any) -> Session:
    """A store in this process, whose buffers a GPU can copy from; see `engram_store.open`."""
    if options.get("allocate") is not None:
        return engram_store.open(local_path(url), mode, **options)
    memory = HostMemory()
    store = engram_store.open(local_path(url), mode, **{**options, "allocate": memory.allocate})
    assign(store, memory)
    return store


def check_tls_options(
    files: dict[str, Path], server_name: str | None, url: str | Path, *, reached: str | None
) -> None:
    """Refuse TLS options that do not go together, or not with the address. Pure.

    Raises: ConfigError.
    """
    given = [*files, *(["tls_server_name"] if server_name is not None else [])]
    if not given:
        return
    if reached is None or reached.startswith("unix:"):
        raise ConfigError(
            f"{given[0]} is for tcp:// addresses; {url} is reached without a network. Leave it out"
        )
    if "tls_ca" not in files:
        raise ConfigError(
            f"{given[0]} without tls_ca; name the CA that signed the store's certificate"
        )
    if ("tls_cert" in files) != ("tls_key" in files):
        raise ConfigError("tls_cert and tls_key go together; give both files of one pair")


def _connect_to_process(
    target: str,
    mode: Literal["train", "read"],
    tls_files: dict[str, Path],
    server_name: str | None,
    *,
    credentials: Any = None,
    **options: Any,
) -> Session:
    try:
        import grpc  # noqa: F401 - asked for by name, for a message that helps
    except ImportError as error:
        raise ConfigError(
            f"a store process ({target}) is reached by gRPC: pip install 'engram-store[grpc]', or "
            "open the store's directory"
        ) from error
    from engram_store_client.remote import RemoteOptions, RemoteSession
    from engram_store_client.remote.credentials import ClientTls, explain_plain_text

    try:
        deadlines = RemoteOptions(**options)
    except TypeError as error:
        raise ConfigError(f"unknown option for a store process: {error}") from error
    if target.startswith("unix:") or (credentials is not None and not tls_files):
        return RemoteSession(target, mode, deadlines, credentials=credentials)
    explain = explain_plain_text
    if tls_files:
        if credentials is not None:
            raise ConfigError("credentials and tls_ca exclude each other; give one of them")
        credentials = ClientTls(
            authority=tls_files["tls_ca"],
            certificate=tls_files.get("tls_cert"),
            key=tls_files.get("tls_key"),
            server_name=server_name,
        )
        explain = credentials.explain
    # Once without patience: a store that is there and refuses TLS is not worth waiting for.
    for patience in (replace(deadlines, connect_seconds=0.0), deadlines):
        try:
            return RemoteSession(target, mode, patience, credentials=credentials)
        except StoreUnreachableError as error:
            if (reason := explain(target)) is not None:
                problem = f"no session with the store at {target}: {reason}"
                raise ProtocolError(problem) from error
            if patience is deadlines:
                raise
    raise AssertionError("the last attempt returns or raises")


def process_address(store: str | Path) -> str | None:
    """Where gRPC finds a store process; None: the address names a directory. Pure.

    Raises:
        ConfigError: the address lacks its path, host or port.
    """
    if isinstance(store, Path):
        return None
    url = _split(store)
    if url.scheme == "unix":
        path = unquote(url.path)
        if url.netloc or url.query or url.fragment or not path:
            raise ConfigError(f"cannot connect to {store!r}: {_ALLOWED}")
        if set(path) & set("%?#"):
            raise ConfigError(
                f"cannot connect to {store!r}: no store process listens on a path with %, ? or #, "
                "which gRPC reads as parts of a URL; give it another --socket"
            )
        return f"unix:{path}"
    if url.scheme == "tcp":
        try:
            complete = bool(url.hostname and url.port) and url.path in ("", "/")
            complete = complete and "@" not in url.netloc and not (url.query or url.fragment)
        except ValueError:  # a port that is no number
            complete = False
        if not complete:
            raise ConfigError(f"cannot connect to {store!r}: {_ALLOWED}")
        return url.netloc
    return None


def _split(store: str) -> SplitResult:
    """Raises: ConfigError."""
    try:
        return urlsplit(store)
    except ValueError as error:  # a host in brackets that is no address, say
        raise ConfigError(
            f"cannot connect to {store!r}: {error}; {_ALLOWED}. A directory of such a name can be "
            "given as pathlib.Path"
        ) from error


def local_path(store: str | Path) -> Path:
    """The directory that an address names. Pure. Raises: ConfigError."""
    if isinstance(store, Path):
        return store
    url = _split(store)
    if not url.scheme or len(url.scheme) == 1:  # "my.engram", "C:\\my.engram"
        return Path(store)
    if url.scheme == "file" and url.netloc in ("", "localhost"):
        return Path(unquote(url.path))
    raise ConfigError(f"cannot connect to {store!r}: {_ALLOWED}")
