"""A memory on real (tiny, random) Hugging Face models: attaching, gradients, detaching."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention
from torch.utils.checkpoint import checkpoint

import engram_store
from engram_store.errors import (
    ConfigError,
    ProtocolError,
    UnknownLayerError,
)
from engram_store.session import Session
from engram_store.testing import MemorySession
from engram_store.types import OptimizerKind, RowDtype
from engram_store_client import GateKind, Memory, attach, connect
from tests.unit.client.tiny import (
    LAYERS,
    assert_same,
    contents,
    llama,
    loss_of,
    loss_of_batch,
    make_session,
    make_tokens,
    one_batch,
    qwen3,
    same_tables,
    scramble,
    trained,
)


@pytest.fixture
def session() -> MemorySession:
    return make_session()


@pytest.fixture(params=[llama, qwen3], ids=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    make: Callable[[], nn.Module] = request.param
    return make()


@pytest.mark.parametrize("kind", GateKind)
def test_a_fresh_memory_changes_no_bit_of_the_logits(
    model: nn.Module, session: MemorySession, kind: GateKind
) -> None:
    """With `identity_init`, for every gate."""
    tokens = make_tokens()
    model.eval()
    before = model(tokens).logits

    attach(model, session, gate=kind, identity_init=True)

    assert torch.equal(model(tokens).logits, before)


def test_detach_restores_the_model_exactly(model: nn.Module, session: MemorySession) -> None:
    """Logits, parameters, flags, hooks and submodules are as before."""
    model.eval()
    frozen = next(model.parameters()).requires_grad_(False)
    tokens, names = make_tokens(), set(model.state_dict())
    before = model(tokens).logits
    memory = attach(model, session)
    scramble(memory)
    assert not torch.equal(model(tokens).logits, before)
    assert set(model.state_dict()) > names

    memory.detach()
    memory.detach()

    assert torch.equal(model(tokens).logits, before)
    assert set(model.state_dict()) == names
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    with pytest.raises(ProtocolError, match="attach again"):
        memory.save_pretrained("unused")


def test_only_the_gates_train_unless_the_base_is_asked_for(session: MemorySession) -> None:
    """Freezing is the default and can be taken back."""
    model = llama()
    memory = attach(model, session)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"engram_memory.default.{n}" for n, _ in memory.gates.named_parameters()}

    memory.set_mode("full")

    assert all(p.requires_grad for p in model.parameters())


def test_what_cannot_be_attached_is_refused_and_leaves_the_model_alone() -> None:
    """Layers the model or the store lacks, unknown gates and options, a second memory."""
    model, session = llama(), make_session()
    names = set(model.state_dict())
    with pytest.raises(UnknownLayerError, match="layer 1"):
        attach(model, session, layers=[1])
    with pytest.raises(ConfigError, match="unknown gate 'other'"):
        attach(model, session, gate="other")
    with pytest.raises(ConfigError, match="options"):
        attach(model, session, colour="red")
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    del layers[2]
    with pytest.raises(ConfigError, match="no layer 2"):
        attach(model, session)
    assert set(model.state_dict()) < names

    model = llama()
    attach(model, session)
    with pytest.raises(ConfigError, match="detach"):
        attach(model, session)


class Wrapper(nn.Module):
    """Stands for what adapters and distributed training put around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, **kwargs: Any) -> Any:
        assert "engram_window" not in kwargs
        return self.inner(**kwargs)


@pytest.mark.parametrize("attach_to_wrapper", [True, False])
def test_a_wrapped_model_can_be_called_with_and_without_its_wrapper(
    *, attach_to_wrapper: bool
) -> None:
    """Tickets are found on either way in, whichever of the two was attached."""
    model, session = llama(), make_session()
    wrapper = Wrapper(model)
    memory = attach(wrapper if attach_to_wrapper else model, session)
    scramble(memory)
    batches = [{"input_ids": make_tokens(seed=seed)} for seed in range(2)]
    calls = [wrapper, model] if attach_to_wrapper else [model, model.get_submodule("model")]

    for step, (call, batch) in enumerate(zip(calls, memory.look_ahead(batches), strict=True)):
        call(**batch)[0].sum().backward()
        memory.commit(step, lr=0.1)

    assert session.step == session._announced == 2


