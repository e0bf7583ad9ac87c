"""`engram-store serve` and `engram-store config`; found through `engram_store.commands`.

The only place that reads the environment.
"""

import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram_store.errors import ConfigError

if TYPE_CHECKING:
    from engram_store_server.config import ServerConfig

_Directory = Annotated[Path | None, typer.Argument(metavar="DIR", help="Directory of the store.")]
_File = Annotated[
    Path | None, typer.Option("--config", help="TOML file of settings, named as the options are.")
]
_Socket = Annotated[
    Path | None,
    typer.Option(
        help="Unix socket, in a directory closed to others; no %, ? or # in its path. "
        "Default: DIR/run/store.sock."
    ),
]
_Tcp = Annotated[
    str | None,
    typer.Option(
        help="HOST:PORT to listen on besides: any with TLS, else loopback with --insecure."
    ),
]
_Insecure = Annotated[
    bool | None,
    typer.Option(
        "--insecure/--no-insecure",
        help="Allow TCP without TLS: every user of this machine can then train the store.",
    ),
]
_TlsCert = Annotated[
    Path | None,
    typer.Option(
        help="PEM file of the certificate shown on TCP. The three TLS files go together, and may "
        "be renewed while it runs."
    ),
]
_TlsKey = Annotated[
    Path | None,
    typer.Option(help="PEM file of its key: no pass phrase, closed to other users (chmod 600)."),
]
_TlsClientCa = Annotated[
    Path | None,
    typer.Option(
        help="PEM file of CAs: who shows a certificate they signed may train the store over TCP."
    ),
]
_MemoryBytes = Annotated[
    int | None,
    typer.Option(
        help="All that the stores may use together, page cache included. Default: what the limit "
        "of the machine or of the cgroup leaves."
    ),
]
_OverlayBytes = Annotated[
    int | None,
    typer.Option(
        help="Shared memory for updated rows. Default: a fifth of the memory limit, at most 1 GiB."
    ),
]
_MemtableDir = Annotated[
    Path | None,
    typer.Option(help="Directory of that memory. Default: /dev/shm, or DIR where that is small."),
]
_LookaheadBytes = Annotated[
    int | None,
    typer.Option(
        help="Memory of windows that a store gathers ahead of their step. Default: an eighth of "
        "the memory limit, at most 2 GiB."
    ),
]
_Staleness = Annotated[
    int | None,
    typer.Option(help="Steps by which the rows of a window may lag behind. Default: 0, exact."),
]
_FoldRatio = Annotated[
    float | None,
    typer.Option(help="Fold when segments reach this multiple of the base. Default: 1."),
]
_FoldRate = Annotated[
    float | None,
    typer.Option(help="Bytes a second that folds and merges read and write. Default: no limit."),
]
_ScrubRate = Annotated[
    float | None,
    typer.Option(
        help="Bytes a second at which files are read again and again to find damages; 0: never. "
        "Default: 20000000."
    ),
]
_Durability = Annotated[
    str | None,
    typer.Option(help="When applied steps outlive the host: snapshot, group(MS) or step."),
]
_KeepSnapshots = Annotated[
    int | None,
    typer.Option(
        help="How many of the newest snapshots stay when one is made, beside the pinned. "
        "Default: all."
    ),
]
_DrainSeconds = Annotated[
    float | None,
    typer.Option(help="How long running calls may finish after SIGTERM. Default: 10."),
]
_MaxMessageBytes = Annotated[
    int | None, typer.Option(help="Largest message in either direction. Default: 256 MiB.")
]
_MaxSessions = Annotated[
    int | None, typer.Option(help="Trainers and readers connected at once. Default: 64.")
]
_HelloSeconds = Annotated[
    float | None,
    typer.Option(help="How long a new connection may take to say who it is. Default: 10."),
]
_HandoverSeconds = Annotated[
    float | None,
    typer.Option(
        help="How long a new trainer waits for a stopped one to be noticed before it is refused. "
        "Default: 1."
    ),
]
_SessionBytes = Annotated[
    int | None,
    typer.Option(help="Memory that the open windows of one session may use. Default: 4 GiB."),
]
_OpenWindows = Annotated[
    int | None, typer.Option(help="Windows that one session may have open at once. Default: 1024.")
]
_KeepaliveSeconds = Annotated[
    float | None,
    typer.Option(help="Silence after which a connection must show that it lives. Default: 20."),
]
_LogFormat = Annotated[
    str | None, typer.Option(help="Log lines on standard error: text or json. Default: text.")
]

