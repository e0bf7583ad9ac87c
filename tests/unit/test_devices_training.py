"""Training over streams that finish late: tables and gates are those of plain copies, bit by bit.

The CPU plays the GPU; every copy is made as late as the protocol allows it.
"""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import engram_store
from engram_store.errors import ProtocolError
from engram_store.recipes import Recipe, engram
from engram_store.session import Session
from engram_store_client import Memory, attach
from engram_store_client.transport import connect
from tests.devices import FakeCard, pretend_card
from tests.servers import serving
from tests.unit.client.tiny import VOCABULARY, llama, loss_of, loss_of_batch, make_tokens, scramble

LAYERS, DIM, STEPS = (0, 2), 4, 3
Result = tuple[dict[int, bytes], dict[str, bytes]]
"""Tables by layer, and the gates' parameters."""
Run = Callable[[nn.Module, Memory], None]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """Two small tables."""
    return engram(
        token_map=np.arange(VOCABULARY), layers=LAYERS, rows_per_head=31, heads=2, pad_id=0
    )


@pytest.fixture
def store(tmp_path: Path, recipe: Recipe) -> Callable[..., Path]:
    """Makes stores of the same random rows."""

    def make(name: str, **settings: Any) -> Path:
        path = tmp_path / f"{name}.engram"
        initial = engram_store.Normal(std=0.5)
        engram_store.create(path, recipe, dim=DIM, initial=initial, **settings)
        return path

    return make


def read_tables(session: Session) -> dict[int, bytes]:
    """Every row that any of these tokens look up."""
    tables = {}
    tokens = np.concatenate([make_tokens(seed=s).numpy() for s in range(12)])
    with session.announce(tokens) as window:
        for layer in session.tables:
            tables[layer] = window.rows(layer)[0].tobytes()
    return tables


def train(session: Session, run: Run, **options: Any) -> Result:
    """What a llama and the tables are after `run`."""
    model = llama()
    memory = attach(model, session, **options)
    scramble(memory)
    optimizer = torch.optim.SGD(memory.gates.parameters(), lr=0.1)
    model.train()
    run(model, memory)
    memory.finish_commit()
    optimizer.step()
    gates = {name: p.detach().numpy().tobytes() for name, p in memory.gates.named_parameters()}
    memory.detach()
    return read_tables(session), gates


def simple(model: nn.Module, memory: Memory) -> None:
    for step in range(STEPS):
        loss_of(model, make_tokens(seed=step)).backward()
        memory.commit(step, lr=0.1)


def accumulating(model: nn.Module, memory: Memory) -> None:
    """Three micro-batches, two of whose backward passes are outstanding at once."""
    for step in range(STEPS):
        losses = [loss_of(model, make_tokens(seed=3 * step + part)) for part in range(2)]
        for loss in reversed(losses):
            loss.backward()
        loss_of(model, make_tokens(seed=3 * step + 2)).backward()
        memory.clip_grad_norm_(memory.gates.parameters(), 0.5)
        memory.commit(step, lr=0.1)


def twice_over_one_window(model: nn.Module, memory: Memory) -> None:
    """Two forward and backward passes of the same batch add up in one leaf."""
    batches = ({"input_ids": make_tokens(seed=s)} for s in range(STEPS))
    for step, batch in enumerate(memory.look_ahead(batches)):
        for _ in range(2):
            loss_of_batch(model, dict(batch)).backward()
        memory.commit(step, lr=0.1)


def checkpointing(model: Any, memory: Memory) -> None:
    model.activation_checkpointing_enable()
    accumulating_in_turn(model, memory)


def accumulating_in_turn(model: nn.Module, memory: Memory) -> None:
    for step in range(STEPS):
        for part in range(2):
            loss_of(model, make_tokens(seed=2 * step + part)).backward()
        memory.commit(step, lr=0.1)


def evaluating(model: nn.Module, memory: Memory) -> None:
    """Before everything, and between the micro-batches of a step."""
    model.eval()
    with torch.inference_mode():
        loss_of(model, make_tokens(batch=5))
    model.train()
    for step in range(STEPS):
        loss_of(model, make_tokens(seed=step)).backward()
        model.eval()
        with torch.inference_mode():
            for seed in range(3):
                loss_of(model, make_tokens(batch=1 + seed, seed=seed))
        model.train()
        loss_of(model, make_tokens(seed=7 + step)).backward()
        memory.commit(step, lr=0.1)


def in_the_background(model: nn.Module, memory: Memory) -> None:
    batches = ({"input_ids": make_tokens(seed=s)} for s in range(2 * STEPS))
    for step, batch in enumerate(memory.look_ahead(batches)):
        loss_of_batch(model, batch).backward()
        memory.commit(step, lr=0.1, wait=False)


def skipping(model: nn.Module, memory: Memory) -> None:
    """A step whose gradient is thrown away while it is being copied."""
    loss_of(model, make_tokens(seed=0)).backward()
    memory.skip(0)
    loss_of(model, make_tokens(seed=1)).backward()
    memory.commit(1, lr=0.1)


