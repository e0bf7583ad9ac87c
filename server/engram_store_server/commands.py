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
    typer.Option(help="Unix socket, in a directory closed to others. Default: DIR/run/store.sock."),
]
_Tcp = Annotated[
    str | None, typer.Option(help="HOST:PORT to listen on besides: loopback, with --insecure.")
]
_Insecure = Annotated[
    bool | None,
    typer.Option(
        "--insecure/--no-insecure",
        help="Allow TCP without TLS: every user of this machine can then train the store.",
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
_FoldRatio = Annotated[
    float | None,
    typer.Option(help="Fold when segments reach this multiple of the base. Default: 1."),
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
    overlay_bytes: _OverlayBytes = None,
    memtable_dir: _MemtableDir = None,
    fold_ratio: _FoldRatio = None,
    drain_seconds: _DrainSeconds = None,
    max_message_bytes: _MaxMessageBytes = None,
    max_sessions: _MaxSessions = None,
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
    overlay_bytes: _OverlayBytes = None,
    memtable_dir: _MemtableDir = None,
    fold_ratio: _FoldRatio = None,
    drain_seconds: _DrainSeconds = None,
    max_message_bytes: _MaxMessageBytes = None,
    max_sessions: _MaxSessions = None,
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
    except (OSError, ValueError) as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error}") from None


def _plain(config: "ServerConfig", key: str) -> Any:
    """A setting as a JSON type; the socket as it is used."""
    value = config.socket_path if key == "socket" else getattr(config, key)
    return str(value) if isinstance(value, Path) else value
