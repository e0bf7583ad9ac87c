"""A store process as the demo's child: started, killed on purpose, started again, ended."""

import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from engram_store.errors import ConfigError, EngramStoreError

_CHILD = Path(__file__).with_name("child.py")
_NEEDED = ("grpc", "grpc_health", "grpc_reflection", "google", "google.protobuf")
_READY = re.compile(r"engram-store: serving .* \(step (\d+)\) on ")
_SECONDS = 120.0
"""Patience with a start, and with an end, on a busy machine."""
_LOG_LINES = 20


class StoreProcessError(EngramStoreError, RuntimeError):
    """The demo's store process did not start, or ended without being asked to."""

    def __init__(self, problem: str, log: Path) -> None:
        lines = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
        tail = "".join(f"\n  {line}" for line in lines[-_LOG_LINES:]) or "\n  (nothing)"
        super().__init__(
            f"the store process {problem}. `engram-store demo --embedded` runs without one. "
            f"The end of its log:{tail}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Outage:
    """One time that the store was killed under its trainer."""

    step: int
    """The step that the trainer was in."""
    found_step: int
    """Steps in the store when it was back."""
    seconds: float
    """From the kill until it served again."""


def require_server() -> None:
    """Raises: ConfigError when `engram-store serve` cannot run here."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the demo trains through `engram-store serve`, for which {missing[0]} is not "
            "installed: pip install 'engram-store[server]', or add --embedded to open the stores "
            "in the demo's own process"
        )


class StoreProcess:
    """`engram-store serve` as a child, ready; a thread starts it again when `kill` ended it.

    Args:
        store: its directory.
        socket: where it listens, absolute; its directory is closed to others or does not exist.
        log: gets its log lines, after those that are there.

    Raises:
        StoreProcessError: it does not come up.
    """

    def __init__(self, store: Path, socket: Path, log: Path) -> None:
        self.url = f"unix://{quote(str(socket))}"
        """Where trainers connect to."""
        self.failure: StoreProcessError | OSError | None = None
        """Why it is gone, if nobody asked it to go."""
        self.on_failure: Callable[[], None] = lambda: None
        """Called once when it is gone, on another thread."""
        self._command = [sys.executable, "-P", str(_CHILD), str(store), "--socket", str(socket)]
        self._log = log
        # Guards the current child together with what is meant to become of it.
        self._lock = threading.Lock()
        self._stopping = False
        self._killed: tuple[int, float] | None = None
        """The trainer's step and the time, while a killed child is being replaced."""
        self._ready = threading.Event()
        """Set while it serves, and when it will not serve any more."""
        self._outages: list[Outage] = []
        self._process = self._spawn()
        self._keeper = threading.Thread(target=self._keep, name="demo-store", daemon=True)
        try:
            self._await_ready()
        except BaseException:  # Ctrl-C, too
            _end(self._process)
            raise
        self._ready.set()
        self._keeper.start()

    @property
    def pid(self) -> int:
        """Of the child that serves now."""
        return self._process.pid

    @property
    def outages(self) -> tuple[Outage, ...]:
        """Every kill so far; waits until the store is back from the last one."""
        self._ready.wait()
        return tuple(self._outages)

    def kill(self, step: int) -> None:
        """SIGKILL, without a warning; returns before the store is back.

        Args:
            step: that the trainer is in, for the record.
        """
        self._ready.wait()  # a child that is just starting has nothing to lose
        with self._lock:
            if self._stopping or self.failure is not None:
                return
            self._ready.clear()
            self._killed = step, time.perf_counter()
            self._process.kill()

    def stop(self) -> int:
        """SIGTERM, and SIGKILL if that does not help; the exit code. No child is left.

        A store that was just killed comes back first: what it had in shared memory would stay
        there otherwise.
        """
        try:
            self._ready.wait(_SECONDS)
            self._ask_to_end()
            self._keeper.join(_SECONDS)
        finally:  # Ctrl-C while waiting, too
            self._ask_to_end()
            self._process.kill()
            self._keeper.join()
            self._ready.set()
        return _end(self._process)

    def _ask_to_end(self) -> None:
        """From here on no child is started."""
        with self._lock:
            self._stopping = True
            self._process.terminate()

    # ------------------------------------------------------------------ one child

    def _spawn(self) -> "subprocess.Popen[str]":
        with self._log.open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is for the demo, which ends its child in order
            )

    def _await_ready(self) -> int:
        """The step of the store that is open now. Raises: StoreProcessError."""
        output = self._process.stdout
        assert output is not None
        line = output.readline() if select.select([output], [], [], _SECONDS)[0] else None
        found = None if line is None else _READY.match(line)
        if found is not None:
            return int(found[1])
        code = _end(self._process)  # its own exit code, if it ended by itself
        if line is None:
            raise StoreProcessError(f"was not ready after {_SECONDS:g} s", self._log)
        raise StoreProcessError(f"did not come up ({_ending(code)})", self._log)

    def _keep(self) -> None:
        """Start the child again whenever `kill` ended it, as a service manager would."""
        while True:
            code = self._process.wait()
            _end(self._process)
            try:
                with self._lock:
                    if self._stopping:
                        return
                    if self._killed is None:
                        raise StoreProcessError(f"ended by itself ({_ending(code)})", self._log)
                    (step, since), self._killed = self._killed, None
                    self._process = self._spawn()
                found = self._await_ready()
            except (StoreProcessError, OSError) as error:
                if not self._stopping:
                    self._give_up(error)
                return
            seconds = time.perf_counter() - since
            self._outages.append(Outage(step=step, found_step=found, seconds=seconds))
            self._ready.set()

    def _give_up(self, error: StoreProcessError | OSError) -> None:
        self.failure = error
        self._ready.set()
        self.on_failure()


def _end(process: "subprocess.Popen[str]") -> int:
    """SIGKILL, if it still runs; its exit code."""
    process.kill()
    code = process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    return code


def _ending(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


@contextmanager
def serve(store: Path, socket: Path, log: Path) -> Iterator[StoreProcess]:
    """A store process for the length of a block, after which its store is closed.

    Args:
        store: its directory.
        socket: where it listens, absolute.
        log: gets its log lines.

    Raises:
        StoreProcessError: it did not come up, ended by itself, or did not close its store.
    """
    process = StoreProcess(store, socket, log)
    try:
        yield process
    except Exception as error:
        if process.failure is not None:  # the trainer's error is only what came of it
            raise process.failure from error
        raise
    finally:
        code = process.stop()
    if process.failure is not None:
        raise process.failure
    if code:
        raise StoreProcessError(f"could not close its store ({_ending(code)})", log)