RUNS = (
    simple, accumulating, twice_over_one_window, checkpointing, evaluating, in_the_background,
    skipping,
)  # fmt: skip


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], FakeCard]]:
    """Takes the CPU for a GPU from then on."""
    cards: list[FakeCard] = []

    def pretend() -> FakeCard:
        cards.append(pretend_card(monkeypatch))
        return cards[-1]

    yield pretend
    for made in cards:
        made.streams.let_finish()
        assert made.registrar.wrong == []


@pytest.mark.parametrize("run", RUNS)
def test_training_gives_the_same_bits(
    store: Callable[..., Path], card: Callable[[], FakeCard], run: Run
) -> None:
    with connect(store("plain")) as session:
        plain = train(session, run)
    pretended = card()

    with connect(store("late")) as session:
        late = train(session, run)

    assert late == plain
    assert pretended.streams.uploads >= STEPS - 1
    assert pretended.streams.downloads > 0
    assert pretended.streams.own_rooms == 0 or run is in_the_background


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("gates", [torch.float32, torch.bfloat16])
def test_other_formats_give_the_same_bits(
    store: Callable[..., Path], card: Callable[[], FakeCard], dtype: str, gates: torch.dtype
) -> None:
    """Rows are widened on the device; bfloat16 gradients cross as they are."""

    def run(model: nn.Module, memory: Memory) -> None:
        accumulating_in_turn(model, memory)

    def both(name: str) -> Result:
        with connect(store(name, dtype=dtype)) as session:
            model = llama()
            memory = attach(model, session, dtype=gates)
            model.train()
            run(model, memory)
            memory.detach()
            return read_tables(session), {}

    plain = both("plain")
    card()
    assert both("late") == plain


def test_the_control_arm_changes_no_row(
    store: Callable[..., Path], card: Callable[[], FakeCard]
) -> None:
    """Its gates learn the same; its windows are only read, and released when they may be."""

    def run(model: nn.Module, memory: Memory) -> None:
        simple(model, memory)
        assert memory.guards().gradients_pushed == 0

    with connect(store("plain")) as session:
        plain = train(session, run, zero_table=True)
    pretended = card()
    with connect(store("late")) as session:
        assert train(session, run, zero_table=True) == plain
        assert session.step == 0
    assert pretended.streams.downloads == 0


def test_a_store_process_pins_what_it_shares(
    store: Callable[..., Path], card: Callable[[], FakeCard], tmp_path: Path
) -> None:
    """Rows that it sends are mapped read-only here; a trainer that leaves lets all of it go."""
    with connect(store("plain")) as session:
        plain = train(session, accumulating_in_turn)
    pretended = card()
    path = store("late")
    with (
        engram_store.open(path, "train") as behind,
        serving(behind, f"unix:{tmp_path}/socket") as address,
    ):
        with connect(address) as session:
            assert train(session, accumulating_in_turn) == plain
            kinds = {read_only for _, read_only in pretended.registrar.held.values()}
            assert kinds == {False, True}
            assert pretended.streams.own_rooms == 0

            # It stops with rows on their way from slots that it holds.
            model = llama()
            memory = attach(model, session)
            expected = [loss_of(model.train(), make_tokens(seed=s)).item() for s in range(2)]
            rows = memory._windows._training[0]
            upload = rows._uploads[LAYERS[0]][1]
        with connect(address) as session:
            assert train(session, lambda *_: None)[0] == plain[0]
        assert all(np.isfinite(expected))
        upload.event.wait()
        there = upload.buffer.rows[: upload.n]
        bits = there.view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(bits, upload.source[0])
        del model, memory, rows, upload, there, bits, session
        pretended.streams.let_finish()
        for _ in range(2):  # cycles through tensors are seen once the tensors are gone
            gc.collect()
        assert pretended.registrar.held == {}


def test_what_crossed_is_counted(store: Callable[..., Path], card: Callable[[], FakeCard]) -> None:
    """On a CPU nothing; on a card, how much was pinned and what was waited for."""
    model = llama()
    with connect(store("plain")) as session:
        memory = attach(model, session)
        simple(model.train(), memory)
        transfers = memory.transfers()
        assert (transfers.copies, transfers.pinned_bytes, transfers.device_bytes) == (0, 0, 0)
        memory.detach()
        card()
        memory = attach(model, session)
        loss_of(model, make_tokens()).backward()
        memory.commit(STEPS, lr=0.1)
        transfers = memory.transfers()
    assert transfers.copies == 2 * len(LAYERS)
    assert transfers.waits >= len(LAYERS)
    assert transfers.device_bytes > 0


def test_a_forked_child_is_told(
    store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it calls; leaving it is fine, and nothing of the parent's is touched."""
    model = llama()
    with connect(store("plain")) as session:
        memory = attach(model, session)
        loss = loss_of(model.train(), make_tokens())
        with monkeypatch.context() as child:
            child.setattr("os.getpid", lambda: -1)
            calls: tuple[Callable[[], object], ...] = (
                lambda: loss_of(model, make_tokens()),
                lambda: memory.commit(0, lr=0.1),
                lambda: memory.clip_grad_norm_(memory.gates.parameters(), 1.0),
                lambda: memory.finish_commit(),
                lambda: list(memory.look_ahead([{"input_ids": make_tokens()}])),
            )
            for call in calls:
                with pytest.raises(ProtocolError, match="does not survive a fork"):
                    call()
            memory._windows.close_all()
        loss.backward()
        memory.commit(0, lr=0.1)
        assert session.step == 1