class Reference(nn.Module):
    """The same model with its tables as plain embeddings, hooked in by hand."""

    def __init__(self, model: Any, memory: Memory, session: MemorySession) -> None:
        super().__init__()
        self.model, self.session = model, session
        self.gates = copy.deepcopy(memory.gates)
        self.tables = {
            n: torch.from_numpy(table.rows.copy()).requires_grad_()
            for n, table in session.contents.items()
        }
        self.ids: dict[int, Tensor] = {}
        for number in LAYERS:
            layer = model.get_submodule(f"model.layers.{number}")
            layer.register_forward_pre_hook(lambda _, args, n=number: (self._add(n, args[0]),))

    def _add(self, number: int, hidden: Tensor) -> Tensor:
        rows = F.embedding(self.ids[number], self.tables[number]).flatten(-2)
        added: Tensor = hidden + self.gates[str(number)](rows, hidden)
        return added

    def forward(self, tokens: Tensor) -> Any:
        self.ids = {
            n: torch.from_numpy(self.session.recipe.rows(n, tokens.numpy())) for n in LAYERS
        }
        return self.model(input_ids=tokens, labels=tokens)


def test_loss_and_row_gradients_equal_those_of_plain_embeddings(model: nn.Module) -> None:
    """One step of sgd with rate 1 turns gradients into row differences."""
    session, tokens = make_session(), make_tokens()
    plain = copy.deepcopy(model)
    memory = attach(model, session)
    scramble(memory)
    reference = Reference(plain, memory, session)
    expected = reference(tokens)
    expected.loss.backward()
    before = contents(session)

    loss = loss_of(model, tokens)
    loss.backward()
    applied = memory.commit(0, lr=1.0)

    torch.testing.assert_close(loss, expected.loss)
    for number in LAYERS:
        grad = reference.tables[number].grad
        assert grad is not None
        gradient = grad.numpy()
        moved = before[number] - session.contents[number].rows
        assert np.abs(gradient).max() > 1e-4
        np.testing.assert_allclose(moved, gradient, atol=1e-6)
        assert applied.rows[number] == len(np.unique(session.recipe.rows(number, tokens.numpy())))
    mine = dict(memory.gates.named_parameters())
    for name, parameter in reference.gates.named_parameters():
        torch.testing.assert_close(mine[name].grad, parameter.grad)


def two_losses_at_once(model: nn.Module, memory: Memory) -> None:
    """Two micro-batches whose backward passes both wait for the second forward pass."""
    first, second = ({"input_ids": make_tokens(seed=s)} for s in (3, 4))
    batches = memory.look_ahead([first, second], accumulate=2)
    sum(loss_of_batch(model, batch) for batch in batches).backward()


def two_losses_in_order(model: nn.Module, memory: Memory) -> None:
    """The older micro-batch goes first while the younger one still waits."""
    batches = memory.look_ahead([{"input_ids": make_tokens(seed=s)} for s in (3, 4)], accumulate=2)
    for loss in [loss_of_batch(model, batch) for batch in batches]:
        loss.backward()


def hugging_face_checkpointing(model: nn.Module, *, reentrant: bool) -> None:
    model.activation_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]


