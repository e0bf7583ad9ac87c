"""Where the settings of a store process come from, and what is refused."""

import inspect
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from engram_store import wire
from engram_store.errors import ConfigError
from engram_store_server import commands
from engram_store_server.config import RULES, ServerConfig, load_config
from engram_store_server.limits import SessionLimits

DIR = {"data_dir": Path("a.engram")}
TLS = {"tls_cert": "a.pem", "tls_key": "a.key", "tls_client_ca": "ca.pem"}


def test_each_source_wins_over_the_ones_before() -> None:
    """Defaults < file < environment < command line; every origin is told."""
    file = {"max_sessions": 1, "drain_seconds": 1, "fold_ratio": 2, "log_format": "json"}
    env = {"ENGRAM_STORE_MAX_SESSIONS": "2", "ENGRAM_STORE_DRAIN_SECONDS": "2.5"}

    config, origins = load_config(file, env, {**DIR, "max_sessions": 3, "tcp": None})

    assert (config.max_sessions, config.drain_seconds, config.fold_ratio) == (3, 2.5, 2.0)
    assert (config.log_format, config.keepalive_seconds) == ("json", 20.0)
    assert origins["max_sessions"] == "--max-sessions"
    assert origins["drain_seconds"] == "ENGRAM_STORE_DRAIN_SECONDS"
    assert origins["fold_ratio"] == "file"
    assert origins["tcp"] == "default"
    assert origins["data_dir"] == "DIR"


def test_the_environment_alone_is_enough() -> None:
    """Text becomes paths, numbers and switches; empty means not set, other names are not ours."""
    env = {
        "ENGRAM_STORE_DATA_DIR": "/data/a.engram",
        "ENGRAM_STORE_TCP": "[::1]:7070",
        "ENGRAM_STORE_INSECURE": "Yes",
        "ENGRAM_STORE_OVERLAY_BYTES": "1_000_000",
        "ENGRAM_STORE_MEMTABLE_DIR": "",
        "PATH": "/bin",
    }

    config, _ = load_config({}, env, {})

    assert config == ServerConfig(
        data_dir=Path("/data/a.engram"), tcp="[::1]:7070", insecure=True, overlay_bytes=1_000_000
    )
    assert config.socket_path == Path("/data/a.engram/run/store.sock")


def test_service_links_are_not_settings() -> None:
    """Kubernetes sets these beside a service named engram-store."""
    links = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GRPC", "PORT", "PORT_7070_TCP_ADDR",
             "PORT_7070_TCP", "METRICS_SERVICE_HOST", "METRICS_PORT_9090_TCP_PROTO")  # fmt: skip

    load_config({}, {f"ENGRAM_STORE_{name}": "tcp://10.0.0.1:7070" for name in links}, DIR)


@pytest.mark.parametrize(
    ("file", "env", "flags", "parts"),
    [
        ({"drain_second": 1}, {}, DIR, ("'drain_second'", "file", "mean drain_seconds?")),
        ({"server": {"tcp": ""}}, {}, DIR, ("'server'", "file", "max_sessions")),
        ({}, {"ENGRAM_STORE_TPC": "x"}, DIR, ("ENGRAM_STORE_TPC", "mean ENGRAM_STORE_TCP?")),
        ({}, {"ENGRAM_STORE_tcp": "x"}, DIR, ("ENGRAM_STORE_tcp", "mean ENGRAM_STORE_TCP?")),
        ({}, {}, {**DIR, "sokcet": 1}, ("'sokcet'", "command line", "mean socket?")),
        (
            {"max_sessions": "many"},
            {},
            DIR,
            ("max_sessions is 'many'", "file", "number, 1 to 10,000"),
        ),
        ({"max_sessions": True}, {}, DIR, ("max_sessions is True", "whole number")),
        ({"max_sessions": 2.5}, {}, DIR, ("max_sessions is 2.5", "whole number")),
        ({"insecure": "maybe"}, {}, DIR, ("insecure is 'maybe'", "true or false")),
        ({"insecure": 1}, {}, DIR, ("insecure is 1", "true or false")),
        ({"tcp": 7070}, {}, DIR, ("tcp is 7070", "HOST:PORT")),
        ({"socket": ["a"]}, {}, DIR, ("socket is ['a']", "a path")),
        ({"log_format": "xml"}, {}, DIR, ("log_format is 'xml'", "'text' or 'json'")),
        ({"drain_seconds": float("nan")}, {}, DIR, ("drain_seconds is nan", "seconds")),
        (
            {},
            {"ENGRAM_STORE_OVERLAY_BYTES": "1 GiB"},
            DIR,
            (
                "overlay_bytes is '1 GiB' (ENGRAM_STORE_OVERLAY_BYTES)",
                "number of bytes, at least 1",
            ),
        ),
        (
            {},
            {},
            {**DIR, "max_message_bytes": 5},
            ("(--max-message-bytes)", "bytes, 65,536 to 2,147,483,647"),
        ),
        ({"max_message_bytes": 1 << 31}, {}, DIR, ("max_message_bytes is 2147483648", "to 2,1")),
        ({"fold_ratio": float("inf")}, {}, DIR, ("fold_ratio is inf", "number, 0.01 to")),
        ({}, {}, {}, ("data_dir is not set", "ENGRAM_STORE_DATA_DIR")),
        ({"staleness": -1}, {}, DIR, ("staleness is -1", "number of steps, 0 to 1,000")),
        ({}, {}, {**DIR, "lookahead_bytes": -1}, ("(--lookahead-bytes)", "bytes, at least 0")),
        ({"fold_ratio": 10**400}, {}, DIR, ("fold_ratio is 1000", "number, 0.01 to")),
        ({}, {}, {"data_dir": Path("d" * 100)}, ("socket", "at most 107 bytes")),
        ({}, {}, {**DIR, "socket": Path("/a%20b")}, ("'/a%20b' (--socket)", "gRPC reads as parts")),
        ({"socket": "/run/what?"}, {}, DIR, ("'/run/what?'", "without %, ? and #")),
        ({}, {}, {"data_dir": Path("/a#1")}, ("/a#1/run/store.sock' (its default; choose one)",)),
    ],
)
def test_a_mistake_is_refused_by_name(
    file: dict[str, Any], env: dict[str, str], flags: dict[str, Any], parts: tuple[str, ...]
) -> None:
    """The setting, where it came from, and what is allowed or meant."""
    with pytest.raises(ConfigError) as caught:
        load_config(file, env, flags)

    for part in parts:
        assert part in str(caught.value)


