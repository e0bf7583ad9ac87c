"""TLS options of `connect`: what does not go together is refused before anything is sent."""

from pathlib import Path
from typing import Any

import grpc
import pytest

from engram_store.errors import ConfigError, StoreUnreachableError
from engram_store_client.transport import connect, local_path, process_address
from tests.certificates import Authority


@pytest.mark.parametrize(
    ("store", "options", "part"),
    [
        ("my.engram", {"tls_ca": "ca.pem"}, "tls_ca is for tcp:// addresses; my.engram"),
        (Path("my.engram"), {"tls_server_name": "x"}, "tls_server_name is for tcp://"),
        ("unix:/run/s.sock", {"tls_cert": "a", "tls_key": "b"}, "tls_cert is for tcp://"),
        ("tcp://h:1", {"tls_server_name": "x"}, "tls_server_name without tls_ca"),
        ("tcp://h:1", {"tls_cert": "a", "tls_key": "b"}, "tls_cert without tls_ca"),
        ("tcp://h:1", {"tls_ca": "a", "tls_key": "b"}, "tls_cert and tls_key go together"),
        ("tcp://h:1", {"tls_ca": "a", "tls_cert": "b"}, "tls_cert and tls_key go together"),
        ("tcp://h:1", {"tls_ca": "/nowhere/ca.pem"}, "tls_ca: /nowhere/ca.pem cannot be read"),
    ],
)
def test_tls_options_that_make_no_sense_are_refused(
    store: str | Path, options: dict[str, Any], part: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        connect(store, **options)
    assert part in str(caught.value)


def test_credentials_and_files_exclude_each_other(tmp_path: Path) -> None:
    """Neither would be known to be used."""
    authority = Authority(tmp_path)
    with pytest.raises(ConfigError, match="exclude each other"):
        connect("tcp://h:1", tls_ca=authority.cert, credentials=grpc.ssl_channel_credentials())


def test_nothing_that_listens_is_no_matter_of_tls(tmp_path: Path) -> None:
    """The message asks whether the store runs, with and without TLS."""
    authority = Authority(tmp_path)
    tls: dict[str, Any] = {"tls_ca": str(authority.cert)}
    for options in ({}, tls):
        with pytest.raises(StoreUnreachableError, match="Is `engram-store serve` running"):
            connect("tcp://127.0.0.1:1", connect_seconds=0.0, **options)


@pytest.mark.parametrize(
    "address",
    [
        "tcp://[::1",
        "tcp://[nowhere]:1",
        "tcp://user@h:1",
        "tcp://h:1?x=y",
        "tcp://h:99999",
        "unix:///run/a?b",
        "unix:///run/a#b",
    ],
)
def test_an_address_that_is_none_is_refused_with_what_is_one(address: str) -> None:
    """Nothing of it is left out silently: another store would be reached."""
    with pytest.raises(ConfigError, match="tcp://host:port") as caught:
        process_address(address)
    assert repr(address) in str(caught.value)


@pytest.mark.parametrize("path", ["/run/a%2520b", "/run/a%3Fb", "/run/a%23b"])
def test_a_socket_that_no_store_listens_on_is_refused_with_the_reason(path: str) -> None:
    """The names that `--socket` refuses."""
    with pytest.raises(ConfigError, match="gRPC reads as parts of a URL"):
        process_address(f"unix://{path}")
    assert process_address("unix:///run/a%20b") == "unix:/run/a b"


def test_a_directory_with_a_bracket_can_be_given_as_a_path() -> None:
    """As text it may look like an address of IPv6, which the message says."""
    with pytest.raises(ConfigError, match=r"given as pathlib\.Path"):
        local_path("//[a")
    assert local_path(Path("//[a")) == Path("//[a")
