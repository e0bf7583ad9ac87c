"""How one store process runs, and where each of its settings came from.

Pure: files, the environment and the command line are handed in by `commands.py`. What decides
stored bytes belongs to the store itself, not here.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from engram_store.errors import ConfigError
from engram_store.limits import MAX_MESSAGE_BYTES
from engram_store_server.limits import SessionLimits
from engram_store_server.rules import (
    MAX_INT32,
    Rule,
    address_rule,
    choice_rule,
    durability_rule,
    is_loopback,
    number_rule,
    path_rule,
    socket_rule,
    switch_rule,
    whole_rule,
)

ENVIRONMENT_PREFIX = "ENGRAM_STORE_"
DEFAULT = "default"
FILE = "file"
_LIMITS = SessionLimits()
_TLS_KEYS = ("tls_cert", "tls_key", "tls_client_ca")
# What Kubernetes and Docker links put into every container beside a service named engram-store.
_SERVICE_LINK = re.compile(r"(.+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """How one store process runs. Units are part of the names."""

    data_dir: Path
    """Directory of the store."""
    socket: Path | None = None
    """Unix socket; None: `run/store.sock` in the data directory. Its directory is closed to
    other users."""
    tcp: str | None = None
    """HOST:PORT to listen on besides; any address with TLS, else loopback and only `insecure`."""
    insecure: bool = False
    """Allow TCP without TLS: every user of this machine can then read and train the store."""
    tls_cert: Path | None = None
    """PEM file of the certificate shown on TCP, then those between it and its CA. The three TLS
    files come together, and are read again for new connections when they change."""
    tls_key: Path | None = None
    """PEM file of that certificate's key: without a pass phrase, closed to other users."""
    tls_client_ca: Path | None = None
    """PEM file of CAs: who shows a certificate that they signed may read and train the store,
    nobody else."""
    memory_bytes: int | None = None
    """All that the stores may use together, the page cache of their files included; None: what the
    limit of the machine or of the cgroup leaves to the process."""
    overlay_bytes: int | None = None
    """Shared memory for updated rows; None: a fifth of the memory limit, at most 1 GiB."""
    memtable_dir: Path | None = None
    """Directory of that memory; None: /dev/shm, or the data directory where that is too small."""
    lookahead_bytes: int | None = None
    """Memory of windows that a store hashes and gathers ahead of their step; None: an eighth of
    the memory limit, at most 2 GiB."""
    staleness: int = 0
    """Steps by which the rows of a window may lag behind; 0 is exact."""
    fold_ratio: float = 1.0
    """Fold when segments reach this multiple of the base."""
    fold_rate: float | None = None
    """Bytes a second that folds and merges of a store read and write; None: as fast as they can."""
    scrub_rate: float = 20_000_000
    """Bytes a second at which the files of each store are read again and again to find damages;
    0: never."""
    durability: str = "snapshot"
    """When applied steps outlive the host: `snapshot`, `group(MS)` or `step`."""
    keep_snapshots: int | None = None
    """How many of the newest snapshots stay when one is made, beside the pinned; None: all."""
    drain_seconds: float = 10.0
    """How long running calls may finish after SIGTERM."""
    max_message_bytes: int = MAX_MESSAGE_BYTES
    """Largest message in either direction; a larger one fails its call."""
    max_sessions: int = 64
    """Trainers and readers connected at once."""
    hello_seconds: float = _LIMITS.hello_seconds
    """How long a new connection may take to say who it is, TLS included."""
    handover_seconds: float = _LIMITS.handover_seconds
    """How long a new trainer waits for a stopped one to be noticed before it is refused."""
    session_bytes: int = _LIMITS.session_bytes
    """Memory that the open windows of one session may use: rows, gradients and look-ups."""
    open_windows: int = _LIMITS.open_windows
    """Windows that one session may have open at once."""
    keepalive_seconds: float = 20.0
    """A connection that is silent this long is asked for a sign of life, and ended without one."""
    log_format: Literal["text", "json"] = "text"
    """How log lines look on standard error."""

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
        for key, rule in RULES.items():
            value = getattr(self, key)
            if value is not None:
                _parse(rule, key, value, "")
        if not self.socket:
            _parse(RULES["socket"], "socket", self.socket_path, " (its default; choose one)")
        _check_tls(self)
        if self.tcp is not None and not self.tls:
            _check_tcp(self.tcp, insecure=self.insecure)

    @property
    def socket_path(self) -> Path:
        """Where the Unix socket is."""
        return self.socket or self.data_dir / "run" / "store.sock"

    @property
    def tls(self) -> bool:
        """Whether TCP is served with TLS."""
        return self.tls_cert is not None

    @property
    def limits(self) -> SessionLimits:
        """What one session may take."""
        return SessionLimits(
            hello_seconds=self.hello_seconds,
            handover_seconds=self.handover_seconds,
            session_bytes=self.session_bytes,
            open_windows=self.open_windows,
        )


