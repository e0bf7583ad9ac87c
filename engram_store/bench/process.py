"""Processes that a benchmark starts: a store that serves, a trainer. None outlives it."""

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engram_store.errors import ConfigError, EngramStoreError

_NEEDED = ("grpc", "grpc_health", "grpc_reflection")
_READY_SECONDS = 300.0
"""A store of the reference size is there in one or two."""
_END_SECONDS = 120.0
_SETTINGS = "ENGRAM_STORE_"
_NO_FOLDS = "1000000"
"""Largest fold ratio of a store process: folds would run beside some timed commits only."""
_LOG_CHARACTERS = 2000
# A benchmark that is killed cannot end its children: the kernel does (PR_SET_PDEATHSIG).
_START = (
    "import ctypes, os, signal; "
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == {parent} or os._exit(1); "
    "from {module} import main; main()"
)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a store process listens, as `engram_store_client.connect` wants it."""

    unix: str
    tcp: str


def require_process() -> None:
    """Check that a store process can be started and reached.

    Raises:
        ConfigError: a package that it needs is not installed.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"this benchmark starts a store process, which needs {', '.join(missing)}: "
            "pip install 'engram-store[server]'"
        )


def python_command(module: str, *arguments: str) -> list[str]:
    """A command line that calls `main()` of a module of ours and ends when this process does."""
    start = _START.format(parent=os.getpid(), module=module)
    return [sys.executable, "-P", "-c", start, *arguments]


def child_result(module: str, order: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Run `main()` of a module of ours in a process of its own.

    Args:
        module: reads its order, JSON, from its first argument, and prints its answer as JSON.
        order: what it is told.
        seconds: how long it may take.

    Raises:
        EngramStoreError: it failed or took longer; with its last words.
    """
    command = python_command(module, json.dumps(order))
    try:
        result = subprocess.run(  # noqa: S603 - our own interpreter
            command, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise EngramStoreError(
            f"{module} did not end in {seconds:g} s; is the machine busy? Try smaller sizes"
        ) from None
    if result.returncode:
        raise EngramStoreError(
            f"{module} ended with exit code {result.returncode}: "
            f"{result.stderr[-_LOG_CHARACTERS:].strip() or 'it said nothing'}"
        )
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


@contextmanager
def store_process(root: Path, overlay_bytes: int) -> Iterator[Addresses]:
    """Serve a store on a Unix socket and on a loopback port; ended on leaving.

    Args:
        root: the store's directory; nobody else may have it open for training.
        overlay_bytes: shared memory for updated rows.

    Raises:
        EngramStoreError: it does not start, or does not end as it should.
    """
    room = Path(tempfile.mkdtemp(prefix="engram-store-bench-"))  # a short path, closed to others
    command = python_command(
        "engram_store.cli", "serve", str(root), "--socket", str(room / "socket"),
        "--tcp", "127.0.0.1:0", "--insecure", "--overlay-bytes", str(overlay_bytes),
        "--fold-ratio", _NO_FOLDS,
    )  # fmt: skip
    # What configures somebody's own store process is not for this one.
    environment = {key: v for key, v in os.environ.items() if not key.startswith(_SETTINGS)}
    log = room / "log"
    try:
        with log.open("w") as errors:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                text=True, env=environment,
            )  # fmt: skip
        with process:
            try:
                yield Addresses(f"unix://{room / 'socket'}", _wait_until_ready(process, log))
            finally:
                _end(process)
        if process.returncode:
            raise EngramStoreError(
                f"the store process ended with exit code {process.returncode}: {_tail(log)}"
            )
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _end(process: subprocess.Popen[str]) -> None:
    """As it should, which leaves nothing in shared memory; or else at once."""
    process.terminate()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[str], log: Path) -> str:
    """The address of the port, from the line that the store prints when it is open."""
    assert process.stdout is not None
    readable = select.select([process.stdout], [], [], _READY_SECONDS)[0]
    line = process.stdout.readline() if readable else ""
    _, found, tcp = line.rstrip().rpartition(" and ")
    if not found or not tcp.startswith("tcp://"):
        raise EngramStoreError(
            f"the store process did not open its store in {_READY_SECONDS:g} s; it said {line!r}: "
            f"{_tail(log)}"
        )
    return tcp


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-_LOG_CHARACTERS:].strip() or "its log is empty"