config_app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="How a store process would run."
)


def serve(
    data_dir: _Directory = None,
    config: _File = None,
    socket: _Socket = None,
    tcp: _Tcp = None,
    insecure: _Insecure = None,
    tls_cert: _TlsCert = None,
    tls_key: _TlsKey = None,
    tls_client_ca: _TlsClientCa = None,
    memory_bytes: _MemoryBytes = None,
    overlay_bytes: _OverlayBytes = None,
    memtable_dir: _MemtableDir = None,
    lookahead_bytes: _LookaheadBytes = None,
    staleness: _Staleness = None,
    fold_ratio: _FoldRatio = None,
    fold_rate: _FoldRate = None,
    scrub_rate: _ScrubRate = None,
    durability: _Durability = None,
    keep_snapshots: _KeepSnapshots = None,
    drain_seconds: _DrainSeconds = None,
    max_message_bytes: _MaxMessageBytes = None,
    max_sessions: _MaxSessions = None,
    hello_seconds: _HelloSeconds = None,
    handover_seconds: _HandoverSeconds = None,
    session_bytes: _SessionBytes = None,
    open_windows: _OpenWindows = None,
    keepalive_seconds: _KeepaliveSeconds = None,
    log_format: _LogFormat = None,
) -> None:
    """Serve a store to trainers, as a process of its own, until SIGTERM or Ctrl-C.

    Settings: options, before ENGRAM_STORE_* in the environment, before the configuration file.
    """
    chosen, _ = _load(locals())
    from engram_store_server.app import run
    from engram_store_server.logs import configure_logging

    configure_logging(chosen.log_format)
    run(chosen)


@config_app.callback()
def _config() -> None:
    """How a store process would run."""


@config_app.command()
def show(
    data_dir: _Directory = None,
    config: _File = None,
    socket: _Socket = None,
    tcp: _Tcp = None,
    insecure: _Insecure = None,
    tls_cert: _TlsCert = None,
    tls_key: _TlsKey = None,
    tls_client_ca: _TlsClientCa = None,
    memory_bytes: _MemoryBytes = None,
    overlay_bytes: _OverlayBytes = None,
    memtable_dir: _MemtableDir = None,
    lookahead_bytes: _LookaheadBytes = None,
    staleness: _Staleness = None,
    fold_ratio: _FoldRatio = None,
    fold_rate: _FoldRate = None,
    scrub_rate: _ScrubRate = None,
    durability: _Durability = None,
    keep_snapshots: _KeepSnapshots = None,
    drain_seconds: _DrainSeconds = None,
    max_message_bytes: _MaxMessageBytes = None,
    max_sessions: _MaxSessions = None,
    hello_seconds: _HelloSeconds = None,
    handover_seconds: _HandoverSeconds = None,
    session_bytes: _SessionBytes = None,
    open_windows: _OpenWindows = None,
    keepalive_seconds: _KeepaliveSeconds = None,
    log_format: _LogFormat = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every setting, and where its value comes from; nothing is started."""
    given = locals()
    as_json = given.pop("json")
    chosen, origins = _load(given)
    shown = {key: _plain(chosen, key) for key in origins}
    if as_json:
        from json import dumps

        report = {key: {"value": shown[key], "origin": origins[key]} for key in origins}
        typer.echo(dumps(report, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("setting", "value", "origin", box=None, header_style="bold")
    for key, origin in origins.items():
        table.add_row(key, "" if shown[key] is None else str(shown[key]), origin)
    Console().print(table)


def _load(given: dict[str, Any]) -> "tuple[ServerConfig, dict[str, str]]":
    """The configuration of a command line's options, and where its values come from.

    Raises:
        ConfigError.
    """
    from engram_store_server.config import load_config

    flags = dict(given)
    path: Path | None = flags.pop("config")
    return load_config({} if path is None else _read_file(path), os.environ, flags)


def _read_file(path: Path) -> dict[str, Any]:
    """Raises: ConfigError."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except RecursionError:
        problem = "it is nested too deeply; settings are plain values, one per line"
        raise ConfigError(f"the configuration file {path} cannot be read: {problem}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error}") from None


def _plain(config: "ServerConfig", key: str) -> Any:
    """A setting as a JSON type; the socket as it is used."""
    value = config.socket_path if key == "socket" else getattr(config, key)
    return str(value) if isinstance(value, Path) else value
