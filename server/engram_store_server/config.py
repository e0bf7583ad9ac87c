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
from engram_store_server.rules import (
    MAX_INT32,
    Rule,
    address_rule,
    choice_rule,
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
    """HOST:PORT to listen on besides; a loopback address, and only with `insecure`."""
    insecure: bool = False
    """Allow TCP without TLS: every user of this machine can then read and train the store."""
    overlay_bytes: int | None = None
    """Shared memory for updated rows; None: a fifth of the memory limit, at most 1 GiB."""
    memtable_dir: Path | None = None
    """Directory of that memory; None: /dev/shm, or the data directory where that is too small."""
    fold_ratio: float = 1.0
    """Fold when segments reach this multiple of the base."""
    drain_seconds: float = 10.0
    """How long running calls may finish after SIGTERM."""
    max_message_bytes: int = 256 << 20
    """Largest message in either direction; a larger one fails its call."""
    max_sessions: int = 64
    """Trainers and readers connected at once."""
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
        if self.tcp is not None:
            _check_tcp(self.tcp, insecure=self.insecure)

    @property
    def socket_path(self) -> Path:
        """Where the Unix socket is."""
        return self.socket or self.data_dir / "run" / "store.sock"


RULES: dict[str, Rule] = {
    "data_dir": path_rule(),
    "socket": socket_rule(),
    "tcp": address_rule(),
    "insecure": switch_rule(),
    "overlay_bytes": whole_rule(1, unit="bytes"),
    "memtable_dir": path_rule(),
    "fold_ratio": number_rule(0.01, 1_000_000),
    "drain_seconds": number_rule(0, 86_400, "seconds"),
    "max_message_bytes": whole_rule(64 << 10, MAX_INT32, "bytes"),
    "max_sessions": whole_rule(1, 10_000),
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


def _check_tcp(tcp: str, *, insecure: bool) -> None:
    """Raises: ConfigError."""
    if not is_loopback(tcp):
        raise ConfigError(
            f"tcp is {tcp!r}; without TLS, which a later version brings, only a loopback "
            "address such as 127.0.0.1:7070 is allowed. Reach it from elsewhere through a tunnel"
        )
    if not insecure:
        raise ConfigError(
            f"tcp is {tcp!r}, which every user of this machine can reach and which has no TLS "
            "yet; add --insecure (insecure = true) if that is meant, or use the Unix socket"
        )