LOOPBACK = ("127.0.0.1:7070", "127.1.2.3:0", "[::1]:7070", "localhost:1")
ANYWHERE = ("0.0.0.0:7070", "[::]:7070", "10.0.0.1:7070", "example.org:1")


@pytest.mark.parametrize("tcp", LOOPBACK)
def test_loopback_addresses_need_tls_or_insecure(tcp: str) -> None:
    """Plain text is never served by accident."""
    with pytest.raises(ConfigError, match="give tls_cert, tls_key and tls_client_ca, or add --ins"):
        ServerConfig(data_dir=Path("a"), tcp=tcp)
    assert ServerConfig(data_dir=Path("a"), tcp=tcp, insecure=True).tcp == tcp


@pytest.mark.parametrize("tcp", ANYWHERE)
def test_other_addresses_need_tls(tcp: str) -> None:
    """Also with insecure."""
    with pytest.raises(ConfigError, match=r"without TLS only a loopback .*; give tls_cert"):
        ServerConfig(data_dir=Path("a"), tcp=tcp, insecure=True)


@pytest.mark.parametrize("tcp", [*LOOPBACK, *ANYWHERE])
def test_with_tls_any_address_will_do(tcp: str) -> None:
    """The three files come from wherever settings come from; they are not looked at here."""
    env = {"ENGRAM_STORE_TLS_KEY": "a.key", "ENGRAM_STORE_TLS_CERT": ""}
    file = {"tcp": tcp, "tls_cert": "a.pem"}

    config, _ = load_config(file, env, {**DIR, "tls_client_ca": Path("ca.pem")})

    assert config.tls
    assert (config.tls_cert, config.tls_key) == (Path("a.pem"), Path("a.key"))
    assert not ServerConfig(data_dir=Path("a")).tls


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"tls_cert": "a"}, ("tls_cert without tls_key and tls_client_ca; TLS takes all three",)),
        ({"tls_cert": "a", "tls_key": "b"}, ("tls_cert and tls_key without tls_client_ca",)),
        ({"tls_client_ca": "a"}, ("tls_client_ca without tls_cert and tls_key",)),
        ({**TLS, "insecure": True}, ("insecure and tls_cert contradict", "leave out insecure")),
        (TLS, ("tls_cert is set, but not tcp", "add --tcp HOST:PORT")),
        ({**TLS, "tls_key": 5}, ("tls_key is 5 (file); allowed is a path",)),
    ],
)
def test_tls_settings_go_together(settings: dict[str, Any], parts: tuple[str, ...]) -> None:
    """Half of them would be no protection, or none that is used."""
    tcp = {} if settings == TLS else {"tcp": "127.0.0.1:0"}
    with pytest.raises(ConfigError) as caught:
        load_config({**settings, **tcp}, {}, DIR)

    for part in parts:
        assert part in str(caught.value)


def test_limits_of_sessions_are_settings() -> None:
    """With the same defaults."""
    changed = SessionLimits(
        hello_seconds=1.5, handover_seconds=0.0, session_bytes=1 << 30, open_windows=3
    )

    config, _ = load_config(asdict(changed), {}, DIR)

    assert config.limits == changed
    assert ServerConfig(data_dir=Path("a")).limits == SessionLimits()


@pytest.mark.parametrize(
    "settings",
    [{"hello_seconds": 0}, {"handover_seconds": -1}, {"session_bytes": 1000}, {"open_windows": 0}],
)
def test_limits_that_leave_no_room_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"allowed is a .*number"):
        load_config(settings, {}, DIR)


def test_a_message_is_as_large_as_a_trainer_sends_it() -> None:
    """The default of the process is what clients assume."""
    assert ServerConfig(data_dir=Path("a")).max_message_bytes == wire.MAX_MESSAGE_BYTES


@pytest.mark.parametrize(
    "tcp", ["7070", ":7070", "::1:7070", "localhost", "localhost:x", "a:65536"]
)
def test_an_address_has_a_host_and_a_port(tcp: str) -> None:
    """IPv6 in brackets."""
    with pytest.raises(ConfigError, match="HOST:PORT"):
        ServerConfig(data_dir=Path("a"), tcp=tcp, insecure=True)


def test_a_configuration_made_by_hand_is_checked_too() -> None:
    """The rules are the configuration's own."""
    with pytest.raises(ConfigError, match="max_sessions is 0; allowed"):
        ServerConfig(data_dir=Path("a"), max_sessions=0)


def test_every_setting_has_a_rule_and_an_option() -> None:
    """In both commands."""
    assert {entry.name for entry in fields(ServerConfig)} == set(RULES)
    options = set(RULES) | {"config"}
    assert set(inspect.signature(commands.serve).parameters) == options
    assert set(inspect.signature(commands.show).parameters) == options | {"json"}


def test_every_setting_is_documented() -> None:
    """In docs/serving.md, one row of the table each."""
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    assert {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")} == set(
        RULES
    )
