"""A store process under test, and the least of a trainer: one session, one request at a time."""

import queue
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engram_store import wire
from engram_store.v1 import store_pb2 as pb
from engram_store.v1 import store_pb2_grpc as pb_grpc

ENGRAM_STORE = Path(sys.executable).with_name("engram-store")
SERVICE = "engram_store.v1.StoreService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SECONDS = 60.0
"""Patience with a busy machine."""
_READY = re.compile(r"engram-store: serving (\S+) \(step (\d+)\) on unix:(\S+)(?: and (\S+))?\n")


class StoreProcess:
    """`engram-store serve`, ready."""

    def __init__(self, directory: Path, *options: str) -> None:
        self._process = subprocess.Popen(
            [ENGRAM_STORE, "serve", directory, *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert select.select([self._process.stdout], [], [], SECONDS)[0]
        self.line = self._process.stdout.readline()
        ready = _READY.fullmatch(self.line)
        assert ready is not None, (self.line, self._process.communicate())
        self.step, self.socket, self.tcp = int(ready[2]), Path(ready[3]), ready[4]

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str, str]:
        """Send a signal; returns exit code, the rest of the output, and the log."""
        self._process.send_signal(number)
        output, log = self._process.communicate(timeout=SECONDS)
        return self._process.returncode, output, log

    def kill(self) -> None:
        if self.running:
            self.end(signal.SIGKILL)


@contextmanager
def connected(target: Path | str) -> Iterator[grpc.Channel]:
    """A channel to a socket or to host:port."""
    address = f"unix:{target}" if isinstance(target, Path) else target
    with grpc.insecure_channel(address) as channel:
        yield channel


def health(channel: grpc.Channel, service: str = SERVICE) -> int:
    """What a health check says."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    status: int = stub.Check(request, timeout=SECONDS).status
    return status


class RawSession:
    """Sends requests and takes their answers, in order."""

    def __init__(self, channel: grpc.Channel, session_id: str = "ab" * 16, epoch: int = 1) -> None:
        self._requests: queue.SimpleQueue[pb.SessionRequest | None] = queue.SimpleQueue()
        requests = iter(self._requests.get, None)
        self._answers = pb_grpc.StoreServiceStub(channel).Session(requests, timeout=SECONDS)
        self._number = 0
        hello = pb.Hello(
            protocol=1, oldest_protocol=1, mode=pb.MODE_TRAIN, session_id=session_id, epoch=epoch
        )
        self.welcome = self.ask(pb.SessionRequest(hello=hello)).welcome

    def ask(self, request: pb.SessionRequest) -> pb.SessionResponse:
        """The answer to one request."""
        self._number += 1
        request.id = self._number
        self._requests.put(request)
        answer = next(self._answers)
        assert answer.id == self._number
        assert not answer.HasField("failure"), answer.failure
        return answer

    def train(self, step: int) -> None:
        """One step that adds one to the gradient of every row of a fixed window."""
        tokens = wire.encode_array(np.arange(step, step + 40, dtype=np.int64).reshape(2, 20))
        announce = pb.Announce(window=step, tokens=tokens, step=step)
        self.ask(pb.SessionRequest(announce=announce))
        for layer in (1, 2):
            read = pb.Read(window=step, layer=layer)
            rows = self.ask(pb.SessionRequest(read=read)).rows
            ones = wire.encode_array(np.ones(tuple(rows.rows.shape), np.float32))
            push = pb.Push(window=step, layer=layer, gradients=ones)
            self.ask(pb.SessionRequest(push=push))
        commit = pb.Commit(
            step=step, rates={1: 0.5, 2: 0.5}, gradient_scale=1.0, beta1=0.9, beta2=0.999
        )
        assert self.ask(pb.SessionRequest(commit=commit)).applied.step == step

    def finish(self) -> list[pb.SessionResponse]:
        """Say that no request follows; what still comes."""
        self._requests.put(None)
        return list(self._answers)
