"""Where the settings of a store process come from, and what is refused."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from engram_store.errors import ConfigError
from engram_store_server import commands
from engram_store_server.config import RULES, ServerConfig, load_config

DIR = {"data_dir": Path("a.engram")}


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
        ({}, {}, {"data_dir": Path("d" * 100)}, ("socket", "at most 107 bytes")),
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


@pytest.mark.parametrize("tcp", ["127.0.0.1:7070", "127.1.2.3:0", "[::1]:7070", "localhost:1"])
def test_loopback_addresses_need_insecure(tcp: str) -> None:
    """There is no TLS yet, so it is never on by accident."""
    with pytest.raises(ConfigError, match="--insecure"):
        ServerConfig(data_dir=Path("a"), tcp=tcp)
    assert ServerConfig(data_dir=Path("a"), tcp=tcp, insecure=True).tcp == tcp


@pytest.mark.parametrize("tcp", ["0.0.0.0:7070", "[::]:7070", "10.0.0.1:7070", "example.org:1"])
def test_other_addresses_wait_for_tls(tcp: str) -> None:
    """Also with insecure."""
    with pytest.raises(ConfigError, match="without TLS, which a later version brings"):
        ServerConfig(data_dir=Path("a"), tcp=tcp, insecure=True)


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
