"""Administration by program and by command line, of a process and of directories."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import engram_store
from engram_store.errors import (
    ConfigError,
    DeadlineError,
    ProtocolError,
    StoreUnreachableError,
)
from engram_store_client import connect_admin
from tests.certificates import Authority
from tests.integration.homes import HomeProcess
from tests.integration.serving import ENGRAM_STORE, SECONDS
from tests.pairs import MakeStore

Start = Callable[..., HomeProcess]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    """Starts processes, and kills those that a failed test leaves."""
    started: list[HomeProcess] = []

    def begin(*options: str) -> HomeProcess:
        started.append(HomeProcess(home, *options))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


@pytest.fixture
def two(home: Path, make_store: MakeStore) -> list[Path]:
    """Two stores in the directory, of different rows."""
    return [
        make_store("home/a"),
        make_store("home/b", engram_store.Normal(std=0.5), optimizer="adam"),
    ]


@pytest.fixture
def served(start: Start, two: list[Path]) -> HomeProcess:
    return start()


# ---------------------------------------------------------------------- the client


def test_a_store_process_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """As is one that takes too long, and an address that is none."""
    with (
        connect_admin(f"unix://{tmp_path}/s") as admin,
        pytest.raises(StoreUnreachableError, match="engram-store serve"),
    ):
        admin.list_stores()
    admin.close()
    with pytest.raises(StoreUnreachableError):
        admin.list_stores()
    for url in (str(tmp_path), "http://localhost:1", "tcp://localhost"):
        with pytest.raises(ConfigError):
            connect_admin(url)
    for seconds in (0.0, float("inf")):
        with pytest.raises(ConfigError, match="deadlines"):
            connect_admin("unix:///s", deadline_seconds=seconds)


def test_every_call_has_a_deadline(tmp_path: Path) -> None:
    """Also where something takes the connection and never answers."""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s"))
        silent.listen()
        url = f"unix://{tmp_path}/s"
        with (
            connect_admin(url, deadline_seconds=0.1) as admin,
            pytest.raises(DeadlineError, match=r"0\.1 s: the stores"),
        ):
            admin.list_stores()
        with (
            connect_admin(url, work_seconds=0.2) as admin,
            pytest.raises(DeadlineError, match=r"0\.2 s: a verification"),
        ):
            admin.verify()


def test_administration_over_tls(start: Start, two: list[Path], tmp_path: Path) -> None:
    """With the trainers' certificates; without one the message says what to give."""
    servers, trainers = Authority(tmp_path, "servers"), Authority(tmp_path, "trainers")
    own, shown = servers.issue("127.0.0.1"), trainers.issue()
    process = start("--tcp", "127.0.0.1:0", "--tls-cert", str(own.cert), "--tls-key", str(own.key),
                    "--tls-client-ca", str(trainers.cert))  # fmt: skip
    assert process.tcp is not None
    files: dict[str, Any] = {"tls_ca": servers.cert, "tls_cert": shown.cert, "tls_key": shown.key}

    with connect_admin(process.tcp, **files) as admin:
        assert [entry.name for entry in admin.list_stores()] == ["a.engram", "b.engram"]
    with (
        connect_admin(process.tcp, tls_ca=servers.cert) as admin,
        pytest.raises(ProtocolError, match="give tls_cert"),
    ):
        admin.list_stores()
    with connect_admin(process.tcp) as admin, pytest.raises(ProtocolError, match="give tls_ca"):
        admin.list_stores()
    with pytest.raises(ConfigError, match="all three"):
        connect_admin(process.tcp, tls_cert=shown.cert)
    with pytest.raises(ConfigError, match="all three"):
        connect_admin(process.tcp, tls_ca=servers.cert, tls_key=shown.key)
    with pytest.raises(ConfigError, match="without a network"):
        connect_admin(process.url, **files)
    options = [part for name, path in files.items()
               for part in (f"--{name.replace('_', '-')}", str(path))]  # fmt: skip
    assert "b.engram" in tool("stores", process.tcp, *options)


# ---------------------------------------------------------------------- the command line


def tool(*arguments: str, code: int = 0) -> str:
    """What the command line prints."""
    run = subprocess.run(
        [ENGRAM_STORE, *arguments], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert run.returncode == code, run
    return run.stdout + run.stderr


def test_the_tool_takes_urls(served: HomeProcess) -> None:
    """For what people do to a store that is in use; with a directory such options are refused."""
    url, name = served.url, ("--store", "b.engram")

    with connect_admin(url) as admin:
        assert json.loads(tool("inspect", url, *name, "--json")) == admin.inspect("b.engram")
    assert "rowwise_adagrad" in tool("inspect", url, "--store", "a.engram")
    assert [entry["step"] for entry in json.loads(tool("snapshots", url, *name, "--json"))] == [0]
    assert "At step 0 again." in tool("restore", url, "0", *name)
    assert "Folded." in tool("fold", url, *name)
    listed = json.loads(tool("stores", url, "--json"))
    assert [entry["name"] for entry in listed] == ["a.engram", "b.engram"]
    assert "b.engram" in tool("stores", url)
    assert "name one of a.engram, b.engram" in tool("inspect", url, code=2)
    assert "is a directory" in tool("inspect", str(served.socket.parents[1] / "a.engram"), *name,
                                    code=2)  # fmt: skip
    assert "no URL" in tool("stores", str(served.socket.parent), code=2)
    assert "no store process answers" in tool("stores", "unix:///nowhere/s.sock", code=2)


def test_directories_need_no_grpc(make_store: MakeStore) -> None:
    """Only a URL loads it, or the client."""
    code = (
        "import sys\n"
        "from engram_store.cli import main\n"
        f"try: main(['gc', {str(make_store())!r}])\n"
        "except SystemExit: pass\n"
        "print(sorted({'grpc', 'engram_store_client'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.endswith("1 snapshot left.\n[]\n")


def test_a_store_that_cannot_be_opened_is_named(home: Path, two: list[Path]) -> None:
    """Exit code 3, nothing is served, and the other store is free."""
    (two[1] / "CURRENT.json").write_text("{}")

    said = tool("serve", str(home), code=3)

    assert str(two[1]) in said
    assert "Traceback" not in said
    engram_store.open(two[0], "train").close()
