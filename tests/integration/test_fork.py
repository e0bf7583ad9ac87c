"""Sessions in a process that forks, as data loaders do: the child is told, the parent unharmed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import engram_store
from engram_store.recipes import Recipe
from tests.integration.serving import StoreProcess
from tests.pairs import INITIAL, MakeStore, assert_same_tables, make_oracle

# In a process of its own: pytest's threads and a fork do not go together.
PROGRAM = """
import os, sys
import numpy as np
from engram_store.errors import ProtocolError
from engram_store_client import connect

def train(session, step):
    window = session.announce(np.arange(40).reshape(2, 20), step)
    for layer in session.tables:
        window.push(layer, np.ones(window.rows(layer)[0].shape, np.float32))
    session.commit(step, 0.1)

def in_child():
    calls = (
        lambda: session.announce(np.zeros((1, 4), np.int64), session.step),
        lambda: session.commit(session.step, 0.1),
        lambda: session.snapshot(),
        lambda: window.rows(1),
        lambda: session.stats(),
    )
    for call in calls:
        try:
            call()
        except ProtocolError as error:
            assert "fork" in str(error), error
        else:
            return 1
    window.close()
    session.close()
    return 0

session = connect(sys.argv[1])
train(session, 0)
window = session.announce(np.zeros((1, 4), np.int64))
window.rows(1)
child = os.fork()
if not child:
    code = 2
    try:
        code = in_child()
    finally:
        os._exit(code)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
window.close()
train(session, 1)

# A child that lives on, as a worker does, must keep nobody from opening the store again.
reading, writing = os.pipe()
if not (worker := os.fork()):
    os.close(writing)
    os.read(reading, 1)
    os._exit(0)
session.close()
connect(sys.argv[1]).close()
os.close(writing)
os.waitpid(worker, 0)
"""


def run(address: str) -> None:
    program = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", PROGRAM, address]
    subprocess.run(program, check=True, timeout=120)


def expect_two_steps(path: Path, recipe: Recipe) -> None:
    """What the parent trained, and nothing else."""
    oracle = make_oracle(recipe, INITIAL)
    for step in range(2):
        window = oracle.announce(np.arange(40).reshape(2, 20), step)
        for layer in oracle.tables:
            window.push(layer, np.ones(window.rows(layer)[0].shape, np.float32))
        oracle.commit(step, 0.1)
    with engram_store.open(path, "train") as store:
        assert store.step == 2
        assert_same_tables(store, oracle)


def test_a_fork_of_a_process_with_an_embedded_store(make_store: MakeStore, recipe: Recipe) -> None:
    path = make_store()
    run(str(path))
    expect_two_steps(path, recipe)


@pytest.mark.parametrize("over", ["unix", "tcp"])
def test_a_fork_of_a_trainer(make_store: MakeStore, recipe: Recipe, over: str) -> None:
    """With gRPC's threads and shared memory in the parent."""
    path = make_store()
    process = StoreProcess(path, "--tcp", "127.0.0.1:0", "--insecure")
    try:
        run(f"unix:{process.socket}" if over == "unix" else process.tcp)
    finally:
        code, _, log = process.end()
    assert code == 0, log
    expect_two_steps(path, recipe)