class CheckpointedCall(nn.Module):
    """Checkpoints a layer's whole call, hooks included, as older transformers did."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.self_attn = layer.self_attn

    def forward(self, hidden: Tensor, **kwargs: Any) -> Any:
        kwargs |= {"past_key_values": None, "use_cache": False}
        return checkpoint(self.layer, hidden, **kwargs, use_reentrant=False)


def checkpoint_hooks_too(model: nn.Module) -> None:
    """The inner layers get the hooks, so that they run again in the backward pass."""
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    for index, layer in enumerate(layers):
        outer = CheckpointedCall(layer)
        outer.register_forward_pre_hook = layer.register_forward_pre_hook  # type: ignore[method-assign]
        layers[index] = outer


@pytest.mark.parametrize("run", [one_batch, two_losses_at_once, two_losses_in_order])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: hugging_face_checkpointing(model, reentrant=False),
        lambda model: hugging_face_checkpointing(model, reentrant=True),
        checkpoint_hooks_too,
    ],
    ids=["plain", "reentrant", "hooks"],
)
def test_gradient_checkpointing_changes_no_gradient(
    run: Callable[[nn.Module, Memory], None], change: Callable[[nn.Module], None]
) -> None:
    """Layers that run twice use the rows of their own window, and it is pushed once."""
    assert_same(trained(run, change=change), trained(run))


def test_accumulation_equals_one_concatenated_batch() -> None:
    """Two windows of a step are one window of both, their mean being the mean of all."""
    halves = [make_tokens(seed=3), make_tokens(seed=4)]

    def accumulated(model: nn.Module, memory: Memory) -> None:
        for batch in memory.look_ahead([{"input_ids": half} for half in halves], accumulate=2):
            (loss_of_batch(model, batch) / 2).backward()

    def whole(model: nn.Module, _memory: Memory) -> None:
        loss_of(model, torch.cat(halves)).backward()

    assert_same(trained(accumulated), trained(whole))


def test_training_on_a_store_equals_training_in_memory(tmp_path: Path) -> None:
    """Losses and rows bit for bit, also after going back to a checkpoint of another process."""
    oracle = make_session(RowDtype.BFLOAT16, OptimizerKind.ROWWISE_ADAGRAD)
    oracle = MemorySession(oracle.recipe, oracle.tables)
    engram_store.create(tmp_path / "my.engram", oracle.recipe, dim=4)
    batches = [{"input_ids": make_tokens(seed=seed)} for seed in range(6)]

    def train(session: Session, *, resume: bool = False) -> list[float]:
        model = llama()
        memory = attach(model, session)
        scramble(memory)
        if resume:
            memory.load(tmp_path)
        losses = []
        for step, batch in enumerate(memory.look_ahead(batches[memory.step :]), memory.step):
            if step == 3 and session is not oracle and not resume:
                memory.save_pretrained(tmp_path)
            loss = loss_of_batch(model, batch)
            loss.backward()
            memory.clip_grad_norm_(model.parameters(), 0.5)
            memory.commit(step, lr=0.1)
            losses.append(loss.item())
        memory.detach()
        return losses

    expected = train(oracle)
    with connect(tmp_path / "my.engram") as store:
        assert train(store) == expected
    with connect(f"file:{tmp_path / 'my.engram'}") as store:
        assert train(store, resume=True) == expected[3:]
        for number in LAYERS:
            with store.announce(make_tokens().numpy()) as window:
                ids, rows = window.row_ids(number), window.rows(number)[0]
                np.testing.assert_array_equal(rows, oracle.contents[number].rows[ids])


@pytest.mark.parametrize("dtype", [RowDtype.BFLOAT16, RowDtype.FLOAT16])
def test_half_precision_tables_and_models_learn(dtype: RowDtype) -> None:
    """Rows become the model's dtype; bfloat16 gradients travel as bits."""
    model, session = llama().bfloat16(), make_session(dtype)
    memory, before = attach(model, session), contents(session)
    scramble(memory)

    loss_of(model, make_tokens()).backward()
    memory.commit(0, lr=1.0)

    assert not same_tables(session, before)
    assert {g.dtype for g in memory.gates.parameters()} == {torch.bfloat16}


def test_fewer_layers_than_tables_train_those_and_leave_the_others(
    model: nn.Module, session: MemorySession
) -> None:
    """`layers=` picks tables; a commit asks for no gradient of the others and changes none."""
    trained_layer, other = LAYERS[0], LAYERS[1]
    before = contents(session)
    memory = attach(model, session, layers=[trained_layer])
    model.train()

    loss_of(model, make_tokens()).backward()
    applied = memory.commit(0, lr=0.5)

    assert applied.rows[trained_layer] > 0
    assert applied.rows[other] == 0
    np.testing.assert_array_equal(session.contents[other].rows, before[other])
    assert (session.contents[trained_layer].rows != before[trained_layer]).any()
