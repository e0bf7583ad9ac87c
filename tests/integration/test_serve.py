"""`engram-store serve` as a process: health, reflection, signals, kills, and what is refused."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import engram_store
from engram_store.v1 import store_pb2 as pb
from engram_store.v1 import store_pb2_grpc as pb_grpc
from engram_store_server import app
from engram_store_server.config import ServerConfig
from engram_store_server.gate import StoreGate
from tests.integration.serving import (
    ENGRAM_STORE,
    NOT_SERVING,
    SECONDS,
    SERVICE,
    SERVING,
    RawSession,
    StoreProcess,
    connected,
    health,
)
from tests.pairs import MakeStore

Start = Callable[..., StoreProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts store processes, and kills those that a failed test leaves."""
    started: list[StoreProcess] = []

    def begin(directory: Path, *options: str) -> StoreProcess:
        started.append(StoreProcess(directory, *options))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


def refused(directory: Path, *options: str) -> tuple[int, str]:
    """Exit code and message of a `serve` that does not come up."""
    command = [str(ENGRAM_STORE), "serve", str(directory), *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert not run.stdout
    return run.returncode, run.stderr


def test_a_store_process_serves_and_closes_cleanly(make_store: MakeStore, start: Start) -> None:
    """One line when ready, closed to other users; SIGTERM leaves a snapshot and nothing else."""
    path = make_store()
    process = start(path)

    assert process.line == f"engram-store: serving {path} (step 0) on unix:{process.socket}\n"
    assert process.socket == path / "run" / "store.sock"
    assert process.socket.stat().st_mode & 0o777 == 0o600
    assert process.socket.parent.stat().st_mode & 0o777 == 0o700
    with connected(process.socket) as channel:
        assert health(channel) == health(channel, "") == SERVING
        RawSession(channel).train(0)
        code, output, log = process.end()

    assert (code, output) == (0, "")
    assert "closed" in log.splitlines()[-1]
    assert not process.socket.exists()
    assert 1 in engram_store.inspect(path).snapshots


def test_the_service_describes_itself(make_store: MakeStore, start: Start) -> None:
    """Reflection lists it; InspectStore, over TCP too, says what is stored."""
    process = start(make_store(), "--tcp", "127.0.0.1:0", "--insecure")
    assert process.tcp is not None

    with connected(process.tcp.removeprefix("tcp://")) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(stub.ServerReflectionInfo(iter([request]), timeout=SECONDS))
        inspected = pb_grpc.StoreServiceStub(channel).InspectStore(
            pb.InspectStoreRequest(), timeout=SECONDS
        )

    assert SERVICE in {entry.name for entry in answer.list_services_response.service}
    assert json.loads(inspected.description_json)["step"] == 0


def test_a_killed_store_process_loses_no_step(make_store: MakeStore, start: Start) -> None:
    """Started again, it replaces the stale socket and continues where it was."""
    path = make_store()
    killed = start(path)
    with connected(killed.socket) as channel:
        session = RawSession(channel)
        for step in range(3):
            session.train(step)
        killed.kill()
    assert killed.socket.exists()

    again = start(path)
    with connected(again.socket) as channel:
        assert RawSession(channel, epoch=2).welcome.step == again.step == 3
    assert "recovered" in again.end()[2]
    assert 3 in engram_store.inspect(path).snapshots


def test_ctrl_c_ends_it_too(make_store: MakeStore, start: Start) -> None:
    """With log lines for machines, if that was asked for."""
    code, _, log = start(make_store(), "--log-format", "json").end(signal.SIGINT)

    lines = [json.loads(line) for line in log.splitlines()]
    assert code == 0
    assert any("SIGINT" in line["message"] for line in lines)
    assert {"time", "level", "logger", "message"} == lines[0].keys()


def test_a_second_process_on_a_store_is_refused(make_store: MakeStore, start: Start) -> None:
    """Exit code 3, wherever its socket would be; the first one goes on."""
    path = make_store()
    process = start(path)

    for options in ((), ("--socket", str(path.parent / "other" / "s.sock"))):
        code, message = refused(path, *options)
        assert code == 3
        assert "open for training by process" in message
    assert refused(make_store("b"), "--socket", str(process.socket))[0] == 2
    with connected(process.socket) as channel:
        assert health(channel) == SERVING


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--tcp", "127.0.0.1:0"), "--insecure"),
        (("--tcp", "0.0.0.0:0", "--insecure"), "TLS"),
        (("--tcp", "127.0.0.1:{port}", "--insecure"), "cannot listen on"),
        (("--max-sessions", "0"), "(--max-sessions)"),
        (("--socket", "{store}/store.sock"), "chmod 700"),
        (("--overlay-bytes", "5"), "overlay_bytes"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_served(
    make_store: MakeStore, start: Start, options: tuple[str, ...], part: str
) -> None:
    """Exit code 2, one sentence, and the store can be served afterwards."""
    path = make_store()
    port = ""
    if "{port}" in options[1]:
        taken = start(make_store("b"), "--tcp", "127.0.0.1:0", "--insecure").tcp
        port = (taken or "").rpartition(":")[2]

    code, message = refused(path, *(option.format(store=path, port=port) for option in options))

    assert code == 2
    assert part in message
    assert "Traceback" not in message
    assert start(path).end()[0] == 0


def test_sessions_are_limited(make_store: MakeStore, start: Start) -> None:
    """One too many is refused; administration goes on, and a place that is left can be taken."""
    process = start(make_store(), "--max-sessions", "1")
    with connected(process.socket) as channel:
        first = RawSession(channel)
        with pytest.raises(grpc.RpcError) as caught:
            RawSession(channel, session_id="cd" * 16)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        pb_grpc.StoreServiceStub(channel).GetStatistics(pb.GetStatisticsRequest(), timeout=SECONDS)
        assert first.finish() == []
        RawSession(channel, session_id="cd" * 16).train(0)


def test_an_open_session_does_not_hold_the_end_up(make_store: MakeStore, start: Start) -> None:
    """Its stream ends in order, long before the drain time is over."""
    process = start(make_store(), "--drain-seconds", "1000")
    with connected(process.socket) as channel:
        session = RawSession(channel)
        code, _, _ = process.end()
        assert session.finish() == []
    assert code == 0


def test_garbage_ends_its_connection_and_nothing_else(make_store: MakeStore, start: Start) -> None:
    """On the socket, and as messages of a session."""
    process = start(make_store())
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(process.socket))
        raw.settimeout(SECONDS)
        raw.sendall(bytes(range(256)) * 100)
        with suppress(ConnectionError):
            while raw.recv(4096):
                pass

    with connected(process.socket) as channel:
        session: Any = channel.stream_stream(f"/{SERVICE}/Session")
        with pytest.raises(grpc.RpcError):
            next(session(iter([b"\xff" * 50]), timeout=SECONDS))
        unknown: Any = channel.unary_unary(f"/{SERVICE}/Nothing")
        with pytest.raises(grpc.RpcError) as caught:
            unknown(b"", timeout=SECONDS)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        RawSession(channel).train(0)
    assert process.end()[0] == 0


def test_health_is_not_serving_while_the_store_is_opened_and_drained(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Calls are refused with UNAVAILABLE meanwhile, health checks never."""
    config = ServerConfig(data_dir=make_store())
    opening, draining = _Pause(), _Pause()
    monkeypatch.setattr(app, "_open", opening.before(app._open))
    monkeypatch.setattr(StoreGate, "drain", draining.before_awaiting(StoreGate.drain))

    async def watch() -> None:
        process = asyncio.create_task(app.serve(config))
        assert await asyncio.to_thread(opening.reached.wait, SECONDS)
        await asyncio.to_thread(_expect_unavailable, config.socket_path)
        opening.go_on.set()
        await asyncio.to_thread(_await_serving, config.socket_path)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.to_thread(draining.reached.wait, SECONDS)
        await asyncio.to_thread(_expect_unavailable, config.socket_path)
        draining.go_on.set()
        await process

    asyncio.run(watch())

    assert capsys.readouterr().out.count("\n") == 1


def test_a_signal_while_the_store_is_opened_ends_the_process(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once the store is open, because recovery is not interrupted; it never says it is ready."""
    config, opening = ServerConfig(data_dir=make_store()), _Pause()
    monkeypatch.setattr(app, "_open", opening.before(app._open))

    async def interrupt() -> None:
        process = asyncio.create_task(app.serve(config))
        assert await asyncio.to_thread(opening.reached.wait, SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        opening.go_on.set()
        await process

    asyncio.run(interrupt())

    assert capsys.readouterr().out == ""
    engram_store.open(config.data_dir, "train").close()


class _Pause:
    """Makes a function wait until the test has looked around."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.reached.set()
            assert self.go_on.wait(SECONDS)
            return function(*arguments)

        return call

    def before_awaiting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        async def call(*arguments: Any) -> Any:
            self.reached.set()
            assert await asyncio.to_thread(self.go_on.wait, SECONDS)
            return await function(*arguments)

        return call


def _expect_unavailable(path: Path) -> None:
    with connected(path) as channel:
        assert health(channel) == health(channel, "") == NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            pb_grpc.StoreServiceStub(channel).InspectStore(
                pb.InspectStoreRequest(), timeout=SECONDS
            )
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def _await_serving(path: Path) -> None:
    with connected(path) as channel:
        while health(channel) != SERVING:
            pass
