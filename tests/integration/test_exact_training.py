"""Tables on disk train exactly as tables in memory do, whatever the store does meanwhile."""

import contextlib
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import engram_store
from engram_store.engine.extents import BLOCK_SLOTS
from engram_store.engine.memtable import slot_bytes
from engram_store.recipes import Recipe, engram
from engram_store.session import Session
from engram_store.store import Store
from engram_store.testing import MemorySession
from engram_store_client import attach, connect
from tests.servers import serving
from tests.unit.client.tiny import VOCABULARY, llama, loss_of_batch

STEPS, WINDOWS, DIM = 14, 2, 8
INITIAL = engram_store.Normal(std=0.05, seed=3)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """Two layers of about 8,000 rows: a step touches some 1,300 of each."""
    return engram(
        token_map=np.arange(VOCABULARY), layers=(0, 2), rows_per_head=997, heads=4, pad_id=0
    )


@pytest.fixture(scope="module", params=["rowwise_adagrad", "adam"])
def optimizer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def batches() -> list[dict[str, Tensor]]:
    """Random text; every third batch is seen again."""
    draw = torch.Generator().manual_seed(1)
    drawn = [
        {"input_ids": torch.randint(0, VOCABULARY, (4, 48), generator=draw)}
        for _ in range(STEPS * WINDOWS)
    ]
    return [drawn[i - i % 3] for i in range(len(drawn))]


def train(
    session: Session, depth: int, *, wait: bool = True
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and the gates afterwards, of a run with accumulation and clipping."""
    torch.manual_seed(5)
    model = llama()
    memory = attach(model, session, bias=True)
    optimizer = torch.optim.AdamW(memory.gates.parameters(), lr=1e-2)
    losses = []
    loader = memory.look_ahead(batches(), depth, accumulate=WINDOWS)
    for number, batch in enumerate(loader):
        loss = loss_of_batch(model, batch) / WINDOWS
        loss.backward()
        losses.append(loss.item())
        if (number + 1) % WINDOWS:
            continue
        memory.clip_grad_norm_(memory.gates.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        memory.commit(memory.step, lr=0.05, wait=wait)
    memory.finish_commit()
    gates = {name: tensor.clone() for name, tensor in memory.gates.state_dict().items()}
    memory.detach()
    return losses, gates


Expected = tuple[MemorySession, list[float], dict[str, Tensor]]


@pytest.fixture(scope="module")
def expected(recipe: Recipe, optimizer: str, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """The run over tables in memory."""
    path = tmp_path_factory.mktemp("initial") / "a.engram"
    engram_store.create(path, recipe, dim=DIM, optimizer=optimizer, initial=INITIAL)
    with engram_store.open(path) as store:
        rows = {
            n: store.read_rows(n, np.arange(s.rows, dtype=np.int32))
            for n, s in store.tables.items()
        }
        oracle = MemorySession(recipe, store.tables, rows)
    return oracle, *train(oracle, depth=0)


def assert_same_tables(store: Store, oracle: MemorySession) -> None:
    for layer, spec in store.tables.items():
        rows, state = store._engine.tables[layer].read_range(0, spec.rows)
        assert rows.tobytes() == oracle.contents[layer].rows.tobytes()
        assert state.tobytes() == oracle.contents[layer].state.tobytes()


@pytest.mark.parametrize("depth", [0, 4])
@pytest.mark.parametrize("blocks", [1, 16])
def test_losses_gates_rows_and_state_equal_those_of_tables_in_memory(
    tmp_path: Path, recipe: Recipe, optimizer: str, expected: Expected, depth: int, blocks: int
) -> None:
    """Bit for bit, for two depths of look-ahead and two sizes of the overlay."""
    oracle, losses, gates = expected
    path = tmp_path / "a.engram"
    engram_store.create(path, recipe, dim=DIM, optimizer=optimizer, initial=INITIAL)
    specs = list(engram_store.inspect(path).metadata.tables.values())
    overlay_bytes = 2 * blocks * BLOCK_SLOTS * slot_bytes(specs)
    with engram_store.open(path, "train", overlay_bytes=overlay_bytes) as store:
        actual, actual_gates = train(store, depth)

        assert actual == losses
        assert all(torch.equal(tensor, gates[name]) for name, tensor in actual_gates.items())
        assert_same_tables(store, oracle)
        stats = store.stats()
        assert (stats.seals > 0) == (blocks == 1)
    with engram_store.open(path, "train") as store:
        assert_same_tables(store, oracle)


def test_a_store_behind_a_socket_trains_the_same(
    tmp_path: Path, recipe: Recipe, optimizer: str, expected: Expected
) -> None:
    """Losses, gates, rows and state, bit for bit, with look-ahead."""
    oracle, losses, gates = expected
    path = tmp_path / "a.engram"
    engram_store.create(path, recipe, dim=DIM, optimizer=optimizer, initial=INITIAL)
    with engram_store.open(path, "train") as store:
        with serving(store, "tcp:") as address, connect(address) as session:
            actual, actual_gates = train(session, depth=2)

        assert actual == losses
        assert all(torch.equal(tensor, gates[name]) for name, tensor in actual_gates.items())
        assert_same_tables(store, oracle)


@pytest.mark.parametrize(
    ("where", "depth"),
    [("here", 0), ("here", 1), ("here", 4), ("unix:", 0), ("unix:", 1), ("unix:", 4), ("tcp:", 4)],
)
def test_commits_in_the_background_train_the_same(
    tmp_path: Path, recipe: Recipe, optimizer: str, expected: Expected, where: str, depth: int
) -> None:
    """Bit for bit, while rows of the next window are handed out before a commit is done."""
    oracle, losses, gates = expected
    path = tmp_path / "a.engram"
    engram_store.create(path, recipe, dim=DIM, optimizer=optimizer, initial=INITIAL)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(engram_store.open(path, "train"))
        if where == "here":
            actual, actual_gates = train(store, depth, wait=False)
        else:
            short = stack.enter_context(tempfile.TemporaryDirectory())
            address = where if where == "tcp:" else f"unix:{short}/store.sock"
            with serving(store, address) as served, connect(served) as session:
                actual, actual_gates = train(session, depth, wait=False)

        assert actual == losses
        assert all(torch.equal(tensor, gates[name]) for name, tensor in actual_gates.items())
        assert_same_tables(store, oracle)
