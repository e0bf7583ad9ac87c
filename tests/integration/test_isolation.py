"""One client's trouble is nobody else's: stopped, silent, greedy and foreign clients."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from engram_store.recipes import Recipe
from engram_store_client import connect
from engram_store_client.remote import RemoteSession
from tests.integration.homes import HomeProcess
from tests.integration.serving import SECONDS, StoreProcess, connected, health
from tests.pairs import INITIAL, MakeStore, Pair, make_oracle

READER = """
import sys
import numpy as np
from engram_store_client.remote import RemoteSession
session = RemoteSession(sys.argv[1], "read")
rng = np.random.default_rng(0)
windows = [session.announce(rng.integers(0, 500, (8, 256))) for _ in range(8)]
expected = windows[0].rows(1)[0].copy()
for window in windows[1:]:
    window._request_rows(1)
print("asked", flush=True)
sys.stdin.readline()
for window in windows[1:]:
    assert len(window.rows(1)[0])
np.testing.assert_array_equal(windows[0].rows(1)[0], expected)
print("read", flush=True)
"""


TRAINER = """
import sys
import numpy as np
from engram_store_client import connect
session = connect(sys.argv[1], store=sys.argv[2])
window = session.announce(np.arange(400).reshape(2, 200), 0)
for layer in session.tables:
    window.push(layer, np.ones(window.rows(layer)[0].shape, np.float32))