RULES: dict[str, Rule] = {
    "data_dir": path_rule(),
    "socket": socket_rule(),
    "tcp": address_rule(),
    "insecure": switch_rule(),
    "tls_cert": path_rule(),
    "tls_key": path_rule(),
    "tls_client_ca": path_rule(),
    "memory_bytes": whole_rule(1, unit="bytes"),
    "overlay_bytes": whole_rule(1, unit="bytes"),
    "memtable_dir": path_rule(),
    "lookahead_bytes": whole_rule(0, unit="bytes"),
    "staleness": whole_rule(0, 1_000, "steps"),
    "fold_ratio": number_rule(0.01, 1_000_000),
    "fold_rate": number_rule(1_000, 1e15, "bytes a second"),
    "scrub_rate": number_rule(0, 1e15, "bytes a second"),
    "durability": durability_rule(),
    "keep_snapshots": whole_rule(1, unit="snapshots"),
    "drain_seconds": number_rule(0, 86_400, "seconds"),
    "max_message_bytes": whole_rule(64 << 10, MAX_INT32, "bytes"),
    "max_sessions": whole_rule(1, 10_000),
    "hello_seconds": number_rule(0.1, 3600, "seconds"),
    "handover_seconds": number_rule(0, 3600, "seconds"),
    "session_bytes": whole_rule(1 << 20, unit="bytes"),
    "open_windows": whole_rule(1, 1_000_000),
    "keepalive_seconds": number_rule(1, 86_400, "seconds"),
    "log_format": choice_rule("text", "json"),
}


def load_config(
    file: Mapping[str, Any], env: Mapping[str, str], flags: Mapping[str, Any]
) -> tuple[ServerConfig, dict[str, str]]:
    """Defaults < configuration file < environment < command line.

    Args:
        file: the parsed TOML file; empty if there is none.
        env: the whole environment; only names that begin with ENGRAM_STORE_ count, and an empty
            value counts as not set.
        flags: by name of the setting; None means not given.

    Returns:
        The configuration, and where each setting came from: 'default', 'file', the name of the
        variable, or the option.

    Raises:
        ConfigError: an unknown setting, a value that is not allowed, or no data directory.
    """
    values: dict[str, Any] = {}
    origins = {entry.name: DEFAULT for entry in fields(ServerConfig)}
    for source in (_from_file(file), _from_environment(env), _from_flags(flags)):
        for key, value, origin in source:
            values[key] = _parse(RULES[key], key, value, f" ({origin})")
            origins[key] = origin
    if "data_dir" not in values:
        raise ConfigError(
            "data_dir is not set: name the store's directory on the command line, in "
            f"{ENVIRONMENT_PREFIX}DATA_DIR, or in the configuration file"
        )
    return ServerConfig(**values), origins


Setting = tuple[str, Any, str]
"""Key, value, and where it came from."""


def _from_file(file: Mapping[str, Any]) -> Iterator[Setting]:
    for key, value in file.items():
        if key not in RULES:
            raise ConfigError(_unknown(repr(key), key, list(RULES), "in the configuration file"))
        yield key, value, FILE


def _from_environment(env: Mapping[str, str]) -> Iterator[Setting]:
    for name, value in env.items():
        rest = name.removeprefix(ENVIRONMENT_PREFIX)
        if rest == name or _SERVICE_LINK.fullmatch(rest):
            continue
        if rest.lower() not in RULES or rest != rest.upper():
            known = [ENVIRONMENT_PREFIX + key.upper() for key in RULES]
            raise ConfigError(_unknown(name, name.upper(), known, "in the environment"))
        if value:
            yield rest.lower(), value, name


def _from_flags(flags: Mapping[str, Any]) -> Iterator[Setting]:
    for key, value in flags.items():
        if key not in RULES:
            raise ConfigError(_unknown(repr(key), key, list(RULES), "on the command line"))
        if value is not None:
            yield key, value, option_name(key)


def option_name(key: str) -> str:
    """How a setting is called on the command line."""
    return "DIR" if key == "data_dir" else "--" + key.replace("_", "-")


def _unknown(shown: str, name: str, known: list[str], where: str) -> str:
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"settings are {', '.join(known)}"
    return f"unknown setting {shown} {where}; {hint}"


def _parse(rule: Rule, key: str, value: Any, where: str) -> Any:
    """Raises: ConfigError, naming the setting, where it came from, and what is allowed."""
    try:
        return rule.parse(value)
    except (ValueError, TypeError, KeyError, AttributeError):
        shown = repr(str(value) if isinstance(value, Path) else value)
        raise ConfigError(f"{key} is {shown}{where}; allowed is {rule.allowed}") from None


def _check_tls(config: ServerConfig) -> None:
    """Raises: ConfigError."""
    given = [key for key in _TLS_KEYS if getattr(config, key) is not None]
    if not given:
        return
    if missing := [key for key in _TLS_KEYS if key not in given]:
        raise ConfigError(
            f"{' and '.join(given)} without {' and '.join(missing)}; TLS takes all three: the "
            "store's certificate, its key, and the CA of the trainers' certificates"
        )
    if config.insecure:
        raise ConfigError(
            "insecure and tls_cert contradict each other; leave out insecure to serve TLS, or "
            "the tls settings to serve without"
        )
    if config.tcp is None:
        raise ConfigError(
            "tls_cert is set, but not tcp, so nothing would be served with TLS; add --tcp "
            "HOST:PORT, or leave the tls settings out"
        )


def _check_tcp(tcp: str, *, insecure: bool) -> None:
    """Raises: ConfigError."""
    how = "give tls_cert, tls_key and tls_client_ca"
    if not is_loopback(tcp):
        raise ConfigError(
            f"tcp is {tcp!r}; without TLS only a loopback address such as 127.0.0.1:7070 is "
            f"allowed; {how}"
        )
    if not insecure:
        raise ConfigError(
            f"tcp is {tcp!r}, which every user of this machine can reach; {how}, or add "
            "--insecure (insecure = true) if that is meant, or use the Unix socket"
        )