print("in a step", flush=True)
sys.stdin.readline()
session.commit(0, 0.1)
print("committed", session.step, flush=True)
"""


@contextmanager
def reader(address: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that has asked for many rows and read few."""
    process = subprocess.Popen(
        [sys.executable, "-c", READER, address],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "asked\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def process(make_store: MakeStore) -> Iterator[StoreProcess]:
    started = StoreProcess(
        make_store(), "--tcp", "127.0.0.1:0", "--insecure", "--hello-seconds", "0.5"
    )
    yield started
    started.kill()


def resident_bytes(process: StoreProcess) -> int:
    """Memory of the store process that is not a file's."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


@pytest.mark.parametrize("over", ["unix", "tcp"])
def test_a_stopped_reader_delays_no_trainer_and_goes_on_later(
    process: StoreProcess, recipe: Recipe, over: str
) -> None:
    """Stopped with answers on their way; it gets them all when it is continued."""
    address = f"unix:{process.socket}" if over == "unix" else process.tcp.removeprefix("tcp://")
    with reader(address) as stopped, connect(f"unix:{process.socket}") as session:
        stopped.send_signal(signal.SIGSTOP)
        pair = Pair(session, make_oracle(recipe, INITIAL))
        pair.train(20)
        assert pair.step == 20

        stopped.send_signal(signal.SIGCONT)
        assert stopped.stdin is not None
        assert stopped.stdout is not None
        stopped.stdin.write("\n")
        stopped.stdin.flush()
        assert stopped.stdout.readline() == "read\n"


def test_a_stopped_trainer_leaves_readers_and_health_alone(process: StoreProcess) -> None:
    """And its place is free once its connection is gone."""
    tokens = np.zeros((2, 8), np.int64)
    program = (
        "import sys, time, numpy as np\n"
        "from engram_store_client import connect\n"
        "session = connect(sys.argv[1])\n"
        "session.announce(np.zeros((2, 8), np.int64), 0).rows(1)\n"
        "print('training', flush=True)\n"
        "time.sleep(600)\n"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", program, f"unix:{process.socket}"], stdout=subprocess.PIPE
    )
    assert trainer.stdout is not None
    try:
        assert trainer.stdout.readline() == b"training\n"
        trainer.send_signal(signal.SIGSTOP)
        with connected(process.socket) as channel:
            assert health(channel) == 1
        with RemoteSession(f"unix:{process.socket}", "read") as session:
            for _ in range(20):
                with session.announce(tokens) as window:
                    assert len(window.rows(1)[0])
    finally:
        trainer.kill()
        trainer.communicate()
    with connect(f"unix:{process.socket}") as session:
        session.commit(0, 0.1)


@pytest.mark.parametrize("over", ["unix", "tcp"])
def test_a_stopped_trainer_delays_no_trainer_of_another_store(
    make_store: MakeStore, recipe: Recipe, tmp_path: Path, over: str
) -> None:
    """Both in one process; stopped in a step, it finishes the step when it is continued."""
    make_store("a")
    make_store("b")
    home = HomeProcess(tmp_path, "--tcp", "127.0.0.1:0", "--insecure")
    address = home.url if over == "unix" else home.tcp
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, address, "a.engram"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert trainer.stdin is not None
    assert trainer.stdout is not None
    try:
        assert trainer.stdout.readline() == "in a step\n"
        trainer.send_signal(signal.SIGSTOP)
        with connect(home.url, store="b.engram") as session:
            pair = Pair(session, make_oracle(recipe, INITIAL))
            pair.train(20)

        trainer.send_signal(signal.SIGCONT)
        trainer.stdin.write("\n")
        trainer.stdin.flush()
        assert trainer.stdout.readline() == "committed 1\n"
    finally:
        trainer.kill()
        trainer.communicate()
        home.kill()


def test_silent_connections_are_ended_and_cost_little(
    process: StoreProcess, recipe: Recipe
) -> None:
    """Fifty that say nothing, on both sockets and the slots' door, beside a trainer."""
    door = f"{process.socket}.slots"
    host, port = process.tcp.removeprefix("tcp://").split(":")
    before = resident_bytes(process)
    with ExitStack() as stack:
        silent = []
        for _ in range(25):
            silent.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
            silent[-1].connect(str(process.socket))
            silent.append(stack.enter_context(socket.create_connection((host, int(port)))))
        for _ in range(10):
            knocking = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(knocking).connect(door)
        with connect(f"unix:{process.socket}") as session:
            Pair(session, make_oracle(recipe, INITIAL)).train(5)
        assert resident_bytes(process) - before < 64 << 20
        for connection in silent:
            connection.settimeout(SECONDS)
            while connection.recv(4096):  # the server's side of HTTP/2, then the end
                pass


AS_NOBODY = """
import os, socket, sys
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
path = sys.argv[1]
kind = socket.SOCK_SEQPACKET if path.endswith(".slots") else socket.SOCK_STREAM
client = socket.socket(socket.AF_UNIX, kind)
client.settimeout(30)
try:
    client.connect(path)
except PermissionError:
    sys.exit("kept out")
try:
    client.send(b"x" * 16)
    answer = client.recv(64)
except ConnectionError:
    answer = b""
sys.exit(f"answered {answer!r}")
"""


def ask_as_nobody(path: str) -> str:
    """What another user meets at a socket."""
    ran = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, path], stderr=subprocess.PIPE, timeout=SECONDS, text=True
    )
    return ran.stderr.strip()


def test_other_users_reach_neither_socket(make_store: MakeStore) -> None:
    """The directory keeps them out; at the door the kernel says who they are."""
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    with tempfile.TemporaryDirectory() as public:
        Path(public).chmod(0o755)
        process = StoreProcess(make_store(), "--socket", f"{public}/run/s.sock")
        try:
            door = f"{process.socket}.slots"
            assert ask_as_nobody(str(process.socket)) == "kept out"
            assert ask_as_nobody(door) == "kept out"

            # Somebody opens the directory by mistake.
            process.socket.parent.chmod(0o755)
            Path(door).chmod(0o666)
            assert ask_as_nobody(door) == "answered b''"
        finally:
            _, _, log = process.end()
    assert "user 65534 is not the store's user 0" in log


def test_a_trainer_that_takes_its_time_is_not_cut_off(
    process: StoreProcess, recipe: Recipe
) -> None:
    """Silence between steps is what training looks like; only a missing hello is an offence."""
    with connect(f"unix:{process.socket}") as session:
        pair = Pair(session, make_oracle(recipe, INITIAL))
        pair.train(1)
        time.sleep(1.2)
        pair.train(1)
